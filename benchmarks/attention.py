"""Attention forwards and backwards on a CPU: torch's fused kernel beside two matrix products, in training's shapes.

python -m benchmarks.attention
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.models.short_attention import attend_by_products

# (batch, heads, queries, keys, width) of layers that occur: what it is, and where.
SHAPES = {
    "`base/`, 64 px, 8 images, itself": (8, 4, 64, 64, 32),
    "`base/`, 64 px, 8 images, text": (8, 4, 64, 32, 32),
    "Stable Diffusion 1.4, 256 px, 2 images, itself": (2, 8, 1024, 1024, 40),
    "the same, text": (2, 8, 1024, 77, 40),
    "its second level, itself": (2, 8, 256, 256, 80),
    "its second level, text": (2, 8, 256, 77, 80),
    "its third level, itself": (2, 8, 64, 64, 160),
    "Stable Diffusion XL, 512 px, 2 images, third level, itself": (2, 20, 256, 256, 64),
}


def milliseconds(attention: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> float:
    """The best of so many times of one pass forwards and backwards.

    Args:
        attention: of query, key, value and scale.
        shape: batch, heads, queries, keys and width of a head.
        dtype: of all tensors.
        repeats: how often it is timed.
    """
    batch, heads, queries, keys, width = shape
    # Laid out as projections give them: heads beside each other.
    query, key, value = (
        torch.randn(batch, length, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for length in (queries, keys, keys)
    )
    gradient = torch.randn(batch, queries, heads * width, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        attended = attention(query, key, value, scale=width**-0.5).transpose(1, 2).flatten(2)
        torch.autograd.grad(attended, (query, key, value), gradient)
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--repeats", type=int, default=10, help="Times of each, of which the best counts.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print("| layer | positions | type | fused, ms | products, ms | fused / products |\n|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            both = F.scaled_dot_product_attention, attend_by_products
            fused, products = (milliseconds(one, shape, dtype, arguments.repeats) for one in both)
            kind = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
            cells = (
                name,
                f"{shape[2]} x {shape[3]}",
                kind,
                f"{fused:.2f}",
                f"{products:.2f}",
                f"{fused / products:.1f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
