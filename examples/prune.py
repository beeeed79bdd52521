"""Prune a language model by learned widths, save the smaller model, load it again, recover it with LoRA.

    python -m examples.prune                             # the project's own base model, a few minutes on one CPU core
    python -m examples.prune --model NAME                # any supported causal language model, by path or hub name

Learns on the Python standard library which channels each block needs, and reports the perplexity on files of it that were
held out. For a model and text of your own, give a training set of your own: text of the kind the model will see.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from examples.compress_llm import PROMPT, report
from examples.corpus import BlockDataset, blocks, split, stdlib_files, tokens
from examples.demo import BASE, complete
from examples.real_model import HELP, model_argument
from hf_qst import DISPCallback, DISPConfig


def train(model, rows: torch.Tensor, steps: int, args, name: str, callbacks=(), **arguments) -> None:
    """The ordinary Trainer, for both trainings."""
    settings = TrainingArguments(
        output_dir=str(args.output / name),
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        bf16=args.device != "cpu",
        dataloader_pin_memory=False,
        seed=args.seed,
        **arguments,
    )
    Trainer(model, settings, train_dataset=BlockDataset(rows), callbacks=list(callbacks)).train()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default=str(BASE), help=HELP)
    parser.add_argument("--keep", type=float, default=0.5, help="part of the weights in the blocks to keep")
    parser.add_argument("--width-multiple", type=int, help="widths are multiples of it")
    parser.add_argument("--steps", type=int, default=300, help="steps of learning the widths")
    parser.add_argument("--recovery-steps", type=int, default=60, help="steps of LoRA on the smaller model")
    parser.add_argument("--batch", type=int, default=2, help="rows in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--training-blocks", type=int, default=20_000, help="rows to train on")
    parser.add_argument("--held-blocks", type=int, default=64, help="rows to measure the perplexity on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("demo_output/prune"), help="folder of the small model")
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held_out = split(stdlib_files())
    rows = blocks(tokens(training, tokenizer), args.length, args.training_blocks)
    held = blocks(tokens(held_out, tokenizer), args.length, args.held_blocks)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    report("dense", base, held)

    # Learn: the base is frozen, a hypernetwork learns which channels each block reads and writes. The callback starts it
    # from scores of the training data; the rate is twice the paper's, which is for ten thousand steps.
    config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=args.keep, width_multiple=args.width_multiple or "auto")
    model = get_peft_model(base, config)
    train(
        model,
        rows,
        args.steps,
        args,
        "learning",
        callbacks=[DISPCallback(plot_directory=args.output)],
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        weight_decay=0.05,
        max_grad_norm=0.0,
    )

    # Cut: the smaller model is an ordinary one, without PEFT.
    small = model.merge_and_unload().eval()
    report("pruned", small, held)

    # An ordinary model folder; loads with the Auto class after `import hf_qst`.
    small.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    again = AutoModelForCausalLM.from_pretrained(args.output / "model", dtype=dtype).to(args.device).eval()
    report("reloaded", again, held)
    with torch.no_grad():
        logits = [one(input_ids=held[:2].to(args.device)).logits for one in (small, again)]
    if not torch.equal(*logits):
        raise SystemExit("the reloaded model does not give the same outputs")

    # Recover: whatever tunes a transformers model tunes this one.
    started = time.perf_counter()
    lora = get_peft_model(again, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    train(lora, rows, args.recovery_steps, args, "recovery", learning_rate=1e-3, warmup_steps=3)
    print(f"Recovered in {time.perf_counter() - started:.0f} s.")
    recovered = lora.merge_and_unload().eval()
    report("recovered", recovered, held)
    recovered.save_pretrained(args.output / "recovered")
    tokenizer.save_pretrained(args.output / "recovered")
    print(f"Wrote {args.output}\n---\n{PROMPT}{complete(recovered, tokenizer, PROMPT, 32)}\n---")


if __name__ == "__main__":
    main()
