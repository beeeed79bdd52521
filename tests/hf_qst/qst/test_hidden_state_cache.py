"""A side network on stored states: what is computed again and what is not, and where it equals the model without a cache."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel

from hf_qst import QSTConfig
from hf_qst.qst import (
    HiddenStateCacheConfig,
    fill_hidden_state_cache,
    hidden_state_cache,
    learn_apart,
    set_hidden_state_cache,
)
from tests.architectures import digest, in_nf4, side_layers, side_network, side_tuned, tiny, token_batch
from tests.tiny_decoders import tiny_decoder

IDS = token_batch(rows=4, length=12)


def model_with(folder, storage="full", limit=None, **settings):
    """A side-tuned tiny Llama with a cache, or without where `folder` is None; the same one each time."""
    config = None if folder is None else HiddenStateCacheConfig(folder, storage, limit)
    torch.manual_seed(4)
    return side_tuned(awake=True, hidden_state_cache=config, **settings).train()


def padded(lengths, to: int, side: str = "right"):
    """The rows of `IDS`, shortened to `lengths` and padded to `to` tokens, with labels."""
    ids = torch.zeros(len(lengths), to, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(to - length, to)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(*rows):
    """Sequences one behind the other in one row, as padding-free collators make it."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    ids = torch.cat(rows)[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def loss_of(model, **batch):
    batch = batch or {"input_ids": IDS}
    return model(**{"labels": batch["input_ids"], "use_cache": False, **batch}).loss.item()


def rows_run(model) -> list[int]:
    """Gets the number of rows of each run of a base block, from now on."""
    rows = []
    block = side_layers(model)[0].blocks[1]
    block.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return rows


def counts(model):
    return hidden_state_cache(model).counts


def finish(model):
    hidden_state_cache(model).close()


def test_the_blocks_of_the_base_run_once_for_each_row(tmp_path):
    model = model_with(tmp_path)
    rows = rows_run(model)
    expected = loss_of(model_with(None))
    assert loss_of(model) == expected
    assert rows == [1, 4]  # one token to see what the blocks return
    assert loss_of(model) == expected
    assert rows == [1, 4, 1]  # one row to compare
    assert loss_of(model, input_ids=IDS[[3, 1]]) == pytest.approx(
        loss_of(model_with(None), input_ids=IDS[[3, 1]]), abs=1e-6
    )
    assert rows == [1, 4, 1]
    assert (counts(model).missing, counts(model).found) == (4, 6)


def test_only_rows_that_are_missing_run(tmp_path):
    model = model_with(tmp_path)
    rows = rows_run(model)
    loss_of(model, input_ids=IDS[:1])
    assert loss_of(model) == pytest.approx(loss_of(model_with(None)), abs=1e-6)
    assert rows[-1] == 3


def test_a_new_process_compares_one_example_and_computes_nothing_else(tmp_path):
    first = model_with(tmp_path)
    expected = loss_of(first)
    finish(first)
    again = model_with(tmp_path)
    rows = rows_run(again)
    assert [loss_of(again), loss_of(again)] == [expected] * 2
    assert rows == [1, 1]
    assert counts(again).missing == 0


@pytest.mark.parametrize("settings", [{}, {"tail_layers": 1}, {"downsample": "avgpool", "readout_rank": 0}])
def test_gradients_are_those_without_a_cache(tmp_path, settings):
    gradients = []
    for folder in (None, tmp_path, tmp_path):
        model = model_with(folder, **settings)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if folder:
            finish(model)
    for others in gradients[1:]:
        assert others.keys() == gradients[0].keys()
        assert all(torch.equal(others[name], gradient) for name, gradient in gradients[0].items())


def test_padding_behind_a_row_does_not_matter(tmp_path):
    model = model_with(tmp_path)
    loss_of(model, **padded([12, 5, 9], 12))
    missing = counts(model).missing
    for lengths, to in (([12, 5, 9], 16), ([12, 5], 12)):
        expected = loss_of(model_with(None), **padded(lengths, to))
        assert loss_of(model, **padded(lengths, to)) == pytest.approx(expected, abs=2e-6)
    assert loss_of(model, input_ids=IDS[1:2, :5]) == pytest.approx(
        loss_of(model_with(None), input_ids=IDS[1:2, :5]), abs=2e-6
    )
    assert counts(model).missing == missing == 3


def test_padding_in_front_is_part_of_the_key(tmp_path):
    model = model_with(tmp_path)
    for to, missing in ((12, 2), (14, 4), (12, 4)):
        batch = padded([12, 7], to, "left")
        assert loss_of(model, **batch) == pytest.approx(loss_of(model_with(None), **batch), abs=2e-6)
        assert counts(model).missing == missing


def test_a_batch_of_nothing_but_padding_runs_the_base(tmp_path):
    model = model_with(tmp_path)
    ids = torch.zeros(2, 4, dtype=torch.long)
    output = model(input_ids=ids, attention_mask=ids, use_cache=False).logits
    assert torch.equal(output, model_with(None)(input_ids=ids, attention_mask=ids, use_cache=False).logits)
    assert counts(model).missing == 0


def test_sequences_of_a_packed_row_are_known_in_any_other(tmp_path):
    model = model_with(tmp_path)
    a, b, c = IDS[0], IDS[1, :5], IDS[2, :8]
    for rows, missing in (((a, b), 2), ((b, c, a), 3), ((c,), 3)):
        batch = packed(*rows)
        assert loss_of(model, **batch) == pytest.approx(loss_of(model_with(None), **batch), abs=2e-6)
        assert counts(model).missing == missing
    loss_of(model, input_ids=IDS[:1])
    assert counts(model).missing == 3


def test_a_mask_with_packed_positions_keeps_the_row_whole(tmp_path):
    """transformers separates sequences by their positions only where there is no mask."""
    model = model_with(tmp_path)
    batch = {**packed(IDS[0], IDS[1]), "attention_mask": torch.ones(1, 24, dtype=torch.long)}
    for _ in range(2):
        assert loss_of(model, **batch) == pytest.approx(loss_of(model_with(None), **batch), abs=2e-6)
    assert counts(model).missing == 1
    loss_of(model, **packed(IDS[0], IDS[1]))
    assert counts(model).missing == 3


def test_a_base_with_convolutions_does_not_separate_packed_sequences(tmp_path):
    def make(folder):
        torch.manual_seed(4)
        return side_tuned(model=tiny_decoder("lfm2"), awake=True, hidden_state_cache=folder).train()

    model, batch = make(tmp_path), packed(IDS[0], IDS[1])
    for _ in range(2):
        assert loss_of(model, **batch) == pytest.approx(loss_of(make(None), **batch), abs=2e-6)
    assert counts(model).missing == 1
    loss_of(model, **packed(IDS[1], IDS[0]))
    assert counts(model).missing == 2


def test_an_edited_row_is_computed_again_and_no_other(tmp_path):
    model = model_with(tmp_path)
    loss_of(model)
    edited = IDS.clone()
    edited[2, 3] = edited[2, 3] % 90 + 3
    assert loss_of(model, input_ids=edited) == pytest.approx(loss_of(model_with(None), input_ids=edited), abs=1e-6)
    assert counts(model).missing == 5


def change_weight(model):
    with torch.no_grad():
        model.get_base_model().model.base_layer.layers[0].mlp.up_proj.weight[3, 4] += 0.5


@pytest.mark.parametrize("moment", ["between_runs", "during_a_run"])
def test_states_of_another_base_are_not_used(tmp_path, moment):
    model = model_with(tmp_path)
    loss_of(model)
    if moment == "between_runs":
        finish(model)
        model = model_with(tmp_path)
    change_weight(model)
    changed = model_with(None)
    change_weight(changed)
    before = counts(model).missing
    assert loss_of(model) == pytest.approx(loss_of(changed), abs=1e-6)
    assert counts(model).missing == before + 4


def test_states_of_another_configuration_are_not_used(tmp_path):
    finished = model_with(tmp_path)
    loss_of(finished)
    finish(finished)
    torch.manual_seed(4)
    other = side_tuned(
        model=tiny("llama", rms_norm_eps=1e-2), awake=True, hidden_state_cache=HiddenStateCacheConfig(tmp_path)
    ).train()
    loss_of(other)
    assert counts(other).missing == 4


def test_a_4_bit_base_is_known_by_its_constants(tmp_path):
    def make(folder, scale=1.0):
        base = in_nf4(tmp_path / "base")
        base.model.layers[0].mlp.up_proj.weight.quant_state.state2.absmax.mul_(scale)
        torch.manual_seed(4)
        return side_tuned(model=base, awake=True, hidden_state_cache=folder).train()

    expected = loss_of(make(None))
    for scale, missing in ((1.0, 4), (1.0, 0), (3.0, 4)):
        model = make(tmp_path / "states", scale)
        loss = loss_of(model)
        assert counts(model).missing == missing
        assert (abs(loss - expected) < 1e-5) == (scale == 1.0)
        finish(model)


def test_networks_share_states_where_they_read_the_same(tmp_path):
    for settings, missing in (
        ({"r": 4}, 4),
        ({"r": 8, "mix": "paper", "downsample_rank": 2}, 0),
        ({"tail_layers": 1}, 4),
        ({"readout_every": 1}, 0),  # reads what the first did
        ({"downsample": "principal", "readout_rank": 0}, 4),
        ({"downsample": "maxpool", "readout_rank": 0}, 4),
        ({"downsample": "avgpool", "readout_rank": 0}, 4),
        ({"downsample": "avgpool", "readout_rank": 0, "r": 8}, 4),
    ):
        model = model_with(tmp_path, **settings)
        assert loss_of(model) == pytest.approx(loss_of(model_with(None, **settings)), abs=1e-6)
        assert counts(model).missing == missing, settings
        finish(model)


def test_other_principal_directions_are_other_states(tmp_path):
    settings = {"downsample": "principal", "readout_rank": 0}
    model = model_with(tmp_path, **settings)
    loss_of(model)
    for other in (model, model_with(None, **settings)):
        with torch.no_grad():
            side_network(other).downsample[0].directions.mul_(-1.5)
    assert loss_of(model) == pytest.approx(loss_of(other), abs=1e-6)
    assert counts(model).missing == 8


@pytest.mark.parametrize(("storage", "of_largest"), [("full", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("settings", [{}, {"downsample": "avgpool", "readout_rank": 0}])
def test_stored_states_are_within_the_error_of_their_storage(tmp_path, storage, of_largest, settings):
    """int8: half a step, which is a 127th of the largest of 64 channels; bfloat16: half a unit of eight bits."""
    model = model_with(tmp_path, storage, **settings)
    layer, network = side_layers(model)[0], side_network(model)
    leaving = {}
    for i, block in enumerate(layer.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: leaving.setdefault(i, out))
    with torch.no_grad():
        layer.base_layer(input_ids=IDS, use_cache=False)
    states = network.hidden_states.stored(layer, network, {"input_ids": IDS})
    assert states.plan.names
    for name in states.plan.names:
        kind, _, index = name.partition(".")
        right = leaving[int(index)]
        right = right if kind == "state" else network.downsample[network.places.index(int(index))].tap(right)
        error = (states.tensor(name, torch.float32, torch.device("cpu")) - right).abs()
        bound = torch.cat([p.abs().amax(-1, keepdim=True).expand_as(p) for p in right.split(64, -1)], -1) * of_largest
        assert (error <= bound * (1 + 1e-5)).all()
        assert (error.max() > 0) == (storage != "full")


def test_noise_in_the_base_is_found_out_in_the_second_pass(tmp_path):
    model = model_with(tmp_path)
    model.get_base_model().model.base_layer.layers[0].register_forward_hook(
        lambda _, __, out: out + torch.randn_like(out)
    )
    loss_of(model)
    with pytest.raises(ValueError, match=r"computes other states than those stored"):
        loss_of(model)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_losses_in_fewer_bits_are_near_and_the_same_in_every_pass(tmp_path, storage):
    model = model_with(tmp_path, storage)
    expected = loss_of(model_with(None))
    first = loss_of(model)
    assert first == pytest.approx(expected, rel=5e-3)
    assert loss_of(model) == first
    finish(model)
    assert loss_of(model_with(tmp_path, storage)) == first


def test_states_that_a_hook_changes_are_found_out(tmp_path):
    model = model_with(tmp_path)
    loss_of(model)
    finish(model)
    other = model_with(tmp_path)
    other.get_base_model().model.base_layer.layers[0].register_forward_hook(lambda _, __, out: out + 1)
    with pytest.raises(ValueError, match=r"computes other states than those stored .* state\.\d .*such as a hook"):
        loss_of(other)


def test_the_size_limit_leaves_the_losses_right(tmp_path, caplog):
    model = model_with(tmp_path, limit=1000)
    rows = rows_run(model)
    for _ in range(2):
        assert loss_of(model) == pytest.approx(loss_of(model_with(None)), abs=1e-6)
        hidden_state_cache(model).shards.writer.flush()
    assert rows == [1, 4, 4]
    assert caplog.text.count("reached its size_limit") == 1


def test_generation_and_calls_for_more_than_the_loss_run_the_base(tmp_path):
    model, plain = model_with(tmp_path).eval(), model_with(None).eval()
    loss_of(model)
    new = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **new), plain.generate(IDS, **new))
    for wanted in ("output_hidden_states", "output_attentions"):
        got, expected = (m(input_ids=IDS, use_cache=False, **{wanted: True}) for m in (model, plain))
        for ours, theirs in zip(got[wanted.partition("_")[2]], expected[wanted.partition("_")[2]], strict=True):
            torch.testing.assert_close(ours, theirs)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny("llama")(IDS).logits)
    assert counts(model).missing + counts(model).found == 4


def test_a_training_step_that_needs_the_base_says_so_once(tmp_path, caplog):
    torch.manual_seed(4)
    model = side_tuned(model=tiny_decoder("qwen3_moe"), awake=True, hidden_state_cache=str(tmp_path)).train()
    for _ in range(2):
        assert model(input_ids=IDS, labels=IDS, output_router_logits=True).aux_loss > 0
    assert [record.getMessage() for record in caplog.records if "hidden-state cache" in record.getMessage()] == [
        "hidden-state cache: output_router_logits is set, so the base runs in this step and the like"
    ]
    assert counts(model).missing == 0


def test_evaluation_reads_what_training_stored(tmp_path):
    model = model_with(tmp_path)
    loss_of(model), loss_of(model)
    rows = rows_run(model)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits
        assert torch.equal(logits, model_with(None).eval()(input_ids=IDS, use_cache=False).logits)
    assert rows == []


def test_copies_and_pickles_use_the_same_folder(tmp_path):
    model = model_with(tmp_path)
    expected = loss_of(model)
    hidden_state_cache(model).shards.writer.flush()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert loss_of(other) == expected
        assert counts(other).missing == 0
        change_weight(other)
        assert loss_of(other) != expected
    assert loss_of(model) == expected


def test_the_folder_is_not_saved_with_the_adapter(tmp_path):
    model = model_with(tmp_path / "states")
    assert "hidden_state_cache" not in model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path / "states") not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True).train()
    assert hidden_state_cache(loaded) is None
    expected = loss_of(loaded)
    set_hidden_state_cache(loaded, tmp_path / "states")
    assert [loss_of(loaded), loss_of(loaded)] == [expected] * 2
    assert (counts(loaded).missing, counts(loaded).found) == (4, 4)
    set_hidden_state_cache(loaded, None)
    assert hidden_state_cache(loaded) is None
    assert loss_of(loaded) == expected


def test_the_base_comes_back_as_it_was(tmp_path):
    base = tiny("llama")
    before = digest(base)
    model = side_tuned(model=base, hidden_state_cache=str(tmp_path)).train()
    loss_of(model)
    assert model.unload() is base
    assert digest(base) == before
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in base.modules())
    torch.testing.assert_close(base(IDS).logits, tiny("llama")(IDS).logits, rtol=0, atol=0)


def test_two_adapters_on_one_base(tmp_path):
    model = model_with(tmp_path)
    torch.manual_seed(6)
    model.add_adapter("other", QSTConfig(task_type="CAUSAL_LM", r=8, init_weights=False))
    model.set_adapter("other")
    plain = loss_of(model)
    set_hidden_state_cache(model, tmp_path)
    assert loss_of(model) == plain
    model.set_adapter("default")
    assert loss_of(model) == loss_of(model_with(None))


def test_autocast_has_states_of_its_own(tmp_path):
    model = model_with(tmp_path)
    loss_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stored = loss_of(model)
        assert stored == loss_of(model)
        assert stored == pytest.approx(loss_of(model_with(None)), abs=1e-3)
    assert (counts(model).missing, counts(model).found) == (8, 4)


def test_filling_leaves_nothing_to_compute(tmp_path, capsys):
    model = model_with(tmp_path, "int8")
    rows = [{"input_ids": row.tolist()} for row in [*IDS, IDS[0], IDS[1, :5]]]
    report = fill_hidden_state_cache(model, rows)
    assert (report.examples, report.stored, report.tokens) == (5, 5, 53)
    assert report.bytes_per_token == 3 * (64 + 4)  # three states of 64 channels, one scale each
    assert report.bytes_written > 53 * report.bytes_per_token
    assert "53 tokens to store, 204 bytes each (int8)" in capsys.readouterr().out
    trained = model_with(tmp_path, "int8")
    run = rows_run(trained)
    loss_of(trained)
    assert run == [1, 1]
    again = fill_hidden_state_cache(trained, [{"input_ids": IDS}], progress=False)
    assert (again.examples, again.stored, again.bytes_written) == (4, 0, 0)
    assert capsys.readouterr().out == ""


def test_ranks_divide_the_filling(tmp_path):
    batches = [{"input_ids": IDS[[i]], "labels": IDS[[i]]} for i in range(4)]
    stored = [
        fill_hidden_state_cache(model_with(tmp_path), batches, rank=rank, world_size=2, progress=False).stored
        for rank in (0, 1)
    ]
    assert stored == [2, 2]
    model = model_with(tmp_path)
    loss_of(model)
    assert counts(model).missing == 0
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size=2\), got 2"):
        fill_hidden_state_cache(model, batches, rank=2, world_size=2)


@pytest.mark.parametrize("second", [{"r": 4}, {"r": 2, "readout_every": 1}], ids=["same reads", "other reads"])
def test_several_networks_that_learn_apart_read_stored_states(tmp_path, second):
    def two(folder):
        model = model_with(folder)
        torch.manual_seed(6)
        cache = None if folder is None else HiddenStateCacheConfig(folder, "full")
        model.add_adapter(
            "second", QSTConfig(task_type="CAUSAL_LM", init_weights=False, hidden_state_cache=cache, **second)
        )
        return model.train(), learn_apart(model, ["default", "second"])

    plain, of_plain = two(None)
    cached, of_cached = two(tmp_path)
    loss_of(plain)
    expected = {name: loss.item() for name, loss in of_plain.losses.items()}
    for time in range(3):
        rows = rows_run(cached)
        loss_of(cached)
        assert {name: loss.item() for name, loss in of_cached.losses.items()} == pytest.approx(expected, abs=1e-6)
        if time == 2:
            assert not rows
    assert expected["default"] != expected["second"]
