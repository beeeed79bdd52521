"""The cost of a call of the adaptive temperature, next to transformers' own processors and to decoding text.

    python -m benchmarks.decoding.overhead            # prints tables, writes results/decoding_overhead.json

It measures three things in one run: a call at a large batch and vocabulary, against `TemperatureLogitsWarper` and the
least possible; whether the length so far matters; and the bookkeeping (all but the division) against decoding the rows'
text at every step. Times are microseconds, medians and 20th percentiles; the sides of a comparison take turns.
"""

import ctypes
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from transformers import AutoTokenizer, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from benchmarks.common.command_line import parser_of
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import in_turns
from examples.corpus import split, stdlib_files, tokens
from examples.demo import BASE
from hf_qst_plugins.adaptive_temperature import (
    AdaptiveTemperatureLogitsProcessor,
    BlockStart,
    DifficultyProbe,
    EntropyTemperature,
    LearnedTemperature,
    VocabularyTable,
    combine,
    entropy,
)

VOCABULARY = 128_256
"""That of Llama 3; the ids come from the project's own tokenizer, the rest of the vocabulary is padding."""
BATCHES, LENGTHS = (1, 8, 64), (128, 512, 2048)


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed; whether it could (glibc can).

    It gives 32 MB back to the system after some calls and not after others, as the heap happens to lie. The page faults
    of the next call then cost ten times the division, whichever processor it is that meets them.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(trim_threshold, most) and mallopt(mmap_threshold, most))


def timed(calls: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of each call in turns, sorted.

    Each call is made once more right before it is timed: the call after a slow one would pay for cold caches.
    """
    times = in_turns(calls, repeats, device, before=lambda call: call())
    return {name: sorted(1e6 * seconds for seconds in those) for name, those in times.items()}


def p20(values: list[float]) -> float:
    """The 20th percentile of sorted values: the time of a call while nothing else asks for the memory."""
    return values[len(values) // 5]


def real_rows(ids: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of source code, int64 `[batch, length]`, cut at random places."""
    starts = torch.randint(0, len(ids) - length, (batch,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def flat_probe(table: VocabularyTable) -> DifficultyProbe:
    """A probe of ordinary size; its values do not change its cost."""
    return DifficultyProbe([0.5] * 8, -1.0, [1.0, 0.4, 2.0], [1.0, 0.3, 2.0], table.tokenizer_hash, {})


def hot_rows(policy: BlockStart, ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Rows of source code whose next token is drawn hot, int64 `[batch, length]`."""
    ends = policy.hot_along(ids[: 64 * 1024]).nonzero()[:, 0]
    ends = ends[ends >= length][:batch]
    return torch.stack([ids[end - length : end] for end in ends.tolist()])


def policies(table: VocabularyTable) -> dict:
    return {
        "block start, line": BlockStart(table),
        "block start, block": BlockStart(table, scope="block"),
        "block start, gated": combine(BlockStart(table), how="gate"),
        "entropy (edt)": EntropyTemperature(),
        "learned": LearnedTemperature(table, flat_probe(table)),
    }


def whole_calls(table: VocabularyTable, ids: torch.Tensor, device: torch.device, repeats: int) -> list[dict]:
    """One call at 64 rows and the large vocabulary: ours, and the processors transformers ships.

    The floor of a policy that reads the distribution is that of its bytes: the scores are read twice and written once
    instead of read and written. That of arithmetic is the entropy of scores that lie in the cache, and the division.
    """
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(64, VOCABULARY, generator=generator)).to(device)
    rows = real_rows(ids, 64, 512, generator).to(device)
    processors = {
        "TemperatureLogitsWarper": TemperatureLogitsWarper(0.7),
        **{
            name: AdaptiveTemperatureLogitsProcessor(table, rule=lambda _, policy=policy: policy)
            for name, policy in policies(table).items()
        },
        "TemperatureLogitsWarper, again": TemperatureLogitsWarper(0.7),  # how far the machine is at rest
        "MinPLogitsWarper": MinPLogitsWarper(0.05),
        "TopPLogitsWarper": TopPLogitsWarper(0.95),
        "TypicalLogitsWarper": TypicalLogitsWarper(0.9),
    }
    calls = {name: lambda processor=processor: processor(rows, scores) for name, processor in processors.items()}
    gated, starts = processors["block start, gated"], hot_rows(BlockStart(table), ids, 64, 512).to(device)
    calls["block start, gated, all rows hot"] = lambda: gated(starts, scores)
    part = scores[:4]
    calls["entropy of scores in cache"] = lambda: [entropy(part) for _ in range(16)]
    times = timed(calls, repeats, device)
    by_name = {name: (statistics.median(values), p20(values)) for name, values in times.items()}
    plain = by_name["TemperatureLogitsWarper"]
    cached = by_name.pop("entropy of scores in cache")
    by_name["floor of entropy policies: arithmetic"] = tuple(map(sum, zip(cached, plain, strict=True)))
    by_name["floor of entropy policies: bytes"] = tuple(1.5 * us for us in plain)
    threads = torch.get_num_threads()
    return [
        {
            "processor": name,
            "threads": threads,
            "us": us,
            "against_plain": us / plain[0],
            "us_p20": least,
            "against_plain_p20": least / plain[1],
        }
        for name, (us, least) in by_name.items()
    ]


def bookkeeping(table: VocabularyTable, tokenizer, ids: torch.Tensor, device: torch.device, repeats: int) -> list[dict]:
    """Everything but the division, at several batches and lengths, against decoding all rows' text."""
    generator = torch.Generator().manual_seed(1)
    line, block = BlockStart(table), BlockStart(table, scope="block")
    scores = torch.zeros(1, 1, device=device)
    result = []
    for batch in BATCHES:
        for length in LENGTHS:
            # Other rows each time: how many of them need a look further back is left to chance.
            drawn = [real_rows(ids, batch, length, generator).to(device) for _ in range(repeats)]
            # Each is used twice in turn, without and with the clock.
            turns = {
                name: cycle([rows for rows in drawn for _ in range(2)])
                for name in ("line", "block", "tensor", "decode")
            }
            calls = {
                "line": lambda turns=turns: line(next(turns["line"]), scores),
                "block": lambda turns=turns: block(next(turns["block"]), scores),
                "tensor": lambda turns=turns: line.automaton.states(next(turns["tensor"])),
                "decode": lambda turns=turns: tokenizer.batch_decode(next(turns["decode"])),
            }
            us = {name: statistics.median(values) for name, values in timed(calls, repeats, device).items()}
            result.append(
                {
                    "batch": batch,
                    "length": length,
                    **{f"{name}_us": value for name, value in us.items()},
                    "decode_over_line": us["decode"] / us["line"],
                    "decode_over_block": us["decode"] / us["block"],
                }
            )
    return result


def print_rows(title: str, rows: list[dict]) -> None:
    lines = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print(f"\n{title}\n{markdown(list(rows[0]), lines)}")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.decoding.overhead", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the calls; the rest has the first")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding_overhead.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    kept = keep_freed_memory()

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    table = VocabularyTable.from_tokenizer(tokenizer)
    ids = torch.from_numpy(tokens(split(stdlib_files())[1], tokenizer)).long()
    calls = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        calls += whole_calls(table, ids, device, options.repeats)
    torch.set_num_threads(options.threads[0])
    result = {
        **environment(device),
        "vocabulary": VOCABULARY,
        "repeats": options.repeats,
        "freed_memory_kept": kept,
        "calls": calls,
        "bookkeeping": bookkeeping(table, tokenizer, ids, device, options.repeats),
    }
    print_rows(f"one call, 64 rows, vocabulary {VOCABULARY}", result["calls"])
    print_rows("all but the division", result["bookkeeping"])
    write_json(options.out, result)


if __name__ == "__main__":
    main()
