"""Fine-tune a real 4-bit language model through a side network, next to QLoRA on the same steps.

    python -m examples.demo                      # the project's own base model, about five minutes on two CPU cores
    python -m examples.demo --model NAME         # any supported causal language model, by path or hub name

The base was trained on Python's standard library; the task is the source of the installed `transformers` package, which
is Python of another kind. Prints perplexities, one table, a completion before and after; writes two plots.
"""

import argparse
import copy
import math
import random
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from examples.corpus import BlockDataset, blocks, held_out_loss, split, stdlib_files, tokens, transformers_files
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst.base_model import forbid_packing
from hf_qst.planning import SavedForBackward
from hf_qst_plugins.inputs import nf4

BASE = Path(__file__).parent / "base_model"
# The best of those tried for each method on this base and task, by held-out loss (docs/results/).
LEARNING_RATE = {"QST": 3e-3, "QLoRA": 4e-3}
SIDE_R = 2


@dataclass
class Run:
    """The run of one method: curve of (seconds of training, held-out loss) and the figures of the table."""

    name: str
    curve: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    trainable: int = 0
    saved_bytes: int = 0
    file_bytes: int = 0
    loss: float = math.nan
    old_loss: float = math.nan


def load_base(model: str, device: str, dtype: torch.dtype | None = None):
    """The base in NF4, computing in `dtype`, by default float32 on a CPU and bfloat16 on a GPU.

    Both methods get the float32 product, on processors with AVX512-BF16 too: LoRA needs it, see `forbid_packing`.
    """
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=nf4(dtype), dtype=dtype, device_map={"": device}
    )
    forbid_packing(base)
    return base


def adapters(calibration: list[dict]) -> dict:
    """The two methods, each with its own configuration."""
    return {
        "QST": QSTConfig(
            task_type="CAUSAL_LM",
            r=SIDE_R,
            side_every=2,
            readout_every=1,
            downsample="principal",
            calibration_data=calibration,
        ),
        "QLoRA": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    }


class Curve(TrainerCallback):
    """Held-out loss every few steps, with the clock stopped while it is taken."""

    def __init__(self, run: Run, rows: torch.Tensor, every: int, batch: int):
        self.run, self.rows, self.every, self.batch = run, rows, every, batch

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.run.curve.append((0.0, held_out_loss(model, self.rows, self.batch)))
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        self.run.seconds += time.perf_counter() - self.started
        self.run.curve.append((self.run.seconds, held_out_loss(model, self.rows, self.batch)))
        self.started = time.perf_counter()


def bytes_for_backward(model, rows: torch.Tensor) -> int:
    """The most bytes one training step on `rows` keeps for its backward pass."""
    model.train()
    rows = rows.to(next(model.parameters()).device)
    with SavedForBackward(model) as saved:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    model.zero_grad()
    return saved.peak


def fine_tune(name: str, model, data: dict, args, folder: str, rate: float) -> Run:
    """Train an adapter with the ordinary Trainer at this learning rate and save it to `folder`."""
    run = Run(name, trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))
    run.saved_bytes = bytes_for_backward(model, data["train"][: args.batch])
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=args.every,
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        seed=args.seed,
        dataloader_pin_memory=False,
    )
    curve = Curve(run, data["curve"], args.every, args.batch)
    Trainer(model, settings, train_dataset=BlockDataset(data["train"]), callbacks=[curve]).train()
    run.step_seconds = run.seconds / args.steps
    run.loss = held_out_loss(model, data["held"], args.batch)
    run.old_loss = held_out_loss(model, data["old"], args.batch)
    model.save_pretrained(folder)
    run.file_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return run


def complete(model, tokenizer, prompt: str, length: int = 48) -> str:
    """A greedy completion."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.eval()
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def print_table(runs: list[Run], base_loss: float, base_old: float) -> None:
    """One row a method."""
    header = ("", "loss", "perplexity", "old text", "s/step", "for backward", "trainable", "adapter file")
    rows = [("base (NF4)", f"{base_loss:.3f}", f"{math.exp(base_loss):.2f}", f"{base_old:.3f}", "", "", "", "")]
    rows += [
        (
            run.name,
            f"{run.loss:.3f}",
            f"{math.exp(run.loss):.2f}",
            f"{run.old_loss:.3f}",
            f"{run.step_seconds:.2f}",
            f"{run.saved_bytes / 1e6:.1f} MB",
            f"{run.trainable:,}",
            f"{run.file_bytes / 1e6:.2f} MB",
        )
        for run in runs
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print("\nHeld-out text of the new kind (loss in nats per token), and what was not forgotten of the old:")
    for row in [header, *rows]:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def loss_at(run: Run, seconds: float) -> float:
    """Held-out loss after that much training, linear between two measurements; the last one beyond the end."""
    for (t0, l0), (t1, l1) in zip(run.curve, run.curve[1:], strict=False):
        if seconds <= t1:
            return l0 + (l1 - l0) * (seconds - t0) / (t1 - t0)
    return run.curve[-1][1]


def plot(runs: list[Run], folder: Path) -> list[Path]:
    """Loss against seconds, and bytes kept for the backward pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = [folder / "loss.png", folder / "memory.png"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for run in runs:
        axes.plot(*zip(*run.curve, strict=True), marker="o", markersize=3, label=run.name)
    axes.set(xlabel="seconds of training", ylabel="held-out loss (nats per token)", title="A new kind of text")
    axes.legend()
    figure.tight_layout()
    figure.savefig(paths[0], dpi=120)

    figure, axes = plt.subplots(figsize=(6, 4))
    bars = axes.bar([run.name for run in runs], [run.saved_bytes / 1e6 for run in runs], color=["C0", "C1"])
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="MB kept for the backward pass", title="Memory above the base, one training step")
    figure.tight_layout()
    figure.savefig(paths[1], dpi=120)
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default=str(BASE), help=HELP)
    parser.add_argument("--steps", type=int, default=180, help="training steps of each method")
    parser.add_argument("--batch", type=int, default=4, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--files", type=int, default=500, help="training files, drawn at random")
    parser.add_argument("--every", type=int, default=40, help="steps between two held-out measurements")
    parser.add_argument("--held-blocks", type=int, default=96, help="held-out blocks of each kind of text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the plots and adapters")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    # Of the libraries about themselves: a renamed argument, an optional kernel package that is not installed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Failed to load CPU gemm_4bit_forward")
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)

    print(f"Loading {args.model} in NF4 on {args.device}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = load_base(args.model, args.device)
    train_files, held_files = split(transformers_files())
    _, old_files = split(stdlib_files())
    if args.files < len(train_files):
        train_files = random.Random(args.seed).sample(train_files, args.files)
    data = {
        "train": blocks(tokens(train_files, tokenizer), args.length),
        "held": blocks(tokens(held_files, tokenizer), args.length, args.held_blocks),
        "old": blocks(tokens(old_files, tokenizer), args.length, args.held_blocks),
    }
    data["curve"] = data["held"][:: max(1, len(data["held"]) // 32)]
    base_loss, base_old = (held_out_loss(base, data[key], args.batch) for key in ("held", "old"))
    print(
        f"Perplexity of the base: {math.exp(base_old):.2f} on the standard library, {math.exp(base_loss):.2f} on transformers"
    )

    prompt = "@dataclass\nclass LlamaConfig(PreTrainedConfig):\n    model_type ="
    before = complete(base, tokenizer, prompt)
    runs = []
    calibration = [{"input_ids": rows} for rows in data["train"][:16].split(args.batch)]
    for name, config in adapters(calibration).items():
        set_seed(args.seed)
        print(
            f"\n{name}: {args.steps} steps of {args.batch} x {args.length} tokens, learning rate {LEARNING_RATE[name]}"
        )
        # Each method gets its own copy of the same quantised base.
        model = get_peft_model(copy.deepcopy(base), config)
        runs.append(fine_tune(name, model, data, args, str(args.output / name.lower()), LEARNING_RATE[name]))

    side, lora = runs
    print_table(runs, base_loss, base_old)
    seconds = min(side.seconds, lora.seconds)
    print(f"\nAt equal seconds ({seconds:.0f} s): QST {loss_at(side, seconds):.3f}, QLoRA {loss_at(lora, seconds):.3f}")
    print(
        f"QST's steps are {lora.step_seconds / side.step_seconds:.2f} times as fast and keep "
        f"{lora.saved_bytes / side.saved_bytes:.1f} times fewer bytes for the backward pass."
    )

    print("\nReloading the saved side network onto the base")
    reloaded = PeftModel.from_pretrained(base, args.output / "qst")
    again = held_out_loss(reloaded, data["held"], args.batch)
    print(
        f"Held-out loss {again:.6f}, before saving {side.loss:.6f}: {'the same' if again == side.loss else 'DIFFERENT'}"
    )
    print(f"\n--- before\n{prompt}{before}\n--- after\n{prompt}{complete(reloaded, tokenizer, prompt)}\n---")
    for path in plot(runs, args.output):
        print(f"Wrote {path}")
    print(f"Done in {time.perf_counter() - started:.0f} s")
    if again != side.loss:
        raise SystemExit("the reloaded side network does not give the same loss")


if __name__ == "__main__":
    main()
