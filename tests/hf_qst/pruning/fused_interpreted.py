"""Runs pruned blocks with their kernels in Triton's interpreter and prints what came out; a test starts it.

A process of its own, because `TRITON_INTERPRET` is read when Triton is imported and changes every kernel defined after.
"""

import json
import tempfile

import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst.pruning import use_kernels
from hf_qst.pruning.fused import DeferrableLinear
from hf_qst_kernels import use_backend
from hf_qst_kernels.dispatch import use_configuration
from hf_qst_kernels.ops.norm_index_select_triton import CONFIGURATIONS
from tests.architectures import NF4
from tests.hf_qst.pruning.fused_blocks import FUSED, IDS, Launches, furthest, inputs_watched, logits, pruned, sites

LAUNCHES = Launches()


def in_kernels(run):
    """What `run` returns with the kernels, and which of them it launched."""
    LAUNCHES.look()
    with use_backend("triton"):
        result = run()
    return result, LAUNCHES.look()


def architectures():
    for name in FUSED:
        model = pruned(name)
        run = lambda model=model: model(IDS, output_hidden_states=True)
        with torch.no_grad():
            twin = run()
            with inputs_watched(model.model.layers) as unchanged:
                ours, launched = in_kernels(run)
        yield f"{name} logits", furthest(ours.logits, twin.logits)
        yield f"{name} hidden states", furthest(ours.hidden_states, twin.hidden_states)
        yield f"{name} launches", [launched, sites(model)]
        yield f"{name} inputs of blocks unchanged", unchanged
        settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        twin = model.generate(IDS[:, :3], **settings)
        ours, launched = in_kernels(lambda model=model, s=settings: model.generate(IDS[:, :3], **s))
        yield f"{name} generated tokens are equal", [torch.equal(ours, twin), launched[0] == 2 * sites(model)[0]]


def each_site_by_itself():
    model = pruned(blocks=1)
    twin = logits(model)
    for op in ("norm_index_select", "linear_index_add"):
        with use_configuration(op, None):
            ours, launched = in_kernels(lambda: logits(model))
        yield f"without {op}", [furthest(ours, twin), launched, sites(model)]


def saved_and_loaded():
    model = pruned("qwen2")
    twin = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = use_kernels(AutoModelForCausalLM.from_pretrained(folder))
        narrow = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4))
    use_kernels(narrow)
    ours, launched = in_kernels(lambda: logits(again))
    yield "reloaded", [furthest(ours, twin), launched, sites(again)]
    twin = logits(narrow)
    ours, launched = in_kernels(lambda: logits(narrow))
    yield "NF4", [furthest(ours, twin), launched, (sites(narrow)[0], 0)]


def hooks():
    """A hook sees what it sees without the kernels, and keeps its place from being fused, no other."""
    model = pruned(blocks=1)
    selections, additions = sites(model)
    places = {
        "norm": (lambda b: b.post_attention_layernorm, (selections - 1, additions)),
        "branch": (lambda b: b.self_attn, (selections - 1, additions - 1)),
        "attention": (lambda b: b.self_attn.module, (selections, additions - 1)),
        "projection": (lambda b: b.mlp.module.down_proj, (selections, additions - 1)),
        "reader": (lambda b: b.mlp.module.up_proj, (selections, additions)),
    }
    for place, (find, expected) in places.items():
        seen = []
        keep = lambda _, args, kwargs, output, seen=seen: seen.extend(
            t for t in (*args, *kwargs.values(), *(output if isinstance(output, tuple) else [output]))
            if isinstance(t, torch.Tensor)
        )  # fmt: skip
        handle = find(model.model.layers[0]).register_forward_hook(keep, with_kwargs=True)
        twin, of_twin = logits(model), seen[:]
        seen.clear()
        ours, launched = in_kernels(lambda: logits(model))
        handle.remove()
        yield f"hook on the {place}", [max(furthest(ours, twin), furthest(seen, of_twin)), launched, expected]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    _, launched = in_kernels(lambda: logits(model))
    handle.remove()
    yield "hook on all modules", [0.0, launched, (0, 0)]


def other_conditions():
    model = pruned("llama", blocks=1)
    twin = logits(model)
    none = (0, 0)
    ours, launched = in_kernels(lambda: model(IDS).logits)
    yield "gradients", [furthest(ours.detach(), twin), launched, none]
    ours, launched = in_kernels(lambda: logits(model.train()))
    yield "training", [furthest(ours, twin), launched, none]
    model.eval()
    _, launched = in_kernels(lambda: torch.autocast("cpu", torch.bfloat16)(logits)(model))
    yield "autocast", [0.0, launched, none]
    ours, launched = in_kernels(lambda: torch.inference_mode()(logits)(model))
    yield "inference mode", [furthest(ours, twin), launched, sites(model)]
    block = model.model.layers[0]
    block.input_layernorm.forward = lambda hidden: (
        2 * type(block.input_layernorm).forward(block.input_layernorm, hidden)
    )
    twin = logits(model)
    ours, launched = in_kernels(lambda: logits(model))
    yield "forward of its own", [furthest(ours, twin), launched, (sites(model)[0] - 1, sites(model)[1])]
    model = pruned(blocks=1)
    twin = logits(model)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    ours, launched = in_kernels(lambda: logits(model))
    yield "weights moved by accelerate", [furthest(ours, twin), launched, none]
    model = pruned("mistral", blocks=1, dtype=torch.bfloat16)
    twin, (ours, launched) = logits(model), in_kernels(lambda: logits(model))
    yield "bfloat16", [furthest(ours, twin) / twin.abs().max().item(), launched, sites(model)]
    model = pruned("qwen3", blocks=1)
    model.set_attn_implementation("eager")
    run = lambda: torch.no_grad()(model)(IDS, output_attentions=True).attentions
    twin, (ours, launched) = run(), in_kernels(run)
    yield "attention weights", [furthest(ours, twin), launched, sites(model)]
    for part, name in (("MLP", "mlp.module"), ("projection", "mlp.module.down_proj")):
        model = pruned(blocks=1)
        twin = logits(model)
        model.model.layers[0].get_submodule(name).compile(backend="eager")
        ours, launched = in_kernels(lambda model=model: logits(model))
        yield f"{part} compiled", [furthest(ours, twin), launched, (sites(model)[0], sites(model)[1] - 1)]
    model = pruned(blocks=1)
    of_row = lambda row: model(inputs_embeds=row[None], use_cache=False).logits
    run = lambda: torch.no_grad()(torch.func.vmap(of_row))(model.get_input_embeddings()(IDS).detach())
    twin, (ours, launched) = run(), in_kernels(run)
    yield "vmap", [furthest(ours, twin), launched, none]
    model = pruned("qwen2", blocks=1)
    settings = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    in_kernels(lambda: logits(model))  # its projections can be deferred from here on
    tuned = get_peft_model(model, LoraConfig(**settings)).eval()
    twin, (ours, launched) = logits(tuned), in_kernels(lambda: logits(tuned))
    attentions = sum(block.self_attn.output_index is not None for block in model.model.layers)
    yield "LoRA", [furthest(ours, twin), launched, (sites(model)[0], sites(model)[1] - attentions)]


def after_an_error():
    model = pruned(blocks=1)
    twin = logits(model)

    def fail(*_):
        raise KeyError("stop")

    handle = model.model.layers[0].self_attn.module.q_proj.register_forward_hook(fail)
    try:
        in_kernels(lambda: logits(model))
    except KeyError:
        handle.remove()
    projection = model.model.layers[0].self_attn.module.o_proj
    x = torch.randn(3, projection.in_features)
    with torch.no_grad():
        product = torch.nn.functional.linear(x, projection.weight, projection.bias)
        yield (
            "projection after an error",
            [
                furthest(projection(x), product) if type(projection) is DeferrableLinear else None,
                furthest(logits(model), twin),
            ],
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    parts = (architectures, each_site_by_itself, saved_and_loaded, hooks, other_conditions, after_an_error)
    # Four rows a program, of which the interpreter runs one after another.
    with use_configuration("norm_index_select", CONFIGURATIONS["norm_index_select"][1]):
        print(json.dumps({name: value for part in parts for name, value in part()}))
