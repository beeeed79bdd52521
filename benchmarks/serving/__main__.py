"""A model and its smaller forms in vLLM: tokens a second, and greedy tokens beside those of transformers.

    make test-vllm                                                             # once: makes .vllm-venv
    .vllm-venv/bin/python -m benchmarks.serving --model FOLDER                 # a folder, or 'smollm2'
    .vllm-venv/bin/python -m benchmarks.serving --model FOLDER --forms forms   # keeps the smaller models there

The model is pruned by `flap`, factorised, and both, each time to the same part of its block weights. The dense model runs in
vLLM's own class for it and on the transformers backend, on which reshaped models run. All requests are one batch of prompts of
equal length, in float32, without compilation.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of, require_parts, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from examples.corpus import blocks, split, stdlib_files, tokens
from examples.real_model import BASE, HELP, model_argument
from hf_qst import MixedRankConfig, compress_model, prune_model

OUT = RESULTS / "serving.json"
BACKEND = "transformers backend"
FORMS = ("dense", "pruned", "factorised", "pruned and factorised")
CALIBRATION_ROWS, CALIBRATION_LENGTH = 16, 128


def make_forms(model: str, keep: float, folder: Path) -> dict[str, Path]:
    """Folders of the model and its smaller forms, made where they are not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = blocks(tokens(split(stdlib_files())[0], tokenizer), CALIBRATION_LENGTH, CALIBRATION_ROWS)
    data = [{"input_ids": part} for part in rows.split(2)]
    part = keep**0.5

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    makers = {
        "dense": load,
        "pruned": lambda: prune_model(load(), "flap", keep, calibration_data=data, width_multiple=1),
        "factorised": lambda: compress_model(load(), MixedRankConfig(keep_ratio=keep), data),
        "pruned and factorised": lambda: compress_model(
            prune_model(load(), "flap", part, calibration_data=data, width_multiple=1),
            MixedRankConfig(keep_ratio=part),
            data,
        ),
    }
    found = {form: folder / form.replace(" ", "_") for form in FORMS}
    for form, path in found.items():
        if not (path / "tokenizer_config.json").exists():
            makers[form]().save_pretrained(path)
            tokenizer.save_pretrained(path)
    return found


def in_transformers(path: Path, prompts: torch.Tensor, new: int, rounds: int) -> tuple[list[list[int]], float, int]:
    """Greedy tokens of each prompt, tokens a second (median), parameters."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    given = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    model.generation_config.eos_token_id = None

    def run() -> list[list[int]]:
        with torch.no_grad():
            found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **given)
        return found[:, prompts.shape[1] :].tolist()

    drawn, seconds = timed(run, rounds)
    return drawn, prompts.shape[0] * new / seconds, model.num_parameters()


def in_vllm(
    path: Path, prompts: torch.Tensor, new: int, rounds: int, model_impl: str = "auto"
) -> tuple[list[list[int]], float]:
    """Greedy tokens of each prompt, tokens a second (median)."""
    import vllm

    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in prompts.tolist()]
    served = vllm.LLM(
        str(path), dtype="float32", max_model_len=prompts.shape[1] + new, max_num_seqs=len(asked), enforce_eager=True,
        enable_prefix_caching=False, kv_cache_memory_bytes=2**28, model_impl=model_impl,
    )  # fmt: skip
    outputs, seconds = timed(partial(served.generate, asked, parameters, use_tqdm=False), rounds)
    del served
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs], len(asked) * new / seconds


def timed(run, rounds: int):
    """What `run` returns, and the median of its seconds after one round that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, median(times[1:])


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    forms = make_forms(args.model, args.keep, folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = blocks(tokens(split(stdlib_files())[1], tokenizer), args.prompt_tokens, args.requests)
    # First all of these: vLLM changes the class of a model that it serves, in this process.
    found = {form: in_transformers(path, prompts, args.new_tokens, args.rounds) for form, path in forms.items()}
    rows = []
    for form, where, model_impl in (
        *((form, BACKEND, "auto") for form in FORMS[1:]),
        ("dense", "vLLM's own class", "auto"),
        ("dense", BACKEND, "transformers"),
    ):
        drawn, speed, parameters = found[form]
        served, served_speed = in_vllm(forms[form], prompts, args.new_tokens, args.rounds, model_impl)
        rows.append({
            "form": form, "where": where, "parameters": parameters, "vllm": served_speed, "transformers": speed,
            "equal": sum(a == b for a, b in zip(drawn, served, strict=True)), "requests": len(drawn),
            "first": {"vllm": served[0], "transformers": drawn[0]},
        })  # fmt: skip
    return sorted(rows, key=lambda row: FORMS.index(row["form"]))


def report(rows: list[dict], tokenizer) -> str:
    columns = [
        "model",
        "in vLLM",
        "parameters",
        "vLLM, tokens/s",
        "transformers, tokens/s",
        "requests with equal tokens",
    ]
    lines = [
        [row["form"], row["where"], f"{row['parameters'] / 1e6:.1f} M", f"{row['vllm']:.1f}", f"{row['transformers']:.1f}",
         f"{row['equal']} of {row['requests']}"]
        for row in rows
    ]  # fmt: skip
    parts = [markdown(columns, lines, 2)]
    for row in rows:
        parts.append(f"{row['form']}, {row['where']}, the first request:")
        parts += [f"  {name:12} {ids[:24]}\n  {'':12} {tokenizer.decode(ids)!r}" for name, ids in row["first"].items()]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.serving", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default=str(BASE), help=HELP)
    add("--keep", type=float, nargs=1, default=[0.8], help="part of the block weights that stays")
    add("--requests", type=int, default=8)
    add("--prompt-tokens", type=int, default=32)
    add("--new-tokens", type=int, default=32)
    add("--rounds", type=int, default=3, help="timed rounds")
    add("--forms", type=Path, help="folder that keeps the smaller models")
    add("--output", type=Path, default=OUT)
    args = parser.parse_args(argv)
    require_positive(parser, args, ["requests", "prompt_tokens", "new_tokens", "rounds"])
    require_parts(parser, args, ["keep"])
    (args.keep,) = args.keep
    # Read when vLLM is imported: the engine in this process, as on one core others would only wait for it, no statistics sent.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(args, args.forms or Path(temporary))
    import vllm

    where = environment(torch.device("cpu"))
    where["versions"]["vllm"] = vllm.__version__
    write_json(args.output, {**where, "arguments": as_json(vars(args)), "rows": rows})
    print(report(rows, AutoTokenizer.from_pretrained(args.model)))


if __name__ == "__main__":
    main()
