"""The training loss of a causal language model from its frozen head, in chunks of tokens.

The full `[tokens, vocab]` logits and their gradient never exist; with a vocabulary of 128k they are most of a training
step's memory. The model's own forward still runs. A pre-hook removes the labels and requests the logits of no position,
the decoder stack stores its output in the request, and a hook computes the loss of transformers (`ForCausalLMLoss`) and
adds it to the model's output. An NF4 head of bitsandbytes is dequantised a slice of the vocabulary at a time.
"""

from __future__ import annotations

import inspect
import logging
from typing import NamedTuple

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_qst_kernels
from hf_qst.base_model.decoder_stack import ARCHITECTURES, find_decoder_stack, text_config
from hf_qst.base_model.offloading import has_values, is_sharded
from hf_qst.base_model.packed_weights import find_packed, forbid_packing, nf4_weight
from hf_qst.qst.hidden_states.refusals import check_labels as check_labels_of_stored

logger = logging.getLogger(__name__)

# Keyword argument that passes a request from the model to its decoder stack.
LOSS_REQUEST = "hf_qst_loss_request"
# Logits for the comparison of a model's loss with ours: above the caps in use, 30 and 50.
_LARGEST_LOGIT = 60.0
# 16-bit logits, also those of autocast, changed the mean of 16 tokens by a tenth of this.
_TOLERANCE = 5e-3
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")


class LogitTransform(NamedTuple):
    """What a model does to the logits of its head: a multiplier, then a cap (None: no cap)."""

    multiplier: float
    softcap: float | None


class LossRequest:
    """The loss arguments of one call, and the output of its decoder stack [batch, seq, d_out].

    The stack sets `hidden` after it ran. If `hidden` is set before, the stack returns it and does not run.
    """

    def __init__(self, labels, shift_labels=None, num_items_in_batch=None, ignore_index: int = -100, hidden=None):
        self.hidden: torch.Tensor | None = hidden
        self.arrived = False  # whether the model has passed it on to its stack
        self.labels = labels
        self.shift_labels = shift_labels
        self.num_items_in_batch = num_items_in_batch
        self.ignore_index = ignore_index

    def loss(self, head: nn.Linear, transform: LogitTransform) -> torch.Tensor:
        """The value of `ForCausalLMLoss` for the head's logits after their transform."""
        labels = self.shift_labels
        if labels is None:
            labels = nn.functional.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:]
        hidden = self.hidden.to(head.weight.device)
        if transform.multiplier != 1.0:
            # A head with a bias is not multiplied: the comparison with the model's own loss would refuse it.
            hidden = hidden * transform.multiplier
        if getattr(head, "compute_dtype", None) is not None:
            hidden = hidden.to(head.compute_dtype)  # as a 4-bit head does
        total = hf_qst_kernels.linear_cross_entropy(
            hidden,
            head_weight(head),
            labels.to(head.weight.device),
            head.bias,
            ignore_index=self.ignore_index,
            logit_softcap=transform.softcap,
            reduction="mean" if self.num_items_in_batch is None else "sum",
        )
        if self.num_items_in_batch is None:
            return total
        count = self.num_items_in_batch
        return total / (count.to(total.device) if torch.is_tensor(count) else count)


def check_labels(kwargs: dict) -> None:
    """Check that labels have the shape of the inputs.

    Raises:
        ValueError: they do not; the message has both shapes.
    """
    labels, inputs = kwargs.get("labels"), kwargs.get("input_ids")
    if inputs is None and kwargs.get("inputs_embeds") is not None:
        inputs = kwargs["inputs_embeds"][..., 0]
    if labels is None or inputs is None:
        return
    if labels.shape != inputs.shape:
        raise ValueError(
            f"labels must have the shape of the inputs {list(inputs.shape)} ([batch, seq]), got {list(labels.shape)}"
        )


def check_trainable(model: nn.Module) -> None:
    """Check that the adapter is trainable. With several adapters a frozen one may be a reference model.

    Raises:
        ValueError: training with no trainable parameter.
    """
    if len(getattr(model, "peft_config", {})) > 1:
        return
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "training was started with zero trainable parameters: the adapter is frozen. Load it with "
            "is_trainable=True, or call set_adapter(name) to activate it for training."
        )


def check_head(model: nn.Module) -> None:
    """Check that gradients can flow through the head.

    Raises:
        ValueError: training with a head that bitsandbytes has packed for its CPU kernel, which has no backward pass.
    """
    head = model.get_output_embeddings()
    if model.training and torch.is_grad_enabled() and head is not None and find_packed(head) is not None:
        raise ValueError(
            "the gradient of the side network goes through the head, but bitsandbytes has packed its 4-bit weight for a "
            "kernel without backward, as it does at a model's first forward in evaluation mode on this processor: load "
            "the base again and wrap it before it runs"
        )


def head_weight(head: nn.Module | None) -> torch.Tensor | hf_qst_kernels.NF4Weight | None:
    """The frozen weight [vocab, d_out] for the chunked loss; None if the head is trained, offloaded, or quantised in
    another format than NF4."""
    if head is None or hasattr(head, "_hf_hook"):
        return None
    if type(head) is nn.Linear:
        return head.weight if head.weight.is_floating_point() and not head.weight.requires_grad else None
    return nf4_weight(head)


class FrozenHeadLoss:
    """The hooks of one model with a head.

    Args:
        network: a function that returns the active network, whose `chunked_loss` enables the chunked loss; or None, and
            then the model runs unchanged and unchecked.
    """

    def __init__(self, network):
        self.network = network
        self.model: nn.Module | None = None
        # The model's path from hidden states to the loss at the last comparison, and its result.
        self._tried: tuple | None = None
        self._is_plain = False
        self._said: set[str] = set()

    def __getstate__(self):
        # A copy compares again, because patched forwards may not pickle.
        return {**vars(self), "_tried": None}

    def install(self, model: nn.Module) -> list:
        """Register the hooks on `model`; returns their handles."""
        self.model = model
        handles = [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_After(), with_kwargs=True),
        ]
        head = model.get_output_embeddings()
        return handles if head is None else [*handles, forbid_packing(head)]

    def wants(self, kwargs: dict) -> bool:
        """Whether this call computes its loss in chunks: a training step that does not request logits."""
        model = self.model
        return (
            model.training
            and torch.is_grad_enabled()
            and "logits_to_keep" not in kwargs
            # TRL's fused head computes its own loss from the decoder stack's output.
            and not kwargs.get("fused_lm_head", False)
            # A mixture of experts adds a term of its routers to its loss.
            and not kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
            and kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is not False
            and self.network().chunked_loss
            and self._can_chunk()
        )

    @property
    def config(self):
        """Of the language model."""
        return text_config(self.model.config)

    # A compiler takes the result as a constant and does not trace this function.
    @torch.compiler.assume_constant_result
    def _can_chunk(self) -> bool:
        """Whether the head supports the chunked loss, and the model's own loss is the same function of the hidden states."""
        model, head = self.model, self.model.get_output_embeddings()
        if head_weight(head) is None or any(map(is_sharded, head.parameters())):
            return self._say_once(
                "the head is trained, offloaded, divided among processes, or quantised otherwise than in NF4"
            )
        path = (model.__dict__.get("forward"), type(model).forward, logit_transform(model), head)
        if self._tried is None or any(new != old for new, old in zip(path, self._tried, strict=True)):
            self._tried, self._is_plain = path, is_of_transformers(model) and computes_plain_loss(model)
        if not self._is_plain:
            return self._say_once(
                f"{type(model).__name__} does more to its hidden states than its head, a multiplier and a cap"
            )
        return True

    def _say_once(self, reason: str) -> bool:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("%s: the loss is computed from full logits", reason)
        return False


def is_of_transformers(model: nn.Module) -> bool:
    """Whether the model's forward is one of transformers, not of a subclass, and takes `logits_to_keep`."""
    forward = type(model).forward
    return forward.__module__.startswith("transformers.models.") and (
        "logits_to_keep" in inspect.signature(forward).parameters
    )


def logit_transform(model: nn.Module) -> LogitTransform:
    """What its row of the table says of the model's logits."""
    config = text_config(model.config)
    row = ARCHITECTURES[config.model_type]
    return LogitTransform(row.logit_multiplier(config), getattr(config, row.softcap, None))


@torch.no_grad()
def computes_plain_loss(model: nn.Module) -> bool:
    """Whether the model's loss for a few hidden states equals that of `LossRequest`.

    Scales, caps and biases of the logits, and anything else that a model does after its decoder stack, change the loss.
    One token is masked out, since some models leave such tokens out of their loss.
    The hidden states are random and scaled to logits of about `_LARGEST_LOGIT`, where a cap has an effect.
    """
    head = model.get_output_embeddings()
    if head.in_features != find_decoder_stack(model).output_size:
        return False
    weight = next(p for p in head.parameters())
    dtype = getattr(head, "compute_dtype", None) or (weight.dtype if weight.is_floating_point() else torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, head.in_features, generator=generator).to(weight.device, dtype)
    hidden *= _LARGEST_LOGIT / head(hidden).abs().max().clamp_min(1e-6)
    tokens = (torch.arange(16, device=weight.device) % head.out_features)[None]
    mask = (tokens != 3).long()
    targets = {"labels": tokens, "num_items_in_batch": 15}
    request = LossRequest(**targets, hidden=hidden)
    expected = request.loss(head, logit_transform(model))
    inputs, handle = [], head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    own, asked = model.__dict__.get("_loss_function"), []
    # Some classes compute a loss of another kind by themselves.
    model._loss_function = lambda *args, **kwargs: asked.append(True) or (own or ForCausalLMLoss)(*args, **kwargs)
    try:
        loss = model.forward(
            input_ids=tokens, attention_mask=mask, use_cache=False, **targets, **{LOSS_REQUEST: request}
        ).loss
    except (AttributeError, TypeError) as error:
        # It reads more of its stack's output, or needs more arguments, than a plain language model.
        logger.info("%s cannot be tried on hidden states alone: %s", type(model).__name__, error)
        return False
    finally:
        handle.remove()
        model.__dict__.pop("_loss_function")
        if own is not None:
            model._loss_function = own
    if loss is None or not request.arrived or not asked:
        return False
    if not has_values(loss):
        # In a plan there are no values to compare; whether the head reads the stack's output can be seen.
        given = hidden.untyped_storage()._cdata
        multiplied = logit_transform(model).multiplier != 1.0
        return multiplied or any(x.untyped_storage()._cdata == given for x in inputs)
    return bool((loss.float() - expected.float()).abs() <= _TOLERANCE * expected.abs())


class _Before:
    def __init__(self, owner: FrozenHeadLoss):
        self.owner = owner

    def __call__(self, model, args, kwargs):
        if kwargs.get("labels") is None or (network := self.owner.network()) is None:
            return None
        if network.hidden_states is not None:
            check_labels_of_stored(kwargs)
        check_trainable(model)
        check_head(model)
        if model.loss_function is not ForCausalLMLoss:
            return None
        check_labels(kwargs)
        if not self.owner.wants(kwargs):
            return None
        kwargs = dict(kwargs)
        request = LossRequest(**{name: kwargs.pop(name) for name in _LOSS_ARGUMENTS if name in kwargs})
        kwargs[LOSS_REQUEST] = request
        kwargs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=request.labels.device)
        return args, kwargs


class _After:
    def __call__(self, model, args, kwargs, output):
        request = kwargs.get(LOSS_REQUEST)
        if request is None:
            return None
        loss = request.loss(model.get_output_embeddings(), logit_transform(model))
        values = {name: value for name, value in output.items() if name != "logits"}
        return type(output)(**{**values, "loss": loss})
