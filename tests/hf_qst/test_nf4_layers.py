"""4-bit layers on our kernels: the same results, and nothing else about the model changes."""

import copy
import io

import pytest
import torch
from bitsandbytes import nn as bnb
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from transformers import AutoModelForCausalLM

from hf_qst import use_nf4_kernels
from hf_qst.packed_weights import forbid_packing
from hf_qst_kernels import use_backend
from tests.architectures import digest, in_nf4, token_batch
from tests.interpreter import interpreted as run_interpreted


def layer(inputs=128, outputs=96, **settings):
    settings = {"compute_dtype": torch.float32, "quant_type": "nf4", **settings}
    return bnb.Linear4bit(inputs, outputs, **settings).to("cpu")


def classes(model):
    return {type(module) for module in model.modules() if isinstance(module, bnb.Linear4bit)}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return run_interpreted("tests/hf_qst/nf4_layers_interpreted.py", str(folder))


@pytest.mark.parametrize("shape", ["[1, 128]", "[2, 3, 128]", "[64, 128]", "[65, 128]", "[2, 0, 128]"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("scales", ["single", "double"])
def test_kernels_give_what_bitsandbytes_gives(interpreted, scales, bias, shape):
    """Outputs and input gradients; up to 64 rows by the two kernels, more by bitsandbytes."""
    distance, same_shape_and_dtype, launches = interpreted[f"{scales} {bias} {shape}"]
    assert same_shape_and_dtype and launches == (0 if shape in ("[65, 128]", "[2, 0, 128]") else 2)
    assert distance <= (1e-5 if launches else 0)


def test_types_follow_bitsandbytes(interpreted):
    distance, same_dtype, launches = interpreted["half precision input"]
    assert same_dtype and launches == 1 and distance <= 2**-6  # a step of bfloat16 at 2 to 4
    assert interpreted["first forward"] == [0, 1, True]


@pytest.mark.parametrize("what", ["autocast", "packed", "library backend"])
def test_left_to_bitsandbytes(interpreted, what):
    assert interpreted[what] == 0


def test_model_generates_the_same_tokens(interpreted):
    same, length, launches, layers = interpreted["generation"]
    assert same and length == 5 + 3
    assert launches == 3 * layers == 3 * 3 * 7  # a prompt of 10 rows and two steps of two


def test_lora_trains_through_the_kernels(interpreted):
    distance, smallest, launches, without = interpreted["LoRA"]
    assert distance <= 1e-5 < 1e-3 < smallest
    assert launches == 2 * 3 * 7 - 3 and without == 0  # q, k and v of the first block have an input without a gradient
    before, after = interpreted["losses"]
    assert after < before - 0.1


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_without_a_kernel_the_layer_is_bitsandbytes(double, bias):
    theirs = layer(bias=bias, compress_statistics=double)
    ours = copy.deepcopy(theirs)
    assert use_nf4_kernels(ours) == 1
    results = []
    for module in (ours, theirs):
        x = torch.linspace(-1, 1, 2 * 3 * 128).view(2, 3, 128).requires_grad_()
        with use_backend("torch"):
            y = module(x)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(map(torch.equal, *results))


def test_counts_the_layers_it_is_for():
    others = [
        torch.nn.Linear(64, 64),
        layer(quant_type="fp4"),
        layer(96, 64),
        bnb.Linear8bitLt(64, 64, has_fp16_weights=False),
    ]
    wide = layer()
    wide.weight.blocksize = 128
    model = torch.nn.Sequential(*others, wide, layer(), torch.nn.ModuleList([layer()]))
    before = [type(module) for module in model.modules()]
    assert use_nf4_kernels(model) == use_nf4_kernels(model) == 2
    after = [type(module) for module in model.modules()]
    assert sum(a is not b for a, b in zip(before, after, strict=True)) == 2
    assert use_nf4_kernels(model, enabled=False) == use_nf4_kernels(model, enabled=False) == 2
    assert [type(module) for module in model.modules()] == before
    assert use_nf4_kernels(torch.nn.Linear(64, 64)) == 0


def test_model_looks_as_before(tmp_path):
    base = in_nf4(tmp_path / "base")
    forbid_packing(base)
    text, before, state = repr(base), digest(base), base.state_dict()
    assert use_nf4_kernels(base) == 21
    assert len(classes(base)) == 1 and classes(base) != {bnb.Linear4bit}
    assert repr(base) == text and digest(base) == before
    swapped = base.state_dict()
    assert list(swapped) == list(state) and all(torch.equal(swapped[name], state[name]) for name in state)
    base.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert classes(loaded) == {bnb.Linear4bit}
    forbid_packing(loaded)
    assert digest(loaded) == before


def test_adapters_and_copies(tmp_path):
    base = in_nf4(tmp_path)
    forbid_packing(base)
    use_nf4_kernels(base)
    ids = token_batch()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        inner = model.base_model.model.model.layers[0].self_attn
        assert isinstance(inner.q_proj, LoraLinear4bit) and classes(model) == classes(base)
        assert inner.k_proj.weight.data_ptr() != base.model.layers[0].self_attn.k_proj.weight.data_ptr()
        assert not torch.equal(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected)
        buffer = io.BytesIO()
        torch.save(base, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert classes(again) == classes(base) and torch.equal(again(input_ids=ids).logits, expected)


def test_compiles_into_our_operator():
    module = layer()
    module.compute_type_is_set = True
    x = torch.randn(3, 128, requires_grad=True)
    expected = module(x)
    use_nf4_kernels(module)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), expected)
    assert len(graphs) == 1 and "nf4_linear" in graphs[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "model must be a torch.nn.Module, got str"),
        ((torch.nn.Linear(1, 1), 1), "enabled must be True or False, got 1"),
    ],
)
def test_refuses_with_the_argument_and_its_value(arguments, message):
    with pytest.raises(TypeError, match=message):
        use_nf4_kernels(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 64, 65])
@pytest.mark.parametrize("double", [False, True])
def test_on_cuda_as_bitsandbytes(double, rows):
    theirs = bnb.Linear4bit(192, 96, True, torch.bfloat16, double, "nf4").to("cuda")
    ours = copy.deepcopy(theirs)
    use_nf4_kernels(ours)
    results = []
    for module in (ours, theirs):
        module.compute_type_is_set = True
        x = torch.linspace(-1, 1, rows * 192, device="cuda").view(rows, 192).bfloat16().requires_grad_()
        with use_backend("triton"):
            y = module(x)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).abs().max() <= 4 * 2**-7 * b.float().abs().max()
