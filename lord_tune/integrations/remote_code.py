"""Programs that never import lord_tune (lm_eval, trl, sentence-transformers) load factored checkpoints all the same.

With trust_remote_code=True, transformers imports the class that config.json names as `auto_map["AutoConfig"]` before it
looks at `quantization_config`. So each factored checkpoint carries configuration_lord_tune.py, which imports lord_tune
and gives back transformers' own configuration. Every way to load a model reads the configuration first (all AutoModel
classes, trl's choice of the class by `architectures`, lm_eval), so one entry is enough, and none for a model class is
needed. Without trust_remote_code the entry does nothing: transformers knows the model type and does not ask.

An entry point was the other way: transformers has none, so it would be a `.pth` file, which runs code at each start of
any Python process in the environment, and of which a user who reads config.json sees nothing.
"""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..layers import check_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMOTE_FILE = "configuration_lord_tune.py"
_REFERENCE = "configuration_lord_tune.LordTuneConfig"


def add_remote_code(config: Any, folder: Path) -> None:
    """Put the entry into `config`, which the caller saves in `folder`, and the file beside it. The original's entries
    for models go: the model was decomposed as transformers' class, and its layers have that class's names."""
    before = getattr(config, "auto_map", None) or {}
    config.auto_map = {"AutoConfig": _REFERENCE} | {k: v for k, v in before.items() if not _is_of_model(k)}
    shutil.copyfile(Path(__file__).with_name(REMOTE_FILE), folder / REMOTE_FILE)


def remove_remote_code(config: Any) -> None:
    """From the configuration of a loaded model, which may be saved as something else; `saves_remote_code` puts it back
    where a factored checkpoint is saved."""
    entries = getattr(config, "auto_map", None)
    if entries and str(entries.get("AutoConfig", "")).endswith(_REFERENCE):  # of a Hub id: OWNER/NAME--...
        config.auto_map = {key: value for key, value in entries.items() if key != "AutoConfig"}
        if not config.auto_map:
            del config.auto_map


def saves_remote_code(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write entry and file, so that what a program that does not import lord_tune saves
    can be loaded by the next one. An attribute of the instance: its class is transformers'."""
    model.__dict__["save_pretrained"] = types.MethodType(_save, model)


def _save(model: PreTrainedModel, save_directory: str | os.PathLike[str], *given: Any, **options: Any) -> Any:
    if getattr(model, "hf_quantizer", None) is not None and not getattr(model, "_hf_peft_config_loaded", False):
        check_plain(model)
    before = getattr(model.config, "auto_map", None)
    is_main = options.get("is_main_process", given[0] if given else True)
    try:
        if is_main and getattr(model, "hf_quantizer", None) is not None:  # not made dense since
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            add_remote_code(model.config, Path(save_directory))
        return type(model).save_pretrained(model, save_directory, *given, **options)
    finally:
        model.config.__dict__.pop("auto_map", None)
        if before is not None:
            model.config.auto_map = before


def _is_of_model(key: str) -> bool:
    return key == "AutoConfig" or key.startswith("AutoModel")
