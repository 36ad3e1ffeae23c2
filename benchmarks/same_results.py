"""Check that this working tree gives, bit for bit, what another commit gives on a CPU.

    python -m benchmarks.same_results main

Both trees run the same commands on the same inputs: a tiny model with random weights, drawn images, fixed seeds, one
thread. The files that each case leaves are compared: every tensor by name, type, shape and bytes; images by their
pixels and the text in them; everything else line by line. Two things are left out: the sentences of model cards (their
metadata and tables count), and the states of random generators in checkpoints, which no result depends on.

The other commit may arrange its modules in another way. It needs the same scripts and the same flags.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SEED = 0  # of the models and the images
COMMAND_SECONDS = 600  # after which a command counts as failed


# --- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Commands whose files are compared.

    Attributes:
        name: also the folder under ``{results}`` that the commands write into.
        commands: each a script with its arguments. ``{inputs}`` stands for the folder of :func:`write_inputs`, and
            ``{results}`` for the folder of all results of the same tree.
        needs: names of the cases whose results the commands read.
        bf16: whether the CPU needs instructions for bf16.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    bf16: bool = False


def train(output: str, **more: object) -> tuple[str, ...]:
    """A short training at 64 px; ``more`` adds or replaces flags, True gives a switch, None drops one."""
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": "{inputs}/tiny",
        "instance_data_dir": "{inputs}/cat",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "output_dir": f"{{results}}/{output}",
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 3,
        "learning_rate": 1e-2,  # every weight moves visibly in a few steps
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "seed": 42,
    }
    given = [(name, value) for name, value in (flags | more).items() if value is not None]
    return (
        "train_custom_diffusion.py",
        *(f"--{name}" if value is True else f"--{name}={value}" for name, value in given),
    )


REAL_CATS: dict[str, object] = {
    "with_prior_preservation": True,
    "real_prior": True,
    "class_data_dir": "{inputs}/real-cats",
    "class_prompt": "cat",
    "num_class_images": 4,
}

CASES = (
    Case("one-concept", (train("one-concept", hflip=True, train_batch_size=2, dataloader_num_workers=None),)),
    Case(
        "two-concepts",
        (
            train(
                "two-concepts",
                instance_data_dir=None,
                instance_prompt=None,
                concepts_list="{inputs}/concepts.json",
                modifier_token="<new1>+<new2>",
                cutmix_probability=0.5,
                with_prior_preservation=True,
                real_prior=True,
                num_class_images=4,
                hflip=True,
                train_batch_size=2,
                max_train_steps=4,
                validation_prompt="a <new1> cat beside a <new2> wooden pot",
                num_validation_images=1,
                validation_steps=2,
            ),
        ),
    ),
    Case("crossattn", (train("crossattn", freeze_model="crossattn", hflip=True),)),
    Case("bf16", (train("bf16", mixed_precision="bf16", hflip=True, **REAL_CATS),), bf16=True),
    Case(
        "generated-class-images",
        (
            train(
                "generated-class-images/concept",
                instance_data_dir="{inputs}/pot",
                instance_prompt="photo of a <new2> wooden pot",
                modifier_token="<new2>",
                initializer_token="pll",
                with_prior_preservation=True,
                class_data_dir="{results}/generated-class-images/class",
                class_prompt="wooden pot",
                num_class_images=3,
                sample_batch_size=2,
                scale_lr=True,
            ),
        ),
    ),
    Case("no-latent-cache", (train("no-latent-cache", no_latent_cache=True, hflip=True, **REAL_CATS),)),
    Case(
        "accumulation-and-resume",
        tuple(
            train(
                "accumulation-and-resume",
                gradient_accumulation_steps=2,
                checkpointing_steps=2,
                keep_latents=True,
                lr_scheduler="linear",
                hflip=True,
                **more,
            )
            for more in ({"max_train_steps": 2}, {"max_train_steps": 4, "resume_from_checkpoint": "latest"})
        ),
    ),
    Case(
        "v-prediction",
        (
            train(
                "v-prediction",
                pretrained_model_name_or_path="{inputs}/tiny-v",
                noaug=True,
                gradient_checkpointing=True,
                **REAL_CATS,
            ),
        ),
    ),
    Case(
        "merge",
        (
            (
                "merge.py",
                *("--model_dir", "{results}/one-concept", "{results}/generated-class-images/concept"),
                *("--class_words", "cat", "wooden pot", "--output_dir={results}/merge"),
            ),
        ),
        needs=("one-concept", "generated-class-images"),
    ),
    Case(
        "prior-weight",
        (
            (
                "merge.py",
                *("--model_dir", "{results}/one-concept", "--prior_weight=0.5"),
                *("--captions={inputs}/captions.txt", "--output_dir={results}/prior-weight"),
            ),
        ),
        needs=("one-concept",),
    ),
    Case(
        "lora-export",
        (("export.py", "--format=lora", "--model_dir={results}/one-concept", "--output_dir={results}/lora-export"),),
        needs=("one-concept",),
    ),
    Case(
        "delta-export",
        (("export.py", "--format=delta", "--model_dir={results}/two-concepts", "--output_dir={results}/delta-export"),),
        needs=("two-concepts",),
    ),
    Case(
        "infer",
        (
            (
                "infer.py",
                *("--model_dir", "{results}/merge", "--prompt", "photo of a <new1> cat in a <new2> wooden pot"),
                *("--num_inference_steps=5", "--device=cpu", "--seed=42", "--output_dir={results}/infer"),
            ),
        ),
        needs=("merge",),
    ),
)


def chosen_cases(names: Sequence[str] | None) -> list[Case]:
    """The named cases and those that they need, in the order of :data:`CASES`; all, if none is named."""
    wanted = set(names or (case.name for case in CASES))
    for case in reversed(CASES):  # a case needs only earlier ones
        if case.name in wanted:
            wanted.update(case.needs)
    return [case for case in CASES if case.name in wanted]


def computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(name in info.read_text() for name in ("avx512_bf16", "amx_bf16"))


# --- inputs --------------------------------------------------------------------------------------


def draw_images(folder: Path, names: Sequence[str]) -> None:
    """Write images of several sizes and shapes, different from each other and from their mirror images."""
    folder.mkdir(parents=True)
    for name in names:
        random = np.random.default_rng([SEED, *f"{folder.parent.name}/{folder.name}/{name}".encode()])
        width, height = (int(side) for side in random.integers(72, 129, size=2))
        image = Image.fromarray(random.integers(0, 256, size=(height // 8, width // 8, 3), dtype=np.uint8))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top, size = (int(number) for number in random.integers(4, 30, size=3))
        color = tuple(random.integers(256, size=3).tolist())
        ImageDraw.Draw(image).ellipse((left, top, left + size, top + 2 * size), fill=color)
        image.save(folder / name, quality=95)


def write_real_class_images(folder: Path, captions: Sequence[str]) -> None:
    """Class images with the lists that retrieve.py writes beside them."""
    paths = [folder / "images" / f"{number}.jpg" for number in range(len(captions))]
    draw_images(folder / "images", [path.name for path in paths])
    lists = {
        "images.txt": [path.as_posix() for path in paths],
        "caption.txt": captions,
        "urls.txt": [f"https://example.org/{path.name}" for path in paths],
    }
    for name, lines in lists.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_inputs(folder: Path) -> None:
    """Write all that the commands read: models, images, lists and captions."""
    # The command line is checked before the seconds that this takes.
    from benchmarks.random_model import build_random_model

    for shape in ("tiny", "tiny-v"):
        build_random_model(shape, folder / shape, seed=SEED)
    concepts = []
    for number, (name, words) in enumerate((("cat", "cat"), ("pot", "wooden pot")), 1):
        draw_images(folder / name, [f"{image}.png" for image in range(4)])
        places = ("on a chair", "in the garden", "beside a window, in the evening", "on a boat")
        write_real_class_images(folder / f"real-{name}s", [f"a {words} {place}" for place in places])
        concepts.append(
            {
                "instance_prompt": f"photo of a <new{number}> {words}",
                "class_prompt": words,
                "instance_data_dir": str(folder / name),
                "class_data_dir": str(folder / f"real-{name}s"),
            }
        )
    (folder / "concepts.json").write_text(json.dumps(concepts, indent=2), encoding="utf-8")
    # Together they have more words than the text features are wide, as merging needs.
    adjectives, nouns = ("small", "red", "old"), ("cat", "dog", "wooden pot", "house", "river", "bicycle")
    places = ("in the snow", "at night", "near the sea", "on a table")
    captions = [f"a {adjective} {noun} {place}\n" for adjective, noun, place in product(adjectives, nouns, places)]
    (folder / "captions.txt").write_text("".join(captions), encoding="utf-8")


# --- running -------------------------------------------------------------------------------------


@contextmanager
def other_tree(commit: str) -> Iterator[Path]:
    """A temporary working tree of another commit, which goes however this ends."""
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        tree = Path(temporary) / "tree"
        try:
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=False)


def full_hash(commit: str) -> str | None:
    """The hash of a commit that a branch, tag or shorter hash names; None where there is none."""
    command = ["git", "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if run.returncode else run.stdout.strip()


def environment() -> dict[str, str]:
    """What the commands run in: a CPU, one thread, no network, and no modules but those of the tree in question."""
    left_out = ("PYTHONPATH", "PYTHONSAFEPATH", "ACCELERATE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }


def run_case(case: Case, tree: Path, work: Path, kept: Path) -> str | None:
    """Run the commands of a case in a tree; gives None, or the last line of the command that failed.

    Args:
        work: has ``inputs``. The results are in ``work / "results"`` while commands run, whichever tree is in question:
            so the paths that files hold are the same.
        kept: folder of this tree's results before and after.
    """
    results, log = work / "results", kept.with_name(f"{kept.name}-{case.name}.log")
    kept.rename(results)
    try:
        for command in case.commands:
            arguments = [part.format(inputs=work / "inputs", results=results) for part in command]
            with log.open("a", encoding="utf-8") as output:
                process = subprocess.run(
                    [sys.executable, *arguments],
                    cwd=tree,
                    env=environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=COMMAND_SECONDS,
                )
            if process.returncode:
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                return next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        return f"not done after {COMMAND_SECONDS} s"
    finally:
        results.rename(kept)
    return None


# --- comparing -----------------------------------------------------------------------------------


def is_compared(path: Path) -> bool:
    """Whether a file is a result."""
    return path.is_file() and not path.name.startswith("random_states_")


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | str]]:
    """The tensors in nested dictionaries and lists by name, and everything else in them as text."""
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and value):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        if isinstance(value, Mapping) and not value:
            yield f"{name} (empty)", ""
        for key, entry in entries:
            yield from flatten(entry, f"{name}/{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, Tensor) else repr(value)


def read_parts(path: Path) -> dict[str, Tensor | str]:
    """What a file holds, part by part, in an order that is always the same."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            parts: dict[str, Tensor | str] = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return parts | {f"metadata {name}": text for name, text in sorted((file.metadata() or {}).items())}
    if path.suffix == ".bin":
        return dict(flatten(torch.load(path, map_location="cpu", weights_only=True)))
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            texts = {f"text {name}": value for name, value in sorted(image.info.items()) if isinstance(value, str)}
            return {"mode": image.mode, "pixels": torch.from_numpy(np.array(image)), **texts}
    if path.suffix not in (".md", ".yaml", ".json", ".txt"):
        return {"content": hashlib.sha256(path.read_bytes()).hexdigest()}
    lines = path.read_text(encoding="utf-8").split("\n")
    if path.suffix == ".md":
        lines = without_sentences(lines)
    return {f"line {number}": line for number, line in enumerate(lines, 1)}


def without_sentences(card: Sequence[str]) -> list[str]:
    """The lines of a model card's metadata and tables."""
    end = card.index("---", 1) if card[0] == "---" else -1
    return [line for number, line in enumerate(card) if number <= end or line.startswith("|")]


def digest(part: Tensor | str | None) -> str | None:
    """Text that is the same only for the same bits."""
    if not isinstance(part, Tensor):
        return part
    content = part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if part.numel() else b""
    return f"{part.dtype} {tuple(part.shape)} {hashlib.sha256(content).hexdigest()}".removeprefix("torch.")


def describe(before: Tensor | str | None, now: Tensor | str | None) -> str:
    """In words how two parts differ."""
    tensors = isinstance(before, Tensor) and isinstance(now, Tensor)
    if tensors and before.shape == now.shape and before.dtype == now.dtype:
        difference = (before.double() - now.double()).abs()
        return f"{int((difference != 0).sum())} of {now.numel()} values differ, by up to {difference.max():.2g}"
    return " -> ".join("not there" if part is None else repr(digest(part))[:100] for part in (before, now))


def compare_files(before: Path, now: Path) -> str | None:
    """The first part in which two files differ; None where all are the same."""
    old, new = (read_parts(path) for path in (before, now))
    for name in old | new:
        if digest(old.get(name)) != digest(new.get(name)):
            return f"{name}: {describe(old.get(name), new.get(name))}"
    return None


def compare_folders(before: Path, now: Path) -> tuple[int, list[str]]:
    """Compare the results of a case; gives the number of files, and for every file that differs how it does.

    Weights come first, then images, then text.
    """
    weights, images = (".safetensors", ".bin"), (".png", ".jpg")
    old, new = (
        {path.relative_to(folder) for path in folder.rglob("*") if is_compared(path)} for folder in (before, now)
    )
    differences = []
    for name in sorted(old | new, key=lambda name: (name.suffix not in weights, name.suffix not in images, name)):
        if name not in new:
            differences.append(f"{name} is missing")
        elif name not in old:
            differences.append(f"{name} is new")
        elif difference := compare_files(before / name, now / name):
            differences.append(f"{name}, {difference}")
    return len(old | new), differences


# --- the command ---------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"The cases: {', '.join(names)}.", allow_abbrev=False
    )
    parser.add_argument("commit", metavar="COMMIT", help="Commit, branch or tag to compare the working tree with.")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="Run these cases and those that they need; else all."
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Keep the results here; must be new or empty.")
    args = parser.parse_args(argv)
    if (commit := full_hash(args.commit)) is None:
        parser.error(f"{args.commit!r} is no commit of this repository")
    args.commit = commit
    if args.keep is not None:
        try:
            args.keep.mkdir(parents=True, exist_ok=True)
            if any(args.keep.iterdir()):
                parser.error(f"--keep {str(args.keep)!r} is not empty")
        except OSError as error:
            parser.error(f"--keep {str(args.keep)!r} cannot be used: {error.strerror}")
    return args


def check_case(case: Case, trees: Mapping[Path, Path], work: Path) -> tuple[int, str]:
    """Run a case in both trees and compare; gives the number of files and the verdict, "equal" or what is wrong.

    Args:
        trees: the other tree and the working tree, each with the folder of its results.
        work: see :func:`run_case`.
    """
    for tree, kept in trees.items():
        if (failure := run_case(case, tree, work, kept)) is not None:
            return 0, f"**failed** in the {kept.name.replace('-', ' ')}: {failure}"
    before, now = (kept / case.name for kept in trees.values())
    count, differences = compare_folders(before, now)
    if not count:
        return 0, "**failed**: it wrote no files"
    if differences:
        return count, f"**different** in {len(differences)}, first {differences[0]}"
    return count, "equal"


def compare(cases: Sequence[Case], commit: str, work: Path) -> list[str]:
    """Run and compare the cases, print a line for each; gives the names of those that are not equal."""
    bad: list[str] = []
    with other_tree(commit) as other:
        trees = {other: work / "other-commit", ROOT: work / "working-tree"}
        for folder in trees.values():
            folder.mkdir()
        write_inputs(work / "inputs")
        print("| case | files compared | result |\n|---|---|---|", flush=True)
        for case in cases:
            if case.bf16 and not computes_bf16():
                print(f"| {case.name} | 0 | left out: this CPU has no instructions for bf16 |", flush=True)
                continue
            count, verdict = check_case(case, trees, work)
            print(f"| {case.name} | {count} | {verdict} |", flush=True)
            if verdict != "equal":
                bad.append(case.name)
    return bad


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cases in both trees, print what is equal and what is not.

    Raises:
        SystemExit: with 1 where a case differs or a command fails.
    """
    args = parse_args(argv)
    started = time.perf_counter()
    # Ended by a signal, it still removes the other tree.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if hasattr(os, "sched_setaffinity"):
        # Training takes all cores that it may use where OMP_NUM_THREADS is 1; on a single one it has one thread.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cases = chosen_cases(args.only)
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        bad = compare(cases, args.commit, (args.keep or Path(temporary)).resolve())
    seconds = f"{time.perf_counter() - started:.0f} s, torch {torch.__version__}"
    if bad:
        sys.exit(f"not the same as {args.commit[:10]}: {', '.join(bad)} ({seconds})")
    print(f"the same as {args.commit[:10]} in all that was compared ({seconds})")


if __name__ == "__main__":
    main()
