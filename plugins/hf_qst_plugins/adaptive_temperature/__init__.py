"""Adaptive temperature for code: one temperature where a block of code starts, another elsewhere.

Zhu et al., "Hot or Cold? Adaptive Temperature Sampling for Code Generation with Large Language Models", AAAI 2024,
arXiv 2309.02772.
"""

from hf_qst_plugins.adaptive_temperature.distribution import entropy
from hf_qst_plugins.adaptive_temperature.generation import (
    adaptive_generate_kwargs,
    install_adaptive_temperature,
    uninstall_adaptive_temperature,
)
from hf_qst_plugins.adaptive_temperature.learned import (
    DifficultyProbe,
    LearnedTemperature,
    Observations,
    Position,
    PositionTable,
    fit_difficulty_probe,
    observe,
)
from hf_qst_plugins.adaptive_temperature.policies import (
    BlockStart,
    EntropyGate,
    EntropyTemperature,
    TemperaturePolicy,
    combine,
)
from hf_qst_plugins.adaptive_temperature.processor import (
    PRESETS,
    AdaptiveTemperatureLogitsProcessor,
    LastTokenTemperatureLogitsProcessor,
)
from hf_qst_plugins.adaptive_temperature.rules import TokenRule, character_rule
from hf_qst_plugins.adaptive_temperature.vllm_adapter import VLLMAdaptiveTemperature
from hf_qst_plugins.adaptive_temperature.vocabulary import (
    LANGUAGES,
    TokenizerMismatchError,
    TokenKind,
    VocabularyTable,
)

__all__ = [
    "LANGUAGES",
    "PRESETS",
    "AdaptiveTemperatureLogitsProcessor",
    "BlockStart",
    "DifficultyProbe",
    "EntropyGate",
    "EntropyTemperature",
    "LastTokenTemperatureLogitsProcessor",
    "LearnedTemperature",
    "Observations",
    "Position",
    "PositionTable",
    "TemperaturePolicy",
    "TokenKind",
    "TokenRule",
    "TokenizerMismatchError",
    "VLLMAdaptiveTemperature",
    "VocabularyTable",
    "adaptive_generate_kwargs",
    "character_rule",
    "combine",
    "entropy",
    "fit_difficulty_probe",
    "install_adaptive_temperature",
    "observe",
    "uninstall_adaptive_temperature",
]
