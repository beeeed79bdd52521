"""Fashion-MNIST: 70,000 images of clothes in ten classes, from a Debian package, and vision transformers for them.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb ~/.cache/hf_qst/fashion-mnist    # once
    python -m examples.fashion_mnist                # where the images are, and how many of each class

    training, test = fashion_mnist()                # images [60000, 1, 28, 28] and [10000, 1, 28, 28], labels

The images and labels are those of Xiao, Rasul and Vollgraf, arXiv 1708.07747, in the idx format of MNIST.
"""

from __future__ import annotations

import argparse
import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from examples.corpus import cache_folder
from hf_qst.saved import whole_file

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


# Widths of the two vision transformers, and how they are trained; the large one is for a GPU.
SIZES = {
    "small": {"patch_size": 7, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
    "large": {"patch_size": 4, "hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3},
}
TRAINING = {
    "small": {"epochs": 6, "learning_rate": 1e-3, "batch": 64},
    "large": {"epochs": 20, "learning_rate": 1e-3, "batch": 512},
}
WEIGHT_DECAY, SMOOTHING, WARM_UP, GRADIENT_NORM = 0.05, 0.1, 0.05, 1.0
# Augmentation: most pixels of a shift, chance of a patch without image, its part of the image, and its aspect ratio.
SHIFT, ERASED, AREA, ASPECT = 2, 0.5, (0.02, 0.2), 3.3


def new_vit(size: str = "small") -> ViTForImageClassification:
    """A ViT of 1,199,882 parameters (6 blocks of width 128, patches of 7 x 7 pixels), or the `"large"` one.

    That has 3,574,282: 8 blocks of width 192, patches of 4 x 4.
    """
    widths = SIZES[size]
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            num_channels=1,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: index for index, name in enumerate(CLASSES)},
            intermediate_size=4 * widths["hidden_size"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **widths,
        )
    )


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [n, 1, h, w], each mirrored half of the time, moved by up to `SHIFT` pixels, and some with a patch erased.

    Args:
        generator: on the CPU, so that every device draws the same.
    """
    count, _, height, width = images.shape
    device = images.device
    mirror, down, across, erase, area, aspect, top, left, grey = torch.rand(9, count, generator=generator).to(device)
    at_row, at_column = torch.arange(height, device=device), torch.arange(width, device=device)
    shift = lambda drawn: (drawn * (2 * SHIFT + 1)).long()[:, None]
    rows, columns = at_row + shift(down), at_column + shift(across)
    columns = torch.where(mirror[:, None] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (SHIFT,) * 4, value=-1.0)[:, 0]
    moved = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None]]
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    aspect = ASPECT ** (2 * aspect - 1)
    inside = []
    for size, side, start, positions in (
        (height, (area * aspect).sqrt(), top, at_row),
        (width, (area / aspect).sqrt(), left, at_column),
    ):
        first = (start * (1 - side) * size)[:, None]
        inside.append((positions >= first) & (positions < first + (side * size)[:, None]))
    patch = inside[0][:, :, None] & inside[1][:, None] & (erase < ERASED)[:, None, None]
    return torch.where(patch, (2 * grey - 1)[:, None, None], moved)[:, None]


def train(
    model: nn.Module,
    data: Images,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> None:
    """Train a model on augmented images, on the device it is on: AdamW, warm-up, then a cosine.

    Args:
        data: images [n, 1, 28, 28] with labels [n].
        epochs: passes over them; a part of one is allowed.
        checkpoint: a file written after every pass. Where it is there, the training goes on from it.
    """
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in data)
    passes = max(1, len(labels) // batch)
    steps = max(1, int(epochs * passes))
    warm_up = max(1, int(WARM_UP * steps))
    rate = lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if checkpoint is not None and checkpoint.exists():
        states = torch.load(checkpoint, map_location="cpu")
        done = states.pop("done")
        for name, state in states.items():
            parts[name].load_state_dict(state)
    model.train()
    bar = tqdm(range(done, steps), desc="training", unit="step", initial=done, total=steps, mininterval=5)
    for step in bar:
        epoch, place = divmod(step, passes)
        if place == 0 or step == done:
            # Of the epoch alone, so that a training that goes on draws as one that was never cut short.
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            order = torch.randperm(len(labels), generator=generator).to(device)
        picked = order[place * batch : (place + 1) * batch]
        logits = model(pixel_values=augmented(images[picked], generator)).logits
        F.cross_entropy(logits, labels[picked], label_smoothing=SMOOTHING).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if checkpoint is not None and place == passes - 1:
            states = {name: part.state_dict() for name, part in parts.items()}
            with whole_file(checkpoint) as temporary:
                torch.save({"done": step + 1, **states}, temporary)
    model.eval()


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
