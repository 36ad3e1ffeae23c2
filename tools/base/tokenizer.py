"""CLIP's byte-pair vocabulary, whole or in part, in the files of Stable Diffusion's tokenizers."""

import gzip
import importlib.util
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

# What Stable Diffusion's users start their new word from (`--initializer_token`): entries without an end-of-word mark,
# which no text is ever tokenised into.
RARE_ENTRIES = ("ktn", "pll", "ucd")
# Entries before the merges: 256 bytes, within words and at their ends.
LETTERS = 512
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_merges() -> list[str]:
    """CLIP's 48,894 merges ("a b"), the most frequent first, from the open_clip_torch package (MIT)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SystemExit("error: CLIP's vocabulary comes with open_clip_torch: make setup, or pip install it --no-deps")
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1:48895]


def merges_for(words: Iterable[str], merges: list[str], most_frequent: int) -> list[str]:
    """The `most_frequent` first of `merges`, and those by which each of `words` becomes one token.

    A merge that the whole list would apply first is also the first of the part: the words are split as by the whole.
    """
    rank = {merge: number for number, merge in enumerate(merges)}
    kept = set(merges[:most_frequent])
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = [f"{left} {right}" for left, right in itertools.pairwise(parts)]
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            kept.add(best)
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [merge for merge in merges if merge in kept]


def write_tokenizer(
    folder: Path, merges: list[str], extra: Iterable[str] = (), max_length: int = 77, pad_token: str = END
) -> int:
    """Write vocab.json, merges.txt and the two configurations into `folder`; gives the size of the vocabulary.

    `extra` entries that no merge makes are kept before the two special tokens. `max_length` is in tokens.
    """
    letters = list(_byte_characters())
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += [entry for entry in extra if entry not in words]
    words += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(words)


def _byte_characters() -> str:
    """The 256 characters that stand for bytes in CLIP's vocabulary, in its order (Radford et al., GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return "".join(map(chr, [*printable, *range(256, 512 - len(printable))]))
