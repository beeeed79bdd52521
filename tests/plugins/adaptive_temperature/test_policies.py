"""Policies beyond the paper's: entropy-driven, gated, combined, learned; and the adapter for vLLM."""

import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import train_base
from hf_qst_plugins.adaptive_temperature import (
    AdaptiveTemperatureLogitsProcessor,
    BlockStart,
    DifficultyProbe,
    EntropyGate,
    EntropyTemperature,
    LearnedTemperature,
    Observations,
    Position,
    PositionTable,
    TokenizerMismatchError,
    VLLMAdaptiveTemperature,
    VocabularyTable,
    combine,
    fit_difficulty_probe,
    observe,
)
from hf_qst_plugins.adaptive_temperature.distribution import certainty, entropy
from hf_qst_plugins.adaptive_temperature.learned import area_under_curve
from tests.plugins.code_tokenizers import standard_library, tokenizer

TABLE = VocabularyTable([None, "x", "\n", "    ", ":\n", " "])
INDENTED, INSIDE = [4, 3], [4, 1]


def rows(*ids):
    return torch.tensor(ids)


def certain_and_not(vocabulary=50):
    """A nearly one-hot row and a flat one."""
    scores = torch.zeros(2, vocabulary)
    scores[0, 7] = 30
    return scores


# --- what a distribution says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("ruled_out", [False, True])
def test_certainty_is_that_of_the_softmax(dtype, count, ruled_out):
    scores = (torch.randn(count, 1031) * torch.tensor([[1.0], [4], [30], [0], [9]])[:count] + 40).to(dtype)
    if ruled_out:
        scores[:, ::2] = -torch.inf
    found = certainty(scores)
    law = law_of(scores)
    torch.testing.assert_close(found.entropy.double(), law.entropy(), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(found.top_probability.double(), law.probs.amax(-1), atol=1e-6, rtol=1e-5)


def law_of(scores):
    return torch.distributions.Categorical(logits=scores.double().clamp(min=-1e4))


@pytest.mark.parametrize("peak", [0.0, 20.0, 60.0, 85.0, 95.0, 3000.0])
def test_entropy_finds_a_peak_wherever_it_stands(peak, monkeypatch):
    """The first scores alone are looked at for a reference; the largest may stand elsewhere, far above them."""
    torch.manual_seed(0)
    scores = torch.randn(6, 5000) * 3
    scores[::2, -3] += peak
    scores[4, :3000] = -torch.inf
    expected = law_of(scores).entropy()
    torch.testing.assert_close(entropy(scores).double(), expected, atol=5e-5, rtol=1e-5)
    some = torch.tensor([4, 1, 5])
    torch.testing.assert_close(entropy(scores, some).double(), expected[some], atol=5e-5, rtol=1e-5)
    monkeypatch.setattr("hf_qst_plugins.adaptive_temperature.distribution.IN_CACHE", 10_000)  # two rows at a time
    torch.testing.assert_close(entropy(scores).double(), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(certainty(scores).entropy.double(), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(entropy(scores, some).double(), expected[some], atol=5e-5, rtol=1e-5)
    monkeypatch.setattr("hf_qst_plugins.adaptive_temperature.distribution.runs_on_host", lambda tensor: False)
    torch.testing.assert_close(entropy(scores).double(), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(entropy(scores, some).double(), expected[some], atol=5e-5, rtol=1e-5)


def test_a_row_that_is_not_a_number_leaves_the_others_alone():
    scores = torch.randn(3, 3000)
    scores[1, 7] = torch.nan
    found = entropy(scores)
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[::2].double(), law_of(scores[::2]).entropy(), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [3, 7, 512, 513, 769, 2048, 5000])
def test_top_two_gap(vocabulary):
    for places in ((0, 1), (vocabulary - 1, 0), (vocabulary // 2, vocabulary - 1)):
        scores = torch.rand(3, vocabulary)
        scores[:, places[0]] = 5.0
        scores[:, places[1]] = 3.5
        assert certainty(scores).top_two_gap.tolist() == pytest.approx([1.5] * 3)
    scores = torch.full((1, vocabulary), -torch.inf)
    scores[0, 0] = 1
    assert certainty(scores).top_two_gap.tolist() == [200.0]


# --- entropy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edt", "power"])
def test_entropy_temperature_rises_with_entropy_within_its_range(kind):
    policy = EntropyTemperature(0.9, 0.3, kind=kind, exponent=0.7)
    scores = torch.randn(1, 200) * torch.linspace(0, 25, 60)[:, None]
    nats, found = entropy(scores), policy(rows(*[[1]] * 60), scores)
    assert (found >= 0.3).all() and (found <= 0.9 + 1e-6).all()
    order = nats.argsort()
    assert (found[order].diff() >= -1e-6).all() and found.max() - found.min() > 0.4


def test_edt_is_its_equation():
    """T = T0 * 0.8^(theta / H); the values are those of the equation worked by hand."""
    policy = EntropyTemperature(0.8, 0.01, kind="edt", theta=0.1)
    found = policy.of_entropy(torch.tensor([0.0, 0.01, 0.1, 1.0]), 1000)
    assert found.tolist() == pytest.approx([0.01, 0.0859, 0.64, 0.7823], abs=1e-3)


def test_power_is_its_equation():
    """T = T0 - D + 2 D (H / ln n)^e with T0 = 0.55, D = 0.25."""
    policy = EntropyTemperature(0.8, 0.3, kind="power")
    found = policy.of_entropy(torch.tensor([0.0, 0.2, 1.0]) * math.log(1000), 1000)
    assert found.tolist() == pytest.approx([0.3, 0.4, 0.8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sqrt"}, "kind must be edt or power, got 'sqrt'"),
        ({"max_temperature": 0.1}, "max_temperature must be at least min_temperature=0.2, got 0.1"),
        ({"min_temperature": 0}, "min_temperature must be a finite number above 0"),
        ({"theta": -1}, "theta must be a finite number above 0"),
        ({"exponent": math.nan}, "exponent must be a finite number above 0"),
    ],
)
def test_bad_entropy_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EntropyTemperature(**options)


# --- gates and combinations ---------------------------------------------------------------------------------------------


def test_gate_leaves_certain_rows_cold():
    gate = combine(BlockStart(TABLE, 0.8, 0.5), how="gate", min_entropy=0.05)
    assert isinstance(gate, EntropyGate)
    assert gate(rows(INDENTED, INDENTED), certain_and_not()).tolist() == pytest.approx([0.5, 0.8])
    assert gate(rows(INDENTED, INSIDE), certain_and_not()).tolist() == pytest.approx([0.5, 0.5])
    assert gate(rows(INSIDE, INSIDE), certain_and_not()) == 0.5


@pytest.mark.parametrize("hot", [1, 5, 7, 8])
def test_gate_reads_the_scores_of_hot_rows_alone_while_they_are_few(hot):
    """And gives the same however many there are."""
    gate = EntropyGate(BlockStart(TABLE, 0.8, 0.5), 0.05)
    ids, scores = rows(*[INDENTED] * hot, *[INSIDE] * (8 - hot)), certain_and_not().repeat(4, 1)
    if hot <= 5:
        scores[hot:] = torch.nan  # whatever reads them passes it on
    assert gate(ids, scores).tolist() == pytest.approx([0.5, 0.8] * (hot // 2) + [0.5] * (8 - hot // 2 * 2))


def test_gate_is_the_same_on_the_path_of_accelerators(monkeypatch):
    gate = EntropyGate(BlockStart(TABLE, 0.8, 0.5), 0.05)
    ids, scores = rows(INDENTED, INDENTED, INSIDE, INSIDE), certain_and_not().repeat(2, 1)
    expected = gate(ids, scores)
    monkeypatch.setattr("hf_qst_plugins.adaptive_temperature.policies.runs_on_host", lambda tensor: False)
    assert gate(ids, scores).tolist() == expected.tolist() == pytest.approx([0.5, 0.8, 0.5, 0.5])


def test_combinations():
    block, entropic = BlockStart(TABLE, 0.8, 0.5), EntropyTemperature(1.0, 0.25, kind="power")
    ids, scores = rows(INDENTED, INSIDE), certain_and_not()
    for how, expected in (("max", [0.8, 1.0]), ("min", [0.25, 0.5]), ("product", [0.2, 0.5])):
        policy = combine(block, entropic, how=how)
        assert policy(ids, scores).tolist() == pytest.approx(expected, abs=1e-3)
        processor = AdaptiveTemperatureLogitsProcessor(TABLE, rule=lambda table, policy=policy: policy)
        torch.testing.assert_close(processor(ids, scores), scores / policy(ids, scores)[:, None])


@pytest.mark.parametrize(
    ("count", "how", "message"),
    [(2, "mean", "how must be max, min, product or gate"), (1, "max", "two or more"), (2, "gate", "one policy")],
)
def test_bad_combinations_are_named(count, how, message):
    with pytest.raises(ValueError, match=message):
        combine(*[BlockStart(TABLE)] * count, how=how)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_gates_are_named(value):
    with pytest.raises(ValueError, match="min_entropy must be a finite number of nats"):
        EntropyGate(BlockStart(TABLE), value)


# --- learned ------------------------------------------------------------------------------------------------------------


def test_positions():
    positions = PositionTable(TABLE)
    text = rows(1, 5, 1, 4, 3, 1, 2, 3, 1, 2, 1)
    names = ["LINE_START", "OTHER", "GAP", "OTHER", "LINE_START", "BLOCK_START", "OTHER", "LINE_START"]
    names += ["INDENTED_LINE", "OTHER", "LINE_START"]
    assert [Position(place).name for place in positions.along(text).tolist()] == names
    for t in range(len(text)):
        assert positions.of_rows(text[None, :t]).item() == positions.along(text)[t]


def test_area_under_curve_counts_pairs():
    score, hard = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.8, 0.9]), torch.tensor([0, 0, 1, 0, 1, 1])
    pairs = [(a > b) + (a == b) / 2 for a in score[hard == 1].tolist() for b in score[hard == 0].tolist()]
    assert area_under_curve(score, hard) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(-score, hard) == pytest.approx(1 - sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="hard must hold both kinds of tokens, got 0 hard and 6 easy ones"):
        area_under_curve(score, torch.zeros(6))


def made_up(count=6000):
    """Observations whose law is known: hard with odds that rise with the entropy and at block starts."""
    certainty = torch.rand(count, 3) * torch.tensor([5.0, 1.0, 10.0])
    position = torch.randint(0, len(Position), (count,))
    logit = 1.2 * (certainty[:, 0] - 2.5) + 2.0 * (position == Position.BLOCK_START) - 1
    return Observations(certainty, position, torch.rand(count) < logit.sigmoid())


@pytest.fixture(scope="module")
def probe():
    torch.manual_seed(0)
    return fit_difficulty_probe(made_up(), TABLE.tokenizer_hash)


def test_probe_finds_the_law_it_was_fitted_on(probe):
    slope = probe.weights[0] / probe.std[0]
    starts = probe.weights[3 + Position.BLOCK_START] - probe.weights[3 + Position.OTHER]
    assert slope == pytest.approx(1.2, abs=0.15) and starts == pytest.approx(2.0, abs=0.4)
    assert abs(probe.weights[1]) < 0.2 and abs(probe.weights[2]) < 0.2
    assert probe.beats_its_parts
    assert probe.report["probe"] > probe.report["entropy"] + 0.005 > probe.report["position"]


def test_learned_temperature_is_within_its_range_and_rises_with_difficulty(probe):
    policy = LearnedTemperature(TABLE, probe, 0.9, 0.3, gamma=2.0)
    scores = torch.randn(1, 300) * torch.linspace(0.5, 20, 40)[:, None]
    found = policy(rows(*[INDENTED] * 40), scores)
    assert (found >= 0.3).all() and (found <= 0.9).all() and found.max() - found.min() > 0.2
    features = torch.stack([entropy(scores), 1 - certainty(scores).top_probability, certainty(scores).top_two_gap], -1)
    difficulty = probe.difficulty(features, torch.full((40,), int(Position.BLOCK_START)))
    torch.testing.assert_close(found, 0.3 + 0.6 * difficulty**2)
    elsewhere = policy(rows(*[INSIDE] * 40), scores)
    assert (elsewhere < found).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["entropy", "gate", "learned"])
def test_no_host_synchronisation_on_cuda(probe, kind):
    policies = {
        "entropy": EntropyTemperature(),
        "gate": combine(BlockStart(TABLE), how="gate"),
        "learned": LearnedTemperature(TABLE, probe),
    }
    processor = AdaptiveTemperatureLogitsProcessor(TABLE, rule=lambda _: policies[kind])
    ids, scores = rows(INDENTED, INDENTED, INSIDE, INSIDE), certain_and_not().repeat(2, 1)
    on_device = ids.cuda(), scores.cuda()
    processor(*on_device)  # copies the tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = processor(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), processor(ids, scores))


def test_probe_round_trip(probe, tmp_path):
    probe.save(tmp_path / "probe.json")
    assert DifficultyProbe.load(tmp_path / "probe.json") == probe
    assert json.loads((tmp_path / "probe.json").read_text())["report"] == probe.report


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}'])
def test_a_file_that_is_no_probe_is_named(tmp_path, content):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(ValueError, match=r"probe\.json is not"):
        DifficultyProbe.load(tmp_path / "probe.json")


def test_a_probe_of_another_tokenizer_is_refused(probe):
    with pytest.raises(TokenizerMismatchError, match="the difficulty probe belongs to the tokenizer"):
        LearnedTemperature(VocabularyTable.from_tokenizer(tokenizer("gpt2")), probe)


def test_too_little_to_fit_on_is_named():
    with pytest.raises(ValueError, match="at least 100 tokens, got 50"):
        fit_difficulty_probe(made_up(50), "")
    with pytest.raises(ValueError, match="held_out must be a share"):
        fit_difficulty_probe(made_up(200), "", held_out=1.0)
    with pytest.raises(ValueError, match="must be"):
        Observations(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3))


def test_probe_of_the_base_model_beats_entropy_and_position_alone(capsys):
    """On files of the standard library, by the project's own base model."""
    made = tokenizer("project")
    folder = Path(train_base.__file__).parent / "base_model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = VocabularyTable.from_tokenizer(made)
    texts = [torch.tensor(made.encode(text)[:256]) for text in standard_library()[::5]]
    probe = fit_difficulty_probe(observe(model, table, texts), table.tokenizer_hash)
    with capsys.disabled():
        print("\narea under the curve:", {name: round(value, 4) for name, value in probe.report.items()})
    assert probe.report["tokens"] > 1000 and probe.report["entropy"] > 0.7
    assert probe.beats_its_parts


def test_texts_without_a_token_to_predict_are_refused():
    with pytest.raises(ValueError, match="at least one text of two tokens"):
        observe(SimpleNamespace(device="cpu"), TABLE, [torch.tensor([1])])


# --- vLLM ---------------------------------------------------------------------------------------------------------------


class MoveDirectionality(enum.Enum):
    """As in vllm.v1.sample.logits_processor."""

    UNIDIRECTIONAL = 0
    SWAP = 1


@dataclass(frozen=True)
class BatchUpdate:
    """As in vllm.v1.sample.logits_processor."""

    batch_size: int
    removed: list = field(default_factory=list)
    added: list = field(default_factory=list)
    moved: list = field(default_factory=list)


@pytest.fixture
def adapter(tmp_path):
    made = tokenizer("newline_merging")
    made.save_pretrained(tmp_path)
    config = SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(tmp_path)))
    return made, VLLMAdaptiveTemperature(config, torch.device("cpu"), False)


def given(adapter, count):
    return (1 / adapter.apply(torch.ones(count, 3))[:, 0]).tolist()


def test_vllm_adapter_follows_its_batch(adapter):
    made, processor = adapter

    def ids(text):
        return made.encode(text, add_special_tokens=False)

    assert processor.is_argmax_invariant()
    plain, own = SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"block_temperature": 1.5})
    outputs = [[], ids("x"), ids("y")]
    added = [(0, plain, ids("if x:\n    "), outputs[0]), (1, own, None, outputs[1]), (2, plain, ids("z"), outputs[2])]
    processor.update_state(BatchUpdate(3, added=added))
    assert given(processor, 3) == pytest.approx([0.8, 0.5, 0.5])
    outputs[0] += ids("x")
    outputs[1] += ids(":\n    ")
    processor.update_state(None)
    assert given(processor, 3) == pytest.approx([0.5, 1.5, 0.5])
    processor.update_state(BatchUpdate(3, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert given(processor, 3) == pytest.approx([1.5, 0.5, 0.5])
    outputs[2] += ids("\n        ")
    processor.update_state(BatchUpdate(2, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert given(processor, 2) == pytest.approx([1.5, 0.8])
    bad = SimpleNamespace(extra_args={"temperature": 0})
    with pytest.raises(ValueError, match=r"extra_args\['temperature'\] must be a finite number above 0"):
        processor.update_state(BatchUpdate(3, added=[(2, bad, [], [])]))


def test_vllm_adapter_agrees_with_the_processor(adapter):
    made, processor = adapter
    text = made.encode(standard_library()[3][:1500], add_special_tokens=False)
    prompt, output = text[:30], []
    processor.update_state(BatchUpdate(1, added=[(0, SimpleNamespace(extra_args=None), prompt, output)]))
    policy, found, expected = BlockStart(VocabularyTable.from_tokenizer(made)), [], []
    for token in text[30:]:
        output.append(token)
        found.append(given(processor, 1)[0] > 0.65)
        expected.append(policy.hot_rows(rows(prompt + output))[0])
    assert found == expected and sum(found) > 10


@pytest.mark.parametrize("value", [0, -1.0, "0.5", True, float("inf"), float("nan"), 1e-60, 1e60, 10**400, None])
@pytest.mark.parametrize("name", ["temperature", "block_temperature"])
def test_vllm_is_told_of_a_bad_request_before_its_engine_sees_it(name, value):
    VLLMAdaptiveTemperature.validate_params(SimpleNamespace(extra_args=None))
    VLLMAdaptiveTemperature.validate_params(SimpleNamespace(extra_args={name: 0.3, "of another processor": "x"}))
    with pytest.raises(ValueError, match=rf"extra_args\['{name}'\] must be a finite number above 0 .*temperature=0"):
        VLLMAdaptiveTemperature.validate_params(SimpleNamespace(extra_args={name: value}))


def test_vllm_newer_interface_agrees_with_the_policy(tmp_path):
    """Slots are not rows; the ids of a step's drafts stand in the batch, earlier ones with their request."""
    made = tokenizer("newline_merging")
    made.save_pretrained(tmp_path)
    config = SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(tmp_path)))
    ids = torch.full((3, 200), 5, dtype=torch.int32)  # what earlier requests left
    state = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=3, all_token_ids=SimpleNamespace(gpu=ids))
    processor = VLLMAdaptiveTemperature(config, state)
    text = made.encode(standard_library()[3][:1500], add_special_tokens=False)[:150]
    ids[2, :120] = torch.tensor(text[:120])
    ids[0, :4] = torch.tensor(made.encode("if x:\n    ", add_special_tokens=False)[-4:])
    assert processor.add_request(2, SimpleNamespace(extra_args=None, temperature=1.0))
    assert not processor.add_request(0, SimpleNamespace(extra_args=None, temperature=0))
    processor.apply_staged_writes()
    drafts = len(text) - 120
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([0] + [2] * (drafts + 1), dtype=torch.int32),
        expanded_local_pos=torch.tensor([0, *range(drafts + 1)], dtype=torch.int32),
        input_ids=torch.tensor([ids[0, 3], *text[119:]], dtype=torch.int32),
        pos=torch.tensor([3, *range(119, 119 + drafts + 1)]),
    )
    found = 1 / processor.apply(torch.ones(drafts + 2, 3), context)[:, 0]
    policy = BlockStart(VocabularyTable.from_tokenizer(made))
    hot = [policy.hot_rows(torch.tensor([text[: 120 + i]]))[0] for i in range(drafts + 1)]
    assert found.tolist() == pytest.approx([1.0, *(0.8 if is_hot else 0.5 for is_hot in hot)])
    assert 0 < sum(hot) < len(hot)
