"""Trains the project's small base model: a Llama-architecture model of Python source, from nothing.

    python -m examples.train_base --minutes 100 --run .cache/base_run --out examples/base_model
    python -m examples.train_base --minutes 100 --run .cache/base_run --resume
    python -m examples.train_base --run .cache/base_run --export-only /tmp/model

The data is the standard library of the running interpreter (see `examples/corpus.py`). `--run` is the folder of the
tokenizer and the checkpoints; a run that was cut short goes on with `--resume`, with the same batches as if it had
never stopped.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.base_model_card import END_OF_TEXT, card, evaluate, machine_name
from examples.corpus import blocks, held_out_loss, split, stdlib_files, tokens

PRE_TOKENIZE = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How text is cut before byte pairs are merged: a word with the one sign or blank before it (`.append`, ` def`), up to
three digits, a run of signs, a run of blanks but for its last. The last case puts a line break and the indentation
after it in one piece, so that a line of code costs one token of layout however deep it is."""

RESUMABLE = ("minutes", "steps", "run", "out", "resume", "export_only", "stop_at", "device", "threads", "compile",
             "checkpoint_minutes", "eval_minutes")  # fmt: skip
"""Options that may differ between a run and its continuation; the others come from the checkpoint."""


def train_tokenizer(texts: list[str], vocab: int, positions: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab` tokens, trained on `texts`; it has no unknown token and loses no byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model in float32 with the shape `args` gives; the same weights for the same `args.seed`."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=args.intermediate,
        max_position_embeddings=args.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # padding shares the end-of-text token, whose embedding must keep learning
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():  # what writes into the residual stream starts smaller, the deeper the stream
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * args.layers))
    return model


def epoch_windows(ids: np.ndarray, end: int, length: int, seed: int, epoch: int) -> np.ndarray:
    """The windows of one pass over `ids` [n]: [m, length + 1], their order drawn from (seed, epoch) alone.

    Each epoch shuffles the files and starts cutting at another offset, so no two epochs share a window: what repeats
    is the text, not the example. Windows overlap by the one token that is the last target here and the first input
    there.
    """
    draw = np.random.default_rng([seed, epoch])
    files = np.split(ids, np.flatnonzero(ids == end)[:-1] + 1)
    row = np.concatenate([files[i] for i in draw.permutation(len(files))])
    row = row[draw.integers(length) :]
    starts = np.arange((len(row) - 1) // length) * length
    windows = row[starts[:, None] + np.arange(length + 1)]
    return windows[draw.permutation(len(windows))]


def batches(ids: np.ndarray, end: int, args: argparse.Namespace, epoch: int, used: int) -> Iterator:
    """Endless (windows [batch, seq + 1], epoch, batches of the epoch used so far), going on after `used` of `epoch`."""
    while True:
        windows = epoch_windows(ids, end, args.seq, args.seed, epoch)
        count = len(windows) // args.batch
        if count == 0:
            raise ValueError(
                f"--batch {args.batch} --seq {args.seq} is more than the {len(ids)} training tokens; give less"
            )
        while used < count:
            part = windows[used * args.batch : (used + 1) * args.batch]
            used += 1
            yield torch.from_numpy(part.astype(np.int64)), epoch, used
        epoch, used = epoch + 1, 0


def matmul_speeds(device: torch.device, seconds: float = 0.3) -> dict[str, float]:
    """Measured GFLOP/s of `F.linear` by dtype name: what autocast buys differs sixfold between processors."""
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
        F.linear(a, b)
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            F.linear(a, b)[0, 0].item()
            count += 1
        speeds[str(dtype).removeprefix("torch.")] = count * 2 * 1024**3 / spent / 1e9
    return speeds


def next_token_loss(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of `window` [batch, length + 1]: inputs all but the last, targets all but the first."""
    hidden = model.model(input_ids=window[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all. Embedding and norms do not decay."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in n]
    fused = next(model.parameters()).is_cuda
    adamw = [{"params": others, "lr": args.lr, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        adamw.append({"params": matrices, "lr": args.lr, "weight_decay": args.weight_decay})
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, betas=(0.9, 0.95), eps=1e-8, fused=fused)]
    if args.optimizer == "muon":
        made.append(torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=args.weight_decay))
    for group in (g for optimizer in made for g in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return made


def lr_scale(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear up to `warmup`, then linear down to 0 at 1."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup))


def save_checkpoint(run: Path, model, optimizers, state: dict) -> Path:
    """Writes `run/step-N/` and removes older ones. It is written under another name and renamed when whole."""
    final = run / f"step-{state['step']:07d}"
    temporary = run / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
    tensors = {
        f"{which}.{index}.{key}": value.contiguous()
        for which, optimizer in enumerate(optimizers)
        for index, slots in optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }
    save_file(tensors, temporary / "optimizer.safetensors")
    model.config.save_pretrained(temporary)
    (temporary / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in run.glob("step-*"):
        if old != final and not old.name.endswith(f".tmp-{os.getpid()}"):
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(run: Path) -> Path:
    found = sorted(p for p in run.glob("step-*") if p.name.removeprefix("step-").isdigit())
    if not found:
        raise FileNotFoundError(f"--run {str(run)!r} holds no checkpoint; start a run there without --resume")
    return found[-1]


def load_optimizers(optimizers, path: Path) -> None:
    """Puts the tensors `save_checkpoint` wrote back into freshly made optimizers."""
    states: list[dict] = [{} for _ in optimizers]
    for name, value in load_file(path / "optimizer.safetensors").items():
        which, index, key = name.split(".")
        states[int(which)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_base",
        description="Train the small base model on the Python standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, default=Path(".cache/base_run"), help="folder of the tokenizer and the checkpoints")
    add("--out", type=Path, help="where the finished model goes; without it, write it later with --export-only")
    add("--resume", action="store_true", help="go on from the last checkpoint in --run, with its settings")
    add("--export-only", type=Path, metavar="DIR", help="write the last checkpoint of --run as a model; train nothing")
    add("--minutes", type=float, help="training time the learning-rate schedule is laid out for, over all resumes")
    add("--steps", type=int, help="number of steps the schedule is laid out for; with --minutes, whichever ends first")
    add("--stop-at", type=int, metavar="STEP", help="checkpoint and stop at this step, as an interruption would")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type of the matrix products; auto measures which is faster here. The weights are float32")  # fmt: skip
    add("--optimizer", choices=("auto", "muon", "adamw"), default="auto",
        help="auto is muon where bfloat16 products are fast (it works in them), else adamw")  # fmt: skip
    add("--compile", action="store_true", help="compile the loss with torch.compile")
    add("--threads", type=int, help="CPU threads; without it, torch's choice")
    add("--seed", type=int, default=0, help="of the initial weights and of the order of the data")
    add("--vocab", type=int, default=6144, help="tokens in the vocabulary")
    add("--hidden", type=int, default=384, help="width of the residual stream")
    add("--layers", type=int, default=6, help="decoder layers")
    add("--heads", type=int, default=6, help="attention heads; the hidden size is divided among them")
    add("--kv-heads", type=int, default=2, help="key and value heads, shared by groups of attention heads")
    add("--intermediate", type=int, default=1024, help="width inside the feed-forward blocks")
    add("--positions", type=int, default=512, help="longest context the configuration declares, in tokens")
    add("--seq", type=int, default=512, help="tokens per training window")
    add("--batch", type=int, default=16, help="windows per step")
    add("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--muon-lr", type=float, default=0.02, help="peak learning rate of Muon, before its scaling by shape")
    add("--weight-decay", type=float, default=0.1, help="decoupled decay of the matrices, times the learning rate")
    add("--warmup", type=float, default=0.02, help="share of the schedule the learning rate rises over")
    add("--clip", type=float, default=1.0, help="largest norm of the whole gradient")
    add("--held-out", type=float, default=0.05, help="share of the files kept out of training")
    add("--max-files", type=int, help="train on that many files only, for a quick try")
    add("--checkpoint-minutes", type=float, default=5.0, help="time between checkpoints")
    add("--eval-minutes", type=float, default=5.0, help="time between measurements of the held-out loss")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    if args.export_only is None and args.minutes is None and args.steps is None:
        parser.error("give --minutes, --steps or both: the learning-rate schedule needs an end")
    for name in ("minutes", "steps", "batch", "seq", "layers", "hidden", "heads", "kv_heads", "threads", "max_files"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if args.hidden % args.heads or args.heads % args.kv_heads:
        shape = f"--hidden {args.hidden} --heads {args.heads} --kv-heads {args.kv_heads}"
        parser.error(f"{shape}: each must divide the one before")
    if args.seq > args.positions:
        parser.error(f"--seq {args.seq} is more than --positions {args.positions}")
    return args


def train(args: argparse.Namespace) -> None:
    state: dict = {"step": 0, "elapsed": 0.0, "epoch": 0, "used": 0, "tokens": 0, "log": []}
    checkpoint = None
    if args.resume:
        checkpoint = latest_checkpoint(args.run)
        state = json.loads((checkpoint / "state.json").read_text())
        for name, value in state["settings"].items():
            if name not in RESUMABLE:
                setattr(args, name, value)
    elif any(args.run.glob("step-*")):
        raise FileExistsError(f"--run {str(args.run)!r} holds checkpoints; give --resume, or another folder")
    args.run.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    speeds = matmul_speeds(device)
    if args.precision == "auto":
        args.precision = "bfloat16" if speeds["bfloat16"] > 1.5 * speeds["float32"] else "float32"
    if args.optimizer == "auto":
        args.optimizer = "muon" if speeds["bfloat16"] > speeds["float32"] else "adamw"
    print("GFLOP/s:", {k: round(v) for k, v in speeds.items()}, "->", args.precision, args.optimizer, flush=True)

    files, held_files = split(stdlib_files(), args.held_out)
    if args.max_files:
        files, held_files = files[: args.max_files], held_files[: max(1, args.max_files // 10)]
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
    else:
        tokenizer = train_tokenizer([f.text for f in files], args.vocab, args.positions)
        tokenizer.save_pretrained(args.run / "tokenizer")
    ids = tokens(files, tokenizer)
    held = blocks(tokens(held_files, tokenizer), args.seq, limit=64)
    model = make_model(args, tokenizer).to(device)
    if checkpoint:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    optimizers = make_optimizers(model, args)
    if checkpoint:
        load_optimizers(optimizers, checkpoint)
    state["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "argv"}
    if not args.resume:
        state["command"] = f"python -m examples.train_base {shlex.join(args.argv)}"
        state["machine"] = machine_name(args.device)
        state["gflops"] = speeds
    print(f"{len(files)} files, {len(ids):,} tokens to train on; {model.num_parameters():,} parameters", flush=True)

    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bfloat16")
    stopping: list[int] = []  # a first SIGTERM or SIGINT ends the run after the step at hand, with a checkpoint
    previous = {s: signal.signal(s, lambda number, _: stopping.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    began = time.monotonic() - state["elapsed"]
    saved = measured = time.monotonic()
    recent: list[float] = []

    def progress() -> float:
        by_steps = state["step"] / args.steps if args.steps else 0.0
        by_time = state["elapsed"] / (60 * args.minutes) if args.minutes else 0.0
        return max(by_steps, by_time)

    def measure() -> None:
        with autocast:
            loss = held_out_loss(model, held)
        train_loss = float(np.mean(recent)) if recent else None
        entry = {k: state[k] for k in ("step", "elapsed", "epoch", "tokens")}
        entry |= {"train_loss": train_loss, "held_out_loss": loss}
        state["log"].append(entry)
        recent.clear()
        shown = "-" if train_loss is None else f"{train_loss:.4f}"
        at = f"step {entry['step']}  {entry['elapsed'] / 60:.1f} min  epoch {entry['epoch']}"
        tqdm.write(f"{at}  train {shown}  held-out {loss:.4f}", file=sys.stdout)
        sys.stdout.flush()

    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file should not fill with bars
    bar = tqdm(total=args.steps, initial=state["step"], desc="training", unit="step", mininterval=interval)
    for window, epoch, used in batches(ids, tokenizer.eos_token_id, args, state["epoch"], state["used"]):
        at = progress()
        if at >= 1.0 or stopping or state["step"] == args.stop_at:
            break  # this batch is not used, and not counted: a resumed run draws it again
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * lr_scale(at, args.warmup)
        with autocast:
            loss = loss_of(model, window.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"loss {recent[-1]} at step {state['step']}; the last checkpoint is in {args.run}")
        state |= {"step": state["step"] + 1, "epoch": epoch, "used": used}
        state["tokens"] += args.batch * args.seq
        state["elapsed"] = time.monotonic() - began
        bar.update()
        bar.set_postfix(loss=f"{np.mean(recent[-50:]):.3f}", progress=f"{100 * at:.1f}%", refresh=False)
        if time.monotonic() - measured > 60 * args.eval_minutes:
            measure()
            measured = time.monotonic()
        if time.monotonic() - saved > 60 * args.checkpoint_minutes:
            save_checkpoint(args.run, model, optimizers, state)
            saved = time.monotonic()
    bar.close()
    measure()
    state["finished"] = progress() >= 1.0
    save_checkpoint(args.run, model, optimizers, state)
    for number, handler in previous.items():
        signal.signal(number, handler)
    end = "finished" if state["finished"] else "stopped"
    print(f"{end} at step {state['step']}, {state['elapsed'] / 60:.1f} min, {state['tokens']:,} tokens", flush=True)


def export(run: Path, out: Path, device: str) -> None:
    """Writes the last checkpoint of `run` to `out`: bfloat16 weights, tokenizer, model card and training log.

    A run that has not finished gives a preliminary model, whose card says so and reports no measurements.
    """
    checkpoint = latest_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text())
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(checkpoint)).float()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    tokenizer.save_pretrained(out)
    log = {"command": state["command"], "settings": state["settings"], "log": state["log"]}
    if state.get("finished"):
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)  # what is shipped, not what was trained
        model.to(device)
        state.setdefault("machine", machine_name(device))
        results = evaluate(model, tokenizer, state["settings"])
        results["parameters"] = model.num_parameters()
        results["transformers_version"] = transformers.__version__
        log["results"] = results
        (out / "README.md").write_text(card(out, model.config, state, results))
        for name in ("stdlib", "transformers"):
            r = results[name]
            ours = f"loss {r['loss']:.4f}, perplexity {r['perplexity']:.2f}, {r['bits_per_byte']:.3f} bits per byte"
            print(f"held-out {name}: {ours}; 5-gram {r['ngram_loss']:.4f}")
        for text in results["samples"]:
            print("-" * 40, text, sep="\n")
    else:
        (out / "README.md").write_text(
            f"# Preliminary model\n\nAfter {state['step']} steps of an unfinished run; not measured. Made by "
            "`python -m examples.train_base --export-only`.\n"
        )
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    size = (out / "model.safetensors").stat().st_size
    print(f"wrote {out}: {size:,} bytes of weights, step {state['step']}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.export_only:
        export(args.run, args.export_only, args.device)
        return
    train(args)
    if args.out:
        export(args.run, args.out, args.device)


if __name__ == "__main__":
    main()
