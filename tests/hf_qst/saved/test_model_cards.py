"""Cards that the hub accepts: their metadata, what they say of the base, and that an upload keeps them."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_qst.pruning import prune_blocks
from hf_qst.reshaped_models import to_dense
from hf_qst.saved.model_card import complete_card, hub_name
from tests.architectures import side_tuned, tiny
from tests.local_hub import local_hub
from tests.pruned_models import random_masks

# The fields that are written, and their types in the hub's specification of cards.
FIELDS = {"library_name": str, "base_model": str, "pipeline_tag": str, "tags": list}


def base(name=""):
    model = tiny("llama")
    model.name_or_path = model.config._name_or_path = name
    return model


def pruned(name=""):
    model = base(name)
    return prune_blocks(model, random_masks(model))


def metadata(folder):
    """The head of a card, which must be valid."""
    found = ModelCard.load(folder / "README.md").data.to_dict()
    assert found.keys() <= FIELDS.keys()
    for name, value in found.items():
        assert isinstance(value, FIELDS[name]), name
    assert all(isinstance(tag, str) and tag for tag in found["tags"])
    if "base_model" in found:
        validate_repo_id(found["base_model"])
    return found


def test_adapter_names_its_base(tmp_path):
    side_tuned(model=base("org/base")).save_pretrained(tmp_path)
    found = metadata(tmp_path)
    assert found["library_name"] == "peft" and found["base_model"] == "org/base"
    assert found["pipeline_tag"] == "text-generation"
    assert {"hf_qst", "qst", "base_model:adapter:org/base"} <= set(found["tags"])


def test_adapter_on_a_folder_does_not_name_a_path(tmp_path):
    for name in (str(tmp_path), "/nowhere/base"):
        side_tuned(model=base(name)).save_pretrained(tmp_path / "adapter")
        text = (tmp_path / "adapter" / "README.md").read_text()
        assert "base_model" not in metadata(tmp_path / "adapter") and f"adapter:{name}" not in text


def test_small_model_names_what_it_was_made_of(tmp_path):
    small = pruned("org/base")
    small.save_pretrained(tmp_path / "small")
    found = metadata(tmp_path / "small")
    assert found["library_name"] == "hf_qst" and found["base_model"] == "org/base"
    assert found["tags"] == ["hf_qst", "pruned_branch"] and found["pipeline_tag"] == "text-generation"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again.save_pretrained(tmp_path / "again")
    assert metadata(tmp_path / "again") == found
    assert not hasattr(to_dense(again).config, "reshaped_from")
    pruned(str(tmp_path)).save_pretrained(tmp_path / "of_a_folder")
    assert "base_model" not in metadata(tmp_path / "of_a_folder")


def test_what_a_user_wrote_stays(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\nlibrary_name: own\nbase_model:\n- org/a\n- org/b\n---\n# Mine\n"
    )
    complete_card(tmp_path, "<!-- mark -->", "<!-- mark -->\nHow.\n", {"library_name": "peft", "tags": ["hf_qst"]})
    first = (tmp_path / "README.md").read_text()
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {
        "license": "mit",
        "tags": ["mine", "hf_qst"],
        "library_name": "own",
        "base_model": ["org/a", "org/b"],
    }
    assert first.endswith("---\n# Mine\n<!-- mark -->\nHow.\n")
    complete_card(tmp_path, "<!-- mark -->", "<!-- mark -->\nHow.\n", {"library_name": "peft", "tags": ["hf_qst"]})
    assert (tmp_path / "README.md").read_text() == first


def test_metadata_that_cannot_be_read_are_left_alone(tmp_path):
    for head in ("---\n- a list\n---\n", "---\n[open\n---\n"):
        (tmp_path / "README.md").write_text(head)
        complete_card(tmp_path, "<!-- mark -->", "<!-- mark -->\n", {"library_name": "peft"})
        assert (tmp_path / "README.md").read_text() == f"{head}<!-- mark -->\n"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("/a/b", None),
        ("./a", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_names_of_repositories(name, found):
    assert hub_name(name) == found


UPLOAD = """
import sys
from pathlib import Path
import hf_qst
from huggingface_hub import create_repo, upload_folder
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/small", tags=["demo"])
create_repo("me/tuned")
upload_folder(repo_id="me/tuned", folder_path=sys.argv[2])
"""


@pytest.mark.slow
def test_uploaded_models_load_and_say_how(tmp_path):
    """A small model by its `push_to_hub`, an adapter by its folder."""
    pruned("org/base").save_pretrained(tmp_path / "small")
    side_tuned(model=base("org/base")).save_pretrained(tmp_path / "tuned")
    with local_hub() as (address, repositories, checked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        folders = [str(tmp_path / name) for name in ("small", "tuned")]
        subprocess.run([sys.executable, "-c", UPLOAD, *folders], env=environment, check=True)
    for name, files in repositories.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for path, content in files.items():
            (folder / path).write_bytes(content)
    assert set(repositories) == {"me/small", "me/tuned"}
    assert checked == [files["README.md"].decode() for files in repositories.values()]
    assert metadata(tmp_path / "me/small") == {
        "library_name": "hf_qst",
        "tags": ["demo", "hf_qst", "pruned_branch"],
        "base_model": "org/base",
        "pipeline_tag": "text-generation",
    }
    assert metadata(tmp_path / "me/tuned") == metadata(tmp_path / "tuned")
    for name in repositories:
        assert (tmp_path / name / "README.md").read_text().count("import hf_qst") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "me/small")
    PeftModel.from_pretrained(base(), tmp_path / "me/tuned")
    assert json.loads(repositories["me/small"]["config.json"])["reshaped_from"] == "org/base"
