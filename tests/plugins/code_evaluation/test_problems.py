"""Problem files, and the problems that are shipped."""

import ast
import gzip
import json
import re

import pytest

from hf_qst_plugins.code_evaluation import SHIPPED, Problem, ProblemFileError, Sandbox, read_problems
from hf_qst_plugins.code_evaluation.problems import as_record
from hf_qst_plugins.code_evaluation.problems.generated import held_out_problems, training_pairs

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {
    "task_id": 11,
    "text": 'Write a function that adds two numbers, as in """ \\n.',
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(offset, 2) == 7"],
    "test_setup_code": "offset = 5",
}

SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 82,
    "prompt": "Write a function to find the volume of a sphere.",
    "code": "import math\ndef volume_sphere(r):\n  return 4 / 3 * math.pi * r ** 3",
    "test_imports": ["import math", "from math import isclose as near"],
    "test_list": ["assert math.isclose(volume_sphere(10), 4188.790204786391, rel_tol=0.001)", "assert near(1, 1)"],
}


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(allow_execution=True)


def write(path, *records):
    lines = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_both_formats_are_read_and_can_be_executed(tmp_path, sandbox, name):
    one, two = read_problems(write(tmp_path / name, HUMANEVAL, "", MBPP))
    assert (one.task_id, one.entry_point, two.task_id, two.entry_point) == ("HumanEval/0", "add", "11", None)
    assert MBPP["test_list"][1] in two.prompt and ast.get_docstring(ast.parse(two.prompt), clean=False)
    for problem in (one, two):
        right = problem.program(problem.canonical_solution)
        assert sandbox.run(right).outcome == "passed"
        assert sandbox.run(right.replace("a + b", "a - b")).outcome == "wrong"


def test_mbpps_later_key_for_the_task_is_read_too(tmp_path):
    record = {"task_id": 1, "prompt": "Add.", "code": "x", "test_list": ["assert x"]}
    assert "Add." in read_problems(write(tmp_path / "p.jsonl", record))[0].prompt


def test_the_sanitized_forms_tests_run_with_their_imports(tmp_path, sandbox):
    problem = read_problems(write(tmp_path / "p.jsonl", SANITIZED))[0]
    solution = "def volume_sphere(r):\n    return 4 / 3 * 3.141592653589793 * r ** 3\n"
    assert sandbox.run(problem.program(solution)).outcome == "passed"
    assert sandbox.run(problem.program(solution.replace("4 /", "2 /"))).outcome == "wrong"
    both = {**SANITIZED, "test_setup_code": "limit = math.inf", "test_list": ["assert 1 < limit"]}
    assert sandbox.run(read_problems(write(tmp_path / "q.jsonl", both))[0].program("")).outcome == "passed"
    for absent in ([], None):
        record = {**SANITIZED, "test_imports": absent}
        assert read_problems(write(tmp_path / "r.jsonl", record))[0].test.startswith("\nassert")


def test_the_prompt_that_was_completed_may_differ_from_the_problems():
    problem = Problem("t", "def f():\n", "", "check(f)", "f")
    assert problem.program("\n    pass", "def f():") == "def f():\n    pass\n\ncheck(f)\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2"]),
        ("[1]", ["line 2", "JSON object", "list"]),
        ({**HUMANEVAL, "task_id": "HumanEval/0"}, ["line 2", "HumanEval/0", "before"]),
        ({**HUMANEVAL, "task_id": None}, ["line 2", "task_id", "None"]),
        ({**HUMANEVAL, "task_id": "b", "prompt": 3}, ["line 2", "'prompt'", "3"]),
        ({**HUMANEVAL, "task_id": "b", "entry_point": "a b"}, ["line 2", "entry_point", "'a b'"]),
        ({k: v for k, v in {**HUMANEVAL, "task_id": "b"}.items() if k != "test"}, ["line 2", "'test'", "missing"]),
        ({k: v for k, v in MBPP.items() if k != "text"}, ["line 2", "'prompt' or 'text'", "missing"]),
        ({**MBPP, "test_list": []}, ["line 2", "test_list", "[]"]),
        ({**MBPP, "test_list": [1]}, ["line 2", "test_list", "[1]"]),
        ({**MBPP, "test_setup_code": 1}, ["line 2", "test_setup_code", "1"]),
        ({**SANITIZED, "test_imports": "import math"}, ["line 2", "test_imports", "'import math'"]),
        ({**SANITIZED, "test_imports": [1]}, ["line 2", "test_imports", "[1]"]),
        ({"task_id": "b"}, ["line 2", "HumanEval", "MBPP"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "problems.jsonl", HUMANEVAL, line)
    with pytest.raises(ProblemFileError) as error:
        read_problems(path)
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff\xfe\n"])
def test_a_file_without_problems_is_refused(tmp_path, data):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(data)
    with pytest.raises(ProblemFileError, match=re.escape(str(path))):
        read_problems(path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ProblemFileError, match="no such file"):
        read_problems(tmp_path / "nothing.jsonl")
    cut = write(tmp_path / "cut.jsonl.gz", *[{**HUMANEVAL, "task_id": str(i)} for i in range(500)])
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(ProblemFileError, match=r"cut.jsonl.gz, after line"):
        read_problems(cut)


# --- the shipped problems ----------------------------------------------------------------------------------------------


def test_the_shipped_file_is_what_the_generator_makes():
    made = "".join(json.dumps(as_record(problem), ensure_ascii=False) + "\n" for problem in held_out_problems())
    assert SHIPPED.read_text(encoding="utf-8") == made
    assert read_problems() == held_out_problems() and len(read_problems()) == 120


def test_every_shipped_solution_passes(sandbox):
    problems = read_problems()
    outcomes = sandbox.run_all([problem.program(problem.canonical_solution) for problem in problems])
    assert [p.task_id for p, o in zip(problems, outcomes, strict=True) if o.outcome != "passed"] == []


def test_no_shipped_problem_is_passed_by_a_trivial_answer(sandbox):
    """One program a problem: it fails when any of these functions gets through the problem's tests."""
    constants = ["None", "0", "1", "-1", "True", "False", "[]", "{}", "''"]
    trivial = f"[lambda *a: a[0], *(lambda *a, c=c: c for c in [{', '.join(constants)}])]"
    attempt = f"\nfor f in {trivial}:\n    try: check(f)\n    except Exception: continue\n    raise AssertionError"
    problems = read_problems()
    programs = [problem.test.removesuffix(f"check({problem.entry_point})") + attempt for problem in problems]
    outcomes = sandbox.run_all(programs)
    assert [p.task_id for p, o in zip(problems, outcomes, strict=True) if o.outcome != "passed"] == []


def _task(prompt: str) -> str:
    """What a prompt asks for, whatever the function and its arguments are called."""
    function = ast.parse(prompt).body[0]
    docstring = ast.get_docstring(function)
    for number, argument in enumerate(function.args.args):
        docstring = re.sub(rf"(?<!the )\b{argument.arg}\b", f"<{number}>", docstring)
    return docstring


def test_no_shipped_problem_is_among_the_training_problems():
    pairs = training_pairs(20_000, seed=0)
    trained = {_task(prompt) for prompt, _ in pairs}
    asked = [_task(problem.prompt) for problem in read_problems()]
    assert len(trained) > 3_000 and len(set(asked)) == len(asked)
    assert trained.isdisjoint(asked)
    assert {prompt for prompt, _ in pairs}.isdisjoint(problem.prompt for problem in read_problems())


def test_training_problems_are_python_and_depend_on_the_seed_alone():
    pairs = training_pairs(500, seed=1)
    for prompt, solution in pairs:
        ast.parse(prompt + solution)
    assert pairs == training_pairs(500, seed=1) != training_pairs(500, seed=2)
    assert sum(solution.count("\n") > 1 for _, solution in pairs) > 150  # blocks, not only one-liners
