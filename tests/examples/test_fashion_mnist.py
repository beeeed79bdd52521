"""Fashion-MNIST: where its files lie, what is refused, and the batches made of it."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import fashion_mnist


def write_idx(path, pixels, header=None):
    values = header or [{1: 0x0801, 3: 0x0803}[pixels.ndim], *pixels.shape]
    path.write_bytes(gzip.compress(np.array(values, ">u4").tobytes() + pixels.tobytes()))


def test_an_idx_file_reads_as_it_was_written(tmp_path):
    for shape in ((5, 4, 3), (7,)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        write_idx(tmp_path / "some.gz", pixels)
        assert np.array_equal(fashion_mnist.read_idx(tmp_path / "some.gz", shape), pixels)


def test_other_files_are_refused(tmp_path):
    path, pixels = tmp_path / "some.gz", np.zeros((5, 4, 3), np.uint8)
    write_idx(path, pixels)
    with pytest.raises(ValueError, match=r"begins with \[2051, 5, 4, 3\]; .* \[2051, 6, 4, 3\]"):
        fashion_mnist.read_idx(path, (6, 4, 3))
    write_idx(path, pixels, [0x0D03, 5, 4, 3])
    with pytest.raises(ValueError, match="begins with"):
        fashion_mnist.read_idx(path, (5, 4, 3))
    write_idx(path, pixels[:4], [0x0803, 5, 4, 3])
    with pytest.raises(ValueError, match="holds 48 bytes after its header, 60 are expected"):
        fashion_mnist.read_idx(path, (5, 4, 3))
    path.write_bytes(gzip.compress(b"\0\0"))
    with pytest.raises(ValueError, match="begins with"):
        fashion_mnist.read_idx(path, (5, 4, 3))
    with pytest.raises(fashion_mnist.NoImagesError, match=r"no file .*none\.gz"):
        fashion_mnist.read_idx(tmp_path / "none.gz", (5,))


def test_missing_images_say_how_to_get_them_and_the_script_skips(tmp_path, capsys):
    with pytest.raises(fashion_mnist.NoImagesError, match="apt-get download dataset-fashion-mnist"):
        fashion_mnist.fashion_mnist(tmp_path)
    fashion_mnist.main(["--folder", str(tmp_path)])
    assert capsys.readouterr().out.startswith("skipped: Fashion-MNIST is not on this machine. Get it with: apt-get")


def test_images_are_those_of_the_package():
    try:
        parts = fashion_mnist.fashion_mnist()
    except fashion_mnist.NoImagesError as missing:
        pytest.skip(str(missing))
    for (images, labels), count in zip(parts, (60_000, 10_000), strict=True):
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.float32
        assert images.min() == -1 and images.max() == 1
        assert labels.bincount().tolist() == [count // 10] * 10
    # The first test image: an ankle boot in the middle rows, its sole below, its shaft on the right.
    image, label = parts[1][0][0, 0], parts[1][1][0]
    assert fashion_mnist.CLASSES[label] == "ankle boot" and (image[:7] == -1).all() and (image[22:] == -1).all()
    assert image[20].mean() > image[8].mean() and image[:, 14:].mean() > image[:, :14].mean()


def test_training_images_are_mirrored_moved_and_partly_erased(monkeypatch):
    images = torch.rand(256, 1, 28, 28)
    draw = lambda: fashion_mnist.augmented(images, torch.Generator().manual_seed(0))
    assert torch.equal(draw(), draw())
    monkeypatch.setattr(fashion_mnist, "ERASED", 0.0)
    moved = draw()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    at = lambda down, across: padded[:, :, down : down + 28, across : across + 28]
    shifts = [at(down, across) for down in range(5) for across in range(5)]
    same, mirrored = (
        torch.stack([(moved == other).flatten(1).all(1) for other in others])
        for others in (shifts, [one.flip(-1) for one in shifts])
    )
    assert (same.sum(0) + mirrored.sum(0) == 1).all() and 96 < mirrored.sum() < 160
    assert (same | mirrored).any(1).all()  # every shift occurs
    monkeypatch.setattr(fashion_mnist, "ERASED", 1.0)
    part = (draw() != moved).flatten(1).float().mean(1)
    assert part.min() > 0.01 and part.max() < 0.25 and 0.07 < part.mean() < 0.13


def test_a_training_that_was_cut_short_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    images, labels = torch.rand(24, 1, 28, 28), torch.arange(24) % 10
    file = tmp_path / "training.pt"

    def trained(epochs_seen=None):
        torch.manual_seed(0)
        model = fashion_mnist.new_vit()
        if epochs_seen is not None:
            monkeypatch.setattr(fashion_mnist, "tqdm", lambda steps, **_: list(steps)[:epochs_seen])
        fashion_mnist.train(model, (images, labels), 3, 1e-3, 8, checkpoint=file if epochs_seen else None)
        return model.state_dict()

    whole = trained()
    trained(3)
    assert file.exists()
    rest = trained(99)
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


def test_the_vits_take_these_images():
    for size, count in {"small": 1_199_882, "large": 3_574_282}.items():
        model = fashion_mnist.new_vit(size).eval()
        assert sum(p.numel() for p in model.parameters()) == count
        with torch.no_grad():
            assert model(pixel_values=torch.zeros(2, 1, 28, 28)).logits.shape == (2, 10)
        assert model.config.id2label[9] == "ankle boot"
        assert Path(fashion_mnist.__file__).read_text().count(f"{count:,}") == 1
