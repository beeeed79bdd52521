"""Several settings and problems in one batch: the scores, the draws and the files are those of one at a time."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TopPLogitsWarper,
)

from hf_qst import AdaptiveTemperatureLogitsProcessor, QSTConfig
from hf_qst_plugins.code_evaluation import (
    ExecutionNotAllowedError,
    Sampler,
    SamplesFileError,
    evaluate_together,
    judge_samples,
    read_problems,
    read_report,
    read_samples,
)
from hf_qst_plugins.code_evaluation.sampling import on_device
from hf_qst_plugins.code_evaluation.sampling.batched import LIKELIEST, BatchedSampler, draw
from hf_qst_plugins.code_evaluation.sampling.on_device import DeviceSampler
from hf_qst_plugins.code_evaluation.sampling.shared_prompts import read_prompt, read_rows, sharing_prompts

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("examples/base_model")


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large enough that what is drawn depends on all that came before."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=tokenizer.eos_token_id, **SIZES)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def problems():
    return read_problems()[:5]


@torch.no_grad()
def test_scores_are_those_of_the_model_when_rows_are_copied_and_dropped(model):
    generator = torch.Generator().manual_seed(1)
    first, second = ([*torch.randint(100, (length,), generator=generator).tolist()] for length in (9, 4))
    after = torch.randint(100, (3, 2), generator=generator).tolist()

    def alone(ids):
        return model(torch.tensor([ids])).logits[0, -1]

    with sharing_prompts(model):
        a, scores_a = read_prompt(model, first, 4)
        b, scores_b = read_prompt(model, second, 4)
        a.take([0, 0])
        one = read_rows(model, [a, b], [after[0][0], after[1][0], after[2][0]], [9, 9, 4])
        a.take([1, 1])
        two = read_rows(model, [b, a], [after[2][1], after[0][1], after[1][1]], [5, 10, 10])
    expected = [alone(first), alone(second)]
    torch.testing.assert_close(torch.cat([scores_a, scores_b]), torch.stack(expected), rtol=1e-4, atol=1e-4)
    expected = [alone([*first, after[0][0]]), alone([*first, after[1][0]]), alone([*second, after[2][0]])]
    torch.testing.assert_close(one, torch.stack(expected), rtol=1e-4, atol=1e-4)
    # Both rows of the first prompt are now copies of its second row.
    expected = [alone([*second, *after[2]]), *(alone([*first, after[1][0], after[row][1]]) for row in (0, 1))]
    torch.testing.assert_close(two, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation != "hf_qst_shared_prompts"


@pytest.mark.parametrize("scale", [0.1, 4.0], ids=["nucleus beyond the likeliest", "nucleus among the likeliest"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_follow_the_distribution_that_generate_would_draw_from(scale, top_p):
    scores = scale * torch.randn(3, 3 * LIKELIEST, generator=torch.Generator().manual_seed(2))
    expected = (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)
    grid = (torch.arange(20_000) + 0.5) / 20_000
    for row in range(3):
        rows = torch.full((len(grid),), row)
        tokens = draw(scores, top_p, rows, grid)
        shares = torch.bincount(tokens, minlength=scores.shape[1]) / len(grid)
        # Each token's interval holds the grid's points that it covers, one more or less at its two ends.
        assert (shares - expected[row]).abs().max() < 1.5 / len(grid) + 1e-5
        assert expected[row, tokens].min() > 0


def test_excluded_tokens_are_never_drawn_and_the_last_number_is_safe():
    scores = torch.full((1, 600), -torch.inf)
    scores[0, [5, 400]] = torch.tensor([1.0, 0.5])
    tokens = draw(scores, 1.0, torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 0.7, 1 - 2**-24]))
    assert tokens.tolist() == [5, 400, 400]


def settings_of(tokenizer):
    warm = {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    adaptive = {"temperature": 1.0, "top_p": 1.0, "logits_processor": [AdaptiveTemperatureLogitsProcessor(tokenizer)]}
    return {
        name: {"max_new_tokens": 12, **kwargs}
        for name, kwargs in {"greedy": GREEDY, "warm": warm, "adaptive": adaptive}.items()
    }


def seeds_of(problem, names, count=4):
    return problem, {(name, number): 31 * number + len(problem.prompt) for name in names for number in range(count)}


def drawn_with(model, tokenizer, problems, names, rows, kind=BatchedSampler, ends=()):
    settings = settings_of(tokenizer)
    if ends:
        settings = {name: {**kwargs, "eos_token_id": list(ends)} for name, kwargs in settings.items()}
    batched = kind({name: Sampler(model, tokenizer, settings[name]) for name in names})
    found = batched.draw([seeds_of(problem, names) for problem in problems], rows)
    return {(problem.task_id, *one): (text, count) for problem, one, text, count in found}


def test_a_completion_depends_neither_on_the_batch_nor_on_other_settings(model, tokenizer, problems):
    together = drawn_with(model, tokenizer, problems, ("greedy", "warm", "adaptive"), rows=1000)
    assert len(together) == 5 * 3 * 4
    assert len({text for text, _ in together.values()}) > 20
    for name in ("greedy", "warm", "adaptive"):
        alone = drawn_with(model, tokenizer, problems[1:2], (name,), rows=1)
        assert alone.items() <= together.items()


def test_greedy_is_what_generate_gives(model, tokenizer, problems):
    together = drawn_with(model, tokenizer, problems, ("greedy", "warm"), rows=20)
    one = Sampler(model, tokenizer, settings_of(tokenizer)["greedy"])
    for problem in problems:
        (expected,) = one.draw(problem, 1, seed=0)
        assert together[problem.task_id, "greedy", 0] == expected


def test_a_run_that_was_cut_short_goes_on_and_is_reported(model, tokenizer, problems, tmp_path):
    settings = settings_of(tokenizer)
    arguments = {"samples": 2, "rows": 8, "workers": 1, "allow_execution": True, "progress": False}
    assert not evaluate_together(model, tokenizer, problems, settings, tmp_path, minutes=1e-9, **arguments)
    assert all(read_samples(tmp_path / f"{name}.jsonl")[1] == [] for name in settings)
    assert evaluate_together(model, tokenizer, problems, settings, tmp_path, **arguments)

    def read(name):
        return {(s["task_id"], s["sample"]): s["completion"] for s in read_samples(tmp_path / f"{name}.jsonl")[1]}

    whole = {name: read(name) for name in settings}
    assert {name: len(samples) for name, samples in whole.items()} == {"greedy": 5, "warm": 10, "adaptive": 10}
    assert read_report(tmp_path / "warm.jsonl").samples == 10
    path = tmp_path / "warm.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    assert evaluate_together(model, tokenizer, problems, settings, tmp_path, **arguments)
    assert {name: read(name) for name in settings} == whole
    assert json.loads(lines[0])["settings"]["batch_size"] is None


def test_what_cannot_be_drawn_together_is_refused(model, tokenizer, problems, tmp_path):
    def run(model=model, **settings):
        settings = {name: {"max_new_tokens": 4, **kwargs} for name, kwargs in settings.items()}
        return evaluate_together(
            model, tokenizer, problems, settings, tmp_path / str(id(model)), samples=1, workers=1, allow_execution=True
        )

    with pytest.raises(ValueError, match="generate_kwargs of 'a' must not hold 'repetition_penalty'"):
        run(a={"repetition_penalty": 1.2})
    with pytest.raises(ValueError, match=r"same max_new_tokens in every setting, got \[4, 5\]"):
        run(a={}, b={"max_new_tokens": 5})
    with pytest.raises(ValueError, match="settings is empty"):
        run()
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1, got 0"):
        evaluate_together(model, tokenizer, problems, {"a": {}}, tmp_path, rows=0, allow_execution=True)
    sliding = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=8, **SIZES)).eval()
    with pytest.raises(ValueError, match="sliding_window cannot share prompts"):
        run(sliding, a={})
    blind = copy.deepcopy(model)
    for layer in blind.model.layers:  # the same function under another name: nothing of it is shared
        layer.self_attn.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match="so its prompts cannot be shared; use evaluate"):
        run(blind, a={})


def test_a_side_network_reads_shared_prompts_too(model, tokenizer, problems):
    side = get_peft_model(copy.deepcopy(model), QSTConfig(r=4)).eval()
    torch.manual_seed(3)
    for parameter in side.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    together = drawn_with(side, tokenizer, problems, ("greedy",), rows=20)
    assert together != drawn_with(model, tokenizer, problems, ("greedy",), rows=20)
    one = Sampler(side, tokenizer, settings_of(tokenizer)["greedy"])
    for problem in problems:
        (expected,) = one.draw(problem, 1, seed=0)
        assert together[problem.task_id, "greedy", 0] == expected


@pytest.mark.parametrize("rows", [1, 30, 1000])
def test_on_a_device_the_completions_are_the_same(model, tokenizer, problems, rows, monkeypatch):
    monkeypatch.setattr(on_device, "STEPS", 5)  # rows end and move between two looks
    model = copy.deepcopy(model).double()  # the batches differ in the order of sums: float32 would draw other tokens
    names, ends = ("greedy", "warm", "adaptive"), range(1000)
    expected = drawn_with(model, tokenizer, problems, names, 1000, ends=ends)
    assert len({count for _, count in expected.values()}) > 3
    assert drawn_with(model, tokenizer, problems, names, rows, DeviceSampler, ends) == expected


def test_on_a_device_a_side_network_reads_the_prompts(model, tokenizer, problems):
    side = get_peft_model(copy.deepcopy(model), QSTConfig(r=4)).eval().double()
    torch.manual_seed(3)
    for parameter in side.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    names = ("greedy", "adaptive")
    expected = drawn_with(side, tokenizer, problems, names, rows=20)
    assert drawn_with(side, tokenizer, problems, names, 20, DeviceSampler) == expected


def test_draws_take_a_nucleus_for_each_row():
    scores = torch.randn(4, 2 * LIKELIEST, generator=torch.Generator().manual_seed(5))
    rows, uniform = torch.arange(4), torch.tensor([0.1, 0.5, 0.9, 0.99])
    top_p = [1e-30, 0.3, 0.9, 1.0]
    alone = [draw(scores[[row]], top_p[row], torch.tensor([0]), uniform[[row]]).item() for row in range(4)]
    assert draw(scores, torch.tensor(top_p), rows, uniform).tolist() == alone
    assert alone[0] == scores[0].argmax()


def test_samples_are_judged_later_as_they_would_have_been_at_once(model, tokenizer, problems, tmp_path):
    settings = {"warm": settings_of(tokenizer)["warm"]}
    arguments = {"samples": 3, "rows": 8, "workers": 1, "progress": False}
    assert evaluate_together(model, tokenizer, problems, settings, tmp_path / "later", judge=False, **arguments)
    assert evaluate_together(model, tokenizer, problems, settings, tmp_path / "once", allow_execution=True, **arguments)
    later, once = (tmp_path / folder / "warm.jsonl" for folder in ("later", "once"))
    with pytest.raises(ValueError, match="not executed"):
        read_report(later)
    with pytest.raises(ExecutionNotAllowedError):
        judge_samples([later], problems)
    with pytest.raises(SamplesFileError, match="other problems"):
        judge_samples([later], problems[1:], allow_execution=True)
    judge = {"workers": 1, "allow_execution": True, "progress": False}
    assert judge_samples([later], problems, **judge) == 15
    assert judge_samples([later], problems, **judge) == 0

    def read(path):
        header, samples = read_samples(path)
        return header, [{**sample, "seconds": None} for sample in samples]

    assert read(later) == read(once)
    # A judged file goes on like any other.
    assert evaluate_together(model, tokenizer, problems, settings, later.parent, allow_execution=True, **arguments)
    more = {**arguments, "judge": False}
    assert evaluate_together(model, tokenizer, problems, settings, later.parent, **more)
    assert read(later) == read(once)
