"""The compression benchmark on a tiny model: its rows, the parameters behind them, its file, its tables."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common.merging import merged_files
from benchmarks.common.tables import interval
from benchmarks.common.timing import paired_ratio
from benchmarks.compression import __main__ as compression
from benchmarks.compression import layers as compression_layers
from benchmarks.compression import llama_7b as compression_7b
from benchmarks.compression import methods as compression_methods
from benchmarks.compression import pretrained
from benchmarks.compression import report as compression_report
from benchmarks.compression.speed import break_even, random_factors, with_ranks
from benchmarks.compression.vit import Dense, compare, facts_of, fashion_variants, summary
from benchmarks.side_tuning.bases import SHAPES
from examples import fashion_mnist
from examples.demo import BASE
from examples.prose import NoTextError, handbook_files
from hf_qst.mixed_rank import LowRankLinear

CPU = torch.device("cpu")
# Without the part that needs text and a model of other packages.
OWN_PARTS = tuple(part for part in compression.PARTS if part != "pretrained")


def tiny_llama(vocabulary=512):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def batches(count=4, vocabulary=512):
    return [{"input_ids": part} for part in torch.randint(vocabulary, (8 * count, 32)).split(8)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(result file, printed text, folder) of one run of all parts with `--quick`."""
    folder = tmp_path_factory.mktemp("compression")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        compression.main(["--quick", "--model", str(folder / "model"), "--output", str(folder), "--parts", *OWN_PARTS])
    return json.loads((folder / "compression.json").read_text()), "\n".join(printed), folder


def test_every_part_is_written_with_its_machine_and_arguments(quick):
    found, printed, folder = quick
    assert tuple(found) == OWN_PARTS
    for part in found.values():
        assert {"versions", "commit", "machine", "arguments", "result"} <= set(part)
    results = {part: found[part]["result"] for part in found}
    assert compression_report.report(results, OWN_PARTS) in printed
    for name in ("perplexity", "ranks", "errors_llm", "errors_vit"):
        assert (folder / f"compression_{name}.png").stat().st_size > 5000


def test_all_methods_have_the_same_number_of_parameters(quick):
    result = quick[0]["llm"]["result"]
    assert len(result["rows"]) == len(compression.QUICK["methods"])
    for row in result["rows"]:
        assert 0 <= row["below_budget"] < compression_methods.TOLERANCE, row["method"]
        # What the ranks say is what the tensors hold.
        saved = sum(
            math.prod(shape) - row["ranks"][name] * sum(shape)
            for name, shape in result["dense"]["shapes"].items()
            if name in row["ranks"]
        )
        assert row["parameters"] == result["dense"]["parameters"] - saved
        assert all(math.isfinite(value) for value in row["perplexity"].values())
    for one in quick[0]["vit"]["result"]["seeds"]:
        assert all(0 <= row["below_budget"] < compression_methods.TOLERANCE for row in one["rows"])


def test_reported_errors_obey_the_optimum_and_the_floor(quick):
    for result in quick[0]["layers"]["result"].values():
        assert result["by_itself"]
        for row in result["by_itself"]:
            # Both are parts of an energy whose products are float32.
            assert row["calibration"] >= row["calibration_optimum"] * (1 - 1e-4) - 1e-7
            assert row["held"] >= row["floor"] * (1 - 1e-4)
            assert row["held_plain"] >= row["floor"] * (1 - 1e-4)
        for errors in result["in_the_model"].values():
            assert all(0 <= error < 2 for error in errors.values())


def test_a_second_run_makes_nothing_again_and_other_arguments_do(quick):
    found, _, folder = quick
    path = folder / "compression.json"
    arguments = ["--quick", "--model", str(folder / "model"), "--output", str(folder), "--parts", "llm"]
    before = path.stat().st_mtime_ns
    compression.main(arguments)
    assert path.stat().st_mtime_ns == before
    args = compression.arguments(arguments)
    results = compression.results_of(args)
    assert results.begun("llm", compression.used(args, "llm")) == found["llm"]["result"]
    args.held_blocks = 4
    assert results.begun("llm", compression.used(args, "llm")) == {}


def test_costs_are_counted_for_every_method(quick):
    result = quick[0]["cost"]["result"]
    assert [row["method"] for row in result["rows"]] == compression.QUICK["methods"]
    assert result["tokens"] == 8 * 512 and all(row["seconds"] > 0 for row in result["rows"])


def test_a_pretrained_model_goes_through_all_methods_and_a_recovery(tmp_path):
    try:
        handbook_files()
    except NoTextError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--quick", "--pretrained", str(tmp_path / "model"), "--output", str(tmp_path), "--parts", "pretrained"]
    compression.main([*options, "--text", str(tmp_path / "rows.npz")])
    result = json.loads((tmp_path / "compression_smollm2.json").read_text())["pretrained"]["result"]
    assert {(row["method"], row["recovery"]) for row in result["rows"]} == {
        (method, steps) for _, method, steps in compression.QUICK["pretrained_rows"]
    }
    dense_bytes = pretrained.block_bits(result["dense"]["shapes"], {}) / 8
    for row in result["rows"]:
        part = {"dense": 1.0, "nf4": 4.126953125 / 16}.get(row["method"], 0.6)
        assert part - 0.01 < row["block_bytes"] / dense_bytes <= part, row["method"]
        assert all(math.isfinite(value) for value in row["perplexity"].values())
        assert all(0 <= value <= 1 for value in row["cloze"].values())
    table = compression_report.pretrained_table(result)
    assert all(pretrained.LABELS[method] in table for method in (*pretrained.ROWS, "nf4"))
    distilled = next(row["distillation"] for row in result["rows"] if row["method"] == "mix-kd")
    assert distilled["after"] <= distilled["before"] and distilled["steps"] == 2
    # An untrained model chooses at random.
    assert 0.1 < result["dense"]["cloze"]["prose"] < 0.4


def test_rows_of_text_come_back_from_their_file(tmp_path, monkeypatch):
    arrays = {"code": (3, 512), "prose": (3, 512), "calibration": (8, 512), "recovery": (4, 256), "choices": (5,)}
    made = {name: torch.randint(99, shape).int().numpy() for name, shape in arrays.items()}
    monkeypatch.setattr(pretrained, "_arrays", lambda *_: made)
    file = tmp_path / "folder" / "rows.npz"
    first = pretrained.load_text("none", 8, 3, file)
    monkeypatch.delattr(pretrained, "_arrays")
    again = pretrained.load_text("none", 8, 3, file)
    assert [len(batch["input_ids"]) for batch in again.calibration] == [4, 4]
    assert torch.equal(again.calibration[1]["input_ids"], first.calibration[1]["input_ids"])
    assert torch.equal(again.held["prose"], torch.from_numpy(made["prose"]).long()) and set(again.held) == {
        "code",
        "prose",
    }
    assert torch.equal(again.choices, first.choices) and torch.equal(again.recovery, first.recovery)
    with pytest.raises(ValueError, match="holds 8 rows of calibration"):
        pretrained.load_text("none", 4, 3, file)


def test_results_of_several_processes_go_together(tmp_path, capsys):
    seed = lambda number, methods: {
        "seed": number,
        "dense": {"accuracy": 90.0, "parameters": 2, "training_accuracy": 90.0},
        "rows": [{"keep": 0.4, "method": m, "parameters": 1, "accuracy": 89.0, "drop": 1.0} for m in methods],
    }
    files = []
    for name, seeds in {"a": [seed(0, ["svd"])], "b": [seed(0, ["asvd"]), seed(1, ["svd", "asvd"])]}.items():
        files.append(tmp_path / name)
        timings = [{"shape": [64, 64], "rows": rows, "of_dense": 0.5} for rows in (1, 16)]
        parts = {
            "vit": {"arguments": {"images": 1}, "result": {"seeds": seeds}},
            "speed": {"arguments": {}, "result": {"layers": timings}},
        }
        files[-1].write_text(json.dumps(parts))
    compression.main(["--merge", *map(str, files), "--parts", "vit", "--output", str(tmp_path / "both")])
    found = json.loads((tmp_path / "both" / "compression.json").read_text())
    assert list(found) == ["vit"]
    assert merged_files(files)["speed"]["result"]["layers"] == timings
    found = found["vit"]["result"]
    assert [[row["method"] for row in one["rows"]] for one in found["seeds"]] == [["svd", "asvd"]] * 2
    assert "89.0 ± 0.0" in capsys.readouterr().out
    files[0].write_text(json.dumps({"vit": {"arguments": {"images": 2}, "result": {"seeds": []}}}))
    with pytest.raises(SystemExit, match="other arguments of the part 'vit'"):
        compression.main(["--merge", *map(str, files), "--output", str(tmp_path)])


def test_a_part_whose_model_is_missing_is_left_out_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compression, "run_parts", lambda args, *rest: print(f"made {args.parts}"))
    compression.main(["--pretrained", str(tmp_path / "none.gguf"), "--parts", "7b", "pretrained"])
    printed = capsys.readouterr().out
    assert "'pretrained' is left out" in printed and "made ['7b']" in printed


def test_rows_are_named_by_part_method_and_steps():
    assert pretrained.row("0.8:svd") == (0.8, "svd", 0) and pretrained.row("0.6:mix-lstsq:20") == (0.6, "mix-lstsq", 20)
    assert pretrained.row("1:nf4:20") == (1.0, "nf4", 20)
    for wrong in ("0.8", "0.8:none", "1.5:svd", "0.8:svd:-1", "0.8:nf4"):
        with pytest.raises(ValueError):
            pretrained.row(wrong)


def test_impossible_arguments_are_refused(capsys):
    for wrong in (
        ["--keep", "1.5"],
        ["--vit-keep", "0"],
        ["--seeds", "0"],
        ["--data", "fashion-mnist", "--parts", "llm"],
    ):
        with pytest.raises(SystemExit):
            compression.arguments(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_a_compressed_copy_leaves_the_dense_model_alone():
    dense, data = tiny_llama(), batches()
    before = copy.deepcopy(dense.state_dict())
    small, facts = compression_methods.compressed(dense, "mix", 0.5, data)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert facts["parameters"] == sum(p.numel() for p in small.parameters()) < compression_methods.parameters(dense)
    assert facts["seconds"] > 0 and facts["ranks"]


def test_errors_in_the_model_are_those_of_whole_forwards():
    dense, data = tiny_llama(), batches(1)
    result = compression_layers.in_the_model(dense, data, data, 0.5)
    small, _ = compression_methods.compressed(dense, "mix", 0.5, data)
    name = "model.layers.1.mlp.down_proj"
    outputs = []
    for model in (dense, small):
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, output: outputs.append(output))
        with torch.no_grad():
            model(**data[0])
        handle.remove()
    expected = ((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()).item()
    assert result["mix"][name] == pytest.approx(expected, rel=1e-4)


def test_models_of_random_factors_have_the_ranks_asked_for():
    name = "model.layers.0.self_attn.q_proj"
    small = with_ranks(tiny_llama(), {name: 5})
    assert isinstance(small.get_submodule(name), LowRankLinear) and small.get_submodule(name).rank == 5
    assert torch.isfinite(small(input_ids=torch.arange(4)[None]).logits).all()
    assert random_factors(nn.Linear(8, 4), 2)(torch.randn(3, 8)).shape == (3, 4)


def testbreak_even_lies_on_the_line_between_measured_parts():
    assert break_even([(0.2, 0.5), (0.6, 0.9), (1.0, 1.1)]) == pytest.approx(0.8)
    assert break_even([(0.2, 0.5), (0.6, 0.9)]) is None
    assert paired_ratio({"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


def test_variants_of_a_vision_transformer_are_measured_and_made_once():
    torch.manual_seed(0)
    images, labels = torch.rand(256, 1, 28, 28), torch.arange(256) % 10
    model = fashion_mnist.new_vit().eval()
    dense = Dense(model, (images, labels), (images[:64], labels[:64]), {})
    dense.facts = facts_of(model, dense.training, dense.test)
    saved = []
    run = lambda done: compare(
        lambda seed: dense, ["svd", "mix-lstsq"], [0.4], range(2), 64, done, saved.append, fashion_variants
    )
    result = run({})
    assert len(saved) == 4
    for one in result["seeds"]:
        plain, ours = one["rows"]
        assert "int8" not in plain and {"int8", "tuned"} <= set(ours)
        assert ours["int8"]["bytes"] < 0.4 * ours["int8"]["float_bytes"]
        for row in (plain, ours, ours["int8"], ours["tuned"]):
            assert row["drop"] == dense.facts["accuracy"] - row["accuracy"]
    assert [(row["method"], row["variant"]) for row in summary(result)] == [
        ("svd", None), ("mix-lstsq", None), ("mix-lstsq", "int8"), ("mix-lstsq", "tuned")
    ]  # fmt: skip
    # A row that has no other variant than the one that is not wanted.
    assert fashion_variants("svd-llm", model, dense, 0, ["int8"]) == {}
    # The images are no seed's own here, the plain SVD knows none, and nothing is made again.
    assert len({row["accuracy"] for one in result["seeds"] for row in one["rows"] if row["method"] == "svd"}) == 1
    assert run(json.loads(json.dumps(result))) == result and len(saved) == 4


def test_figures_of_another_vision_transformer_are_not_mixed_in():
    used = lambda *options: compression.used(
        compression.arguments(["--parts", "vit", "--data", "fashion-mnist", *options]), "vit"
    )
    assert used("--vit-epochs", "3")["training"]["epochs"] == 3
    other = used("--vit-model", "folder/other")
    assert other["vit_model"] == "other" and "training" not in other
    # What is measured beside the rows changes none of them.
    assert used("--vit-variants", "int8") == used("--vit-variants") == used()


def test_a_vision_benchmark_without_its_images_says_so_and_skips(tmp_path, monkeypatch, capsys):
    if (Path("/") / fashion_mnist.PLACE).exists():
        pytest.skip("the images are installed")
    monkeypatch.setenv("HF_QST_CACHE", str(tmp_path))
    compression.main(["--parts", "vit", "--data", "fashion-mnist", "--output", str(tmp_path)])
    assert "skipped: Fashion-MNIST is not on this machine. Get it with" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_intervals_are_students():
    middle, width = interval([1.0, 2.0, 3.0])
    assert middle == 2.0 and width == pytest.approx(4.303 / math.sqrt(3))
    assert interval([1.0]) == (1.0, None)
    rows = [{"keep": 0.4, "method": "mix", "parameters": 1, "accuracy": a, "drop": 0.0} for a in (90, 92)]
    found = summary({"seeds": [{"rows": [row]} for row in rows]})
    assert len(found) == 1 and found[0]["accuracy"][0] == 91 and found[0]["accuracy"][1] == pytest.approx(12.706)


def test_arithmetic_of_the_large_model_is_that_of_its_shapes():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["llama-2-7b"].config))
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    counted = compression_7b.arithmetic(**{**compression_7b.PLAN, "tokens": 1000})
    assert counted["target_weights"] == sum(module.weight.numel() for module in linear)
    assert counted["eigenproblems"] == len(linear)
    assert counted["weights_bytes_bf16"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=1e-4)
    # One product a weight and token: what a forward pass costs but for attention itself.
    expected = counted["forward_passes"] * 2 * counted["target_weights"] * 1000
    assert counted["forward_operations"] == pytest.approx(expected)
