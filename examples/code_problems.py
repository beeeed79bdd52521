"""Fine-tune the project's 4-bit base model on small function-completion problems, then measure pass@k on others.

    python -m examples.code_problems                     # QST, five minutes of training on one CPU core, then sampling
    python -m examples.code_problems --method lora       # LoRA inside the base on the same steps

The training problems and the shipped ones come from one grammar and share no specification. The completions are
executed, in the sandbox of `hf_qst_plugins.code_evaluation`: running this script is the consent to that.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from examples.demo import BASE, load_base
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst_plugins.code_evaluation import evaluate, read_problems, training_pairs

LEARNING_RATE = {"qst": 4e-3, "lora": 4e-3}


class CompletionBlocks(torch.utils.data.Dataset):
    """Problems one after another in blocks of `length` tokens; only the solutions are learned, not the prompts.

    Each is the end-of-text token, the prompt, the solution, as the base saw files in its own training; evaluation
    starts its prompts in the same way. Items: {"input_ids": [length], "labels": [length]}, int64, -100 in the prompts.
    """

    def __init__(self, pairs: list[tuple[str, str]], tokenizer, length: int):
        ids, labels = [], []
        for prompt, solution in pairs:
            # Cut where evaluation cuts: after the prompt's last visible character.
            head, tail = prompt.rstrip(), prompt[len(prompt.rstrip()) :] + solution
            prompt_ids, solution_ids = tokenizer([head, tail], add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id, *prompt_ids, *solution_ids]
            # The end-of-text token that opens the next text also closes this one: it is learned.
            labels += [tokenizer.eos_token_id, *[-100] * len(prompt_ids), *solution_ids]
        rows = len(ids) // length
        self.input_ids, self.labels = (torch.tensor(part[: rows * length]).view(rows, length) for part in (ids, labels))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def load(model: str, device: str, quantized: bool):
    """The frozen base: NF4, or float32."""
    if quantized:
        return load_base(model, device)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)


def fine_tune(base, tokenizer, args):
    """An adapter on `base`, trained with the ordinary Trainer and saved to `args.output`."""
    # One pass: a problem is 60 to 80 tokens.
    pairs = training_pairs(args.steps * args.batch * args.length // 50, args.seed)
    data = CompletionBlocks(pairs, tokenizer, args.length)
    if args.method == "qst":
        calibration = [{"input_ids": rows} for rows in data.input_ids[:32].split(args.batch)]
        config = QSTConfig(task_type="CAUSAL_LM", r=args.r, downsample="principal", calibration_data=calibration)
    else:
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)
    settings = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate or LEARNING_RATE[args.method],
        lr_scheduler_type="linear",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=args.device == "cpu",
        seed=args.seed,
        dataloader_pin_memory=False,
    )
    Trainer(model, settings, train_dataset=data).train()
    model.save_pretrained(args.output)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default=str(BASE), help=HELP)
    parser.add_argument("--method", choices=tuple(LEARNING_RATE), default="qst")
    parser.add_argument("--float32", action="store_true", help="keep the base in float32 instead of NF4")
    parser.add_argument("--r", type=int, default=2, help="QST's reduction factor")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--learning-rate", type=float, help=f"default: {LEARNING_RATE}")
    parser.add_argument("--samples", type=int, default=15, help="completions of each problem")
    parser.add_argument("--problems", type=int, help="only the first so many of the shipped problems")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.2, 0.5, 0.8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output/code_problems"), help="folder of the adapter")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    started = time.perf_counter()
    model = fine_tune(load(args.model, args.device, not args.float32), tokenizer, args)
    print(f"Trained for {time.perf_counter() - started:.0f} s; the adapter is in {args.output}")

    problems = read_problems()[: args.problems]
    for temperature in args.temperatures:
        report = evaluate(
            model,
            tokenizer,
            problems,
            samples=args.samples,
            generate_kwargs={"temperature": temperature, "top_p": 0.95, "max_new_tokens": 160},
            prefix=tokenizer.eos_token,
            out=args.output / f"temperature_{temperature}.jsonl",
            seed=args.seed,
            overwrite=True,
            allow_execution=True,
        )
        print(f"\nTemperature {temperature}\n{report.summary()}")


if __name__ == "__main__":
    main()
