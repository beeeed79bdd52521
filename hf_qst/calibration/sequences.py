"""Which rows of a module's input are tokens, and which are padding.

A batch may have several sequences with a mask each: the tokens of encoder and decoder, or a text and an image. A module's
rows belong to one of them or to none. Shapes do not decide, because there may be as many image patches as tokens.
Therefore the tokens of one sequence at a time are perturbed, and the modules whose inputs change depend on it. A decoder
depends on its own tokens and, by cross-attention, on the encoder's; its rows belong to its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.calibration.data import CalibrationError

DECODER = "decoder_"
_TOKENS = ("input_ids", "inputs_embeds", "hidden_states", "values")
_SMALLEST_CHANGE = 1e-6


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of a batch.

    Args:
        sources: keys of the batch that hold its tokens.
        mask: bool [batch, seq], True for tokens; None without padding.
        key: the mask's key in the batch.
    """

    sources: tuple[str, ...]
    mask: torch.Tensor | None
    key: str


def decoder_inputs(model: nn.Module, batch: Mapping) -> torch.Tensor | None:
    """The decoder's ids [batch, seq] that an encoder-decoder model derives from the batch's labels, or None."""
    labels = batch.get("labels")
    has_inputs = any(f"{DECODER}{name}" in batch for name in ("input_ids", "inputs_embeds"))
    config = getattr(model, "config", None)
    if (
        has_inputs
        or not _are_tokens(labels)
        or not getattr(config, "is_encoder_decoder", False)
        or not _generates(model)
    ):
        return None
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    shifted = labels.roll(1, -1)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def _generates(model: nn.Module) -> bool:
    return hasattr(model, "can_generate") and model.can_generate()


def _are_tokens(labels) -> bool:
    return torch.is_tensor(labels) and labels.dim() == 2 and not labels.is_floating_point()


def find_sequences(model: nn.Module, inputs: Mapping, labels: torch.Tensor | None) -> dict[str, TokenSequence]:
    """The sequences of a batch by the prefix of their keys: `""`, `"decoder_"` or another.

    A decoder without a mask of its own gets one from its labels, which are -100 at padding.

    Raises:
        CalibrationError: a mask is not [batch, seq], or has negative values.
    """
    sequences = {}
    for key, value in inputs.items():
        match = re.fullmatch(r"(.*?)(?:attention_)?mask", key)
        if match and match[1] != DECODER and value is not None:
            sources = _sources(model, inputs, match[1], value)
            if sources:
                sequences[match[1]] = TokenSequence(sources, _mask(key, value, inputs.get(sources[0])), key)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or any(
        k.startswith(DECODER) for k in inputs
    ):
        sources = tuple(k for k in (f"{DECODER}{name}" for name in _TOKENS) if k in inputs)
        sequences[DECODER] = TokenSequence(sources, *_decoder_mask(inputs, labels, sequences.get("")))
    return sequences


def _sources(model: nn.Module, inputs: Mapping, prefix: str, mask) -> tuple[str, ...]:
    names = [f"{prefix}{name}" for name in _TOKENS]
    if prefix:
        names.append(prefix[:-1])
    elif not any(name in inputs for name in names):
        main = getattr(model, "main_input_name", None)
        fitting = lambda value: torch.is_tensor(mask) and tuple(value.shape[: mask.dim()]) == tuple(mask.shape)
        names = [k for k, v in inputs.items() if torch.is_tensor(v) and v is not mask and (k == main or fitting(v))]
    return tuple(name for name in names if torch.is_tensor(inputs.get(name)))


def _mask(key: str, mask, tokens: torch.Tensor | None) -> torch.Tensor | None:
    if not torch.is_tensor(mask):
        raise CalibrationError(f"calibration_data: {key} must be a tensor [batch, seq], got {type(mask).__name__}")
    if not (mask >= 0).all():
        raise CalibrationError(
            f"calibration_data: {key} must be 1 for tokens and 0 for padding, got values from {mask.min().item()} to "
            f"{mask.max().item()}"
        )
    if key.endswith("attention_mask"):
        if mask.dim() > 2 and tokens is not None and mask.shape == tokens.shape:
            mask = mask.flatten(0, -2)  # choices of one question, which the model flattens
        if mask.dim() != 2:
            raise CalibrationError(f"calibration_data: {key} must be [batch, seq], got shape {list(mask.shape)}")
    mask = mask.bool()
    return None if mask.all() else mask


def _decoder_mask(inputs, labels, encoder: TokenSequence | None) -> tuple[torch.Tensor | None, str]:
    key = f"{DECODER}attention_mask"
    if inputs.get(key) is not None:
        return _mask(key, inputs[key], inputs.get(f"{DECODER}input_ids")), key
    ids = inputs.get(f"{DECODER}input_ids")
    if _are_tokens(labels) and ids is not None and ids.shape == labels.shape:
        kept = labels != -100
        return (None if kept.all() else kept.to(ids.device)), "labels"
    made_from_encoder_ids = ids is None and f"{DECODER}inputs_embeds" not in inputs and "input_ids" in inputs
    if made_from_encoder_ids and encoder is not None and encoder.mask is not None:
        # The decoder's ids are shifted by one, after a start token.
        return torch.cat([encoder.mask.any(1, keepdim=True), encoder.mask[:, :-1]], 1), encoder.key
    return None, key


def are_alone(inputs: Mapping, sequences: Mapping[str, TokenSequence]) -> bool:
    """Whether the batch has one sequence of tokens, as ids or embeddings, and no other inputs."""
    tokens = inputs["inputs_embeds"][..., 0] if "inputs_embeds" in inputs else inputs.get("input_ids")
    if set(sequences) != {""} or tokens is None:
        return False
    others = [value for key, value in inputs.items() if torch.is_tensor(value) and key != "inputs_embeds"]
    return all(value.shape[-1:] == tokens.shape[-1:] and value.dim() <= tokens.dim() for value in others)


SEVERAL = "several sequences"


def find_owners(
    model: nn.Module, run: Callable[[Mapping], dict], inputs: Mapping, sequences: Mapping[str, TokenSequence]
) -> dict[str, str | None]:
    """The prefix of the sequence that each module's rows belong to; None for a module that depends on no sequence.

    Args:
        model: the whole model.
        run: runs inputs and returns by module the fingerprints of its inputs, one per call.
        inputs: of the model.
        sequences: of these inputs.
    """
    before = run(inputs)
    depends: dict[str, list[set[str]]] = {name: [set() for _ in calls] for name, calls in before.items()}
    for prefix, sequence in sequences.items():
        after = _run_perturbed(model, run, inputs, prefix, sequence)
        for name, calls in before.items():
            others = after.get(name, [])
            for i, call in enumerate(calls):
                if i >= len(others) or _differ(call, others[i]):
                    depends[name][i].add(prefix)
    return {name: _owner(calls) for name, calls in depends.items()}


def _owner(calls: Sequence[set[str]]) -> str | None:
    first = lambda prefixes: DECODER if DECODER in prefixes else min(prefixes, default=None)
    owners = {first(prefixes) for prefixes in calls}
    return owners.pop() if len(owners) == 1 else SEVERAL


def fingerprint(tensor: torch.Tensor) -> tuple:
    """Shape and two position-weighted sums of a tensor [..., d], which change with its values and their order."""
    values = tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    by_row, by_column = (torch.linspace(1, 2, n, dtype=values.dtype, device=values.device) for n in values.shape)
    sums = [by_row @ each @ by_column for each in (values.abs(), values.square())]
    return tuple(tensor.shape), *(total.item() for total in sums)


def _differ(one: tuple, other: tuple) -> bool:
    near = lambda a, b: abs(a - b) <= _SMALLEST_CHANGE * abs(a)  # false for NaN
    return one[0] != other[0] or not all(near(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def _run_perturbed(model: nn.Module, run: Callable, inputs: Mapping, prefix: str, sequence: TokenSequence) -> dict:
    noise = _Noise()
    changed = dict(inputs)
    for key in sequence.sources:
        if inputs[key].is_floating_point():
            changed[key] = noise(inputs[key])
    ids = [inputs[key] for key in sequence.sources if not inputs[key].is_floating_point()]
    with _perturbed_embeddings(model, prefix, ids, noise):
        seen = run(changed)
    if not noise.used and ids:
        # No embedding looked the ids up, so their order is changed instead.
        flipped = {k: inputs[k].flip(-1) for k in sequence.sources if not inputs[k].is_floating_point()}
        seen = run({**inputs, **flipped})
    return seen


class _Noise:
    """Adds noise of a tensor's own magnitude, the same in each run."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.used = False

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.used = True
        drawn = torch.randn(tensor.shape, generator=self.generator).to(tensor.device)
        scale = tensor.float().square().mean().sqrt().clamp(min=1e-6)
        return (tensor.float() + drawn * scale).to(tensor.dtype)


@contextmanager
def _perturbed_embeddings(model: nn.Module, prefix: str, ids: Sequence[torch.Tensor], noise: _Noise) -> Iterator[None]:
    """Adds noise to the embeddings of these ids, or for the decoder to all that it looks up."""
    decoder = _decoder(model)
    active = [0]

    def enter(module, args, kwargs):
        active[0] += 1

    def leave(module, args, kwargs, output):
        active[0] -= 1

    def perturb(module, args, output):
        own = bool(active[0]) if decoder is not None else any(_looks_up(args, one) for one in ids)
        others = not active[0] and any(_looks_up(args, one) for one in ids)
        return noise(output) if (own if prefix == DECODER else others) else None

    handles = [m.register_forward_hook(perturb) for m in model.modules() if isinstance(m, nn.Embedding)]
    if decoder is not None:
        handles.append(decoder.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(decoder.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder(model: nn.Module) -> nn.Module | None:
    """The decoder inside an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return None if decoder is model or decoder is model.base_model else decoder


def _looks_up(args: tuple, ids: torch.Tensor) -> bool:
    """Whether an embedding was called with these ids; placeholders of one kind may have been replaced."""
    if not args or not torch.is_tensor(args[0]) or args[0].numel() != ids.numel():
        return False
    same = args[0].flatten() == ids.flatten()
    return bool(same.all()) or bool(same.any() and ids.flatten()[~same].unique().numel() == 1)


def places(shape: torch.Size, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Sample and position of each row of a tensor [..., d] with these leading dimensions; None if they do not fit.

    Rows may be [batch, seq] in any split, or [seq, batch].
    """
    count = shape.numel()
    index = torch.arange(count)
    if shape == (length, batch) and length != batch:
        return index % batch, index // batch
    if count == batch * length:
        return index // length, index % length
    return None


def rows_of_sequence(shape: torch.Size, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Which rows of a tensor [..., d] are tokens of a sequence, and the sample and position of every row.

    Args:
        shape: the tensor's leading dimensions.
        mask: bool [batch, seq].

    Returns:
        bool [rows]; sample and position [rows]; or None if the shapes do not fit.
    """
    mask = mask.flatten(1)
    batch, length = mask.shape
    indices = places(shape, batch, length)
    if indices is not None:
        sample, position = (index.to(mask.device) for index in indices)
        return mask[sample, position], sample, position
    if shape.numel() == batch:
        # One row per sample, as from a pooler: it counts if the sample has tokens.
        index = torch.arange(batch, device=mask.device)
        return mask.any(1), index, torch.zeros_like(index)
    return None
