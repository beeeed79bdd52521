"""That the sanitizer's and the device tests' records say what their tools said."""

import os
import stat
import textwrap

import pytest
import torch

from benchmarks.kernels import sanitize as kernels_sanitize
from benchmarks.kernels.registry import OPS
from benchmarks.kernels.sanitize import errors_in, run_device_tests, sanitize


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= COMPUTE-SANITIZER\nran 3\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("no device", None),
    ],
)
def test_errors_are_those_of_the_summary(output, errors):
    assert errors_in(output) == errors


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in the place of compute-sanitizer: it runs the command in Triton's interpreter and adds a summary."""

    def make(summary):
        path = tmp_path / "sanitizer"
        path.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            [ "$1" = --version ] && echo "Version 2026.3" && exit
            shift 4  # --tool NAME --print-limit N
            echo call >> {tmp_path}/calls
            TRITON_INTERPRET=1 "$@" --device cpu
            echo "========= {summary}"
            """)
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("COMPUTE_SANITIZER", str(path))
        # whoever edits a source while this runs would have it run again
        monkeypatch.setattr(kernels_sanitize, "sources", lambda pattern: {"all": "unchanged"})
        return path

    return make


@pytest.mark.skipif(not torch.cuda.is_available() and os.name != "posix", reason="needs a shell")
def test_every_tool_runs_the_examples_of_an_op_once(tmp_path, stand_in):
    pytest.importorskip("triton")
    stand_in("ERROR SUMMARY: 0 errors")
    (op,) = [op for op in OPS if op.name == "linear_index_add"]
    report = sanitize(tmp_path / "record.json", ops=[op.name])
    assert report["sanitizer"] == "Version 2026.3" and report["left"] == []
    assert [(row["tool"], row["errors"], row["examples"]) for row in report["rows"]] == [
        (tool, 0, 2 * len(list(op.examples(torch.float32, "cpu")))) for tool in kernels_sanitize.TOOLS
    ]
    assert not any("failed" in row for row in report["rows"])
    assert sanitize(tmp_path / "record.json", ops=[op.name])["rows"] == report["rows"]
    assert (tmp_path / "calls").read_text().count("call") == len(kernels_sanitize.TOOLS)
    assert "| linear_index_add | 0 | 0 |" in kernels_sanitize.sanitizer_table(report["rows"])


def test_errors_fail_a_row_and_keep_the_output(tmp_path, monkeypatch):
    path = tmp_path / "sanitizer"
    path.write_text(
        '#!/bin/sh\necho "ran 3 examples"\necho "========= Invalid read"\necho "= ERROR SUMMARY: 2 errors"\n'
    )
    path.chmod(0o755)
    row = kernels_sanitize.sanitize_op(str(path), "memcheck", "norm_gate", 20.0)
    assert (row["errors"], row["failed"]) == (2, "2 errors, exit code 0") and "Invalid read" in row["output"]
    path.write_text("#!/bin/sh\nsleep 20\n")
    assert "not through" in kernels_sanitize.sanitize_op(str(path), "memcheck", "norm_gate", 0.2)["failed"]


def test_without_the_sanitizer_the_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_sanitize, "find_sanitizer", lambda: None)
    rows = sanitize(tmp_path / "record.json")["rows"]
    assert [row["failed"] for row in rows] == ["compute-sanitizer not found"] * 2
    assert kernels_sanitize.sanitizer_table(rows).count("not found") == 2


def test_tests_run_beside_each_other_in_groups(tmp_path, monkeypatch):
    tests, root = tmp_path / "test_some.py", {"paths": ["test_some.py"], "root": tmp_path}
    # each of the first two groups waits for the other
    tests.write_text(
        textwrap.dedent(f"""\
        import pathlib, time
        import pytest

        @pytest.mark.gpu
        @pytest.mark.parametrize("x", ["a", "b, c", "d"])
        def test_letters(x):
            folder = pathlib.Path({str(tmp_path)!r})
            (folder / f"{{x}} was here").touch()
            for _ in range(600):
                if len(list(folder.glob("* was here"))) == 3:
                    return
                time.sleep(0.1)
            raise AssertionError("nobody else")
        """)
    )
    monkeypatch.setattr(kernels_sanitize, "GROUP", 1)
    monkeypatch.setattr(kernels_sanitize, "WORKERS", 3)
    late = run_device_tests(tmp_path / "record.json", until=0.0, **root)
    assert late["rows"] == [] and sorted(late["left"]) == [f"test_some.py::test_letters {i}" for i in (1, 2, 3)]
    report = run_device_tests(tmp_path / "record.json", **root)
    assert [(row["tests"][-1], row["passed"]) for row in report["rows"]] == [("1", 1), ("2", 1), ("3", 1)]
    assert report["left"] == [] and run_device_tests(tmp_path / "record.json", **root)["rows"] == report["rows"]


def test_files_that_cannot_be_collected_are_no_clean_run_and_stop_no_other(tmp_path):
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "test_whole.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): ...\n")
    for _ in range(2):
        report = run_device_tests(tmp_path / "record.json", paths=["test_broken.py", "test_whole.py"], root=tmp_path)
        broken, whole = report["rows"]
        assert "failed" in broken and "nothing_of_this_name" in broken["output"] and whole["passed"] == 1


def test_device_tests_are_counted_by_function(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        textwrap.dedent("""\
        import pytest

        @pytest.mark.gpu
        @pytest.mark.parametrize("x", [1, 2, 3])
        def test_numbers(x):
            assert x < 3, f"{x} is too large"

        @pytest.mark.gpu
        @pytest.mark.skip(reason="no device")
        def test_left_out(): ...

        def test_unmarked():
            raise AssertionError
        """)
    )
    report = run_device_tests(tmp_path / "record.json", paths=["test_some.py"], root=tmp_path)
    numbers, left_out = report["rows"]
    assert (numbers["passed"], numbers["failures"], numbers["skipped"]) == (2, 1, 0)
    assert "3 is too large" in numbers["failed"] and numbers["returned"] == 1
    assert (left_out["passed"], left_out["skipped"]) == (0, 1) and "failed" not in left_out


def test_run_without_a_summary_is_tried_again(tmp_path, stand_in):
    path = stand_in("no device")
    for summary in ("nothing", "ERROR SUMMARY: 0 errors"):
        path.write_text(f'#!/bin/sh\necho "ran 1 examples"\necho "========= {summary}"\n')
        rows = sanitize(tmp_path / "record.json", ops=["norm_gate"])["rows"]
        assert [row["errors"] for row in rows] == [None if summary == "nothing" else 0] * 2
