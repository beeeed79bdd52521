"""Fashion-MNIST: 70,000 images of clothes in ten classes, from a Debian package, and a vision transformer for them.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb ~/.cache/hf_qst/fashion-mnist    # once
    python -m examples.fashion_mnist                # where the images are, and how many of each class

    training, test = fashion_mnist()                # images [60000, 1, 28, 28] and [10000, 1, 28, 28], labels

The images and labels are those of Xiao, Rasul and Vollgraf, arXiv 1708.07747, in the idx format of MNIST.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from examples.corpus import cache_folder

PLACE = "usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
_PARTS = {"train": 60_000, "t10k": 10_000}
# The magic number says: unsigned bytes, and the number of dimensions.
_MAGIC = {1: 0x0801, 3: 0x0803}

Images = tuple[torch.Tensor, torch.Tensor]


class NoImagesError(FileNotFoundError):
    """The images are not on this machine; the message says how to get them."""


def fashion_mnist(folder: str | Path | None = None) -> tuple[Images, Images]:
    """Training and test images [n, 1, 28, 28] in [-1, 1], with labels [n] int64.

    Args:
        folder: where the package was unpacked (default: `/`, where it is installed, then the user's cache).

    Raises:
        NoImagesError: the package is neither installed nor unpacked.
        ValueError: a file is no idx file of the expected size.
    """
    place = find(folder)
    training, test = (
        (
            torch.from_numpy(read_idx(place / f"{part}-images-idx3-ubyte.gz", (count, SIDE, SIDE)))[:, None] / 127.5
            - 1,
            torch.from_numpy(read_idx(place / f"{part}-labels-idx1-ubyte.gz", (count,))).long(),
        )
        for part, count in _PARTS.items()
    )
    return training, test


def find(folder: str | Path | None = None) -> Path:
    """The folder of the four files.

    Raises:
        NoImagesError: there is none.
    """
    roots = [Path(folder)] if folder else [Path("/"), cache_folder() / "fashion-mnist"]
    for place in (root / PLACE for root in roots):
        if place.is_dir():
            return place
    raise NoImagesError(
        "Fashion-MNIST is not on this machine. Get it with: apt-get download dataset-fashion-mnist && "
        f"dpkg -x dataset-fashion-mnist_*.deb {cache_folder() / 'fashion-mnist'}"
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a packed idx file as an array of this shape.

    Raises:
        NoImagesError: there is no such file.
        ValueError: the magic number, a size in the header, or the number of bytes is another.
    """
    if not path.is_file():
        raise NoImagesError(f"there is no file {str(path)!r}")
    data = gzip.decompress(path.read_bytes())
    expected = [_MAGIC[len(shape)], *shape]
    header = [int.from_bytes(data[4 * at : 4 * at + 4], "big") for at in range(len(expected))]
    if header != expected:
        raise ValueError(f"{str(path)!r} begins with {header}; an idx file of this data set begins with {expected}")
    pixels = np.frombuffer(data, np.uint8, offset=4 * len(expected))
    if pixels.size != np.prod(shape):
        raise ValueError(f"{str(path)!r} holds {pixels.size} bytes after its header, {np.prod(shape)} are expected")
    return pixels.reshape(shape).copy()


def new_vit() -> ViTForImageClassification:
    """A ViT of 1,199,882 parameters: 6 blocks of width 128, patches of 7 x 7 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=7,
            num_channels=1,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: index for index, name in enumerate(CLASSES)},
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def flipped(items: list[dict]) -> dict[str, torch.Tensor]:
    """A batch for training, in which every image is mirrored half of the time: clothes lie either way."""
    images = torch.stack([item["pixel_values"] for item in items])
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    labels = torch.stack([item["labels"] for item in items])
    return {"pixel_values": torch.where(mirrored, images.flip(-1), images), "labels": labels}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the package was unpacked")
    args = parser.parse_args(argv)
    try:
        place = find(args.folder)
    except NoImagesError as missing:
        print(f"skipped: {missing}")
        return
    print(place)
    for name, (images, labels) in zip(("training", "test"), fashion_mnist(args.folder), strict=True):
        counts = ", ".join(f"{kind} {n}" for kind, n in zip(CLASSES, labels.bincount().tolist(), strict=True))
        print(f"{name}: {len(images):,} images ({counts})")


if __name__ == "__main__":
    main()
