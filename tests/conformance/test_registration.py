"""Every registered method is tested here, and its configuration behaves as the others' do."""

import json
import pickle
import warnings

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from hf_qst.tuner.manifest_tuner import ManifestLayer, ManifestTuner
from hf_qst.tuner.registration import IMPORT_REMINDER, METHODS, register_method
from tests.conformance.methods import LINES


def test_every_registered_method_has_a_line():
    assert {line.config_class for line in LINES.values()} == {config_class for config_class, _ in METHODS.values()}


@pytest.mark.parametrize("name", METHODS)
def test_names_of_a_method_agree(name):
    config_class, tuner_class = METHODS[name]
    assert config_class.method == name and config_class.card_remark
    assert issubclass(tuner_class, ManifestTuner) and issubclass(tuner_class.tuner_layer_cls, ManifestLayer)
    # transformers' delete_adapter derives the prefix from the name.
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == tuner_class.prefix == f"{name.lower()}_"
    (container,) = tuner_class.tuner_layer_cls.adapter_layer_names
    assert container.startswith(tuner_class.prefix)


@pytest.mark.parametrize("name", METHODS)
def test_registering_twice_is_harmless_and_a_stranger_is_refused(name):
    config_class, tuner_class = METHODS[name]
    register_method(config_class, tuner_class)
    with pytest.raises(RuntimeError, match=f"already has a method '{name}'.*{config_class.__qualname__}"):
        register_method(type("StrangerConfig", (config_class,), {}), tuner_class)


def test_configuration_pickles_and_names_wrong_values(line):
    config = line.config(calibration_data=None) if "calibration_data" in line.settings() else line.config()
    assert pickle.loads(pickle.dumps(config)) == config
    for value in (None, "random", 1):
        with pytest.raises(
            ValueError, match=f"{type(config).__name__}.init_weights must be True or False, got {value!r}"
        ):
            line.config(init_weights=value)
    with pytest.raises(TypeError, match="warp_factor"):
        line.config(warp_factor=9)


def test_configuration_file_round_trips(line, tmp_path):
    config = line.config()
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    assert stored["peft_type"] == f"{config.peft_type} ({IMPORT_REMINDER})"
    assert not stored.keys() & set(config.not_saved)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is line.config_class and loaded.to_dict() == config.to_dict()
    path.write_text(json.dumps({**stored, "warp_factor": 9}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert len([w for w in seen if "warp_factor" in str(w.message)]) == 1
