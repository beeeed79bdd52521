"""What a side network costs when the tuned model runs: reading a prompt and writing tokens, next to the bare base and LoRA.

    python -m benchmarks.side_tuning.inference --model smollm2
    python -m benchmarks.side_tuning.inference --model smollm2 --rows 1 16 --prompt 256 --new 32

All models hold the same 4-bit base and take turns. A base in evaluation mode runs the kernel that bitsandbytes chooses for
the processor. Prints a table and writes it to `benchmarks/results/side_tuning_inference.json`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from torch import nn
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import in_turns, paired_ratio, processor_clock
from benchmarks.side_tuning import methods
from benchmarks.side_tuning.bases import copy_of, load_base
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig


def _of(name: str):
    return lambda base: methods.METHODS[name].make(base, [])


METHODS = {
    "base": lambda base: base,
    "QST": _of("qst"),
    "QST, paper's settings": _of("qst-paper"),
    "QST, tail of 4 blocks": lambda base: get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", tail_layers=4)),
    "LoRA, not merged": _of("qlora"),
    "LoRA, merged": lambda base: _of("qlora")(base).merge_and_unload(),
}


@torch.no_grad()
def measure(models: dict[str, nn.Module], rows: int, prompt: int, new: int, repeats: int, device) -> dict:
    """Tokens a second of all rows together for each model, and the parts of the base's speed that it reaches."""
    vocabulary = models["base"].config.vocab_size
    ids = torch.randint(vocabulary, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    start = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8]), "pad_token_id": 0}
    length = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    clock = {} if device.type == "cuda" else {"clock": processor_clock}
    calls = {
        "prefill": {name: lambda m=m: m(input_ids=ids, use_cache=True, logits_to_keep=1) for name, m in models.items()},
        "decode": {name: lambda m=m: m.generate(**start, **length) for name, m in models.items()},
    }
    result = {name: {} for name in models}
    for kind, count in (("prefill", rows * prompt), ("decode", rows * new)):
        times = in_turns(calls[kind], repeats, device, **clock)
        for name in models:
            result[name][kind] = count / median(times[name])
            result[name][f"{kind}_of_base"] = paired_ratio(times, "base", name)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.inference", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="models to compare; the base is always there",
    )
    add("--rows", type=int, nargs="+", default=[1, 16], help="sequences at once")
    add("--prompt", type=int, default=256, help="tokens of a prompt")
    add("--new", type=int, default=32, help="tokens written")
    add("--repeats", type=int, default=5, help="timed rounds")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--output", type=Path, default=RESULTS / "side_tuning_inference.json")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("prompt", "new", "repeats", "threads"))
    require_device(parser, args)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)

    device = torch.device(args.device)
    base = load_base("demo", args.model, device, packed=True)
    # bitsandbytes may rewrite the 4-bit weights for its kernel, so each model has its own.
    models = {
        name: METHODS[name](copy_of(base, own_quantized=True)).eval()
        for name in METHODS
        if name == "base" or name in args.methods
    }
    report = {"arguments": as_json(vars(args)) | {"model": Path(args.model).name}, **environment(device), "rows": {}}
    for rows in args.rows:
        report["rows"][str(rows)] = result = measure(models, rows, args.prompt, args.new, args.repeats, device)
        lines = [
            [name, *(f"{value[key]:.2f}x" if key.endswith("base") else f"{value[key]:.1f}" for key in value)]
            for name, value in result.items()
        ]
        print(f"\n{rows} rows, tokens a second")
        print(markdown(["", "prefill", "of the base", "decode", "of the base"], lines))
    write_json(args.output, report)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
