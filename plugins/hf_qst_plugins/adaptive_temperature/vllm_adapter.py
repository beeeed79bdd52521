"""The same rule for vLLM's engine, written against its interfaces and not its package.

vLLM has two: one of its V1 model runner and one of its V2 model runner. It wants a subclass of its own base class, by
name, so a user of vLLM writes a module of a few lines, which serves both:

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
    """The paper's rule with the methods of both kinds of vLLM's logits processors.

    vLLM divides by `SamplingParams.temperature` too: leave it at 1.0. A request may bring its own two temperatures:
    `SamplingParams(extra_args={"block_temperature": 0.8, "temperature": 0.5})`. Under speculative decoding vLLM allows
    processors in its V2 model runner alone.

    Args:
        vllm_config: vLLM's configuration; the tokenizer is `tokenizer_name`, else its `model_config.tokenizer`.
        device (`torch.device` or `LogitsProcRequestState`): where the logits are (V1), or the token ids of all requests
            (V2), of which `device`, `max_num_reqs` and `all_token_ids.gpu` are read.
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
        # V1. Per row: its temperatures, the end of its prompt, its output so far (vLLM's own list, which grows).
        self._rows: dict[int, tuple[dict[str, float], list[int], list[int]]] = {}
        # V2. Per slot of a request: the temperature elsewhere and at block starts, on the host and on the device.
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
            ValueError: one of them is no finite number above 0.
        """
        _asked(sampling_params, preset_temperatures(cls.preset))

    # --- V1 model runner -----------------------------------------------------------------------------------------------

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

    # --- V2 model runner -----------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params) -> bool:
        """Note the temperatures of the request that takes the slot `req_idx`; False for a greedy one, left alone."""
        greedy = sampling_params.temperature == 0
        asked = _asked(sampling_params, self._default)
        self._slots[req_idx] = 1.0 if greedy else torch.tensor([asked["temperature"], asked["block_temperature"]])
        self._slots_changed = True
        return not greedy

    def apply_staged_writes(self) -> None:
        """Copy what `add_request` noted to the device."""
        if self._slots_changed:
            self._slots_on_device.copy_(self._slots)
            self._slots_changed = False

    def _temperatures(self, ctx) -> torch.Tensor:
        """float32 `[rows]`. Tokens drafted in this step stand in `ctx.input_ids`, earlier ones with the request."""
        slots, rows = ctx.expanded_idx_mapping.long(), torch.arange(len(ctx.pos), device=ctx.pos.device)
        places = ctx.pos.long().unsqueeze(-1) - self._back
        ids = self._requests.all_token_ids.gpu[slots.unsqueeze(-1), places.clamp(min=0)].long()
        drafted = ctx.input_ids[(rows.unsqueeze(-1) - self._back).clamp(min=0)].long()
        ids = torch.where(self._back <= ctx.expanded_local_pos.unsqueeze(-1), drafted, ids)
        hot = self._hot_states[self.automaton.states_of_windows(ids, ctx.pos.long() + 1)]
        return self._slots_on_device[slots, hot]

    # --- both ----------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx=None) -> torch.Tensor:
        """`logits` `[rows, vocabulary]` over the temperatures.

        Args:
            ctx (`LogitsContext`, *optional*): vLLM's V2 layout of the batch; in V1 a row is a request.
        """
        if self._requests is not None:
            return divided(logits, self._temperatures(ctx))
        temperatures = [self._temperature(row) for row in range(logits.shape[0])]
        return divided(logits, torch.tensor(temperatures).to(logits.device, non_blocking=True))


def _asked(sampling_params, default: dict[str, float]) -> dict[str, float]:
    """The two temperatures of a request: its own where it brings them."""
    own = getattr(sampling_params, "extra_args", None) or {}
    return {
        name: positive(f"extra_args[{name!r}]", own.get(name, value), "temperature=0")
        for name, value in default.items()
    }
