"""The training loss of a causal language model from its frozen head, in chunks of tokens.

The `[tokens, vocab]` logits and their gradient never exist at once, which at a vocabulary of 128k is most of a training
step's memory. The model's own forward stays in charge: a pre-hook takes the labels away and asks it for the logits of
no position, the decoder stack hands over its output, and a hook computes the loss transformers would have computed
(`ForCausalLMLoss`) and puts it into the model's output. The head may be in bitsandbytes' NF4: then it is dequantised a
slice of the vocabulary at a time.
"""

from __future__ import annotations

import inspect
import logging

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_qst_kernels
from hf_qst.base_model.packed_weights import find_packed, forbid_packing, nf4_weight

logger = logging.getLogger(__name__)

# Keyword argument by which a request travels from the model to its decoder stack.
LOSS_REQUEST = "hf_qst_loss_request"
# Logits at which a model's loss is compared with ours: beyond the caps in use, which are 30 and 50.
_LARGEST_LOGIT = 60.0
# 16-bit logits, also those of autocast, were seen to differ by a tenth of this in the mean of 16 tokens.
_TOLERANCE = 5e-3
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")


class LossRequest:
    """The loss arguments of one call, and the output of its decoder stack [batch, seq, d_out].

    The stack puts it there when it ran; a stack that is given a request with an output returns that and does not run.
    """

    def __init__(self, labels, shift_labels=None, num_items_in_batch=None, ignore_index: int = -100, hidden=None):
        self.hidden: torch.Tensor | None = hidden
        self.labels = labels
        self.shift_labels = shift_labels
        self.num_items_in_batch = num_items_in_batch
        self.ignore_index = ignore_index

    def loss(self, head: nn.Linear, softcap: float | None) -> torch.Tensor:
        """What `ForCausalLMLoss` gives for the head's logits."""
        labels = self.shift_labels
        if labels is None:
            labels = nn.functional.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:]
        hidden = self.hidden.to(head.weight.device)
        if getattr(head, "compute_dtype", None) is not None:
            hidden = hidden.to(head.compute_dtype)  # as a 4-bit head does it
        total = hf_qst_kernels.linear_cross_entropy(
            hidden,
            head_weight(head),
            labels.to(head.weight.device),
            head.bias,
            ignore_index=self.ignore_index,
            logit_softcap=softcap,
            reduction="mean" if self.num_items_in_batch is None else "sum",
        )
        if self.num_items_in_batch is None:
            return total
        count = self.num_items_in_batch
        return total / (count.to(total.device) if torch.is_tensor(count) else count)


def check_labels(kwargs: dict) -> None:
    """Refuse labels that do not fit the inputs before the base runs.

    Raises:
        ValueError: naming both shapes.
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
    """Refuse to train a model whose only adapter is frozen; of several, a frozen one may be a reference for another.

    Raises:
        ValueError
    """
    if len(getattr(model, "peft_config", {})) > 1:
        return
    if model.training and torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "training was started with zero trainable parameters: the adapter is frozen. Load it with "
            "is_trainable=True, or call set_adapter(name) to activate it for training."
        )


def check_head(model: nn.Module) -> None:
    """Refuse to train through a head that nothing is back-propagated through.

    Raises:
        ValueError
    """
    head = model.get_output_embeddings()
    if model.training and torch.is_grad_enabled() and head is not None and find_packed(head) is not None:
        raise ValueError(
            "the gradient of the side network goes through the head, but bitsandbytes has packed its 4-bit weight for a "
            "kernel without backward, as it does at a model's first forward in evaluation mode on this processor: load "
            "the base again and wrap it before it runs"
        )


def head_weight(head: nn.Module | None) -> torch.Tensor | hf_qst_kernels.NF4Weight | None:
    """The frozen weight [vocab, d_out] for the chunked loss; None if the head needs the model's own path: trained,
    offloaded, or quantised otherwise than in NF4."""
    if head is None or hasattr(head, "_hf_hook"):
        return None
    if type(head) is nn.Linear:
        return head.weight if head.weight.is_floating_point() and not head.weight.requires_grad else None
    return nf4_weight(head)


class FrozenHeadLoss:
    """Hooks of one model with a head, which is `model` once they are installed.

    Args:
        network: a callable without arguments that gives the network in use, whose `chunked_loss` says whether it wants the
            chunked loss, or None while there is none: then the model is the base, and nothing is changed or checked.
    """

    def __init__(self, network):
        self.network = network
        self.model: nn.Module | None = None
        # What the model's path from hidden states to the loss was when it was last tried, and what was found.
        self._tried: tuple | None = None
        self._is_plain = False
        self._said: set[str] = set()

    def __getstate__(self):
        # A copy tries for itself: classes made at run time and patched forwards need not pickle.
        return {**vars(self), "_tried": None}

    def install(self, model: nn.Module) -> list:
        """Register on `model`; returns the handles that take the hooks off again."""
        self.model = model
        handles = [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_After(), with_kwargs=True),
        ]
        head = model.get_output_embeddings()
        return handles if head is None else [*handles, forbid_packing(head)]

    def wants(self, kwargs: dict) -> bool:
        """Whether this call gets its loss in chunks: a training step that does not ask for logits."""
        model = self.model
        return (
            model.training
            and torch.is_grad_enabled()
            and "logits_to_keep" not in kwargs
            # TRL's fused head computes its own loss from the decoder stack's output.
            and not kwargs.get("fused_lm_head", False)
            and kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is not False
            and self.network().chunked_loss
            and self._can_chunk()
        )

    # A compiler takes the answer as it is, without tracing how it was found.
    @torch.compiler.assume_constant_result
    def _can_chunk(self) -> bool:
        """Whether the head is one for the chunked loss, and the model's own loss the same function of the hidden states."""
        model, head = self.model, self.model.get_output_embeddings()
        if head_weight(head) is None:
            return self._say_once("the head is trained, offloaded, or quantised otherwise than in NF4")
        path = (model.__dict__.get("forward"), type(model).forward, logit_softcap(model), head)
        if self._tried is None or any(new != old for new, old in zip(path, self._tried, strict=True)):
            self._tried, self._is_plain = path, is_of_transformers(model) and computes_plain_loss(model)
        if not self._is_plain:
            return self._say_once(f"{type(model).__name__} does more to its hidden states than its head and a softcap")
        return True

    def _say_once(self, reason: str) -> bool:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("%s: the loss is computed from full logits", reason)
        return False


def is_of_transformers(model: nn.Module) -> bool:
    """Whether the model's forward is one of transformers' that takes `logits_to_keep`, and no subclass's own."""
    forward = type(model).forward
    return forward.__module__.startswith("transformers.models.") and (
        "logits_to_keep" in inspect.signature(forward).parameters
    )


def logit_softcap(model: nn.Module) -> float | None:
    """The cap of the model's logits (Gemma 2), or None."""
    return getattr(model.config, "final_logit_softcapping", None)


@torch.no_grad()
def computes_plain_loss(model: nn.Module) -> bool:
    """Whether the model's loss of a few hidden states is that of `LossRequest`.

    Scales, caps and biases of the logits and whatever else a model does after its decoder stack show as another loss. The
    hidden states are random and as large as makes logits of about `_LARGEST_LOGIT`, where a cap shows.
    """
    head = model.get_output_embeddings()
    weight = next(p for p in head.parameters())
    dtype = getattr(head, "compute_dtype", None) or (weight.dtype if weight.is_floating_point() else torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, head.in_features, generator=generator).to(weight.device, dtype)
    hidden *= _LARGEST_LOGIT / head(hidden).abs().max().clamp_min(1e-6)
    tokens = (torch.arange(16, device=weight.device) % head.out_features)[None]
    given = {"labels": tokens, "num_items_in_batch": 15}
    request = LossRequest(**given, hidden=hidden)
    wanted = request.loss(head, logit_softcap(model))
    try:
        found = model.forward(input_ids=tokens, use_cache=False, **given, **{LOSS_REQUEST: request}).loss
    except (AttributeError, TypeError) as error:
        # It reads more of its stack's output, or needs more arguments, than a plain language model.
        logger.info("%s cannot be tried on hidden states alone: %s", type(model).__name__, error)
        return False
    return found is not None and bool((found.float() - wanted.float()).abs() <= _TOLERANCE * wanted.abs())


class _Before:
    def __init__(self, owner: FrozenHeadLoss):
        self.owner = owner

    def __call__(self, model, args, kwargs):
        if kwargs.get("labels") is None or self.owner.network() is None:
            return None
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
        loss = request.loss(model.get_output_embeddings(), logit_softcap(model))
        values = {name: value for name, value in output.items() if name != "logits"}
        return type(output)(**{**values, "loss": loss})
