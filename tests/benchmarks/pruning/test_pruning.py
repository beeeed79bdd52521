"""The pruning benchmark on a tiny model: its rows, the parameters behind them, slicing, its file, its tables."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.compression.llm import Text
from benchmarks.compression.methods import parameters
from benchmarks.pruning import __main__ as pruning
from benchmarks.pruning import cost as pruning_cost
from benchmarks.pruning import methods as pruning_methods
from benchmarks.pruning import report as pruning_report
from benchmarks.pruning import shortening as pruning_shortening
from benchmarks.pruning import slicing as pruning_slicing
from benchmarks.pruning.text import CHOSEN_ON, TEXTS, OtherTextError, kept
from examples.demo import BASE
from examples.prose import PLACES, handbook_files
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.pruning.layout import PruningLayout


def tiny_llama(vocabulary=96, **changes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batches(count=3, vocabulary=96):
    return [{"input_ids": torch.randint(vocabulary, (8, 20))} for _ in range(count)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(result file, printed text, folder, arguments) of one run of all parts with `--quick`."""
    folder = tmp_path_factory.mktemp("pruning")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tiny_llama(len(tokenizer), hidden_size=128, intermediate_size=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    given = ["--quick", "--model", str(folder / "model"), "--output", str(folder)]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        pruning.main(given)
    return json.loads((folder / "pruning.json").read_text()), "\n".join(printed), folder, given


def test_every_part_is_written_with_its_machine_and_arguments(quick):
    found, printed, folder, _ = quick
    assert list(found) == list(pruning.PARTS)
    for part in found.values():
        assert {"versions", "commit", "machine", "arguments", "result"} <= set(part)
    assert pruning_report.report({part: found[part]["result"] for part in found}, pruning.PARTS) in printed
    for name in ("perplexity", "widths"):
        assert (folder / f"pruning_{name}.png").stat().st_size > 5000


def test_all_models_have_the_parameters_of_the_budget_and_no_more(quick):
    result = quick[0]["quality"]["result"]
    rows = {(row["method"], row["seed"]): row for row in result["rows"]}
    first = {(method, 0) for method in ("random", "flap", "slicegpt", "shortgpt", "disp", "disp-64")}
    assert set(rows) == first | {("random", 1), ("disp", 1)}
    for (method, _), row in rows.items():
        assert row["parameters"] < result["dense"]["parameters"]
        # A channel of the residual of all layers, or 64 of one selection, is much of so small a model.
        assert 0 <= row["below_budget"] < {"slicegpt": 0.02, "disp-64": 0.2, "shortgpt": 0.2}.get(method, 0.002), method
        assert ("recovered" in row) == (method != "disp-64")
        for one in (row, row.get("recovered", row)):
            assert all(math.isfinite(value) for value in one["perplexity"].values())
    assert rows["random", 0]["losses"] != rows["random", 1]["losses"]
    assert all(width % 64 == 0 for layer in rows["disp-64", 0]["widths"] for width in layer)


def test_a_second_run_makes_nothing_again_and_more_seeds_only_what_is_missing(quick):
    found, _, folder, given = quick
    before = (folder / "pruning.json").stat().st_mtime_ns
    pruning.main(given)
    assert (folder / "pruning.json").stat().st_mtime_ns == before
    args = pruning.arguments(given)
    rows = found["quality"]["result"]["rows"]
    assert pruning.wanted(args, rows) == []
    args.seeds = 3
    assert pruning.wanted(args, rows) == [(0.6, "random", 2), (0.6, "disp", 2)]
    # What was learned in fewer steps is learned again, what was not learned stays.
    args.seeds, args.steps = 1, 5
    assert pruning.wanted(args, rows) == [(0.6, "disp", 0)]
    args.held_blocks = 3
    assert pruning.results_of(args).begun("quality", pruning.used(args, "quality")) == {}


def test_rows_without_a_wanted_recovery_are_made_again(quick):
    found, _, _, given = quick
    rows = copy.deepcopy(found["quality"]["result"]["rows"])
    del next(row for row in rows if row["method"] == "flap")["recovered"]
    assert pruning.wanted(pruning.arguments(given), rows) == [(0.6, "flap", 0)]
    assert pruning.wanted(pruning.arguments([*given, "--recovered-keep"]), rows) == []


def test_longer_learning_is_current_at_its_own_steps(quick):
    args = pruning.arguments(quick[3])
    steps = args.steps * pruning_methods.LONGER
    rows = [{"keep": 0.6, "method": name, "seed": 0, "steps": steps} for name in ("disp", "disp-long")]
    assert pruning.current(args, rows) == rows[1:]


def test_files_of_several_processes_are_merged(quick, tmp_path):
    found, _, _, given = quick
    parts = copy.deepcopy({"quality": found["quality"]})
    rows = parts["quality"]["result"]["rows"]

    def write(name, some, **changes):
        part = {**parts["quality"], **changes}
        part["result"] = {**part["result"], "rows": some}
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruning.json").write_text(json.dumps({"quality": part}))
        return str(tmp_path / name)

    without = [{key: value for key, value in row.items() if key != "recovered"} for row in rows]
    first, second = write("first", rows[:3]), write("second", [*without[1:2], *rows[3:]])
    output = ["--output", str(tmp_path)]
    pruning.main([*given[:-2], *output, "--merge", first, second])
    merged = json.loads((tmp_path / "pruning.json").read_text())["quality"]
    assert merged == parts["quality"]
    pruning.main([*given[:-2], *output, "--merge", second])
    assert json.loads((tmp_path / "pruning.json").read_text())["quality"] == parts["quality"]
    other = write("other", rows, arguments={"length": 1})
    for wrong, message in ((other, "has other arguments"), (str(tmp_path / "none"), "there is no")):
        with pytest.raises(SystemExit, match=message):
            pruning.main([*given[:-2], *output, "--merge", wrong, first])


def test_kept_rows_are_read_in_place_of_the_text(tmp_path):
    held = {kind: torch.randint(9, (3, 8)) for kind in ("stdlib", "prose")}
    text, rows = Text([{"input_ids": torch.randint(9, (2, 8))} for _ in range(3)], held), torch.randint(9, (20, 8))
    path = tmp_path / "rows.safetensors"
    kept(path, "python", "model", (8, 20, 6, 3), lambda *sizes: (text, rows))
    read, read_rows = kept(path, "python", "model", (8, 20, 6, 3), None)
    assert torch.equal(read_rows, rows) and list(read.held) == list(held)
    assert all(torch.equal(read.held[kind], held[kind]) for kind in held)
    for one, other in zip(read.calibration, text.calibration, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    with pytest.raises(OtherTextError, match=r"holds .*8, 20, 6, 3.*, not .*8, 20, 6, 4"):
        kept(path, "python", "model", (8, 20, 6, 4), None)


def test_an_unpacked_packaged_model_has_its_name():
    assert pruning.model_name("/any/where/smollm2-0e28a2dad73d") == "smollm2"
    assert pruning.model_name("/any/where/smollm2-mine") == "/any/where/smollm2-mine"


def test_speed_is_measured_at_the_learned_widths(quick):
    found = quick[0]
    learned = next(row for row in found["quality"]["result"]["rows"] if row["method"] == "disp")
    dense, small, rounded = found["speed"]["result"]["base"]
    assert dense["prefill_speedup"] == dense["prefill_floor"] == 1
    assert small["widths"] == learned["widths"] and small["weights_bytes"] < dense["weights_bytes"]
    assert small["prefill_floor"] > 1 and rounded["decode_floor"] > 1
    methods = {row["method"]: row for row in found["training"]["result"]["rows"]}
    assert list(methods) == ["floor", "disp", "full"] and methods["floor"]["trainable"] == 0


def test_draws_cost_more_the_less_sure_they_are(quick):
    found = quick[0]["draws"]["result"]
    assert [row["start"] for row in found["rows"]] == [None, [3, 3], [5, 3], [6, 6]]
    # At the paper's start everything is above the threshold; the surer the draws, the nearer it comes to the budget.
    kept = [row["threshold_ratio"] for row in found["rows"]]
    assert kept[0] == 1 and kept[1] > kept[2] > kept[3] > found["keep"] - 0.02
    assert all(row["ratio"] == pytest.approx(found["keep"], abs=0.02) for row in found["rows"][1:])
    assert "Fisher scores, largest logit 6, slope 6, drawn" in quick[1]


def test_floors_count_operations_and_weights():
    model = tiny_llama()
    layout = PruningLayout.of(find_decoder_stack(model))
    half = [[width // 2 for width in row] for row in layout.full_widths]
    # By hand: 2 layers of 64 x (64 + 32 + 32 + 64) and 3 x 64 x 128 and two norms of 64; middle and residual both halved
    # leave a quarter.
    full, small = 2 * (64 * 192 + 3 * 64 * 128 + 128), 2 * (32 * 192 + 3 * 32 * 64 + 128)
    assert layout.total == full and layout.count(half) == small
    head, attention = 96 * 64, 2 * 2 * 64 * 10 * 10 // 2
    found = pruning_cost.floors(layout, half, 96, 10)
    assert found["prefill"] == pytest.approx((full * 10 + attention + head) / (small * 10 + attention + head))
    assert found["decode"] == pytest.approx((full + head) / (small + head))


def test_widths_are_carried_over_in_the_same_parts():
    source = PruningLayout.of(find_decoder_stack(tiny_llama()))
    target = PruningLayout.of(
        find_decoder_stack(tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=4))
    )
    found = pruning_cost.scaled([[64, 32, 16, 32, 64], [1, 64, 64, 128, 64]], source, target, 1)
    assert found == [[128, 64, 32, 128, 128]] * 2 + [[2, 128, 128, 512, 128]] * 2
    rounded = pruning_cost.scaled([[64, 30, 16, 32, 64], [1, 64, 64, 128, 64]], source, target, 64)
    assert rounded[0] == [128, 64, 64, 128, 128] and rounded[3][0] == 64
    small = pruning_cost.at_widths(tiny_llama(), [[64, 32, 16, 32, 64], [1, 64, 64, 128, 64]])
    assert parameters(small) - parameters(tiny_llama()) == source.count(
        [[64, 32, 16, 32, 64], [1, 64, 64, 128, 64]]
    ) - (source.total)


def test_slicing_with_all_channels_is_the_models_own_function():
    model, data = tiny_llama(), batches()
    bases = pruning_slicing.rotations(model, data)
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(64, dtype=basis.dtype), rtol=0, atol=1e-10)
    ids = data[0]["input_ids"]
    expected = model(input_ids=ids).logits
    whole = pruning_slicing.sliced(model, bases, 64)
    torch.testing.assert_close(whole(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    # What is cut first is what matters least.
    gaps = [
        (pruning_slicing.sliced(model, bases, width)(input_ids=ids).logits - expected).norm() for width in (60, 40, 20)
    ]
    assert 0 < gaps[0] < gaps[1] < gaps[2]


def test_slicing_fills_the_budget_with_what_the_tensors_hold():
    model, data = tiny_llama(), batches()
    bases = pruning_slicing.rotations(model, data)
    before = copy.deepcopy(model.state_dict())
    for width in (10, 33, 64):
        small = pruning_slicing.sliced(model, bases, width)
        assert parameters(small) == pruning_slicing.sliced_parameters(model, width)
    width = pruning_slicing.width_on_budget(model, 60_000)
    counts = [pruning_slicing.sliced_parameters(model, w) for w in (width, width + 1)]
    assert counts[0] <= 60_000 < counts[1]
    with pytest.raises(ValueError, match="allowed must be at least"):
        pruning_slicing.width_on_budget(model, 100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_block_influence_is_one_minus_the_cosine_of_the_states_around_a_block():
    model, data = tiny_llama(num_hidden_layers=4), batches()
    found = pruning_shortening.block_influences(model, data)
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in data]
    # transformers' last state is behind the final norm, so that of the last block is not among them.
    for i in range(3):
        before, after = (torch.cat([one[i + j].flatten(0, 1) for one in states]).double() for j in (0, 1))
        cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[i] == pytest.approx(1 - cosines.mean().item(), abs=1e-6)
    assert len(found) == 4 and found[3] > 0


def test_shortening_skips_the_blocks_of_least_influence():
    model, ids = tiny_llama(num_hidden_layers=4), batches()[0]["input_ids"]
    small = pruning_shortening.shortened(model, [0.4, 0.1, 0.3, 0.2], 0.5)
    # The same model with blocks 1 and 3 made the identity: nothing is added to the residual.
    silent = copy.deepcopy(model)
    for i in (1, 3):
        torch.nn.init.zeros_(silent.model.layers[i].self_attn.o_proj.weight)
        torch.nn.init.zeros_(silent.model.layers[i].mlp.down_proj.weight)
    torch.testing.assert_close(small(input_ids=ids).logits, silent(input_ids=ids).logits)
    layout = PruningLayout.of(find_decoder_stack(model))
    assert parameters(model) - parameters(small) == layout.total // 2
    cached = small.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(cached, small.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, use_cache=False))
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    # 24 of 30 and no block fewer, however a float rounds.
    thirty = tiny_llama(num_hidden_layers=30)
    for keep, count in ((0.9, 27), (0.8, 24), (0.7, 21), (0.5, 15)):
        assert len(pruning_shortening.shortened(thirty, list(range(30)), keep).model.layers) == count
    with pytest.raises(ValueError, match="at least one of 4 blocks"):
        pruning_shortening.shortened(model, [1.0] * 4, 0.2)


def test_code_and_prose_take_turns(tmp_path, monkeypatch):
    page = "<html><body><p>" + "A paragraph of a hundred letters is what counts as prose here, not a heading. " * 40
    folder = tmp_path / PLACES[1]
    folder.mkdir(parents=True)
    for i in range(60):
        (folder / f"page{i}.html").write_text(f"{page} {i}</p></body></html>")
    monkeypatch.setattr("benchmarks.pruning.text.handbook_files", lambda: handbook_files(tmp_path))
    text, rows = TEXTS["python-and-prose"](BASE, 32, 40, 6, 3)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prose = ["paragraph" in tokenizer.decode(row) for row in rows]
    assert prose == [False, True] * 20
    assert [len(batch["input_ids"]) for batch in text.calibration] == [2, 2, 2]
    spread = torch.cat([rows[start : start + 2] for start in (0, 20, 38)])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in text.calibration]), spread)
    assert {kind: tuple(part.shape) for kind, part in text.held.items()} == {"code": (3, 32), "handbook": (3, 32)}
    others, _ = TEXTS["python-and-prose-other"](BASE, 32, 40, 6, 3)
    chosen_on, _ = TEXTS["python-and-prose"](BASE, 32, 40, 6, CHOSEN_ON)
    assert len(others.held["code"]) == 3
    assert not (others.held["code"][:, None] == chosen_on.held["code"]).all(-1).any()


def test_impossible_arguments_are_refused(capsys):
    for wrong in (["--keep", "1.5"], ["--seeds", "0"]):
        with pytest.raises(SystemExit):
            pruning.arguments(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_speed_without_learned_widths_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="run it first"):
        pruning.main(["--parts", "speed", "--output", str(tmp_path)])


def test_every_label_belongs_to_a_row():
    assert set(pruning_methods.METHODS) < set(pruning_methods.LABELS)
    assert pruning_methods.DEFAULT not in pruning_methods.BASELINES
