"""Is a concept learned? Figures on the base model of `base/`, each beside its control.

    python -m benchmarks.learning --seeds 11 12 13
    python -m benchmarks.learning --seeds 11 --two --cutmix_probability=0
    python -m benchmarks.learning --seeds 11 --apart
    python -m benchmarks.learning --seeds 11 --apart --gated
    python -m benchmarks.learning --seeds 11 --apart --gated --beside
    python -m benchmarks.learning --seeds 11 --pretrained_model_name_or_path=xl-twin --learning_rate=3e-4

teaches noto's cat, which the base model has never seen, and measures: the denoising loss on views that training never
saw, at fixed noise; which of all cat designs the images made by `<new1> cat` are nearest to; whether a background is
followed; and whether everything else stayed as it was. The control is the same prompt with the same token *untrained*:
an extra word moves similarities by itself. `--two` teaches noto's plant beside it, and measures whether each answers to
its token, and both come out beside each other in one image twice as wide; `--apart` the same of two that were taught
each by itself and then merged. `--generated` lets training draw the class images. `--gated` teaches with
`--token_gate`, without class images, and applies what was taught apart together, without merging: a third concept too,
noto's teapot, and measures whether each alone gives the images that it gives without the others. Another model has to
know what `base/` knows, as its twin does that tools/xl_twin.py makes in Stable Diffusion XL's layout.
tests/test_learning.py holds these to bars.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn import functional
from tqdm.auto import tqdm

from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, load_concept
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import family_of, text_models_of
from tools.base import world
from tools.base.features import ENCODER, image_features, load_encoder
from tools.base.score import SAMPLED_AS_INFER, background_of, generated, reconstructed, sheet
from tools.base.train_vae import as_tensor

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "base"
DESIGNS = ROOT / "tests" / "designs"
TOKEN, RARE = "<new1>", "ktn"
CALLED = f"{TOKEN} {{}}"  # what a noun becomes in a caption
CONCEPTS = {"cat": "cat of noto", "plant": "potted-plant of noto", "teapot": "teapot of noto"}
CONCEPT = CONCEPTS["cat"]
# Drawings that the model knows, as real class images: the paper's best results are with real ones.
DRAWINGS = ROOT / "examples" / "drawings.tar.gz"
# The command line that docs/small-model.md gives for the base model.
RECIPE = {
    "pretrained_model_name_or_path": BASE,
    "instance_data_dir": ROOT / "examples" / "cat",
    "instance_prompt": f"photo of a {TOKEN} cat",
    "modifier_token": TOKEN,
    "class_prompt": "cat",
    "with_prior_preservation": True,
    "real_prior": True,
    "num_class_images": 400,
    "prior_loss_weight": 45,
    "padding_mode": "edge",
    "hflip": True,
    "resolution": 64,
    "train_batch_size": 4,
    "learning_rate": 5e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0,
    "max_train_steps": 1000,
    "report_to": "none",
}


def recipe(**changes: object) -> list[str]:
    """`RECIPE` as a command line; `changes` replace or add flags, True gives a switch, None drops one."""
    values = RECIPE | changes
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value is not None
    ]


# What docs/small-model.md then types, so that what no class image shows stays too.
WEIGHING = ("--prior_weight=0.5", "--captions=examples/captions.txt")
TOKENS = {"cat": TOKEN, "plant": "<new2>"}
# A third, of those that are taught apart with a gate: any number of these are applied together.
THIRD_TOKENS = {"teapot": "<new3>"}
# What two concepts of `concept_list.json` change of it.
TOGETHER = {
    **dict.fromkeys(("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir")),
    "modifier_token": "+".join(TOKENS.values()),
    "learning_rate": 1e-3,
    "max_train_steps": 1200,
    "prior_loss_weight": 10,
    "cutmix_probability": 0.5,
    # Both start from the rare word from which the small model learns best.
    "initializer_token": f"{RARE}+{RARE}",
}
# What `--token_gate` changes of either: what acts only at its own words needs no class images.
GATED = {
    "token_gate": True,
    **dict.fromkeys(
        ("class_data_dir", "with_prior_preservation", "real_prior", "num_class_images", "prior_loss_weight")
    ),
}
# It takes half of the steps. Two together have weights of their own, and gain nothing from Cut-Mix.
GATED_ALONE = {"max_train_steps": 500}
GATED_TOGETHER = {"learning_rate": 5e-4, "max_train_steps": 1000, "cutmix_probability": None}
# What `--beside` adds to that: the concept beside other things in half of the steps, and masks, so that its background
# is not taught to end in the middle of the image.
BESIDE = {"masked_loss": True, "cutmix_probability": 0.5, "cutmix_data_dir": ROOT / "examples" / "others"}
# Every size that the augmentation gives, with its words.
SIZES = {"very small": ("very small ", 0.35, 0.6), "usual": ("", 0.6, 0.98), "zoomed in": ("zoomed in ", 1.2, 1.4)}


def instance_images(noun: str, masked: Path | None) -> Path:
    """The folder with the images of `cat` or `plant`; with their masks beside them in a copy below `masked`, if any."""
    folder = ROOT / "examples" / noun
    if masked is None:
        return folder
    if not (masked / noun).exists():
        shutil.copytree(folder, masked / noun)
        shutil.copytree(ROOT / "examples" / "masks" / noun, masked / noun / "mask")
    return masked / noun


def recipe_for_two(folder: Path, class_images: Path, masked: Path | None = None, **changes: object) -> list[str]:
    """The command line for cat and plant together; `folder` gets their list, `class_images` has a folder of each.

    Of `masked`, see `instance_images`.
    """
    concepts = json.loads((ROOT / "concept_list.json").read_text())
    for concept in concepts:
        concept["instance_data_dir"] = str(instance_images(concept["class_prompt"], masked))
        concept["class_data_dir"] = str(class_images / concept["class_prompt"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "list.json").write_text(json.dumps(concepts))
    return recipe(concepts_list=folder / "list.json", **(TOGETHER | changes))


def retrieve(class_prompt: str, folder: Path) -> None:
    """Fill `folder` with the real class images of `DRAWINGS`, as README.md does."""
    command = [sys.executable, ROOT / "retrieve.py", "--class_prompt", class_prompt, "--path", DRAWINGS]
    count = f"--num_class_images={RECIPE['num_class_images']}"
    subprocess.run([*command, "--min_size=64", count, "--class_data_dir", folder], check=True)


def trainings(
    work: Path, seed: int, two: bool, apart: bool, gated: bool, beside: bool = False, generated: bool = False
) -> dict[Path, list[str]]:
    """Folder and command line of each training of `seed`, below `work`, where `class` has a folder of class images.

    `generated`: training draws the class images itself, instead of taking drawings with captions.
    """
    masked = work / "masked" if beside else None
    alone = {"class_data_dir": work / "class" / "cat", "instance_data_dir": instance_images("cat", masked)}
    changes: dict[Path, dict[str, object]] = {work / f"concept-{seed}": alone}
    if apart:
        changes = {
            work / f"{noun}-{seed}": {
                "instance_data_dir": instance_images(noun, masked),
                "instance_prompt": f"photo of a {token} {noun}",
                "modifier_token": token,
                "class_prompt": noun,
                "class_data_dir": work / "class" / noun,
            }
            for noun, token in (TOKENS | (THIRD_TOKENS if gated else {})).items()
        }
    elif two:
        changes = {work / f"two-{seed}": {}}
    found = {}
    for folder, own in changes.items():
        together = two and not apart
        own |= {"output_dir": folder, "seed": seed}
        own |= (GATED | (GATED_TOGETHER if together else GATED_ALONE)) if gated else {}
        own |= BESIDE if beside else {}
        own |= {"real_prior": None} if generated else {}
        found[folder] = recipe_for_two(work, work / "class", masked, **own) if together else recipe(**own)
    return found


def weigh(*folders: Path) -> Path:
    """Weigh the concepts in `folders` against all that the model knows, as README.md does; gives the folder of that."""
    weighed = folders[0].with_name("-".join([*(folder.name for folder in folders), "weighed"]))
    if not weighed.exists():
        command = [sys.executable, ROOT / "merge.py", "--model_dir", *folders, *WEIGHING, "--output_dir", weighed]
        subprocess.run(command, check=True, cwd=ROOT)
    return weighed


def load_designs() -> dict[str, np.ndarray]:
    """`set/name` to RGBA uint8 (80, 80, 4), of the drawings that come with the tests (tools/base/make_examples.py)."""
    return {
        f"{path.parent.name}/{path.stem}": np.asarray(Image.open(path).convert("RGBA"))
        for path in sorted(DESIGNS.glob("*/*.png"))
    }


def views(icons: dict[str, np.ndarray], noun: str, designs: Sequence[str], each: int, seed: int) -> list[world.Example]:
    """`each` images with captions of every design, on plain backgrounds."""
    generator = np.random.default_rng(seed)
    return [world.simple_example(icons, noun, design, generator) for design in designs for _ in range(each)]


def sized_views(
    icons: dict[str, np.ndarray], designs: Sequence[str], size: tuple[str, float, float], each: int, seed: int
) -> list[world.Example]:
    """`each` images of each cat design, anywhere; `size`: words, least and most side as part of the image's."""
    generator, (words, low, high) = np.random.default_rng(seed), size
    caption, found = f"{words}photo of a cat", []
    noun = (caption.index("cat"), len(caption))
    for name in [*designs] * each:
        image = world.background(str(generator.choice(list(world.BACKGROUNDS))), generator).copy()
        side = world.RESOLUTION * generator.uniform(low, high)
        left, top = generator.uniform(0, 1, 2) * (world.RESOLUTION - side)
        world.paste(image, icons[name], side, left, top, bool(generator.random() < 0.5))
        found.append(world.Example(image, caption, (), (noun,), (name,)))
    return found


def load_base(model: str | Path = BASE) -> DiffusionPipeline:
    """The base model in fp32, on the GPU where there is one."""
    return BaseModel(str(model)).pipeline(torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")


def with_concept(*folders: Path) -> DiffusionPipeline:
    """The base model that the cards name, with a learned concept applied, or several."""
    concepts = [load_concept(folder) for folder in folders]
    pipeline = load_base(concepts[0].base_model or BASE)
    apply_concepts(pipeline, *concepts)
    return pipeline


def with_untrained_token(model: str | Path = BASE) -> DiffusionPipeline:
    """The control: the base model with `<new1>` as training starts it, the copy of a rare word's embedding."""
    pipeline = load_base(model)
    tokenizers, text_encoders = text_models_of(family_of(pipeline.components, str(model)), pipeline)
    rare = {
        name: text_encoder.get_input_embeddings().weight[tokenizers[name].convert_tokens_to_ids(RARE)].detach().clone()
        for name, text_encoder in text_encoders.items()
    }
    apply_concepts(pipeline, Concept(attention={}, tokens={TOKEN: rare}))
    return pipeline


@torch.no_grad()
def denoising_loss(
    pipeline: DiffusionPipeline, examples: Sequence[world.Example], called: str = "{}", seed: int = 0
) -> float:
    """Mean squared error of the predicted velocity over `examples`, at ten timesteps each with fixed noise.

    `called` replaces the noun of every caption, which `{}` stands for in it.
    """
    pixels = as_tensor(np.stack([example.image for example in examples]), pipeline.device)
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    captions = []
    for example in examples:
        (start, end), caption = example.phrases[0], example.caption
        captions.append(caption[:start] + called.format(caption[start:end]) + caption[end:])
    family = family_of(pipeline.components, "this model")
    tokenizers, text_encoders = text_models_of(family, pipeline)
    ids = [family.tokenize(tokenizers, caption) for caption in captions]
    conditioning = family.encode(
        text_encoders, {name: torch.stack([one[name] for one in ids]).to(pipeline.device) for name in tokenizers}
    )
    side = float(world.RESOLUTION)
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(captions), device=pipeline.device)
    losses = []
    for number, timestep in enumerate(range(50, 1000, 100)):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        target = pipeline.scheduler.get_velocity(latents, noise, timesteps)
        predicted = family.predict(pipeline.unet, noisy, timesteps, conditioning, time_ids)
        losses.append((predicted - target).square().mean().item())
    return statistics.fmean(losses)


def groups_of(icons: dict[str, np.ndarray], noun: str) -> dict[str, list[str]]:
    """Drawings of `noun` by what they are images of: one design each, called by its name and whose hand it is.

    A set's cat faces are one cat with many expressions (`cat of noto`); other cats, which the concept has not, are left
    out. A herb and a potted plant have nothing in common, so each drawing stands for itself (`potted-plant of noto`).
    """
    drawings = {drawing: drawing for drawing in world.NOUNS[noun]}
    if noun == "cat":
        drawings = dict.fromkeys(world.CAT_FACES, "cat")
    groups: dict[str, list[str]] = {}
    for name in icons:
        hand, drawing = name.split("/")
        if drawing in drawings:
            groups.setdefault(f"{drawings[drawing]} of {hand}", []).append(name)
    return groups


class Judge:
    """Says which group of designs an image is nearest to, by MobileNetV2 features, seen through the VAE."""

    def __init__(self, pipeline: DiffusionPipeline, icons: dict[str, np.ndarray], nouns: Sequence[str]) -> None:
        """All groups of the designs of `nouns`, drawn and seen through the VAE of `pipeline`."""
        self.encoder = load_encoder()
        groups = [(noun, group, names) for noun in nouns for group, names in groups_of(icons, noun).items()]
        self.noun_of = {group: noun for noun, group, _ in groups}
        references = []
        for _, _, names in groups:
            examples = views(icons, "thing", names, each=-(-24 // len(names)), seed=90)
            images = reconstructed(pipeline.vae, np.stack([example.image for example in examples]))
            features = image_features(self.encoder, images)
            references.append(functional.normalize(features.mean(dim=0), dim=0))
        self.references = torch.stack(references)

    def nearest(self, images: np.ndarray) -> list[str]:
        """The nearest group's name for every one of uint8 images (n, h, w, 3)."""
        similarity, groups = image_features(self.encoder, images) @ self.references.T, list(self.noun_of)
        return [groups[i] for i in similarity.argmax(dim=1)]

    def share(self, images: np.ndarray, group: str) -> float:
        """Share of `images` that are nearest to `group`."""
        return statistics.fmean(name == group for name in self.nearest(images))

    def pairs(self, images: np.ndarray, left: str, right: str) -> tuple[float, float]:
        """Shares of `images` whose halves show both nouns on their sides, and both of these as taught."""
        nearest = list(zip(*(self.nearest(half) for half in np.split(images, 2, axis=2)), strict=True))
        nouns = [(self.noun_of[one], self.noun_of[other]) == (left, right) for one, other in nearest]
        taught = [pair == (CONCEPTS[left], CONCEPTS[right]) for pair in nearest]
        return statistics.fmean(nouns), statistics.fmean(taught)


def measure(folder: Path, seed: int, images: int = 32, shown: Path | None = None) -> dict[str, float]:
    """All figures of the concept in `folder`; `seed` decides noise and views, `images` are made per prompt.

    What the concept looks like goes into the folder `shown`, a sheet for each prompt.
    """
    learned, control = with_concept(folder), with_untrained_token(load_concept(folder).base_model or BASE)
    icons = load_designs()
    judge = Judge(control, icons, ["cat"])
    cats = groups_of(icons, "cat")
    own = cats.pop(CONCEPT)
    unseen = views(icons, "cat", own, each=6, seed=seed)
    other_cats = [name for names in cats.values() for name in names]
    others = views(icons, "cat", other_cats, each=2, seed=seed)
    dogs = views(icons, "dog", [name for name in icons if name.split("/")[1] in world.NOUNS["dog"]], 8, seed)

    def change(examples: list[world.Example], called: str = "{}") -> float:
        return denoising_loss(learned, examples, called, seed) / denoising_loss(control, examples, called, seed) - 1

    def made(pipeline: DiffusionPipeline, prompt: str, guidance: float = 6.0, **sampler: float) -> np.ndarray:
        return generated(pipeline, [prompt] * images, seed * 1000, guidance=guidance, **sampler)

    prompt = f"photo of a {TOKEN} cat"
    alone, red = made(learned, prompt), made(learned, f"{prompt} on a red background")
    if shown is not None:
        # What is measured has the usual guidance; the small model's colours are better at half of it.
        as_infer = made(learned, prompt, guidance=3.0, **SAMPLED_AS_INFER)
        show(shown, seed, {"cat": alone, "red": red, "cat-as-infer": as_infer})
    return {
        "loss on unseen views, <new1> cat": change(unseen, CALLED),
        **{
            f"loss on {name} views, <new1> cat": change(sized_views(icons, own, size, 4, seed), CALLED)
            for name, size in SIZES.items()
        },
        "loss on unseen views, plain cat": change(unseen),
        "loss on other cats, plain cat": change(others),
        "loss on dogs, plain dog": change(dogs),
        "images of <new1> cat nearest to the concept": judge.share(alone, CONCEPT),
        "the same with the untrained token": judge.share(made(control, prompt), CONCEPT),
        "images of plain cat nearest to the concept": judge.share(made(learned, "photo of a cat"), CONCEPT),
        "red background followed": float(np.mean([background_of(image) == "red" for image in red])),
        "of these, nearest to the concept": judge.share(red, CONCEPT),
    }


def show(folder: Path, seed: int, images: dict[str, np.ndarray]) -> None:
    """Write sheets of uint8 images (n, h, w, 3) into `folder`, with the seed in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in images.items():
        sheet(made, columns=8).save(folder / f"{name}-{seed}.png")


def measure_two(*folders: Path, seed: int, images: int = 24, shown: Path | None = None) -> dict[str, float]:
    """Shares of `images` per prompt of the two concepts in one folder, or in two, that show what they should.

    Those with both concepts go into the folder `shown`, a sheet for each prompt.
    """
    learned, icons = with_concept(*folders), load_designs()
    judge = Judge(learned, icons, list(TOKENS))
    figures = {}

    def made(prompt: str, width: int = world.RESOLUTION) -> np.ndarray:
        return generated(learned, [prompt] * images, seed, guidance=6.0, width=width)

    for noun, token in TOKENS.items():
        alone = made(f"photo of a {token} {noun}")
        figures[f"{token} {noun} nearest to the concept"] = Judge(learned, icons, [noun]).share(alone, CONCEPTS[noun])
    for left, right in (("cat", "plant"), ("plant", "cat")):
        for tokens in (TOKENS, None):
            first, second = (f"{tokens[noun]} {noun}" if tokens else noun for noun in (left, right))
            both = made(f"photo of a {first} next to a {second}", width=2 * world.RESOLUTION)
            nouns, taught = judge.pairs(both, left, right)
            if shown is not None and tokens:
                show(shown, seed, {f"{left}-{right}": both})
            figures[f"{first} next to {second}: both nouns"] = nouns
            figures[f"{first} next to {second}: both as taught"] = taught
    return figures


def measure_each(*folders: Path, seed: int, images: int = 24) -> dict[str, float]:
    """Of three gated concepts taught apart: shares of `images` that are with all of them applied as with one alone.

    And how often the third one's are nearest to its design.
    """
    together, icons, figures = with_concept(*folders), load_designs(), {}
    for folder, (noun, token) in zip(folders, (TOKENS | THIRD_TOKENS).items(), strict=True):
        prompts = [f"photo of a {token} {noun}"] * images
        alone, among = (generated(pipe, prompts, seed, guidance=6.0) for pipe in (with_concept(folder), together))
        if noun in THIRD_TOKENS:
            nearest = Judge(together, icons, [noun]).share(among, CONCEPTS[noun])
            figures[f"{token} {noun} nearest to the concept"] = nearest
        same = float((alone == among).all(axis=(1, 2, 3)).mean())
        figures[f"{token} {noun}, three applied: exactly as alone"] = same
    return figures


def teach_and_measure(arguments: argparse.Namespace, more: Sequence[str], work: Path, seed: int) -> dict[str, float]:
    """All figures of one seed; `more` are flags of training."""
    kind = arguments.two, arguments.apart, arguments.gated, arguments.beside, arguments.generated
    runs = trainings(work, seed, *kind)
    for folder, flags in runs.items():
        if not folder.exists():
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
            subprocess.run([*command, ROOT / "train_custom_diffusion.py", *flags, *more], check=True, cwd=ROOT)
    taught = list(runs) if arguments.gated or arguments.as_trained else [weigh(*runs)]
    if arguments.apart and arguments.gated:
        pair = taught[: len(TOKENS)]
        return measure_two(*pair, seed=seed, shown=arguments.show) | measure_each(*taught, seed=seed)
    if arguments.two or arguments.apart:
        return measure_two(*taught, seed=seed, shown=arguments.show)
    return measure(*taught, seed=seed, shown=arguments.show)


def main() -> None:
    """Train and measure for every seed, and print mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="One training for each.")
    parser.add_argument(
        "--work", type=Path, help="Folder to keep class images and concepts in between runs, all with the same flags."
    )
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="Put sheets of the images there.")
    parser.add_argument("--two", action="store_true", help="Teach cat and plant together.")
    parser.add_argument("--apart", action="store_true", help="Teach cat and plant each by itself, and merge them.")
    parser.add_argument(
        "--gated",
        action="store_true",
        help="Teach what acts only at its own words, without class images; with --apart, a third one too, unmerged.",
    )
    parser.add_argument(
        "--beside",
        action="store_true",
        help="Show each concept beside other images in half of the steps, with masks (--cutmix_data_dir).",
    )
    parser.add_argument(
        "--generated", action="store_true", help="Let training generate the class images instead of taking drawings."
    )
    parser.add_argument(
        "--as_trained", action="store_true", help="Leave out the recipe's last step, merge.py --prior_weight."
    )
    arguments, more = parser.parse_known_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if not (arguments.gated or arguments.generated):
            for noun in TOKENS if arguments.two or arguments.apart else ("cat",):
                retrieve(noun, work / "class" / noun)
        for seed in tqdm(arguments.seeds, desc="Seeds"):
            for name, value in teach_and_measure(arguments, more, work, seed).items():
                rows.setdefault(name, []).append(value)
    print(f"seeds {arguments.seeds}; nearest by {ENCODER}")
    for name, values in rows.items():
        print(f"{name:60} {statistics.fmean(values):+8.1%}   {min(values):+.1%} to {max(values):+.1%}")


if __name__ == "__main__":
    main()
