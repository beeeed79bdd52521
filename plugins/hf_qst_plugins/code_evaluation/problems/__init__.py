"""Function-completion problems, read from JSONL files in HumanEval's or MBPP's format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SHIPPED = Path(__file__).with_name("function_problems.jsonl")
"""The project's own problems, in HumanEval's format."""


class ProblemFileError(ValueError):
    """A problem file is invalid. The message names the file and the line."""


@dataclass(frozen=True)
class Problem:
    """One function to write.

    Args:
        task_id: unique in a file.
        prompt: the text that a model completes.
        canonical_solution: a completion that passes; may be empty.
        test: source that runs after the completed function and raises if the function is wrong.
        entry_point: the function's name; None in MBPP's format.
    """

    task_id: str
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str | None = None

    def program(self, completion: str, prompt: str | None = None) -> str:
        """The source to execute: prompt, completion, tests. `prompt` replaces the problem's own if the completed text
        differed from it."""
        return f"{self.prompt if prompt is None else prompt}{completion}\n\n{self.test}\n"


def _text(record: Mapping, *names: str) -> str:
    """The first of `names` that the record has, as text."""
    for name in names:
        if name in record:
            if not isinstance(record[name], str):
                raise ValueError(f"{name!r} must be text, got {record[name]!r}")
            return record[name]
    raise ValueError(f"{' or '.join(map(repr, names))} is missing")


def _task_id(record: Mapping) -> str:
    task_id = record.get("task_id")
    if not isinstance(task_id, (str, int)) or isinstance(task_id, bool) or task_id == "":
        raise ValueError(f"'task_id' must be text or a whole number, got {task_id!r}")
    return str(task_id)


def _from_humaneval(record: Mapping) -> Problem:
    entry_point = _text(record, "entry_point")
    if not entry_point.isidentifier():
        raise ValueError(f"'entry_point' must be a function's name, got {entry_point!r}")
    return Problem(
        _task_id(record),
        _text(record, "prompt"),
        _text(record, "canonical_solution"),
        f"{_text(record, 'test')}\ncheck({entry_point})",
        entry_point,
    )


def _from_mbpp(record: Mapping) -> Problem:
    """MBPP has no signature to complete. As in its paper, the prompt is the task and the tests, here as a docstring."""
    tests = record["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"'test_list' must be a list of at least one assert as text, got {tests!r}")
    task = _text(record, "prompt", "text")
    lines = "\n".join([task, *tests]).replace("\\", "\\\\").replace('"""', r"\"\"\"")
    setup = record.get("test_setup_code") or ""
    if not isinstance(setup, str):
        raise ValueError(f"'test_setup_code' must be text, got {setup!r}")
    imports = record.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise ValueError(f"'test_imports' must be a list of import statements as text, got {imports!r}")
    test = "\n".join([*imports, setup, *tests])
    return Problem(_task_id(record), f'"""\n{lines}\n"""\n', _text(record, "code"), test)


def _reader(record: Mapping) -> Callable[[Mapping], Problem]:
    if "test_list" in record:
        return _from_mbpp
    if "entry_point" in record or "test" in record:
        return _from_humaneval
    raise ValueError(
        "neither 'test' and 'entry_point' (HumanEval's format) nor 'test_list' (MBPP's) is among its keys "
        f"{sorted(record)}"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except FileNotFoundError:
        raise ProblemFileError(f"{path}: there is no such file; give a .jsonl or .jsonl.gz of problems") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ProblemFileError(f"{path}, after line {number}: cannot be read: {error}") from error


def read_problems(path: str | Path = SHIPPED) -> list[Problem]:
    """The problems of a JSONL file, plain or `.gz`. Each line is in HumanEval's or MBPP's format.

    HumanEval: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`.
    MBPP: `task_id`, `text` or `prompt`, `code`, `test_list`, optionally `test_setup_code` and `test_imports` (the
    sanitized version).

    Raises:
        ProblemFileError: invalid JSON, a missing key or one of another type, a repeated task, or no problem at all.
    """
    path = Path(path)
    problems: dict[str, Problem] = {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"must be a JSON object, got {type(record).__name__}")
            problem = _reader(record)(record)
            if problem.task_id in problems:
                raise ValueError(f"'task_id' {problem.task_id!r} was there before")
        except ValueError as error:
            raise ProblemFileError(f"{path}, line {number}: {error}") from None
        problems[problem.task_id] = problem
    if not problems:
        raise ProblemFileError(f"{path}: holds no problem")
    return list(problems.values())


def as_record(problem: Problem) -> dict:
    """The HumanEval record of a problem with an entry point; `read_problems` reads the same problem from it."""
    record = asdict(problem)
    record["test"] = problem.test.removesuffix(f"\ncheck({problem.entry_point})")
    return record
