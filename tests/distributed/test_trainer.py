"""DDP and FSDP2 of `Trainer` on two gloo processes give what one process gives; what two save, one loads and goes on with."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
from peft import PeftModel

from tests.conformance.methods import logits, small
from tests.distributed.processes import in_processes
from tests.distributed.training import FSDP2, METHODS, SAVED, STEPS, losses_of, make, train_all, trainer

CONFIGS = Path(__file__).parents[2] / "examples" / "distributed"
# Sums over rows in another order, after six steps of AdamW.
CLOSE = {"atol": 1e-5, "rtol": 0}


def launched(name: str, processes: int) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` sets for its processes, with the numbers of a CPU."""
    given = [
        "--config_file",
        str(CONFIGS / name),
        "--num_processes",
        str(processes),
        "--mixed_precision",
        "no",
        "train.py",
    ]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def whole(place):
    """One process: losses by method, and the model at the end."""
    found = {}
    for name in METHODS:
        run = trainer(name, make(name), place / "one" / name)
        run.train()
        found[name] = losses_of(run), run.model
    return found


KINDS = {
    "ddp": {"settings": {}},
    "fsdp2": {"settings": FSDP2, "fsdp": True},
    "ddp.yaml": {},
    "fsdp2.yaml": {"fsdp": True},
}


@pytest.fixture(scope="module")
def two(place):
    """Two processes, by kind, and by method; run when they are first asked for."""
    ran = {}

    def of(kind: str) -> list[dict]:
        if kind not in ran:
            yaml_of = launched(kind, 2) if kind.endswith(".yaml") else None
            names = METHODS if yaml_of is None else ["qst", "disp", "mixed_rank"]
            given = KINDS[kind]
            ran[kind] = in_processes(
                2, train_all, place / f"results {kind}", place, kind, names, None, given.get("fsdp", False), given.get("settings"),
                environment=yaml_of,
            )  # fmt: skip
        return ran[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_process(kind, whole, two):
    for found in two(kind):
        for name, of_method in found.items():
            assert len(of_method["losses"]) == STEPS
            torch.testing.assert_close(
                torch.tensor(of_method["losses"]),
                torch.tensor(whole[name][0]),
                msg=lambda m, n=name: f"{n}: {m}",
                **CLOSE,
            )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fsdp2")])
def test_every_parameter_is_divided(kind, two):
    for found in two(kind):
        for name, of_method in found.items():
            assert of_method["divided"] and all(of_method["divided"]), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("ddp")])
def test_ddp_wraps_and_divides_nothing(kind, two):
    for found in two(kind):
        assert {of_method["wrapper"] for of_method in found.values()} == {"DistributedDataParallel"}
        assert not any(any(of_method["divided"]) for of_method in found.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_two_save_one_loads(kind, name, place, whole, two):
    two(kind)
    expected = logits(whole[name][1])
    model = PeftModel.from_pretrained(small(), place / kind / name / f"checkpoint-{STEPS}")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(make(name)), expected, atol=1e-3)  # it has learned


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpointed_tail_has_the_same_losses(kind, place, whole):
    given = KINDS[kind]
    settings = {**given["settings"], "gradient_checkpointing": True}
    name = f"{kind} checkpointed"
    for found in in_processes(
        2, train_all, place / f"results {name}", place, name, ["qst_tail"], None, given.get("fsdp", False), settings
    ):
        losses = torch.tensor(found["qst_tail"]["losses"])
        torch.testing.assert_close(losses, torch.tensor(whole["qst_tail"][0]), **CLOSE)


def goes_on(found: dict, whole: dict) -> None:
    for name, of_method in found.items():
        after = whole[name][0][SAVED:]
        torch.testing.assert_close(torch.tensor(of_method["losses"][-len(after) :]), torch.tensor(after), **CLOSE)


def test_one_process_goes_on_where_two_stopped(place, whole, two):
    two("ddp")
    for name in METHODS:
        run = trainer(name, make(name), place / "resumed" / name)
        run.train(resume_from_checkpoint=str(place / "ddp" / name / f"checkpoint-{SAVED}"))
        goes_on({name: {"losses": losses_of(run)}}, whole)


def test_two_processes_go_on_where_one_stopped(place, whole):
    for found in in_processes(2, train_all, place / "results resumed", place, "resumed by two", METHODS, "one"):
        goes_on(found, whole)


def test_one_sharded_process_goes_on_where_two_stopped(place, whole, two):
    two("fsdp2")
    for found in in_processes(1, train_all, place / "results 1", place, "fsdp2 by 1", METHODS, "fsdp2", True, FSDP2):
        goes_on(found, whole)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_line_of_a_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path)).to_dict()
    assert {name: loaded[name] for name in values} == values
    known = {action.dest for action in launch_command_parser()._actions}
    for part in ("fsdp_config", "deepspeed_config"):
        assert values.get(part, {}).keys() <= known
