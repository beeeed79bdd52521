"""What a GGUF file says of rotary positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .architectures import GGUFError, head_width

FACTORS = "rope_freqs.weight"
"""The tensor of factors by which llama.cpp divides the frequencies."""


def rotary_settings(config) -> tuple[dict[str, Any], np.ndarray | None]:
    """Keys of the file, and the factors of the frequencies [dimensions / 2] where Llama 3's scaling asks for some.

    Raises:
        GGUFError: a kind of scaling that is not among default, linear and llama3.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}, None
    settings: dict[str, Any] = {}
    if "full_attention" in parameters:  # one entry for each type of layer
        settings["rope.freq_base_swa"] = parameters["sliding_attention"]["rope_theta"]
        _scaled(parameters["sliding_attention"], ("default",))
        parameters = parameters["full_attention"]
    width = int(head_width(config) * parameters.get("partial_rotary_factor", 1.0))
    settings |= {"rope.dimension_count": width, "rope.freq_base": parameters["rope_theta"]}
    kind = _scaled(parameters, ("default", "linear", "llama3"))
    if kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": parameters["factor"]}
    return settings, _llama3_factors(parameters, width) if kind == "llama3" else None


def _scaled(parameters: dict, known: tuple[str, ...]) -> str:
    kind = parameters.get("rope_type", "default")
    if kind not in known:
        raise GGUFError(
            f"config.rope_parameters has the rope_type {kind!r}; a GGUF file is written for {', '.join(known)}"
        )
    return kind


def _llama3_factors(parameters: dict, width: int) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones not, those between by a part of it, as in transformers."""
    known = parameters["original_max_position_embeddings"]
    longest, shortest = known / parameters["low_freq_factor"], known / parameters["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        wave = 2 * math.pi * parameters["rope_theta"] ** (i / width)
        part = (known / wave - parameters["low_freq_factor"]) / (
            parameters["high_freq_factor"] - parameters["low_freq_factor"]
        )
        between = 1 / ((1 - part) / parameters["factor"] + part)
        factors.append(1.0 if wave < shortest else parameters["factor"] if wave > longest else between)
    return np.array(factors, dtype=np.float32)
