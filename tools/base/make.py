"""From nothing to the base model: render the emoji, train VAE, text encoder, UNet and decoder, score, install.

`make base` runs this. Every stage is restartable: what a stopped run has trained is taken up again. With `--short`
every stage runs for a few steps, which proves that it runs and leaves `base/` as it is.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.errors import UserError
from custom_diffusion.training.settings import SETTINGS_NAME, check_settings, write_settings
from tools.base import train_decoder, train_text_encoder, train_unet, train_vae, world
from tools.base.emoji import load_icons
from tools.base.score import SAMPLED_AS_INFER, generated, scores, sheet

BASE = Path(__file__).resolve().parent.parent.parent / "base"
# Steps of VAE, text encoder, UNet and decoder, and how many images their pools hold: "pool" those of the first two.
FULL = {
    "vae": 28_000, "text_encoder": 1_000, "unet": 17_000, "decoder": 12_000,
    "unet_pool": 180_000, "decoder_pool": 30_000, "pool": 60_000,
}  # fmt: skip
SHORT = {
    "vae": 6, "text_encoder": 4, "unet": 4, "decoder": 4, "unet_pool": 256, "decoder_pool": 256, "pool": 256,
}  # fmt: skip
LOGS = {
    "VAE, squared error": ("vae", "squared_error"),
    "text encoder, attributes": ("text", "attributes"),
    "UNet, velocity": ("unet", "loss"),
    "decoder, squared error": ("vae/decoder", "squared_error"),
}
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def assemble(work: Path, folder: Path) -> None:
    """Write the trained parts in `work` as one pipeline into `folder`, in fp16 and Stable Diffusion's layout."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer_files = work / "text" / "tokenizer"
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae" / "trained"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text" / "trained"),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_files),
        unet=UNet2DConditionModel.from_pretrained(work / "unet" / "trained"),
        scheduler=DDIMScheduler.from_pretrained(work / "unet" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)
    # transformers loads in the type that the configuration names, diffusers in float32 where none is asked for.
    # Where the parts lay on the machine that trained them is nobody's business.
    for part, more in {"text_encoder": {"dtype": "float32"}, "vae": {}, "unet": {}}.items():
        config_file = folder / part / "config.json"
        config = json.loads(config_file.read_text()) | more
        config.pop("_name_or_path", None)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
    # The files that Stable Diffusion's repositories have, rather than the one that save_pretrained writes today.
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_files, folder / "tokenizer")


def sample_sheet(folder: Path, file: Path, seed: int = 0) -> None:
    """An image of every noun, made by the model in `folder`, fourteen to a row."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [f"photo of a {noun}" for noun in world.NOUNS]
    sheet(generated(pipeline, prompts, seed, **SAMPLED_AS_INFER), columns=14).save(file)


def loss_curves(work: Path, file: Path) -> None:
    """One plot per training, of its first logged loss over its steps; none where nothing was trained."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeError('the loss curves are drawn by matplotlib: pip install ".[tools]"') from error

    # What was taken over from another model has no log.
    logs = {title: log for title, log in LOGS.items() if (work / log[0] / "log.jsonl").exists()}
    if not logs:
        return
    figure, axes = pyplot.subplots(1, len(logs), figsize=(3 * len(logs), 2.6), layout="constrained", squeeze=False)
    for axis, (title, (folder, name)) in zip(axes[0], logs.items(), strict=True):
        lines = [json.loads(line) for line in (work / folder / "log.jsonl").read_text().splitlines()]
        axis.plot([line["step"] for line in lines], [line[name] for line in lines])
        axis.set(title=title, xlabel="step", yscale="log")
    figure.savefig(file, dpi=80)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises SystemExit as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("base-build"), help="Where everything is made and kept.")
    parser.add_argument("--short", action="store_true", help="A few steps of every stage; base/ stays as it is.")
    parser.add_argument("--keep", type=Path, metavar="MODEL", help="Keep this model's encoders of images and text.")
    parser.add_argument("--further", type=Path, metavar="MODEL", help="Keep its encoders, and train its UNet on.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed trains another UNet.")
    parser.add_argument("--threads", type=int, help="CPU threads; if not given, what torch takes by itself.")
    arguments = parser.parse_args(argv)
    if arguments.keep and arguments.further:
        parser.error("--keep and --further each say what a former model gives: give one of them")
    for model in (arguments.keep, arguments.further):
        if model and not (model / "vae").is_dir():
            parser.error(f"{str(model)!r} is no folder of a model such as base/")
    return arguments


def claim(work: Path, arguments: argparse.Namespace) -> None:
    """Make the folder `work`, or take up the run with these `arguments` that it holds.

    Raises:
        UserError: where it holds another run, whose finished stages would be taken for those asked for now.
    """
    work.mkdir(parents=True, exist_ok=True)
    flags = {name: str(value) for name, value in vars(arguments).items() if name not in ("work", "threads")}
    check_settings(flags, work / SETTINGS_NAME, "give another --work, or remove it")
    write_settings(flags, work)


def take_over(former: Path, work: Path) -> None:
    """Start `work` with the VAE, text encoder and tokenizer of the model `former`."""
    if not (work / "vae").exists():
        # Its decoder is trained again all the same, on what this UNet leaves.
        shutil.copytree(former / "vae", work / "vae" / "first")
    if not (work / "text").exists():
        shutil.copytree(former / "tokenizer", work / "text" / "tokenizer")
        shutil.copytree(former / "text_encoder", work / "text" / "trained")


def train_parts(work: Path, icons: dict[str, np.ndarray], arguments: argparse.Namespace) -> None:
    """Train what is missing in `work`."""
    budget = SHORT if arguments.short else FULL
    if not (work / "vae" / "first").exists():
        train_vae.train(icons, work / "vae", budget["vae"], budget["pool"])
    if not (work / "text" / "trained").exists():
        train_text_encoder.train(icons, work / "text", budget["text_encoder"], budget["pool"] // 2)
    if not (work / "unet" / "trained").exists():
        start = arguments.further / "unet" if arguments.further else None
        pool, steps = budget["unet_pool"], budget["unet"] // (4 if start else 1)
        inputs = icons, work / "vae", work / "text"
        train_unet.train(*inputs, work / "unet", steps, pool=pool, start=start, seed=arguments.seed)
    if not (work / "vae" / "trained").exists():
        train_decoder.train(icons, work, budget["decoder"], budget["decoder_pool"])


def install(work: Path) -> None:
    """Put the model in `work` and what shows it into `base/`."""
    for part in PARTS:
        shutil.rmtree(BASE / part, ignore_errors=True)
        shutil.copytree(work / "model" / part, BASE / part)
    for file in filter(Path.exists, (work / "model/model_index.json", work / "samples.png", work / "losses.png")):
        shutil.copy(file, BASE)


def main() -> None:
    """Run what is missing of all stages."""
    arguments = parse_args()
    former = arguments.keep or arguments.further
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = arguments.work
    claim(work, arguments)
    # VAE and decoder learn from drawings of other things too.
    icons = load_icons(work, only=world.icon_names() if arguments.short else None)
    if former:
        take_over(former, work)
    train_parts(work, icons, arguments)
    model = work / "model"
    assemble(work, model)
    sample_sheet(model, work / "samples.png")
    loss_curves(work, work / "losses.png")
    for name, value in scores(model, icons, each=1 if arguments.short else 16, seed=1000).items():
        print(name, value)
    if not arguments.short:
        install(work)
    print(f"the model is in {model if arguments.short else 'base'}")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, UserError) as error:
        raise SystemExit(f"error: {error}") from error
