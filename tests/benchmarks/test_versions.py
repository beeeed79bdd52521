"""The rows of the version benchmark: what each asks pip for, and what is counted of its tests."""

import re
import sys
from pathlib import Path

from benchmarks.versions import TESTS, declared, requirements, rows, run_tests, table

ROOT = Path(__file__).parents[2]


def names(lines):
    return [re.split("[><=]", line)[0] for line in lines]


def test_the_oldest_row_has_the_lower_bound_of_every_requirement_and_the_next_no_upper_one():
    asked = declared()
    assert "torch" in names(asked) and "bitsandbytes" in names(asked)
    count = len(asked)
    for line, oldest, newer in zip(asked, requirements("oldest")[:count], requirements("next")[:count], strict=True):
        least = re.fullmatch(r"(\w+)>=([\d.]+)(,<[\d.]+)?", line)
        assert oldest == f"{least[1]}=={least[2]}" and newer == f"{least[1]}>={least[2]}"
    assert requirements("newest")[:count] == tuple(asked)


def test_each_python_has_a_row():
    made = list(rows({(3, 13): "newest", (3, 10): "oldest", (3, 12): "b", (3, 11): "a"}))
    assert [(row.name, row.python) for row in made] == [
        ("oldest", "oldest"), ("middle-3.11", "a"), ("middle-3.12", "b"), ("newest", "newest"), ("next", "newest")
    ]  # fmt: skip
    assert all((ROOT / path).exists() for path in TESTS)


def test_tests_are_counted_and_those_that_failed_named(tmp_path):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n\n"
        "@pytest.mark.skip(reason='no')\ndef test_left_out():\n    pass\n"
    )
    found = run_tests(Path(sys.executable), tmp_path / "report.xml", (str(file),))
    assert (found["passed"], found["skipped"], len(found["failed"])) == (1, 1, 1)
    assert "test_bad" in found["failed"][0] and "assert 1 == 2" in found["reasons"][0] and found["cpu_seconds"] > 0
    broken = run_tests(Path(sys.executable), tmp_path / "report.xml", (str(tmp_path / "nowhere.py"),))
    assert broken["passed"] == 0 and "no test ran" in broken["failed"][0]
    text = table(
        {"oldest": {"versions": {"python": "3.10.1", "torch": "2.9"}, "tests": found}, "next": {"not_installable": "x"}}
    )
    assert "| oldest | 3.10.1 | 2.9 |" in text and "not installable" in text
