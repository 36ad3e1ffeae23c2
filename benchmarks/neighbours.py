"""The paper's table in miniature: Custom Diffusion beside the three methods that people choose between.

    git clone https://github.com/huggingface/diffusers
    python -m benchmarks.neighbours --diffusers diffusers --work neighbours

teaches noto's cat and plant to the model in `base/`, which has never seen them, with diffusers' own scripts for Textual
Inversion, DreamBooth and DreamBooth with LoRA, each as it is, and with ours, as the paper has it and with
`--token_gate`; and measures the results alike. Every method gets the same images, batch and number of tries, and the
same class images if it takes any. The tries are three learning rates, then the best of them with twice the steps, on a
seed that is not measured. Textual Inversion, which needs more steps by its documentation, gets twice as many in each.
Figures are means over the other seeds, with the minimum and maximum; `neighbours.md` in `--work` has them and
`neighbours.png` images of the first. What is in `--work` already is not made again.

Images are judged by MobileNetV2, so that nothing is downloaded: alignment and KID are `evaluate.py`'s formulas, with
other features than the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from benchmarks.learning import (
    BASE,
    CONCEPTS,
    GATED,
    ROOT,
    TOKENS,
    WEIGHING,
    Judge,
    denoising_loss,
    groups_of,
    load_base,
    load_designs,
    recipe,
    recipe_for_two,
    retrieve,
    views,
    with_concept,
)
from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.evaluation.scores import image_alignment, kid
from custom_diffusion.files import write_bytes
from custom_diffusion.images import contact_sheet, load_image, write_image
from tools.base import world
from tools.base.features import ENCODER, image_features, load_encoder
from tools.base.score import background_of, generated

EXAMPLES = {noun: ROOT / "examples" / noun for noun in TOKENS}
RARE = {"cat": "ktn", "plant": "pll"}  # the words that DreamBooth uses, which the base model has not seen either
STEPS = 500
BATCH = 4
GUIDANCE, SAMPLING_STEPS = 6.0, 25
COLOURS = ("red", "pink")
MOST_DRIFT = 0.10  # of the loss on what was not taught; a try that loses more is not chosen
CHOOSING_SEED = 11


@dataclass(frozen=True)
class Training:
    """One training of one concept.

    Attributes:
        noun: what is taught.
        class_images: the folder that has a folder of class images for each noun.
        folder: for the result.
    """

    noun: str
    class_images: Path
    folder: Path
    rate: float
    steps: int
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to teach a concept.

    Attributes:
        title: for the table.
        called: what stands for a noun in a prompt, by noun.
        rates: the learning rates to try.
        steps: of training to try the rates with; twice as many are tried, too.
        command: program and flags of a training.
        load: the pipeline, of the folders of one or more nouns by noun.
        several: whether what was learned apart can be loaded together.
    """

    title: str
    called: dict[str, str]
    rates: tuple[float, ...]
    steps: int
    command: Callable[[Training], list[str]]
    load: Callable[[dict[str, Path]], DiffusionPipeline]
    several: bool = True


def flags(**values: object) -> list[str]:
    """A command line; True gives a switch."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


def of_diffusers(script: Path, training: Training, **more: object) -> list[str]:
    """The command line that the scripts of diffusers share."""
    return [
        str(script),
        *flags(
            pretrained_model_name_or_path=BASE,
            output_dir=training.folder,
            resolution=world.RESOLUTION,
            train_batch_size=BATCH,
            learning_rate=training.rate,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            max_train_steps=training.steps,
            seed=training.seed,
            **more,
        ),
    ]


def dreambooth(script: Path) -> Callable[[Training], list[str]]:
    """The command line of DreamBooth with prior preservation, with LoRA or without."""

    def command(training: Training) -> list[str]:
        noun, class_images = training.noun, training.class_images / training.noun / "images"
        return of_diffusers(
            script,
            training,
            instance_data_dir=EXAMPLES[noun],
            instance_prompt=f"photo of a {RARE[noun]} {noun}",
            class_prompt=f"photo of a {noun}",
            class_data_dir=class_images,
            num_class_images=len(list(class_images.iterdir())),
            with_prior_preservation=True,
            prior_loss_weight=1.0,
            checkpointing_steps=10**6,
        )

    return command


def textual_inversion(script: Path) -> Callable[[Training], list[str]]:
    """The command line of Textual Inversion, which has no class images."""

    def command(training: Training) -> list[str]:
        return of_diffusers(
            script,
            training,
            train_data_dir=EXAMPLES[training.noun],
            placeholder_token=TOKENS[training.noun],
            initializer_token=training.noun,
            save_steps=10**6,
            checkpointing_steps=10**6,
        )

    return command


def ours(training: Training, **changes: object) -> list[str]:
    """The command line that docs/small-model.md documents; `changes` replace or add flags."""
    noun = training.noun
    flags_of_noun = {
        "instance_data_dir": EXAMPLES[noun],
        "instance_prompt": f"photo of a {TOKENS[noun]} {noun}",
        "modifier_token": TOKENS[noun],
        "class_prompt": noun,
        "class_data_dir": training.class_images / noun,
        "output_dir": training.folder,
        "learning_rate": training.rate,
        "max_train_steps": training.steps,
        "seed": training.seed,
    }
    return [str(ROOT / "train_custom_diffusion.py"), *recipe(**(flags_of_noun | changes))]


def load_inverted(folders: dict[str, Path]) -> DiffusionPipeline:
    """The base model with the words that Textual Inversion learned."""
    pipeline = load_base()
    for noun, folder in folders.items():
        pipeline.load_textual_inversion(folder / "learned_embeds.safetensors", token=TOKENS[noun])
    return pipeline


def load_dreambooth(folders: dict[str, Path]) -> DiffusionPipeline:
    """The model that DreamBooth saved."""
    (folder,) = folders.values()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    return pipeline.to(load_base().device)


def load_lora(folders: dict[str, Path]) -> DiffusionPipeline:
    """The base model with every LoRA at full strength."""
    pipeline = load_base()
    for noun, folder in folders.items():
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=noun)
    pipeline.set_adapters(list(folders), [1.0] * len(folders))
    return pipeline


def load_ours(folders: dict[str, Path]) -> DiffusionPipeline:
    """The base model with the concept, weighed as README.md says; several are merged first."""
    names = "-".join(folder.parent.name for folder in folders.values())
    weighed = next(iter(folders.values())).parent / f"weighed-{names}"
    if not weighed.exists():
        command = [sys.executable, ROOT / "merge.py", "--model_dir", *folders.values(), *WEIGHING]
        subprocess.run([*command, "--output_dir", weighed], check=True, cwd=ROOT)
    return with_concept(weighed)


def load_gated(folders: dict[str, Path]) -> DiffusionPipeline:
    """The base model with every concept at its own words."""
    return with_concept(*folders.values())


def methods(examples: Path) -> dict[str, Method]:
    """All methods, by a short name; `examples` is the folder of diffusers' scripts."""
    words = {noun: f"{RARE[noun]} {noun}" for noun in RARE}
    return {
        "textual_inversion": Method(
            "Textual Inversion",
            TOKENS,
            (5e-4, 2e-3, 5e-3),
            2 * STEPS,
            textual_inversion(examples / "textual_inversion" / "textual_inversion.py"),
            load_inverted,
        ),
        "dreambooth": Method(
            "DreamBooth",
            words,
            (1e-5, 5e-5, 2e-4),
            STEPS,
            dreambooth(examples / "dreambooth" / "train_dreambooth.py"),
            load_dreambooth,
            several=False,
        ),
        "lora": Method(
            "DreamBooth, LoRA of rank 4",
            words,
            (5e-4, 2e-3, 5e-3),
            STEPS,
            dreambooth(examples / "dreambooth" / "train_dreambooth_lora.py"),
            load_lora,
        ),
        "ours": Method(
            "Custom Diffusion, ours",
            {noun: f"{token} {noun}" for noun, token in TOKENS.items()},
            (2e-4, 5e-4, 1e-3),
            STEPS,
            ours,
            load_ours,
        ),
        "gated": Method(
            "Custom Diffusion, gated, ours",
            {noun: f"{token} {noun}" for noun, token in TOKENS.items()},
            (2e-4, 5e-4, 1e-3),
            STEPS,
            partial(ours, **GATED),
            load_gated,
        ),
    }


def train(command: Sequence[str], folder: Path) -> None:
    """Run a training in a process of its own; `cost.json` in `folder` gets what it took, and is there when it ended."""
    if (folder / "cost.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    measured = folder.with_suffix(".measured.json")
    measuring = [sys.executable, str(ROOT / "benchmarks" / "measure.py"), str(measured), *command]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(measuring, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"error: the training ended with {status}, see {folder / 'log.txt'}")
    cost = {
        "seconds": time.monotonic() - started,
        "processor seconds": used.ru_utime + used.ru_stime,
        "peak bytes": json.loads(measured.read_text())["resident_bytes"],
    }
    write_bytes(folder / "cost.json", json.dumps(cost).encode())


# What a result consists of, where that is not all that the script leaves.
RESULTS = (
    "learned_embeds.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_custom_diffusion_weights.safetensors",
)


def size_on_disk(folder: Path) -> int:
    """Bytes of what has to be kept: the weights of the change and the words, or the whole model."""
    small = [folder / name for name in RESULTS if (folder / name).exists()]
    files = [*small, *folder.glob("<new*.safetensors")] if small else folder.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


@cache
def referee() -> tuple[torch.nn.Module, dict[str, np.ndarray], DiffusionPipeline]:
    """The encoder, the designs and the base model."""
    return load_encoder(), load_designs(), load_base()


@cache
def judge_of(*nouns: str) -> Judge:
    """Says which design of `nouns` an image is nearest to."""
    _, icons, base = referee()
    return Judge(base, icons, nouns)


def files_in(folder: Path) -> np.ndarray:
    """uint8 (n, 64, 64, 3): the images of a folder."""
    side = (world.RESOLUTION, world.RESOLUTION)
    return np.stack([np.asarray(load_image(path).resize(side)) for path in sorted(folder.iterdir())])


def not_taught(noun: str, seed: int) -> tuple[list[world.Example], list[world.Example]]:
    """Views of the noun's other designs, and of dogs."""
    _, icons, _ = referee()
    groups = groups_of(icons, noun)
    groups.pop(CONCEPTS[noun])
    others = [name for names in groups.values() for name in names]
    dogs = [name for name in icons if name.split("/")[1] in world.NOUNS["dog"]]
    return views(icons, noun, others, 1, seed), views(icons, "dog", dogs, 4, seed)


@cache
def known_losses(noun: str, seed: int) -> list[float]:
    """The base model's losses on what is not taught."""
    return [denoising_loss(referee()[2], examples, seed=seed) for examples in not_taught(noun, seed)]


def drift(learned: DiffusionPipeline, noun: str, seed: int) -> float:
    """How much the loss on what was not taught grew: the noun's other designs, and another noun's, without the word."""
    others, dogs = not_taught(noun, seed)
    after = [denoising_loss(learned, examples, seed=seed) for examples in (others, dogs)]
    return statistics.fmean(one / before for one, before in zip(after, known_losses(noun, seed), strict=True)) - 1


def measure(
    method: Method, folder: Path, noun: str, class_images: Path, seed: int, images: int, save: Path | None = None
) -> dict[str, float]:
    """All figures of one concept in `folder`; the images of its prompts go to the folder `save`."""
    encoder, icons, base = referee()
    learned, called = method.load({noun: folder}), method.called[noun]
    judge = judge_of(noun)
    own = groups_of(icons, noun)[CONCEPTS[noun]]
    unseen = views(icons, noun, own, each=48 // len(own), seed=seed)

    def made(prompt: str, count: int = images) -> np.ndarray:
        found = generated(learned, [prompt] * count, seed * 1000, SAMPLING_STEPS, GUIDANCE)
        for number, image in enumerate(found[:2] if save is not None else ()):
            name = "_".join(prompt.replace(called, "it").split())
            save.mkdir(parents=True, exist_ok=True)
            write_image(save / f"{noun}_{name}_{number}.png", Image.fromarray(image), "PNG")
        return found

    plain = made(f"photo of a {called}")
    coloured = {colour: made(f"photo of a {called} on a {colour} background") for colour in COLOURS}
    followed = [[background_of(image) == colour for image in found] for colour, found in coloured.items()]
    as_taught = [[name == CONCEPTS[noun] for name in judge.nearest(found)] for found in coloured.values()]
    both = np.logical_and(followed, as_taught)
    features = image_features(encoder, np.concatenate([plain, *coloured.values()]))
    of_class = image_features(encoder, made(f"photo of a {noun}", 2 * images))
    real = image_features(encoder, files_in(class_images / noun / "images"))
    before = image_features(encoder, base_images(noun, 2 * images, seed))
    subset = min(50, images)
    own_loss = denoising_loss(learned, unseen, called.replace(noun, "{}"), seed)
    return {
        "as taught": judge.share(plain, CONCEPTS[noun]),
        "background followed": float(np.mean(followed)),
        "as taught, on the background": float(both.mean()),
        "image alignment": image_alignment(features, image_features(encoder, files_in(EXAMPLES[noun]))),
        "loss on unseen views": own_loss / denoising_loss(base, unseen, seed=seed) - 1,
        "loss on what was not taught": drift(learned, noun, seed),
        "KID x 1000 of the class": kid(of_class, real, subset).mean,
        "the same of the base model": kid(before, real, subset).mean,
    }


@cache
def base_images(noun: str, count: int, seed: int) -> np.ndarray:
    """What the base model makes of the class prompt."""
    return generated(referee()[2], [f"photo of a {noun}"] * count, seed * 1000, SAMPLING_STEPS, GUIDANCE)


def measure_together(pipeline: DiffusionPipeline, called: dict[str, str], seed: int, images: int) -> float:
    """Share of images that show both concepts beside each other as taught, in the mean of both orders."""
    shares = []
    for left, right in (("cat", "plant"), ("plant", "cat")):
        prompt = f"photo of a {called[left]} next to a {called[right]}"
        width = 2 * world.RESOLUTION
        made = generated(pipeline, [prompt] * images, seed, SAMPLING_STEPS, GUIDANCE, width)
        shares.append(judge_of(*TOKENS).pairs(made, left, right)[1])
    return statistics.fmean(shares)


def once(file: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What is in a JSON file, which is made where it is not there."""
    if not file.exists():
        write_bytes(file, json.dumps(make(), indent=2).encode())
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Contest:
    """Trains and measures, in one folder.

    Attributes:
        work: where everything is kept.
        images: made per prompt.
        divide: all steps are divided by this, for a look at whether everything runs.
    """

    work: Path
    images: int
    divide: int = 1

    def concept(self, name: str, method: Method, noun: str, rate: float, steps: int, seed: int) -> Path:
        """The folder of a learned concept, trained where it is not there."""
        folder = self.work / name / f"{noun}-{rate:g}-{steps}-{seed}" / "result"
        training = Training(noun, self.work / "class", folder, rate, max(steps // self.divide, 1), seed)
        train(method.command(training), folder)
        return folder

    def figures(
        self, name: str, method: Method, noun: str, rate: float, steps: int, seed: int, images: int, shown: bool = False
    ) -> dict[str, float]:
        """All figures of one training, measured where they are not there."""
        folder = self.concept(name, method, noun, rate, steps, seed)
        save = self.work / "images" / name if shown else None
        measured = once(
            folder.parent / f"measured-{images}.json",
            lambda: measure(method, folder, noun, self.work / "class", seed, images, save),
        )
        cost = json.loads((folder / "cost.json").read_text())
        return {**measured, **cost, "bytes on disk": size_on_disk(folder)}

    def choose(self, name: str, method: Method) -> tuple[float, int]:
        """Learning rate and steps: of four tries the one whose images are most often as taught, alone and on a colour.

        Tries that spoil what was not taught by more than `MOST_DRIFT` are left out, if there are others.
        """

        def tried(rate: float, steps: int) -> tuple[bool, float]:
            found = self.figures(name, method, "cat", rate, steps, CHOOSING_SEED, self.images // 2)
            keeps = found["loss on what was not taught"] <= MOST_DRIFT
            score = statistics.fmean([found["as taught"], found["as taught, on the background"]])
            print(
                f"{name}: learning rate {rate:g}, {steps} steps: score {score:.2f}, keeps the rest: {keeps}", flush=True
            )
            return keeps, score

        tries = {(rate, method.steps): tried(rate, method.steps) for rate in method.rates}
        best, _ = max(tries, key=tries.__getitem__)
        longer = (best, 2 * method.steps)
        tries[longer] = tried(*longer)
        return max(tries, key=tries.__getitem__)

    def both(self, name: str, method: Method, rate: float, steps: int, seed: int) -> dict[str, float]:
        """Two concepts in one image: learned apart and loaded together; ours also learned jointly."""
        folders = {noun: self.concept(name, method, noun, rate, steps, seed) for noun in TOKENS}
        here = self.work / name / f"together-{seed}"
        here.mkdir(exist_ok=True)
        found = once(
            here / f"apart-{self.images}.json",
            lambda: {"learned apart": measure_together(method.load(folders), method.called, seed, self.images)},
        )
        if name == "ours":
            command = recipe_for_two(here, self.work / "class", output_dir=here / "result", seed=seed)
            if self.divide > 1:
                command += ["--max_train_steps=2"]
            train([str(ROOT / "train_custom_diffusion.py"), *command], here / "result")
            found |= once(
                here / f"jointly-{self.images}.json",
                lambda: {
                    "learned jointly": measure_together(
                        load_ours({"both": here / "result"}), method.called, seed, self.images
                    )
                },
            )
        return found


# Column of the table: what is measured, how it is written, and whether higher is better; None for what is no merit.
COLUMNS: dict[str, tuple[Callable[[float], str], bool | None]] = {
    "as taught": ("{:.0%}".format, True),
    "as taught, on the background": ("{:.0%}".format, True),
    "image alignment": ("{:.3f}".format, True),
    "loss on unseen views": ("{:+.1%}".format, False),
    "loss on what was not taught": ("{:+.1%}".format, False),
    "KID x 1000 of the class": ("{:.2f}".format, False),
    "learned apart": ("{:.0%}".format, True),
    "learned jointly": ("{:.0%}".format, True),
    "processor seconds": ("{:.0f}".format, False),
    "peak bytes": (lambda value: f"{value / 2**30:.2f} GiB", False),
    "bytes on disk": (lambda value: f"{value / 1e6:.2f} MB" if value >= 1e4 else f"{value / 1e3:.1f} kB", False),
}
# What the methods are for. A method is on the Pareto front if no other is as good in all of these and better in one.
MERITS = ("as taught", "as taught, on the background", "loss on what was not taught", "learned apart")


def is_dominated(name: str, means: dict[str, dict[str, float]]) -> bool:
    """Whether another method is as good by all of `MERITS`, and better by one; what is missing is the worst."""

    def merits(figures: dict[str, float]) -> list[float]:
        signs = [1 if COLUMNS[merit][1] else -1 for merit in MERITS]
        return [sign * figures.get(merit, -sign * float("inf")) for sign, merit in zip(signs, MERITS, strict=True)]

    own = merits(means[name])
    others = [merits(figures) for other, figures in means.items() if other != name]
    return any(all(b >= a for a, b in zip(own, other, strict=True)) and other != own for other in others)


def table(rows: dict[str, tuple[Method, float, int, list[dict[str, float]]]], base_kid: list[float]) -> str:
    """Markdown: a row per measure, a column per method; means, and in brackets the minimum and maximum."""
    means = {
        name: {key: statistics.fmean(values) for key in COLUMNS if (values := [run[key] for run in runs if key in run])}
        for name, (_, _, _, runs) in rows.items()
    }
    lines = ["| | " + " | ".join(method.title for method, *_ in rows.values()) + " |", "|---" * (len(rows) + 1) + "|"]
    for key, (written, _) in COLUMNS.items():
        cells = []
        for name, (*_, runs) in rows.items():
            values = [run[key] for run in runs if key in run]
            spread = f" ({written(min(values))} to {written(max(values))})" if values else ""
            cells.append(f"{written(means[name][key])}{spread}" if values else "–")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    front = [rows[name][0].title for name in rows if not is_dominated(name, means)]
    chosen = "; ".join(f"{method.title}: {rate:g}, {steps}" for method, rate, steps, _ in rows.values())
    lines += [
        "",
        f"Learning rate and steps: {chosen}.",
        f"KID x 1000 of the base model: {statistics.fmean(base_kid):.2f} ({min(base_kid):.2f} to {max(base_kid):.2f}).",
        f"On the Pareto front of {', '.join(MERITS)}: {', '.join(front)}.",
        f"Features: {ENCODER}.",
    ]
    return "\n".join(lines) + "\n"


def sheet(work: Path, names: dict[str, str]) -> Image.Image:
    """Rows are methods, and columns prompts: two images each, of the cat and of the plant."""
    prompts = ["photo_of_a_it", *(f"photo_of_a_it_on_a_{colour}_background" for colour in COLOURS)]
    rows = [
        [work / "images" / name / f"{noun}_{prompt}_{n}.png" for noun in TOKENS for prompt in prompts for n in range(2)]
        for name in names
    ]
    own = [path for noun in TOKENS for path in sorted(EXAMPLES[noun].iterdir())[:5]]
    return contact_sheet([own, *rows], ["What was taught: five images each", *names.values()], side=world.RESOLUTION)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="A clone of diffusers, for its scripts.")
    parser.add_argument("--work", type=Path, required=True, help="Folder that keeps everything between runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2026, 41, 42], help="One training per concept each.")
    parser.add_argument("--images", type=int, default=24, help="Images per prompt.")
    parser.add_argument("--methods", nargs="+", help="Only these: textual_inversion, dreambooth, lora, ours or gated.")
    parser.add_argument("--short", action="store_true", help="A few steps of everything, to see whether it runs.")
    args = parser.parse_args(argv)
    known = methods(args.diffusers / "examples")
    unknown = set(args.methods or ()) - set(known)
    if unknown:
        parser.error(f"there is no method {sorted(unknown)[0]!r}: {', '.join(known)}")
    script = args.diffusers / "examples" / "dreambooth" / "train_dreambooth.py"
    if not script.exists():
        parser.error(f"there is no {script}: give a clone of https://github.com/huggingface/diffusers")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Choose, train, measure, and write the table and the image."""
    args = parse_args(argv)
    all_methods = methods(args.diffusers.resolve() / "examples")
    work = args.work.resolve()
    contest = Contest(work, 4 if args.short else args.images, 500 if args.short else 1)
    for noun in TOKENS:
        if not (work / "class" / noun).exists():
            retrieve(noun, work / "class" / noun)
    rows = {}
    for name in args.methods or all_methods:
        method = all_methods[name]
        rate, steps = contest.choose(name, method)
        runs = []
        for seed in args.seeds:
            for noun in TOKENS:
                shown = seed == args.seeds[0]
                runs.append(contest.figures(name, method, noun, rate, steps, seed, contest.images, shown))
            if method.several:
                runs.append(contest.both(name, method, rate, steps, seed))
        rows[name] = (method, rate, steps, runs)
    kids = [run["the same of the base model"] for *_, runs in rows.values() for run in runs if "as taught" in run]
    text = table(rows, kids)
    write_bytes(work / "neighbours.md", text.encode())
    write_image(work / "neighbours.png", sheet(work, {name: all_methods[name].title for name in rows}), "PNG")
    print(f"{text}\nIn {work / 'neighbours.md'}; images in {work / 'neighbours.png'}")


if __name__ == "__main__":
    main()
