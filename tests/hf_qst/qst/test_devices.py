"""Side networks on bases that live in several places: processes, devices, offloaded weights."""

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_qst import QSTConfig
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.qst import SideNetwork, side_network
from tests.architectures import side_network as network_of
from tests.architectures import side_tuned, tiny, token_batch
from tests.distributed.processes import in_processes


def train(model, batches):
    """Losses of one step on each batch."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fresh(mix):
    torch.manual_seed(0)
    return side_tuned("llama", mix=mix).train()


def train_half():
    rank, results = dist.get_rank(), {}
    for mix in ("residual", "paper"):
        model = fresh(mix)
        wrapped = DistributedDataParallel(model)
        # Each process has half of the rows; DDP averages the gradients.
        losses = torch.tensor(train(wrapped, [token_batch(4, 8, seed=s)[rank * 2 : rank * 2 + 2] for s in range(4)]))
        dist.all_reduce(losses)
        results[mix] = losses / 2, network_of(model).state_dict()
    return results


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    results = in_processes(2, train_half, tmp_path)
    for mix in ("residual", "paper"):
        model = fresh(mix)
        expected = torch.tensor(train(model, [token_batch(4, 8, seed=s) for s in range(4)]))
        for losses, weights in (result[mix] for result in results):
            torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
            for name, tensor in network_of(model).state_dict().items():
                torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5)


def test_parts_are_placed_with_their_base_blocks(monkeypatch):
    base = tiny("llama")
    base.model.layers[1].to("meta")
    base.model.layers[2].to("meta")
    placed = {}
    monkeypatch.setattr(side_network, "_move", lambda part, device: placed.update({part: device.type}))
    network = SideNetwork(QSTConfig(r=4, side_every=1, readout_every=1), find_decoder_stack(base))
    for i, kind in enumerate(("cpu", "meta", "meta")):
        assert {placed[part[i]] for part in (network.downsample, network.gates, network.blocks)} == {kind}
        assert placed[network.readout.down[str(i)]] == kind
    # The rest follows the last block, whose output it continues.
    assert {placed[part] for part in (network.norm, network.upsample, network.mix, network.readout.up)} == {"meta"}


def test_offloaded_base_runs_and_trains():
    ids = token_batch()
    base = tiny("llama")
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = side_tuned(model=base)
    assert not any(p.is_meta for p in network_of(model).parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    losses = train(model.train(), [ids] * 8)
    assert losses[-1] < losses[0]


def test_side_network_made_on_the_meta_device_has_no_storage():
    with torch.device("meta"):
        model = side_tuned(model=AutoModelForCausalLM.from_config(tiny("llama").config))
    assert all(p.is_meta for p in model.parameters())
