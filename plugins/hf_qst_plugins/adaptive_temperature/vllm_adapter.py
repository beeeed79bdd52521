"""The same rule for vLLM, written against vLLM's interfaces without importing it.

vLLM has two interfaces, of its V1 and of its V2 model runner, and loads a subclass of its own base class by name. A user
of vLLM writes a module of a few lines that serves both:

    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
    from hf_qst_plugins.adaptive_temperature import VLLMAdaptiveTemperature

    class AdaptiveTemperature(VLLMAdaptiveTemperature, LogitsProcessor, LogitsProcessorV2):
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
    """The paper's rule as a logits processor for vLLM, with the methods of both interfaces.

    vLLM also divides by `SamplingParams.temperature`: leave it at 1.0. A request can have its own two temperatures:
    `SamplingParams(extra_args={"block_temperature": 0.8, "temperature": 0.5})`. With speculative decoding, vLLM allows
    processors only in its V2 model runner.

    Args:
        vllm_config: vLLM's configuration; its `model_config.tokenizer` is used if `tokenizer_name` is None.
        device (`torch.device` or `LogitsProcRequestState`): the device of the logits (V1), or the state of all requests
            (V2: `device`, `max_num_reqs` and `all_token_ids.gpu` are read).
        is_pin_memory (`bool`, *optional*): whether vLLM uses pinned memory (V1); not used.
    """

    tokenizer_name: str | None = None
    preset = "default"
    scope = "line"
    language = "python"

    def __init__(self, vllm_config, device, is_pin_memory: bool | None = None):
        name = self.tokenizer_name or vllm_config.model_config.tokenizer
        table = VocabularyTable.from_tokenizer(AutoTokenizer.from_pretrained(name), language=self.language)
        policy = BlockStart(table, **preset_temperatures(self.preset), scope=self.scope)
        self.automaton = policy.automaton
        self._default = {"block_temperature": policy.block_temperature, "temperature": policy.temperature}
        # V1. Per row: its temperatures, the end of its prompt, and its output (vLLM's own list, which grows).
        self._rows: dict[int, tuple[dict[str, float], list[int], list[int]]] = {}
        # V2. Per request slot: the two temperatures (other tokens, block starts), on the host and on the device.
        self._requests = None
        if hasattr(device, "all_token_ids"):
            self._requests = device
            self._slots = torch.ones(device.max_num_reqs, 2)
            self._slots_on_device = self._slots.to(device.device, copy=True)
            self._slots_changed = False
            self._hot_states = torch.tensor(self.automaton.hot_states, device=device.device).long()
            self._back = torch.arange(self.automaton.window - 1, -1, -1, device=device.device)

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """Check a request's own temperatures; vLLM calls this before the request reaches the engine.

        Raises:
            ValueError: one of them is not a finite number above 0.
        """
        _asked(sampling_params, preset_temperatures(cls.preset))

    def is_argmax_invariant(self) -> bool:
        """True, because a temperature does not change which logit is largest; vLLM then skips greedy requests (V1)."""
        return True

    def update_state(self, batch_update) -> None:
        """Update the rows after vLLM added, removed or moved requests (V1).

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
            prompt = list(prompt_ids or ())[-self.automaton.window :]
            self._rows[row] = (_asked(parameters, self._default), prompt, output_ids)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction.name == "SWAP":
                self._rows[source] = displaced

    def _temperature(self, row: int) -> float:
        if row not in self._rows:
            return self._default["temperature"]
        temperatures, prompt_ids, output_ids = self._rows[row]
        ids = [*prompt_ids, *output_ids[-self.automaton.window :]]
        return temperatures["block_temperature" if self.automaton.is_hot(ids) else "temperature"]

    def add_request(self, req_idx: int, sampling_params) -> bool:
        """Store the temperatures of the request in slot `req_idx` (V2). Returns False for a greedy request."""
        greedy = sampling_params.temperature == 0
        asked = _asked(sampling_params, self._default)
        self._slots[req_idx] = 1.0 if greedy else torch.tensor([asked["temperature"], asked["block_temperature"]])
        self._slots_changed = True
        return not greedy

    def apply_staged_writes(self) -> None:
        """Copy the temperatures stored by `add_request` to the device (V2)."""
        if self._slots_changed:
            self._slots_on_device.copy_(self._slots)
            self._slots_changed = False

    def _temperatures(self, ctx) -> torch.Tensor:
        """float32 `[rows]`. Tokens drafted in this step are in `ctx.input_ids`, earlier ones in the request's state."""
        slots, rows = ctx.expanded_idx_mapping.long(), torch.arange(len(ctx.pos), device=ctx.pos.device)
        places = ctx.pos.long().unsqueeze(-1) - self._back
        ids = self._requests.all_token_ids.gpu[slots.unsqueeze(-1), places.clamp(min=0)].long()
        drafted = ctx.input_ids[(rows.unsqueeze(-1) - self._back).clamp(min=0)].long()
        ids = torch.where(self._back <= ctx.expanded_local_pos.unsqueeze(-1), drafted, ids)
        hot = self._hot_states[self.automaton.states_of_windows(ids, ctx.pos.long() + 1)]
        return self._slots_on_device[slots, hot]

    def apply(self, logits: torch.Tensor, ctx=None) -> torch.Tensor:
        """`logits` `[rows, vocabulary]` divided by the temperatures.

        Args:
            ctx (`LogitsContext`, *optional*): the batch's layout in V2; in V1, each row is a request.
        """
        if self._requests is not None:
            return divided(logits, self._temperatures(ctx))
        temperatures = [self._temperature(row) for row in range(logits.shape[0])]
        return divided(logits, torch.tensor(temperatures).to(logits.device, non_blocking=True))


def _asked(sampling_params, default: dict[str, float]) -> dict[str, float]:
    """The two temperatures of a request: its own, else the default ones."""
    own = getattr(sampling_params, "extra_args", None) or {}
    return {
        name: positive(f"extra_args[{name!r}]", own.get(name, value), "temperature=0")
        for name, value in default.items()
    }
