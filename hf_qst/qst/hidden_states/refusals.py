"""Where stored states would not be those that the base computes: refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from hf_qst.base_model.architecture import one_stream
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.offloading import is_sharded
from hf_qst.qst.hidden_states.config import HiddenStateCacheError
from hf_qst.qst.hidden_states.replaceable_blocks import ReplaceableForward

# Arguments of a stack on which an example's key depends, or which follow from those.
KNOWN = (
    "input_ids", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip
# Arguments that change what is returned and no state.
_OF_OUTPUT = (
    "use_cache", "past_key_values", "cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep", "num_items_in_batch",
)  # fmt: skip


def refuse(reason: str) -> None:
    raise HiddenStateCacheError(f"QSTConfig.hidden_state_cache cannot be used here: {reason}")


def check_stack(stack: DecoderStack, tail_layers: int) -> None:
    """Check that a state depends on its own example alone, and that one tensor a block is all there is.

    Raises:
        HiddenStateCacheError
    """
    config = stack.module.config
    rotary = getattr(config, "rope_parameters", None) or {}
    for part in (rotary, *(value for value in rotary.values() if isinstance(value, Mapping))):
        kind = str(part.get("rope_type", ""))
        if "dynamic" in kind or kind == "longrope":
            refuse(f"rotary scaling of type {kind!r} makes a row's states depend on the longest row of its batch")
    for name in ("expert_capacity", "capacity_factor"):
        if getattr(config, name, None) is not None:
            refuse(f"experts of limited capacity ({name}) make a row's states depend on the other rows of its batch")
    if getattr(getattr(config, "quantization_config", None), "load_in_8bit", False):
        refuse("8-bit weights of bitsandbytes choose their outlier channels over a whole batch; use 4 bits")
    if stack.architecture.state is not one_stream:
        refuse(f"blocks of type {stack.model_type} pass on several residual streams")
    shared = getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None)
    if tail_layers and shared:
        refuse("blocks of the tail read keys and values of blocks below it, which are not stored")


def check_below_tail(handles: Iterable, first: int) -> None:
    """Check that the blocks of a tail, from number `first` on, get nothing but a state from the block below them.

    Raises:
        HiddenStateCacheError
    """
    for handle in handles:
        if isinstance(handle, ReplaceableForward) and handle.index < first and handle.hands_on:
            refuse(
                f"block {handle.index} hands on tensors beside its state, which the blocks of the tail read and which are not "
                "stored"
            )


def check_call(stack: nn.Module, inputs: Mapping) -> None:
    """Check a call of the stack: its inputs, and that the base computes the same function every time.

    Raises:
        HiddenStateCacheError
    """
    if inputs.get("inputs_embeds") is not None or inputs.get("input_ids") is None:
        refuse("the model was given embeddings (inputs_embeds), and an example is known by its tokens")
    for name, value in inputs.items():
        if name not in KNOWN and name not in _OF_OUTPUT and value is not None and value is not False:
            refuse(
                f"the states may depend on the argument {name!r} ({type(value).__name__}), which an example's key leaves out"
            )
    embeddings = stack.get_input_embeddings()
    noise = getattr(embeddings, "neftune_noise_alpha", None)
    if noise and embeddings.training:
        refuse(f"NEFTune (neftune_noise_alpha={noise}) adds other noise to the embeddings every time")


def check_modules(modules: Mapping[str, nn.Module], embeddings: nn.Module) -> None:
    """Check the modules of a stack, by their names: none is trained, in training mode with its dropout, or divided among
    processes.

    Raises:
        HiddenStateCacheError
    """
    inside = set(embeddings.modules())
    for name, module in modules.items():
        if module.training and module not in inside:
            refuse(f"{name or 'the stack'} of the base is in training mode, in which dropout and the like act")
        for part, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                refuse(f"the base is trained: {f'{name}.{part}'!r} requires a gradient")
            if parameter is not None and is_sharded(parameter):
                refuse(
                    f"each process holds a part of {f'{name}.{part}'!r} (FSDP, ZeRO-3 or tensor parallelism), so all have to run the "
                    "base together, and one may find the states of its rows where another does not. Fill and read a cache with "
                    "the whole base in each process"
                )


def check_labels(inputs: Mapping) -> None:
    """Check that no label counts whose logits are of padding behind a row: states there are not stored.

    Args:
        inputs: of the model, with labels [batch, seq] or classes [batch].

    Raises:
        HiddenStateCacheError
    """
    mask, labels, shifted = (inputs.get(name) for name in ("attention_mask", "labels", "shift_labels"))
    if mask is None or mask.dim() != 2:
        return
    # The label at a position is predicted from the one before it.
    for values, behind in ((labels, 1), (shifted, 0)):
        if values is None or values.shape != mask.shape:
            continue
        length = (mask != 0).long().cumsum(-1).argmax(-1, keepdim=True) + 1
        places = torch.arange(mask.shape[1], device=mask.device)
        if bool(((places >= length + behind) & (values.to(mask.device) != -100)).any()):
            refuse("labels at padded positions count in the loss; set them to -100")
