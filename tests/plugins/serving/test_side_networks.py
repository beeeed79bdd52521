"""Side networks in vLLM: the tokens and probabilities of the tuned model, and what is refused."""

import pytest
from peft import LoraConfig, get_peft_model
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from hf_qst.errors import CheckpointError
from hf_qst.pruning import prune_blocks
from hf_qst_plugins.serving.side_networks import SideTunedForCausalLM
from tests.architectures import side_tuned
from tests.plugins.serving.in_vllm import HEADS, engine, require_same
from tests.pruned_models import random_masks
from tests.tiny_decoders import tiny_decoder

SETTINGS = {"r": 2, "side_every": 2, "readout_rank": 4, "readout_every": 2}
SIDE_TUNED = "SideTunedForCausalLM"


def saved(root, name="llama", reshaped=lambda model: model, **settings):
    """Folders of a base and of an adapter with a large say, and the tuned model."""
    base = reshaped(tiny_decoder(name, **HEADS))
    base.save_pretrained(root / "base")
    tuned = side_tuned(model=base, awake=True, **{**SETTINGS, **settings}).eval()
    tuned.save_pretrained(root / "adapter")
    return root / "base", root / "adapter", tuned


def overrides(adapter):
    return {"hf_overrides": {"architectures": [SIDE_TUNED], "qst_adapter": str(adapter)}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("side"))


# One block for each of the base's, wider and narrower heads than these, windows, and a base with norms of its own.
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"side_every": 1, "r": 4, "readout_rank": 0, "mix": "sigmoid"}),
        ("mistral", {"side_every": 1}),
        ("qwen3", {"downsample": "linear"}),
        ("gpt_neox", {}),
    ],
)
def test_greedy_tokens_are_those_of_the_tuned_model(name, settings, tmp_path):
    base, adapter, tuned = saved(tmp_path, name, **settings)
    assert require_same(base, tuned, **overrides(adapter)) is SideTunedForCausalLM


def test_a_smaller_base(tmp_path):
    base, adapter, tuned = saved(tmp_path, reshaped=lambda model: prune_blocks(model, random_masks(model)))
    require_same(base, tuned, **overrides(adapter))


def test_a_side_network_has_its_own_keys_and_values(folders):
    """Prefixes in common are computed once, and prompts in chunks."""
    base, adapter, tuned = folders
    require_same(base, tuned, **overrides(adapter), enable_prefix_caching=True, max_num_batched_tokens=16)
    with pytest.raises(AssertionError), tuned.disable_adapter():
        require_same(base, tuned, **overrides(adapter))


def build(base, **options):
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, **options}
    config = EngineArgs(str(base), **settings).create_engine_config()
    with set_current_vllm_config(config):
        return SideTunedForCausalLM(vllm_config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enforce_eager": False}, "enforce_eager=True, got False"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "quantization=None, got 'fp8'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=1, got 2"),
        ({"hf_overrides": {"architectures": [SIDE_TUNED]}}, r"hf_overrides\[\"qst_adapter\"\] must be .*, got None"),
    ],
)
def test_what_is_not_served_is_refused_by_its_argument(folders, options, message):
    base, adapter, _ = folders
    with pytest.raises(ValueError, match=message):
        build(base, **{**overrides(adapter), **options})


def test_a_tail_is_refused(tmp_path):
    base, adapter, _ = saved(tmp_path, tail_layers=1)
    with pytest.raises(ValueError, match=r"QSTConfig\.tail_layers=0, got 1"):
        build(base, **overrides(adapter))


def test_another_adapter_is_refused(tmp_path):
    base = tiny_decoder("llama", **HEADS)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"must be the folder of a QST adapter, .* has .*LORA"):
        build(tmp_path / "base", **overrides(tmp_path / "lora"))


def test_a_damaged_adapter_and_another_base_are_refused(folders, tmp_path):
    _, adapter, tuned = folders
    tiny_decoder("llama", **{**HEADS, "num_hidden_layers": 3}).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        engine(tmp_path / "other", **overrides(adapter))
    tuned.save_pretrained(tmp_path / "damaged")
    path = tmp_path / "damaged" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        engine(folders[0], **overrides(tmp_path / "damaged"))
