"""The project's own problems: small functions drawn from a grammar, to fine-tune a small model and to test it.

A hash of each specification's key decides whether it is held out. So held-out problems and training problems never share
a specification, whatever their functions are called.

    held_out_problems(120, seed=0)      # list[Problem], the file that is shipped
    training_pairs(8000, seed=0)        # list of (prompt, solution)

    python -m hf_qst_plugins.code_evaluation.problems.generated OUTPUT.jsonl     # writes the shipped file
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

from hf_qst.saved.whole_files import write_text

from . import Problem, as_record
from .grammar import Specification, draw

CALLS = 5


def _name(specification: Specification, rng: random.Random) -> str:
    prefix = rng.choice(("", "", "get_", "make_", "compute_"))
    words = "_".join(specification.words)
    return (prefix + words) if prefix or words not in {"list", "sorted", "all", "any"} else f"find_{words}"


def _prompt(specification: Specification, name: str) -> str:
    return f'def {name}({", ".join(specification.arguments)}):\n    """{specification.docstring}"""\n'


def _body(lines: tuple[str, ...]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _expected(specification: Specification, solution: tuple[str, ...], arguments: tuple) -> object:
    """The result of one of the grammar's solutions. This is our own code, so it needs no sandbox."""
    namespace: dict = {}
    exec(_prompt(specification, "function") + _body(solution), namespace)
    return namespace["function"](*json.loads(json.dumps(arguments)))


def _tests(specification: Specification, rng: random.Random) -> str | None:
    """`check(candidate)` with `CALLS` asserts; None if more than half of them accept one constant or the argument."""
    calls: dict[str, object] = {}
    for _ in range(20 * CALLS):
        arguments = specification.call(rng)
        outcome = _expected(specification, specification.solutions[0], arguments)
        calls.setdefault(", ".join(map(repr, arguments)), outcome)
        if len(calls) == CALLS:
            break
    else:
        return None
    repeats = Counter(map(repr, calls.values())).most_common(1)[0][1]
    same = sum(repr(outcome) == arguments for arguments, outcome in calls.items())
    if repeats > CALLS // 2 or same > CALLS // 2:
        return None
    asserts = [f"    assert candidate({arguments}) == {outcome!r}\n" for arguments, outcome in calls.items()]
    return "def check(candidate):\n" + "".join(asserts)


def held_out_problems(count: int = 120, seed: int = 0) -> list[Problem]:
    """`count` problems of different held-out specifications."""
    rng = random.Random(seed)
    seen: set[tuple] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        specification = draw(rng)
        if not specification.held_out or specification.key in seen:
            continue
        seen.add(specification.key)
        test = next((test for test in (_tests(specification, rng) for _ in range(20)) if test), None)
        if test is None:
            continue
        name = _name(specification, rng)
        solution = _body(specification.solutions[-1])
        problems.append(
            Problem(f"hf_qst/{len(problems)}", _prompt(specification, name), solution, f"{test}\ncheck({name})", name)
        )
    return problems


def training_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` pairs of prompt and solution, none of a held-out specification.

    Specifications repeat: the simple ones are few, and without repeats they would be rare in a large set.
    """
    rng = random.Random(f"training {seed}")
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        specification = draw(rng)
        if not specification.held_out:
            prompt = _prompt(specification, _name(specification, rng))
            pairs.append((prompt, _body(rng.choice(specification.solutions))))
    return pairs


if __name__ == "__main__":
    lines = [json.dumps(as_record(problem), ensure_ascii=False) for problem in held_out_problems()]
    write_text(str(Path(sys.argv[1])), "\n".join(lines) + "\n")
