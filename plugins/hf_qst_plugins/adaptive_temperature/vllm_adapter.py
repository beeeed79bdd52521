"""The same rule for vLLM's V1 engine, written against its interface and not its package.

vLLM wants a subclass of its own base class, by name, so a user of vLLM writes a module of three lines:

    from vllm.v1.sample.logits_processor import LogitsProcessor
    from hf_qst_plugins.adaptive_temperature import VLLMAdaptiveTemperature

    class AdaptiveTemperature(VLLMAdaptiveTemperature, LogitsProcessor):
        tokenizer_name = "path/of/the/model"

    LLM(model=..., logits_processors=["my_module:AdaptiveTemperature"])
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from hf_qst_plugins.adaptive_temperature.policies import BlockStart, positive
from hf_qst_plugins.adaptive_temperature.processor import divided, preset_temperatures
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable


class VLLMAdaptiveTemperature:
    """The paper's rule with the methods of a vLLM V1 logits processor.

    vLLM divides by `SamplingParams.temperature` first: leave it at 1.0. A request may bring its own two temperatures:
    `SamplingParams(extra_args={"block_temperature": 0.8, "temperature": 0.5})`. Not for speculative decoding, where
    vLLM allows no logits processors.

    Args:
        vllm_config: vLLM's configuration; the tokenizer is `tokenizer_name`, else its `model_config.tokenizer`.
        device (`torch.device`): where the logits are.
        is_pin_memory (`bool`): whether vLLM uses pinned memory; not used.
    """

    tokenizer_name: str | None = None
    preset = "default"
    scope = "line"
    language = "python"

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        name = self.tokenizer_name or vllm_config.model_config.tokenizer
        table = VocabularyTable.from_tokenizer(AutoTokenizer.from_pretrained(name), language=self.language)
        policy = BlockStart(table, **preset_temperatures(self.preset), scope=self.scope)
        self.automaton = policy.automaton
        self._default = {"block_temperature": policy.block_temperature, "temperature": policy.temperature}
        # Per row: its temperatures, the end of its prompt, its output so far (vLLM's own list, which grows).
        self._rows: dict[int, tuple[dict[str, float], list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """True: a temperature does not change which logit is largest, so vLLM skips this for greedy requests."""
        return True

    def update_state(self, batch_update) -> None:
        """Follow the requests as vLLM adds, removes and moves their rows.

        Args:
            batch_update (`BatchUpdate`, *optional*): vLLM's, with `removed` (rows), `added` (tuples of row, sampling
                parameters, prompt ids, output ids; the last is vLLM's own list and grows) and `moved` (tuples of two
                rows and a direction). None when nothing changed.
        """
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, parameters, prompt_ids, output_ids in batch_update.added:
            asked = getattr(parameters, "extra_args", None) or {}
            temperatures = {name: positive(name, asked.get(name, value)) for name, value in self._default.items()}
            self._rows[row] = (temperatures, list(prompt_ids or ())[-self.automaton.window :], output_ids)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction.name == "SWAP":
                self._rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` `[requests, vocabulary]` over the temperatures."""
        temperatures = [self._temperature(row) for row in range(logits.shape[0])]
        return divided(logits, torch.tensor(temperatures).to(logits.device, non_blocking=True))

    def _temperature(self, row: int) -> float:
        if row not in self._rows:
            return self._default["temperature"]
        temperatures, prompt_ids, output_ids = self._rows[row]
        ids = [*prompt_ids, *output_ids[-self.automaton.window :]]
        return temperatures["block_temperature" if self.automaton.is_hot(ids) else "temperature"]
