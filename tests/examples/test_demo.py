"""The README's demo, on a tiny base and a few steps."""

from safetensors.torch import load_file

from examples import demo


def test_demo_prints_the_table_and_reloads_what_it_saved(tiny_base, tmp_path, capsys):
    arguments = ["--steps", "2", "--every", "1", "--batch", "2", "--length", "64", "--files", "4", "--held-blocks", "4"]
    demo.main(["--model", str(tiny_base), "--output", str(tmp_path), "--device", "cpu", *arguments])
    printed = capsys.readouterr().out
    assert "the same" in printed and "DIFFERENT" not in printed
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith(("QST  ", "QLoRA  "))]
    assert rows == ["QST", "QLoRA"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("loss.png", "memory.png"))
    saved = load_file(tmp_path / "qst" / "adapter_model.safetensors")
    assert all("qst_net." in name for name in saved)
    assert "import hf_qst" in (tmp_path / "qst" / "README.md").read_text()


def test_loss_at_a_time_lies_between_the_measurements_around_it():
    run = demo.Run("QST", curve=[(0.0, 4.0), (10.0, 2.0), (20.0, 1.0)])
    assert [demo.loss_at(run, seconds) for seconds in (0, 5, 10, 15, 99)] == [4.0, 3.0, 2.0, 1.5, 1.0]
