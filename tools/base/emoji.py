"""The images that the base model knows: five permissively licensed emoji sets, fetched from npm and rendered."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

# Name: (version, licence). The versions are pinned: designs are chosen and held out by their names.
SETS = {
    "fluent-emoji": ("1.2.7", "MIT"),
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "noto": ("1.2.9", "Apache-2.0"),
    "noto-v1": ("1.2.5", "Apache-2.0"),
    "fxemoji": ("1.2.2", "Apache-2.0"),
}
RENDERED_SIZE = 80


def fetch(folder: Path) -> None:
    """Download the packages of `SETS` into `folder`, with the user's own npm (its registry, proxy and cache).

    Raises RuntimeError where npm is not installed or cannot download.
    """
    if shutil.which("npm") is None:
        raise RuntimeError("the emoji come from npm's registry: install Node.js, which brings npm")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, _) in SETS.items():
        if (folder / package_file(name)).exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"], cwd=folder, capture_output=True, text=True
        )
        if packed.returncode != 0:
            raise RuntimeError(f"npm could not download @iconify-json/{name}@{version}: {packed.stderr.strip()}")


def package_file(name: str) -> str:
    """The file that `npm pack` writes for the set `name`."""
    return f"iconify-json-{name}-{SETS[name][0]}.tgz"


def read_set(archive: Path) -> dict[str, str]:
    """Icon name to complete SVG text, of one package; skin tones, which differ in nothing else, are left out."""
    with tarfile.open(archive) as package:
        icons = json.load(package.extractfile("package/icons.json"))
    default_width, default_height = icons.get("width", 16), icons.get("height", 16)
    svg = {}
    for name, icon in icons["icons"].items():
        if "skin-tone" in name:
            continue
        size = icon.get("width", default_width), icon.get("height", default_height)
        box = (icon.get("left", 0), icon.get("top", 0), *size)
        svg[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
    return svg


def render(svg: str, size: int = RENDERED_SIZE) -> np.ndarray | None:
    """RGBA uint8 of shape (size, size, 4): the drawing scaled to fill the square, centred; None for an empty one."""
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError('drawings are rendered by resvg: pip install ".[tools]"') from error
    # Drawn larger than needed, so that the second scaling, to the drawing's own bounds, loses nothing.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    bounds = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if bounds is None:
        return None
    image = image.crop(bounds)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Resized with premultiplied alpha, or transparent black would darken the edges.
    return np.asarray(square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA"))


def load_icons(folder: Path, only: frozenset[str] | None = None) -> dict[str, np.ndarray]:
    """`set/name` to RGBA uint8 (80, 80, 4), for every icon of every set; rendered once, then read from `folder`.

    `only` names the icons that are wanted (without their set); if not given, all 10,000 are rendered, in 2 minutes.
    """
    cache = folder / "icons.npz"
    key = hashlib.sha256(repr((SETS, RENDERED_SIZE, only and sorted(only))).encode()).hexdigest()
    if cache.exists():
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["key"]) == key:
                return dict(zip(saved["names"].tolist(), saved["images"], strict=True))
    fetch(folder)
    drawings = {f"{s}/{name}": svg for s in SETS for name, svg in read_set(folder / package_file(s)).items()}
    drawings = {name: svg for name, svg in drawings.items() if only is None or name.split("/")[1] in only}
    rendered = {name: render(svg) for name, svg in tqdm(drawings.items(), desc="Rendering emoji", unit="image")}
    rendered = {name: image for name, image in rendered.items() if image is not None}
    half_written = cache.with_suffix(".tmp.npz")
    np.savez(half_written, key=key, names=np.array(list(rendered)), images=np.stack(list(rendered.values())))
    half_written.replace(cache)
    return rendered
