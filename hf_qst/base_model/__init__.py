"""What is known of other people's models: where their parts are, their linear layers, how their weights lie."""

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.encoder_blocks import find_blocks
from hf_qst.base_model.experts import expert_shapes, fused_experts
from hf_qst.base_model.linear_layers import dense_shape, dense_weight
from hf_qst.base_model.packed_weights import drop_quantizer, forbid_packing, unpack
from hf_qst.base_model.quantized_layers import stored_bytes

__all__ = [
    "dense_shape",
    "dense_weight",
    "drop_quantizer",
    "expert_shapes",
    "find_blocks",
    "find_decoder_stack",
    "forbid_packing",
    "fused_experts",
    "stored_bytes",
    "unpack",
]
