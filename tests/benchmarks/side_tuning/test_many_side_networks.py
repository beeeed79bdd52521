"""The benchmark of many side networks: what it writes, and that the results are those of each network alone."""

import json

from benchmarks.side_tuning.many_side_networks import main


def test_results_are_those_of_each_alone(tmp_path, capsys):
    main(
        ["--shape", "tiny", "--adapters", "3", "--repeats", "1", "--threads", "1", "--new", "2", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "side_tuning_many_networks.json").read_text())
    serving, training = result["serving"], result["training"]
    assert serving["same_tokens"] and 0 <= serving["largest_difference"] < 1e-5
    assert serving["least_difference_of_adapters"] > 1e-2
    assert training["largest_difference"] < 1e-6
    seconds = training["seconds"]
    limit = seconds["forward of the base"] + 3 * (seconds["QST, one"] - seconds["forward of the base"])
    assert training["limit"] == limit and training["of_limit"] == seconds["QST, together"] / limit
    assert "times that under one | " in capsys.readouterr().out
