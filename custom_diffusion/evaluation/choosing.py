"""Which checkpoint is best, by a rule that is stated beside its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEXT, IMAGE, KID, SPREAD = "text alignment", "image alignment", "KID x 1000", "KID spread"


def choose(rows: Sequence[Mapping[str, Any]], margin: float) -> dict[str, Any]:
    """The checkpoint with the highest image alignment among those that have not paid too much for it.

    Image alignment alone would choose the one that repeats the photographs. So the text alignment has to be within
    ``margin`` of the highest, and the KID within one spread of the lowest. Where no checkpoint keeps both, the KID is
    left out of account, and the answer says so.

    Args:
        rows: of the checkpoints, oldest first, with ``checkpoint``, :data:`IMAGE`, and where they were measured
            :data:`TEXT`, :data:`KID` and :data:`SPREAD`.
        margin: part of the highest text alignment, from 0 to 1.

    Returns:
        ``best``, the name of the checkpoint; ``rule``; and ``sentence``, which says both and why.
    """
    kept = list(rows)
    limits, note = [], ""
    if TEXT in rows[0]:
        least = (1 - margin) * max(row[TEXT] for row in rows)
        kept = [row for row in kept if row[TEXT] >= least]
        limits.append(f"a text alignment of at least {least:.4f}, within {margin:.0%} of the highest")
    if KID in rows[0]:
        lowest = min(rows, key=lambda row: row[KID])
        most = lowest[KID] + lowest[SPREAD]
        also = [row for row in kept if row[KID] <= most]
        if also:
            kept = also
            limits.append(f"a KID of at most {most:.2f}, within one spread of the lowest")
        else:
            note = f" None of them has a KID of at most {most:.2f}: what was known has suffered."
    best = max(kept, key=lambda row: row[IMAGE])
    rule = "the highest image alignment" + (f" among those with {' and '.join(limits)}" if limits else "")
    if TEXT not in rows[0]:
        note += " Without text alignment, this rule cannot see that a concept is learned by heart."
    sentence = f"{best['checkpoint']} is best: {rule}; its own is {best[IMAGE]:.4f}.{note}"
    return {"best": best["checkpoint"], "rule": rule, "sentence": sentence}
