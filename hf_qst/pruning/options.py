"""How much pruning keeps, and where: the options of every pruning method, and the budget that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_qst.base_model.budget import Budget
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.linear_layers import weight_count
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.pruning.widths import AUTO, CONSTRAINTS, SelectionMap, multiple_of, rounded_width
from hf_qst.tuner.config import BUDGET_SCOPES, is_count, is_number


@dataclass
class PruningOptions:
    """What is kept.

    Args:
        keep_ratio (`float`): the part of the parameters to keep, in (0, 1].
        budget_scope (`str`): what it is a part of: `"targets"` (the blocks' parameters) or `"model"` (all parameters).
        selections (`Sequence[str]`): which of the five selections of a block are pruned; the others keep everything.
        constraint (`str`):
            `"none"`; `"layer"`: the selections on the residual are one and the same within a layer; `"model"`: in all
            layers, as when the residual itself is pruned.
        width_multiple (`int` or `str`):
            Every width is a multiple of it, or all channels. `"auto"`: see [`~hf_qst.pruning.widths.multiple_of`].
        min_width (`int`): no width falls below it.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    keep_ratio: float = 0.5
    budget_scope: str = "targets"
    selections: Sequence[str] = SELECTIONS
    constraint: str = "none"
    width_multiple: int | str = AUTO
    min_width: int = 1

    def __post_init__(self):
        check_options(self)


def check_options(options, owner: str = "") -> None:
    """Check the options that `options` has as attributes, and put its selections in order.

    Args:
        options ([`PruningOptions`] or a configuration with its fields)
        owner (`str`): put before a field's name in messages, such as `"DISPConfig."`.
    """

    def require(name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{owner}{name} must be {accepted}, got {getattr(options, name)!r}")

    require("keep_ratio", is_number(options.keep_ratio) and 0 < options.keep_ratio <= 1, "in (0, 1]")
    for name, accepted in (("budget_scope", BUDGET_SCOPES), ("constraint", CONSTRAINTS)):
        require(name, getattr(options, name) in accepted, f"one of {', '.join(accepted)}")
    require("min_width", is_count(options.min_width), "an integer of at least 1")
    multiple = options.width_multiple
    require("width_multiple", multiple == AUTO or is_count(multiple), "an integer of at least 1 or 'auto'")
    chosen = options.selections
    known = isinstance(chosen, (list, tuple, set)) and len(chosen) > 0 and set(chosen) <= set(SELECTIONS)
    require("selections", known, f"a non-empty list out of {', '.join(SELECTIONS)}")
    options.selections = [name for name in SELECTIONS if name in chosen]


def other_parameters(model: nn.Module, stack: DecoderStack) -> int:
    """Parameters outside the blocks, which pruning does not change; tied ones once."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [p for m in layers for name in m.adapter_layer_names for p in getattr(m, name).parameters()]
    return weight_count(model, without=[*stack.blocks.parameters(), *adapters])


def parameter_budget(model: nn.Module, stack: DecoderStack, options, owner: str = "") -> int:
    """Parameters of the blocks to keep. Args as of `check_options`.

    Raises:
        BudgetError: even the least widths are more than `keep_ratio`; the message names the smallest ratio.
    """
    layout = PruningLayout.of(stack)
    plan = SelectionMap.of(layout, options.selections, options.constraint)
    multiple = multiple_of(options.width_multiple, layout.hidden_size)
    least = plan.parameters([rounded_width(0, n, multiple, options.min_width) for n in plan.sizes])
    budget = Budget(options.keep_ratio, options.budget_scope, layout.total, other_parameters(model, stack))
    if budget.parameters < least:
        raise budget.error(owner, least, "at the least widths")
    return budget.parameters
