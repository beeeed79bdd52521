"""What the noise of drawn channels costs while DISP learns, by how sure the draws are at the start."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model

from benchmarks.pruning.methods import Bench
from hf_qst import DISPConfig
from hf_qst.disp import start_logits
from hf_qst.pruning import PRUNING_METHODS, comparable_scores

# The largest logit and the logits for each standard deviation of the scores; None: the paper's start, all channels alike.
STARTS = (None, (3.0, 3.0), (5.0, 3.0), (6.0, 6.0))
SCORES = "fisher"


def draws(bench: Bench, keep: float) -> dict:
    """Loss in nats per token on the training text's first rows: dense, with the hardened choice, and with drawn channels.

    Every row draws with the same seed. The hardened choice is the same for all starts from scores.
    """
    config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=keep, start_scores="none")
    model = get_peft_model(copy.deepcopy(bench.dense), config)
    network, ids = model.base_model.disp_layer.active_network(), bench.learning.rows[:4].to(bench.dense.device)
    loss = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    scores, _ = bench.once((SCORES, 0), lambda: PRUNING_METHODS[SCORES].score(bench.task))
    owned = comparable_scores(SCORES, scores, network.plan)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        result = {"keep": keep, "dense": loss(), "rows": []}
    for start in STARTS:
        if start is not None:
            network.start_at(start_logits(owned, network, *start))
            if "hardened" not in result:
                with torch.no_grad():
                    result["hardened"] = loss()
        torch.manual_seed(0)
        model.train()  # and with gradients, without which nothing is drawn
        row = {"start": start, "drawn": loss(), "ratio": model.base_model.disp_layer.last_ratio.item()}
        result["rows"].append(row | {"threshold_ratio": model.base_model.disp_report().threshold_ratio})
        model.eval()
    return result
