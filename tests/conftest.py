"""Settings every test shares: no network, one thread, a fixed seed before each test."""

import os

# Read when transformers and tokenizers are imported, so it comes before them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# One thread: the models are so small that a second one only waits at barriers, and long where the machine is busy.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=60, help="damaged copies of each kind of file that are tried")
    parser.addoption("--load", type=float, default=0.01, help="part of a day of work in one process that is done")
    parser.addoption("--kills", type=int, default=6, help="processes that are killed for each kind of work")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    # A script that a test ran may have set another.
    torch.set_num_threads(1)
