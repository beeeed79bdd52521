"""Experts of a mixture under DISP: one choice a layer of what they read, hold and write; the router stays."""

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import DISPConfig, MixedRankConfig, prune_model, quantize_experts, to_dense
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.experts import SplitExperts, fused_experts
from hf_qst.mixed_rank import LowRankLinear, compress_model
from hf_qst.pruning.branch import PrunedBranch, prune_blocks
from hf_qst.pruning.gradients import fisher_scores
from hf_qst.pruning.layout import PruningLayout
from hf_qst.pruning.scores import PRUNING_METHODS, PruningTask, experts_as_layers
from tests.architectures import NF4, digest, token_batch
from tests.mixtures import CONFIGS, tiny_mixture
from tests.pruned_models import with_disp
from tests.tiny_decoders import spread, tiny_config


def logits(model):
    with torch.no_grad():
        return model.eval()(token_batch(3, 13, seed=7), use_cache=False).logits


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=1e-4)


def size_of(blocks):
    return sum(p.numel() for p in blocks.parameters())


def tuned(name, model=None, **settings):
    return with_disp(
        model=tiny_mixture(name) if model is None else model, awake=True, **{"keep_ratio": 0.6, **settings}
    )


@torch.no_grad()
def zeroed_by_hand(model, masks):
    """The dense model with zeros in the place of every weight that goes with a channel that is not kept."""
    for block, mask in zip(model.model.layers, masks, strict=True):
        read, middle, written = (~mask[name] for name in ("mlp_in", "mlp_middle", "mlp_out"))
        experts = dict(block.named_modules()).get("mlp.experts")
        if experts is None:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[:, read] = 0
                layer.weight[middle] = 0
            block.mlp.down_proj.weight[:, middle] = 0
            block.mlp.down_proj.weight[written] = 0
            continue
        first, last = experts.gate_up_proj, experts.down_proj
        if not experts.is_transposed:
            first, last = first.transpose(1, 2), last.transpose(1, 2)  # views: [experts, d_in, d_out]
        width = len(middle)
        both = torch.zeros(2 * width, dtype=torch.bool)
        for channel in middle.nonzero().flatten().tolist():
            places = (channel, channel + width) if experts.is_concatenated else (2 * channel, 2 * channel + 1)
            both[list(places)] = True
        first[:, read], first[:, :, both], last[:, middle], last[:, :, written] = 0, 0, 0, 0
        if experts.has_bias:
            experts.gate_up_proj_bias[:, both] = 0
            experts.down_proj_bias[:, written] = 0
        for shared in (getattr(block.mlp, n) for n in ("shared_expert", "shared_experts") if hasattr(block.mlp, n)):
            shared.gate_proj.weight[:, read] = shared.up_proj.weight[:, read] = 0
            shared.down_proj.weight[written] = 0
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_exported_dense_and_zeroed_by_hand_are_one_function(name, tmp_path):
    dense = tiny_mixture(name)
    model = tuned(name, selections=["mlp_in", "mlp_middle", "mlp_out"])
    masks, masked = model.base_model.disp_masks(), logits(model)
    report = model.base_model.disp_report()
    assert all(not mask[part].all() for mask in masks for part in ("mlp_in", "mlp_middle", "mlp_out"))
    assert_close(logits(zeroed_by_hand(tiny_mixture(name), masks)), masked)
    full = size_of(dense.model.layers)
    small = model.merge_and_unload()
    assert_close(logits(small), masked)
    kept = size_of(small.model.layers)
    assert 0.598 < kept / full <= 0.6
    layout = PruningLayout.of(find_decoder_stack(dense))
    widths = [[int(mask[part].sum()) for part in mask] for mask in masks]
    assert layout.total == full and layout.count(widths) == kept == report.parameters
    routers = lambda of: {n: p for n, p in of.named_parameters() if ".gate.weight" in n or ".router." in n}
    after, before = routers(small), routers(dense)
    assert before and all(torch.equal(after[key], value) for key, value in before.items())
    plain = to_dense(small)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert_close(logits(plain), masked)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), again.parameters(), strict=True))
    assert_close(logits(again), masked)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_implementation_of_the_experts_sees_the_gates(name):
    """transformers' own classes compute the usual gate in their forward, the other implementations call a method."""
    model, dense = tuned(name), tiny_mixture(name)
    expected, whole = logits(model), logits(dense)
    assert (expected - whole).abs().max() > 0.1
    for implementation in ("grouped_mm", "batched_mm"):
        for one in (model.get_base_model(), dense):
            one.set_experts_implementation(implementation)
        assert_close(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(dense))


def test_an_implementation_that_would_not_see_the_gates_is_refused():
    model = tiny_mixture("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(
        ValueError, match=r"experts_implementation must be one of eager, grouped_mm, batched_mm.*'sonicmoe'"
    ):
        get_peft_model(model, DISPConfig())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_logit_of_the_experts_selections_learns(name, checkpointing):
    model = tuned(name, hypernetwork="none", selections=["mlp_in", "mlp_middle", "mlp_out"]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = token_batch(4, 24)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all((gradient != 0).float().mean() > 0.95 for gradient in gradients)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_unloading_leaves_nothing_on_the_experts():
    dense, model = tiny_mixture("gpt_oss"), tuned("gpt_oss")
    assert "_apply_gate" in vars(next(iter(fused_experts(model).values())))
    base = model.unload()
    assert torch.equal(logits(base), logits(dense))
    for experts in fused_experts(base).values():
        assert "_apply_gate" not in vars(experts) and not experts._forward_hooks and not experts._forward_pre_hooks


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "deepseek_v3"])
def test_fisher_scores_are_of_one_gate_for_all_experts_and_the_shared_one(name):
    """With one label, only its token counts at the last block: the score is half of the squared gradient of a gate."""
    model = tiny_mixture(name)
    ids = token_batch(1, 11)
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    stack = find_decoder_stack(model)
    scores = fisher_scores(PruningTask(model, stack, PruningLayout.of(stack), [{"input_ids": ids, "labels": labels}]))
    mlp = f"model.layers.{len(stack.blocks) - 1}.mlp."
    weights = {n: p.detach() for n, p in model.named_parameters() if n.startswith(mlp) and "expert" in n}
    readers = {n: w for n, w in weights.items() if "gate_up_proj" in n or "gate_proj" in n or "up_proj" in n}
    writers = {n: w for n, w in weights.items() if "down_proj" in n}
    assert len(writers) == (1 if name == "mixtral" else 2)
    for selection in ("mlp_in", "mlp_out"):
        gate = torch.ones(64, requires_grad=True)
        # [..., d_out, d_in]
        gated = {n: w * gate for n, w in readers.items()} if selection == "mlp_in" else {}
        gated |= {n: w * gate[:, None] for n, w in writers.items()} if selection == "mlp_out" else {}
        loss = functional_call(model, gated, (), {"input_ids": ids, "labels": labels, "use_cache": False}).loss
        (gradient,) = torch.autograd.grad(loss, gate)
        expected = gradient.double().square() / 2
        torch.testing.assert_close(scores[-1][selection], expected, rtol=1e-3, atol=1e-4 * expected.max().item())


@pytest.mark.parametrize("method", PRUNING_METHODS)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_every_method_prunes_experts_to_the_budget(name, method):
    data = [{"input_ids": token_batch(4, 20, seed=seed)} for seed in range(2)]
    model, dense = tiny_mixture(name), tiny_mixture(name)
    small = prune_model(model, method, 0.7, calibration_data=data)
    assert 0.695 < size_of(small.model.layers) / size_of(dense.model.layers) <= 0.7
    experts = [module for module in small.modules() if isinstance(module, SplitExperts)]
    whole = next(iter(fused_experts(dense).values())).down_proj.numel() // 4 // 64
    assert experts and any(module[0].down.in_features < whole for module in experts)
    assert logits(small).isfinite().all()


def test_scores_of_weights_are_sums_over_experts_and_the_shared_one():
    model = tiny_mixture("qwen3_next")
    stack = find_decoder_stack(model)
    task = PruningTask(model, stack, PruningLayout.of(stack))
    with experts_as_layers(stack):
        scores = PRUNING_METHODS["magnitude"].score(task)
    for block, score in zip(model.model.layers, scores, strict=True):
        first, last, shared = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj, block.mlp.shared_expert
        square = lambda weight, *sides: weight.detach().square().sum(sides)
        read = square(first, 0, 1) + square(shared.gate_proj.weight, 0) + square(shared.up_proj.weight, 0)
        written = square(last, 0, 2) + square(shared.down_proj.weight, 1)
        middle = square(first, 0, 2).view(2, -1).sum(0) + square(last, 0, 1)
        for name, expected in (("mlp_in", read), ("mlp_middle", middle), ("mlp_out", written)):
            torch.testing.assert_close(score[name], expected.sqrt())
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_what_a_removed_channel_gave_on_average_goes_to_the_biases_of_the_experts():
    """Where all tokens are alike, the mean is all there is to a channel."""
    data = [{"input_ids": torch.full((4, 1), 5)}]
    dense = tiny_mixture("gpt_oss")
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() < 3:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
        model = tiny_mixture("gpt_oss")
        model.load_state_dict(dense.state_dict())
        expected = dense(**data[0], use_cache=False).logits
        small = prune_model(model, "flap", 0.5, calibration_data=data, selections=["mlp_in", "mlp_middle"])
        torch.testing.assert_close(small(**data[0], use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_learning_starts_at_the_choice_of_the_fisher_scores():
    data = [{"input_ids": token_batch(4, 20, seed=seed)} for seed in range(2)]
    learned = with_disp(model=tiny_mixture("qwen3_next"), keep_ratio=0.6, calibration_data=data).merge_and_unload()
    assert digest(learned) == digest(prune_model(tiny_mixture("qwen3_next"), "fisher", 0.6, calibration_data=data))


def test_generation_with_and_without_a_cache_agrees():
    small = tuned("qwen3_moe").merge_and_unload().eval()
    new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, uncached = (small.generate(token_batch(2, 9), use_cache=use, **new) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_experts_in_four_bits_are_pruned_and_a_pruned_mixture_loads_in_four_bits(tmp_path):
    base = quantize_experts(tiny_mixture("mixtral"))
    model = tuned("mixtral", model=base)
    masked = logits(model)
    small = model.merge_and_unload()
    torch.testing.assert_close(logits(small), masked, rtol=1e-3, atol=1e-3)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**NF4), device_map={"": "cpu"}
    )
    kinds = {type(m).__name__ for n, m in again.named_modules() if ".experts." in n and n.endswith(".down")}
    assert kinds == {"Linear4bit"}
    assert (logits(again) - masked).norm() < 0.5 * masked.norm()


def test_a_pruned_mixture_is_compressed_and_dense_again(tmp_path):
    small = tuned("gpt_oss").merge_and_unload()
    settings = {"keep_ratio": 0.6, "calibration_data": [{"input_ids": token_batch(4, 24)}], "progress": False}
    both = compress_model(small, MixedRankConfig(compensation="none", **settings))
    assert any(isinstance(m, LowRankLinear) and ".experts.module." in n for n, m in both.named_modules())
    both.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(both))
    assert_close(logits(to_dense(both)), logits(both))


def test_experts_that_were_compressed_or_pruned_are_refused():
    compressed = compress_model(
        tiny_mixture("mixtral"),
        MixedRankConfig(keep_ratio=0.5, progress=False, decomposition="plain", target_modules=r".*experts\..*"),
    )
    for model in (compressed, tuned("mixtral", selections=["mlp_middle"], keep_ratio=0.8).merge_and_unload()):
        with pytest.raises(ValueError, match=r"no plain linear layer or experts 'mlp\.experts'"):
            get_peft_model(model, DISPConfig())


def mixture_of(name, **changes):
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(config))


_GEMMA = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
_NEMOTRON = {"moe_latent_size": 32, "moe_shared_expert_intermediate_size": 96}


@pytest.mark.parametrize(
    "name, changes, prunes_experts",
    [
        ("gemma4_text", _GEMMA, True),  # experts beside the MLP, each behind norms of its own
        ("granitemoeshared", {"shared_intermediate_size": 48}, True),  # a shared expert outside of the mixture's module
        ("nemotron_h", _NEMOTRON, False),  # experts of a latent state, which is no residual
    ],
)
def test_other_places_of_experts(name, changes, prunes_experts, tmp_path):
    dense = mixture_of(name, **changes)
    model = tuned(name, model=mixture_of(name, **changes), keep_ratio=0.7)
    masked = logits(model)
    assert (masked - logits(dense)).abs().max() > 0.01
    small = model.merge_and_unload()
    assert_close(logits(small), masked)
    assert 0.695 < size_of(find_decoder_stack(small).blocks) / size_of(find_decoder_stack(dense).blocks) <= 0.7
    pruned = [n for n, m in small.named_modules() if isinstance(m, PrunedBranch)]
    assert any(n.endswith(".experts") for n in pruned) == prunes_experts
    small.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), masked)


def test_all_channels_kept_leaves_the_experts_fused():
    model = tiny_mixture("mixtral")
    layout = PruningLayout.of(find_decoder_stack(model))
    whole = [
        {name: torch.ones(size, dtype=torch.bool) for name, size in zip(
            ("attention_in", "attention_out", "mlp_in", "mlp_middle", "mlp_out"), row, strict=True
        )}
        for row in layout.full_widths
    ]  # fmt: skip
    assert len(fused_experts(prune_blocks(model, whole))) == 2
