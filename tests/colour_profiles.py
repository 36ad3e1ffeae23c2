"""ICC profiles for tests: the few tags of version 2 that matter, written out."""

from __future__ import annotations

import struct
from collections.abc import Sequence

D50 = (0.9642, 1.0, 0.8249)
# Red, green and blue in XYZ, adapted to D50.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def rgb_profile(primaries: Sequence[Sequence[float]], curve: bytes) -> bytes:
    """Such as Display P3."""
    columns = {f"{name}XYZ".encode(): _xyz(value) for name, value in zip("rgb", primaries, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", columns | {f"{name}TRC".encode(): curve for name in "rgb"})


def grey_profile(gamma: float) -> bytes:
    """As scanners write them."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile() -> bytes:
    """A press whose inks are weaker than Pillow believes: a table with what each combination of inks looks like."""
    colours = b""
    for inks in range(16):
        cyan, magenta, yellow, black = (inks >> bit & 1 for bit in (3, 2, 1, 0))
        red, green, blue = ((1 - 0.8 * ink) * (1 - 0.9 * black) for ink in (cyan, magenta, yellow))
        lightness = 100 * (max(red, green, blue) / 2 + min(red, green, blue) / 2)
        colours += bytes(
            [int(lightness * 2.55), int(50 * (red - green)) + 128, int(50 * (min(red, green) - blue)) + 128]
        )
    matrix = b"".join(map(_fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + bytes(range(256)) * 4 + colours + bytes(range(256)) * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def gamma_curve(gamma: float) -> bytes:
    """A power."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def srgb_curve() -> bytes:
    """A power with a straight beginning."""
    return (
        b"para"
        + bytes(4)
        + struct.pack(">HH", 3, 0)
        + b"".join(map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055)))
        + b"".join(map(_fixed, (1 / 12.92, 0.04045)))
    )


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(value: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, value))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"t\0" + bytes(78), b"wtpt": _xyz(D50), **tags}
    start, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", start + len(data), 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(_fixed, D50)) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data
