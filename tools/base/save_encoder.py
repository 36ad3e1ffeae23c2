"""Write the MobileNetV2 of :mod:`tools.base.features` in transformers' layout, into a folder of a name.

    python -m tools.base.save_encoder mobilenet

``evaluate.py --clip none --encoder DIR`` then measures image alignment and KID on a CPU, without any download from a
hub. Its numbers are its own: they cannot be compared with those of CLIP or DINO.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import MobileNetV2Config, MobileNetV2ImageProcessor, MobileNetV2Model

from tools.base.features import load_encoder

SIZE = 96  # pixels, as in tools/base/features.py


def save_encoder(folder: Path) -> Path:
    """Write weights, configuration and preprocessing into a folder, which is made; gives the folder.

    Raises:
        RuntimeError: where the package with the weights is missing.
    """
    ours = load_encoder()
    # As in torchvision: its padding, and its batch norm's epsilon.
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, image_size=SIZE)
    model = MobileNetV2Model(config).eval()
    own = {name: value for name, value in ours.state_dict().items() if name.startswith("features.")}
    # The same network in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), own.values(), strict=True)))
    model.save_pretrained(folder)
    processor = MobileNetV2ImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def difference(folder: Path) -> float:
    """The largest difference between the features of the saved encoder and the original, of random pixels."""
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    saved = MobileNetV2Model.from_pretrained(folder).eval()
    return float((saved(pixel_values=pixels).pooler_output - load_encoder()(pixels)).abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small image encoder in transformers' layout.")
    parser.add_argument("folder", type=Path)
    print(save_encoder(parser.parse_args().folder))
