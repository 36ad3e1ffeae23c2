"""The numbers: text alignment, image alignment and KID, all of features.

Text and image alignment are those of CustomConcept101's ``evaluate.py`` (adobe-research/custom-diffusion), the former
being CLIPScore (Hessel et al., EMNLP 2021). KID is torch-fidelity's (Binkowski et al., ICLR 2018).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from custom_diffusion.errors import UserError

CLIPSCORE_WEIGHT = 2.5
KID_NEEDS = "KID needs the package torch-fidelity: pip install '.[evaluation]'"


def text_alignment(images: Tensor, texts: Tensor) -> float:
    """Mean CLIPScore, 2.5 x max(cos, 0), from 0 to 2.5; higher is better.

    Args:
        images, texts: (N, width), features of N images and of their prompts, of any length.
    """
    cosines = F.cosine_similarity(images.double(), texts.double(), dim=1)
    return float((CLIPSCORE_WEIGHT * cosines.clamp(min=0)).mean())


def image_alignment(images: Tensor, targets: Tensor) -> float:
    """Mean of all pairwise cosines, from -1 to 1; higher is better.

    Args:
        images: (N, width), features of generated images, of any length.
        targets: (M, width), features of real images of the concept.
    """
    return float((F.normalize(images.double(), dim=1) @ F.normalize(targets.double(), dim=1).T).mean())


def grouped_image_alignment(images: Tensor, targets: Sequence[Tensor]) -> float:
    """The same where every image has targets of its own: the mean over the images of their mean cosines.

    Args:
        images: (N, width).
        targets: N of (M, width), M may differ.
    """
    own = [image_alignment(image[None], real) for image, real in zip(images, targets, strict=True)]
    return sum(own) / len(own)


@dataclass(frozen=True)
class Kid:
    """A kernel inception distance x 1000, estimated on subsets; lower is better, slightly below 0 is no difference.

    Attributes:
        mean, spread: mean and standard deviation over the subsets.
    """

    mean: float
    spread: float


def kid(generated: Tensor, real: Tensor, subset_size: int, subsets: int = 100, seed: int = 2020) -> Kid:
    """KID x 1000 with the polynomial kernel of degree 3, unbiased, as torch-fidelity computes it.

    Args:
        generated, real: (N, width) and (M, width), features as the encoder gives them.
        subset_size: images of each kind in a subset, at most N and M.
        subsets: how many are drawn.
        seed: of that drawing; the default is torch-fidelity's.

    Raises:
        UserError: where there are fewer images than a subset takes, or torch-fidelity is not installed.
    """
    check_kid_size(len(generated), subset_size, "generated class images (--num_class_images)")
    check_kid_size(len(real), subset_size, "real class images (--class_data_dir)")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(KID_NEEDS)
    metric = importlib.import_module("torch_fidelity.metric_kid")
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": seed, "verbose": False}
    result = metric.kid_features_to_metric(generated.double(), real.double(), **options)
    return Kid(1000 * result[metric.KEY_METRIC_KID_MEAN], 1000 * result[metric.KEY_METRIC_KID_STD])


def check_kid_size(count: int, subset_size: int, what: str) -> None:
    """Make sure that there are enough images for KID.

    Args:
        what: they are, for the message.

    Raises:
        UserError: where there are not.
    """
    if count < subset_size:
        raise UserError(
            f"KID compares subsets of {subset_size} images, and there are {count} {what}: get more, or give a smaller "
            "--kid_subset_size, whose KID is less exact"
        )
