"""The four methods one after the other, on a tiny base and a few steps; and what is said without the model."""

import pytest

from examples import demo_real
from examples.real_model import NoModelError


@pytest.mark.parametrize("missing", [False, True])
def test_every_stage_is_a_row_of_the_table(missing, tiny_base, tmp_path, capsys, monkeypatch):
    if missing:

        def nowhere(name):
            raise NoModelError("the model 'smollm2' is not installed here. Get it with: pip install it")

        monkeypatch.setattr(demo_real, "model_path", nowhere)
        with pytest.raises(SystemExit, match="was skipped: the model 'smollm2' is not installed here"):
            demo_real.main(["--quick", "--output", str(tmp_path)])
        return
    demo_real.main(["--model", str(tiny_base), "--quick", "--output", str(tmp_path)])
    table = capsys.readouterr().out.split("Perplexities on held-out text")[1]
    stages = ["base (float32)", "base (NF4)", "QST ", "QST, tail of 1", "QLoRA", "mixed rank, 80 %", "DISP, 80 %"]
    for stage in [*stages, "pruned, NF4 ", "pruned, NF4, QST"]:
        (line,) = [line for line in table.splitlines() if line.startswith(stage)]
        assert "nan" not in line
