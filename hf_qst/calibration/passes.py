"""Runs of a model over calibration batches, and the rows that its modules see in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.experts import enclosing_experts
from hf_qst.base_model.offloading import input_device
from hf_qst.calibration.data import MAIN_INPUTS, CalibrationError, label_names
from hf_qst.calibration.sequences import (
    DECODER,
    SEVERAL,
    TokenSequence,
    are_alone,
    decoder_inputs,
    find_owners,
    find_sequences,
    fingerprint,
    places,
    rows_of_sequence,
)


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. The exit restores every module's mode and the random state."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(d for d in devices if d is not None)), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class CalibrationRun:
    """Runs batches through a model and tells which rows of a module's input are tokens.

    Args:
        model: the model, in any floating dtype or quantised.
        names (*optional*):
            The modules of interest. If a part of the model contains all of them and takes the batch by itself (the
            backbone, an encoder, one tower of two), `prepare` finds it and only that part runs.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None):
        self.model = model
        self.names = None if names is None else list(names)
        self.device = input_device(model)
        self.runs = model
        self.owners: dict[frozenset, dict[str, str | None]] = {}
        self.sequences: dict[str, TokenSequence] = {}
        self.samples: int | None = None

    def prepare(self, batches: Sequence[Mapping]) -> None:
        """Find the part to run, and the sequence that each module's rows belong to. Call it before adding hooks.

        It runs one batch, and if a batch has padding and several kinds of inputs, once more for each sequence.
        """
        with calibration_mode(self.model):
            self.choose_part(batches[0])
            for batch in batches:
                inputs = self.enter(batch)
                padded = any(sequence.mask is not None for sequence in self.sequences.values())
                if padded and self._key not in self.owners:
                    self.owners[self._key] = self._find_owners(inputs)

    def __call__(self, batch: Mapping):
        """Run one batch without its labels and return the output. `rows` then refers to this batch."""
        return self.run_inputs(self.enter(batch))

    def loss(self, batch: Mapping) -> torch.Tensor | None:
        """The model's own loss for the batch with its labels; None if it returns none."""
        output = self._call(self.model, self._on_device(batch))
        return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)

    def enter(self, batch: Mapping) -> dict:
        """Set the sequences to those of this batch; returns its inputs without labels, on the model's device."""
        labels = label_names(self.model)
        moved = self._on_device(batch)
        inputs = {key: value for key, value in moved.items() if key not in labels}
        decoder_ids = decoder_inputs(self.model, moved)
        if decoder_ids is not None:
            inputs["decoder_input_ids"] = decoder_ids
        self.sequences = find_sequences(self.model, inputs, moved.get("labels"))
        self._key, self._alone = frozenset(inputs), are_alone(inputs, self.sequences)
        main = [inputs[key] for key in MAIN_INPUTS if torch.is_tensor(inputs.get(key))]
        others = [v for k, v in inputs.items() if torch.is_tensor(v) and v.dim() and not k.endswith("mask")]
        sizes = {len(value) for value in main or others}
        self.samples = sizes.pop() if len(sizes) == 1 else None
        return inputs

    def rows(
        self, name: str, inputs: torch.Tensor, detach: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rows [n, d] of a module's input without padding, each row's sample [n] and its position in the sample [n].

        Args:
            name (`str`): of the module, or `"output <field>"` for a field of the model's output.
            inputs: [..., d].
            detach (`bool`): whether to detach the rows from their graph.

        Returns:
            The rows; sample and position are None if unknown.

        Raises:
            CalibrationError: the batch has padding, and it is not known which rows are padding.
        """
        rows, shape = (inputs.detach() if detach else inputs).flatten(0, -2), inputs.shape[:-1]
        place = lambda index: index.to(rows.device)
        if (experts := enclosing_experts(self.model, name)) is not None:
            # An expert sees some of the layer's tokens.
            tokens, count = experts[1].running
            shape, place = torch.Size([count]), lambda index: index.to(rows.device)[tokens]
        sequence = self._sequence_of(name)
        if sequence is None or sequence.mask is None:
            indices = self._places(shape)
            return (rows, None, None) if indices is None else (rows, *map(place, indices))
        indices = rows_of_sequence(shape, sequence.mask) or self._rows_of_frames(shape, sequence.mask)
        if indices is None:
            raise CalibrationError(
                f"calibration_data: {sequence.key} marks padding in sequences of {list(sequence.mask.shape)}, but module "
                f"{name!r}, which depends on them, sees rows {list(shape)}, and which of these are padding is not known. "
                "Give batches without padding and without this mask, or leave the module out"
            )
        kept, sample, position = map(place, indices)
        return rows[kept], sample[kept], position[kept]

    def _rows_of_frames(self, shape: torch.Size, mask: torch.Tensor):
        """`rows_of_sequence` for speech models, whose convolutions shorten the mask."""
        shorten = getattr(getattr(self.model, "base_model", None), "_get_feature_vector_attention_mask", None)
        if shorten is None or len(shape) != 2 or len(mask) != shape[0]:
            return None
        return rows_of_sequence(shape, shorten(shape[1], mask.long()).bool())

    def _places(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.samples is None or not shape or shape.numel() % self.samples:
            return None
        return places(shape, self.samples, shape.numel() // self.samples)

    def _sequence_of(self, name: str) -> TokenSequence | None:
        """The sequence of this batch that a module's rows belong to, or None."""
        if not any(sequence.mask is not None for sequence in self.sequences.values()):
            return None
        owners = self.owners.get(self._key)
        if owners is None and not self._alone:
            raise RuntimeError("call prepare(batches) first: whose mask the rows of which module have is not known yet")
        if owners is not None and name not in owners:
            raise CalibrationError(
                f"module {name!r} is reached by some batches of calibration_data with these inputs only, and which of its "
                "rows are padding is not known. Give batches without padding, or leave the module out"
            )
        owner = "" if owners is None else owners[name]
        if owner == SEVERAL:
            raise CalibrationError(
                f"module {name!r} is called for several sequences of calibration_data, and which of its rows are padding "
                "is not known. Give batches without padding, or leave the module out"
            )
        return self.sequences.get(owner)

    def _find_owners(self, inputs: dict) -> dict[str, str | None]:
        if self._alone:
            seen = self._watch(inputs)
            if all(
                places(torch.Size(call[0][:-1]), *self.sequences[""].mask.shape)
                for calls in seen.values()
                for call in calls
            ):
                return dict.fromkeys(seen, "")
        return find_owners(self.model, self._watch, inputs, self.sequences)

    def _watch(self, inputs: dict) -> dict[str, list[tuple]]:
        """Fingerprints of each call's input to the modules of interest, or of the output's fields if there are no names."""
        seen: dict[str, list[tuple]] = {}

        def note(name):
            return lambda module, args, kwargs: seen.setdefault(name, []).append(fingerprint(first_input(args, kwargs)))

        named = {name: self.model.get_submodule(name) for name in self.names or ()}
        with hooks(m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in named.items()):
            output = self.run_inputs(inputs)
        if self.names is None:
            seen = {f"output {key}": [fingerprint(value)] for key, value in output_tensors(output).items()}
        return seen

    def choose_part(self, batch: Mapping) -> None:
        """Find the smallest part of the model that takes the batch and runs all modules of interest."""
        if self.names is None:
            return
        inputs = self.enter(batch)
        parts = [*self._smaller_parts(inputs), self.model, *self._inner_parts(inputs)]
        # Where a part takes one sample it takes all of them.
        trial = self.first_sample(inputs)
        for part in parts:
            self.runs = part
            try:
                seen = self._reached(trial)
            except (AttributeError, TypeError, ValueError):
                # It needs other inputs, such as a backbone whose head prepares them, or a model with several towers.
                continue
            if part is self.model or len(seen) == len(self.names):
                return
        self.runs = self.model
        self.run_inputs(trial)

    def first_sample(self, inputs: dict) -> dict:
        """The first sample of the batch entered last; all of it where the inputs are not those of one sequence."""
        if not self.samples or not are_alone(inputs, self.sequences or {"": None}):
            return inputs
        return {k: v[:1] if torch.is_tensor(v) and v.shape[:1] == (self.samples,) else v for k, v in inputs.items()}

    def _reached(self, inputs: dict) -> set[str]:
        """The modules of interest that these inputs reach."""
        seen: set[str] = set()
        note = lambda name: lambda module, args: seen.add(name)
        with hooks(self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in self.names):
            self.run_inputs(inputs)
        return seen

    def _smaller_parts(self, inputs: dict) -> Iterator[nn.Module]:
        """The encoder, if the decoder has no inputs, and the backbone."""
        if not isinstance(self.model, PreTrainedModel):
            return
        if getattr(self.model.config, "is_encoder_decoder", False) and not any(k.startswith(DECODER) for k in inputs):
            yield from self._enclosing(self.model.get_encoder(), inputs)
        yield from self._enclosing(self.model.base_model, inputs)

    def _inner_parts(self, inputs: dict) -> Iterator[nn.Module]:
        """Models inside the model that take these inputs, the largest first."""
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            for module in self.model.modules():
                yield from self._enclosing(module, inputs)

    def _enclosing(self, part: nn.Module, inputs: dict) -> Iterator[nn.Module]:
        """`part`, if it is a model inside this one that contains all modules of interest and takes all inputs."""
        if part is self.model or not isinstance(part, PreTrainedModel):
            return
        inside = set(part.modules())
        parameters = inspect.signature(part.forward).parameters
        takes = all(key in parameters for key in inputs) and part.main_input_name in {*inputs}
        if takes and all(self.model.get_submodule(name) in inside for name in self.names):
            yield part

    def _on_device(self, batch: Mapping) -> dict:
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def run_inputs(self, inputs: dict):
        """Run inputs as `enter` returns them."""
        return self._call(self.runs, inputs)

    def _call(self, module: nn.Module, inputs: dict):
        inputs = dict(inputs)
        config = getattr(self.model, "config", None)
        # A model of text and images has it in the configuration of its language model.
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        keeps = getattr(config, "use_cache", None) is not None or getattr(text, "use_cache", None) is not None
        if keeps and _takes(module, "use_cache"):
            inputs.setdefault("use_cache", False)
        if getattr(config, "return_dict", True) is False and _takes(module, "return_dict"):
            inputs.setdefault("return_dict", True)
        return module(**inputs)


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def first_input(args: tuple, kwargs: Mapping) -> torch.Tensor:
    """The input of a module with one input, given by position or by name."""
    return args[0] if args else next(value for value in kwargs.values() if torch.is_tensor(value))


def output_tensors(output) -> dict[str, torch.Tensor]:
    """The floating-point fields of a transformers model's output except the loss; empty for other outputs."""
    fields = output.items() if isinstance(output, Mapping) else ()
    return {
        key: value
        for key, value in fields
        if torch.is_tensor(value) and value.is_floating_point() and value.dim() and key != "loss"
    }


@contextmanager
def hooks(handles: Iterable) -> Iterator[None]:
    """Removes the hooks of these handles on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
