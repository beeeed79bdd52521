"""Model and config classes that follow a description of changed modules.

A reshaped model is an instance of a subclass of its architecture's class, made here when it is first needed. Its config
answers in memory like the architecture's, `model_type` included, so that transformers, PEFT and this package treat the
model as what it is. Only the file says `MODEL_TYPE`: a process that has not imported this package then refuses the
folder, and prints that name, instead of filling an unchanged model with random values. The model class has a name of its
own for the same reason: pipelines and TRL look for the name in `config.architectures` among transformers' classes, and
load with that. A class of transformers that is called directly reads neither; what it does read is the name of the file
of weights, `transformers_weights`, which is no file but says what to do.
"""

from __future__ import annotations

import copy
import functools
import os

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.reshaped_models.folder import check_folder, complete_folder_card, write_folder
from hf_qst.reshaped_models.kinds import ReshapedModelError, build_module, described_modules, finish_modules
from hf_qst.reshaped_models.quantised_folder import leave_new_heads_unquantised, save_as_loaded
from hf_qst.reshaped_models.rebuilding import CLASS_PREFIX, require_rebuilt
from hf_qst.reshaped_models.tensor_names import names_in_memory
from hf_qst.saved.manifest import CheckpointError
from hf_qst.saved.model_card import hub_name
from hf_qst.saved.whole_files import finish_interrupted
from hf_qst.tuner.registration import IMPORT_REMINDER

PLAIN_MODEL_TYPE = "hf_qst_reshaped"
"""What folders say that were saved before the name held the reminder."""
MODEL_TYPE = f"{PLAIN_MODEL_TYPE} ({IMPORT_REMINDER})"
HOW_TO_LOAD = (
    "none for this class, as modules of the saved model have other shapes than their architecture's: "
    f"{IMPORT_REMINDER}, and load with an Auto class such as AutoModelForCausalLM"
)
FORMAT = 1
_PACKAGE = __name__.rpartition(".")[0]
_FIELDS = ("base_model_type", "hf_qst_format", "reshaped_from", "reshaped_modules", "saved_class")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments of a model's `from_pretrained` whose names are also fields of a config.
_OF_LOADING = ("attn_implementation", "dtype", "experts_implementation", "quantization_config", "torch_dtype")


def _as_architecture(config_dict: dict, model_type: str) -> dict:
    """The content of a reshaped model's `config.json` as its architecture's config class takes it."""
    found = config_dict.get("hf_qst_format")
    if found != FORMAT:
        raise ReshapedModelError(
            f"config.json says hf_qst_format {found!r}, this hf_qst reads {FORMAT}"
            + ("; update hf_qst" if isinstance(found, int) and found > FORMAT else ": not a reshaped model's folder")
        )
    kept = {name: value for name, value in config_dict.items() if name != "transformers_weights"}
    return {**kept, "model_type": model_type}


class ReshapedConfig:
    """The part of every reshaped model's config that is not its architecture's.

    `base_model_type` is the architecture's model type, `hf_qst_format` the version of this format,
    `reshaped_modules` the description of each changed module by its path inside the base model, `saved_class` the
    model's class where that is not one of transformers, and `reshaped_from` the dense model's name on the hub.
    """

    plain_class: type[PreTrainedConfig]
    auto_map = {}  # TRL reads it of a config whose `architectures` are not transformers' own
    saved_class: str | None = None
    reshaped_from: str | None = None
    transformers_weights = HOW_TO_LOAD  # stops `from_pretrained` of every class but ours

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return _as_architecture(config_dict, cls.model_type), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(_as_architecture(config_dict, cls.model_type), **kwargs)

    def to_diff_dict(self):
        own = {"model_type": MODEL_TYPE, "transformers_weights": HOW_TO_LOAD}
        return {**super().to_diff_dict(), **own}


class _AnyReshapedConfig(PreTrainedConfig):
    """What `AutoConfig` finds under `MODEL_TYPE`; it hands on to the config class of the architecture."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base = _as_architecture(config_dict, MODEL_TYPE).get("base_model_type")
        if base in (MODEL_TYPE, PLAIN_MODEL_TYPE) or base not in CONFIG_MAPPING:
            raise ReshapedModelError(f"config.json says base_model_type {base!r}, which transformers does not know")
        return registered_config_class(CONFIG_MAPPING[base]).from_dict(config_dict, **kwargs)


class ReshapedModel:
    """The part of every reshaped model's class that is not its architecture's."""

    plain_class: type[PreTrainedModel]

    def post_init(self):
        # The last thing every architecture's __init__ calls.
        _build_modules(self)
        super().post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, output_loading_info=False, **kwargs
    ):
        """As transformers' own, after a check of every file against the manifest saved with it.

        Raises:
            CheckpointError: naming the file and the tensor that is missing, extra, of another shape, dtype or content.
        """
        _refuse_tensor_parallelism(**kwargs)
        source = pretrained_model_name_or_path
        if source is not None and finish_interrupted(source):
            config = None  # the one that was read may be of the files before
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, ReshapedConfig):
            config, kwargs = _load_config(cls.config_class, source if config is None else config, kwargs)
            kwargs.update(hub)
        config = copy.copy(config)
        # Without a source the tensors come with the call (`state_dict=`).
        tensors = None if source is None else check_folder(os.fspath(source), config.reshaped_modules, **hub)
        require_saved_class(cls, config)
        if tensors is not None:
            tensors = names_in_memory(cls, config, tensors)
            leave_new_heads_unquantised(cls, config, tensors)
        config.transformers_weights = None
        model, loading_info = super().from_pretrained(
            source, *model_args, config=config, output_loading_info=True, **kwargs
        )
        for module in model.modules():
            if isinstance(getattr(module, "config", None), ReshapedConfig):
                vars(module.config).pop("transformers_weights", None)
        _require_loaded(model, loading_info["missing_keys"])
        forbid_packing(model)
        save_as_loaded(model)
        finish_modules(model.base_model, config.reshaped_modules)  # again, for now it is on its device
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """As transformers' own, whole or not at all, with a manifest and a model card.

        Raises:
            CheckpointError: a tensor holds NaN or infinity; nothing is written.
        """
        save = functools.partial(
            super().save_pretrained, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if push_to_hub:
            raise ReshapedModelError(
                "save_pretrained(push_to_hub=True) would leave out the manifest: use push_to_hub()"
            )
        if not is_main_process or getattr(self, "_hf_peft_config_loaded", False):  # with an adapter, only that is saved
            save(save_directory)
        else:
            write_folder(save, os.fspath(save_directory), self.config, how_to_load(self))

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # push_to_hub has written transformers' own card over that of save_pretrained.
        if not getattr(self, "_hf_peft_config_loaded", False):
            complete_folder_card(os.fspath(working_dir), self.config, how_to_load(self))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _get_name(self):
        # What Trainer decides by whether labels are to be shifted when it smooths them.
        return self.plain_class.__name__

    # transformers tells its own classes by the module they are defined in; these answers are the architecture's.
    @classmethod
    def is_custom_code(cls):
        return cls.plain_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls.plain_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return cls.plain_class._can_set_experts_implementation()


def _refuse_tensor_parallelism(distributed_config=None, tp_plan=None, tp_size=None, **kwargs) -> None:
    processes = getattr(distributed_config, "tp_size", None) or 1
    if tp_plan is not None or tp_size is not None:
        processes = tp_size or int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ReshapedModelError(
            f"tensor parallelism over {processes} processes (tp_plan, tp_size) divides layers as their architecture has them, and "
            "those of a pruned or factorised model have other shapes: load it whole in each process, or divide it with FSDP "
            "(fsdp_size)"
        )


def _load_config(config_class: type, source, kwargs: dict) -> tuple[ReshapedConfig, dict]:
    """The config in a folder with the arguments of `from_pretrained` that are fields of it, and the other arguments."""
    kept = {name: kwargs[name] for name in _OF_LOADING if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in kept}
    config, unused = config_class.from_pretrained(source, return_unused_kwargs=True, **others)
    return config, {**unused, **kept}


def require_saved_class(model_class: type, config: ReshapedConfig) -> None:
    """Refuse to load what a user's own class saved with a class of transformers, which computes something else.

    Another head on the same base, as `AutoModelForSequenceClassification` makes it, is fine.

    Raises:
        ReshapedModelError: naming both classes.
    """
    saved = config.saved_class
    if not isinstance(saved, (str, type(None))):
        raise CheckpointError(f"config.json is damaged: saved_class is {saved!r:.60}")
    if saved is None:  # folders without the field have the class's name alone
        name = (config.architectures or [""])[0].removeprefix(CLASS_PREFIX)
        saved = name if name and not hasattr(transformers, name) else None
    if saved is not None and not model_class.plain_class.is_custom_code():
        name = saved.rpartition(".")[2]
        raise ReshapedModelError(
            f"the model was saved by the class {saved}, which may compute something else than "
            f"{model_class.plain_class.__name__} does with its weights; import {name} and load with "
            f"hf_qst.reshaped_models.reshaped_class({name}).from_pretrained(folder)"
        )


@functools.cache
def reshaped_class(plain: type) -> type:
    """The subclass of an architecture's model or config class whose instances may have changed modules."""
    ours = {"__module__": _PACKAGE, "plain_class": plain}
    if issubclass(plain, PreTrainedConfig):
        return type(plain.__name__, (ReshapedConfig, plain), ours)
    ours["config_class"] = reshaped_class(plain.config_class)
    _translate_names_as(plain)
    return type(CLASS_PREFIX + plain.__name__, (ReshapedModel, plain), ours)


def _translate_names_as(plain: type[PreTrainedModel]) -> None:
    """Some architectures have older tensor names on disk; transformers looks for the translation by the class's name."""
    translation = get_checkpoint_conversion_mapping(plain.__name__)
    if translation is not None:
        register_checkpoint_conversion_mapping(CLASS_PREFIX + plain.__name__, translation, overwrite=True)


@functools.cache
def registered_config_class(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The reshaped config class, after every Auto class that knows the plain one has been told about it."""
    config_class = reshaped_class(plain)
    for _, mapping in _auto_mappings(plain):
        found = mapping[plain]
        several = isinstance(found, (list, tuple))
        models = tuple(reshaped_class(model) for model in (found if several else [found]))
        # `exist_ok` because the mapping tells classes apart by name when it looks for one that is taken.
        mapping.register(config_class, models if several else models[0], exist_ok=True)
    return config_class


def _auto_mappings(config_class: type[PreTrainedConfig]) -> list[tuple[str, dict]]:
    """Name and mapping of each Auto model class that knows `config_class`."""
    from transformers.models.auto import modeling_auto

    found = [(name, getattr(auto, "_model_mapping", None)) for name, auto in vars(modeling_auto).items()]
    return [(name, mapping) for name, mapping in found if mapping is not None and config_class in mapping]


def how_to_load(model: PreTrainedModel) -> tuple[str, str]:
    """The imports that loading this model takes, and the class that does it."""
    plain = model.plain_class
    for name, mapping in _auto_mappings(type(model.config)):
        found = mapping[type(model.config)]
        if (
            name.startswith("AutoModel")
            and name != "AutoModelForPreTraining"
            and type(model) in (found if isinstance(found, (list, tuple)) else [found])
        ):
            return f"from transformers import {name}", name
    if plain.is_custom_code():
        imports = f"from {plain.__module__} import {plain.__name__}\nfrom {_PACKAGE} import reshaped_class"
        return imports, f"reshaped_class({plain.__name__})"
    return "from transformers import AutoModel", "AutoModel"


def _build_modules(model: PreTrainedModel) -> None:
    base, described = model.base_model, model.config.reshaped_modules
    # Classifiers make their base with an Auto class, which has built it; some classes call post_init twice.
    if getattr(base, "_modules_built", False):
        return
    base._modules_built = True
    for path in sorted(described, key=_depth):  # what a changed module holds may be changed in turn
        try:
            unchanged = base.get_submodule(path)
        except AttributeError as error:
            raise ReshapedModelError(
                f"config.reshaped_modules describes {path!r}, which {type(base).__name__} does not have"
            ) from error
        base.set_submodule(path, build_module(unchanged, described[path], path))
        _pass_over_in_initialisation(base, path.rpartition(".")[0])
    finish_modules(base, described)


def _pass_over_in_initialisation(base: nn.Module, parent: str) -> None:
    """Keep an architecture from initialising what it expects inside a changed module's parent.

    GPT-2 does, with `attention.c_proj.weight`. A parent without tensors of its own has nothing else to initialise: its
    children have their own turns.
    """
    module = base.get_submodule(parent)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if parent and not own:
        module._is_hf_initialized = True


def _depth(path: str) -> int:
    return path.count(".")


def _require_loaded(model: PreTrainedModel, missing: set[str]) -> None:
    """A head may be new; a changed module whose tensors were not in the files would hold random values."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = tuple(f"{prefix}{path}." for path in model.config.reshaped_modules)
    if lost := sorted(name for name in missing if name.startswith(inside)):
        raise CheckpointError(f"tensor {lost[0]!r} is in none of the model's files ({len(lost)} such tensors)")


def _exchange_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Put `config` wherever a module of `model` refers to the model's present one."""
    present = model.config
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is present:
                setattr(module, name, config)


def _forget_origin(model: PreTrainedModel) -> None:
    """The model is not that of the folder it was loaded from, where PEFT would look its config up and later itself."""
    model.name_or_path = model.config.name_or_path = ""


def reshape_model(model: PreTrainedModel) -> PreTrainedModel:
    """Make a transformers model whose modules were exchanged one that saves and loads with its new shapes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model of an architecture of transformers, some of whose modules, inside its base model, are of kinds known
            to `register_kind`. It becomes an instance of a subclass of its class. Reshaping again after further
            changes is fine.

    Returns:
        The same model. Its config is a new object, so that another model built from the old one is not affected.

    Raises:
        ReshapedModelError: no module, one outside the base model, or one of an unknown kind was exchanged, the
            architecture is not known to `AutoConfig`, or the model could not be rebuilt from its description. The model
            is unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise ReshapedModelError(f"reshape_model takes a transformers model, got {type(model).__name__}")
    described = described_modules(model.base_model)
    if not described:
        raise ReshapedModelError(f"no module of {type(model).__name__}'s base model is of a registered kind")
    if outside := _outside(model):
        raise ReshapedModelError(f"module {outside!r} lies outside the base model and cannot be of another kind")
    plain_config = getattr(model.config, "plain_class", type(model.config))
    if model.config.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model.config.model_type] is not plain_config:
        raise ReshapedModelError(
            f"{plain_config.__name__} of model type {model.config.model_type!r} is not known to AutoConfig"
        )
    model_class = reshaped_class(getattr(model, "plain_class", type(model)))
    config = copy.copy(model.config)
    config.__class__ = registered_config_class(plain_config)
    config.architectures = [model_class.__name__]
    config.base_model_type = plain_config.model_type
    config.hf_qst_format = FORMAT
    config.reshaped_modules = described
    config.reshaped_from = config.reshaped_from or hub_name(model.name_or_path)
    plain = model_class.plain_class
    if plain.is_custom_code():
        config.saved_class = f"{plain.__module__}.{plain.__qualname__}"
    require_rebuilt(model, model_class, config)
    model.__class__ = model_class
    _exchange_config(model, config)
    _forget_origin(model)
    finish_modules(model.base_model, described)
    forbid_packing(model)
    return model


def _outside(model: PreTrainedModel) -> str | None:
    inside = set(model.base_model.modules())
    outside = (name for name, module in model.named_modules() if hasattr(module, "describe") and module not in inside)
    return next(outside, None)


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The same function in the architecture's own shapes, as a plain model that loads without this package.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A reshaped model that is not quantised. It stays as it is; the result holds copies of its weights.

    Raises:
        ReshapedModelError: the model is not a reshaped one, is quantised, or one of its modules' `to_dense()` did not
            return the architecture's shapes.
    """
    if not isinstance(model, ReshapedModel):
        raise ReshapedModelError(f"to_dense takes a reshaped model, got {type(model).__name__} with its own shapes")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ReshapedModelError("to_dense takes weights that are not quantised; load without quantization_config")
    dense = copy.deepcopy(model)
    base: nn.Module = dense.base_model
    for path in sorted(dense.config.reshaped_modules, key=_depth, reverse=True):
        base.set_submodule(path, base.get_submodule(path).to_dense())
    config = copy.copy(dense.config)
    config.__class__ = config.plain_class
    for name in _FIELDS:
        vars(config).pop(name, None)
    config.architectures = [model.plain_class.__name__]
    for module in dense.modules():  # a classifier's base may be of a class of ours as well, and what a kind finished
        if hasattr(type(module), "plain_class"):
            module.__class__ = type(module).plain_class
    _exchange_config(dense, config)
    _forget_origin(dense)
    require_rebuilt(dense, model.plain_class, config)
    return dense


for _name in (MODEL_TYPE, PLAIN_MODEL_TYPE):
    _class = type("_AnyReshapedConfig", (_AnyReshapedConfig,), {"model_type": _name, "__module__": __name__})
    AutoConfig.register(_name, _class, exist_ok=True)
