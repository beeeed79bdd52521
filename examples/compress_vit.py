"""Compress a vision transformer by mixed-rank factors, fine-tune the factors, save the smaller model and load it again.

    python -m examples.compress_vit                      # about a minute on one CPU core
    python -m examples.compress_vit --keep 0.2

The model is a small ViT, trained here on scikit-learn's handwritten digits (1,797 real images that come with the
package). For a model of your own, everything from `compress` on stays as it is.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_qst import MixedRankConfig

Images = tuple[torch.Tensor, torch.Tensor]
TEST_IMAGES = 540
_EVALUATED = 250


def digits(seed: int = 0) -> tuple[Images, Images]:
    """Training and test images [n, 1, 8, 8] in [-1, 1] with labels [n], split at random by `seed`."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images = torch.from_numpy(images[order] / 8 - 1).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels[order])
    return (images[:-TEST_IMAGES], labels[:-TEST_IMAGES]), (images[-TEST_IMAGES:], labels[-TEST_IMAGES:])


def new_vit() -> ViTForImageClassification:
    """A ViT of 202,186 parameters: 4 blocks of width 64, patches of 2 x 2 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            hidden_dropout_prob=0.1,
        )
    )


def train(
    model,
    data: Images,
    epochs: float,
    learning_rate: float,
    folder: str | Path,
    seed: int = 0,
    collate: Callable[[list[dict]], dict] | None = None,
) -> None:
    """Train whatever of the model is trainable, with the ordinary Trainer.

    Args:
        folder: of the Trainer's files.
        collate: makes a batch of items (default: puts them together).
    """
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    items = [{"pixel_values": image, "labels": label} for image, label in zip(*data, strict=True)]
    Trainer(model, settings, train_dataset=items, data_collator=collate).train()


@torch.no_grad()
def accuracy(model, data: Images) -> float:
    """Percent of the images whose class the model tells."""
    device = next(model.parameters()).device
    model.eval()
    right = sum(
        (model(pixel_values=images.to(device)).logits.argmax(-1).cpu() == labels).sum().item()
        for images, labels in zip(*(part.split(_EVALUATED) for part in data), strict=True)
    )
    return 100 * right / len(data[1])


def calibration(data: Images, count: int, batch: int = 64) -> list[dict]:
    """The first `count` images as batches of model inputs. Labels only matter to the layer weight `"fisher"`."""
    images, labels = data
    parts = zip(images[:count].split(batch), labels[:count].split(batch), strict=True)
    return [{"pixel_values": part, "labels": answers} for part, answers in parts]


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.4, help="part of the weights in the blocks to keep")
    parser.add_argument("--epochs", type=float, default=60, help="of the dense model's training")
    parser.add_argument("--fine-tune-epochs", type=float, default=10, help="of the factors' training; 0 for none")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output/compress_vit"), help="folder of the result")
    args = parser.parse_args(argv)
    set_seed(args.seed)
    training, test = digits(args.seed)

    model = new_vit()
    train(model, training, args.epochs, 2e-3, args.output / "trainer", args.seed)
    print(f"dense:      {count(model):>9,} parameters, {accuracy(model, test):.1f} % of {TEST_IMAGES} digits")

    # Compress: the ranks and factors come from a few images; nothing is trained.
    started = time.perf_counter()
    config = MixedRankConfig(keep_ratio=args.keep, calibration_data=calibration(training, args.images))
    model = get_peft_model(model, config)
    seconds = time.perf_counter() - started
    print(f"compressed: {count(model):>9,} parameters, {accuracy(model, test):.1f} %, in {seconds:.1f} s")

    # Optional: train the factors, and only them, with the same Trainer.
    if args.fine_tune_epochs:
        train(model, training, args.fine_tune_epochs, 5e-4, args.output / "trainer", args.seed)
        print(f"fine-tuned: {count(model):>9,} parameters, {accuracy(model, test):.1f} %")

    # A smaller transformers model, without PEFT around it. Loads after `import hf_qst`.
    small = model.merge_and_unload()
    small.save_pretrained(args.output / "model")
    again = AutoModelForImageClassification.from_pretrained(args.output / "model")
    print(f"reloaded:   {count(again):>9,} parameters, {accuracy(again, test):.1f} %, from {args.output / 'model'}")
    with torch.no_grad():
        logits = [one.cpu().eval()(pixel_values=test[0]).logits for one in (small, again)]
    if not torch.equal(*logits):
        raise SystemExit("the reloaded model does not give the same outputs")


if __name__ == "__main__":
    main()
