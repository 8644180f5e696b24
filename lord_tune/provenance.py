"""Where a result came from: the command that repeats a run, the versions, the identity of the base model."""

from __future__ import annotations

import json
import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import __version__
from .config import HUB_KEYS, HubOptions, RunConfig
from .integrations.files import hub_revision, settings_files, weights_sha256
from .storage import sha256_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PASSING = ("resume", "overwrite", "dry_run", *HubOptions.model_fields, *HUB_KEYS)  # what does not change a result


def command_line(verb: str, config: RunConfig) -> str:
    """The command that repeats a run: positional fields, then every field that differs from its default."""
    words = ["lord-tune", verb]
    known = () if verb == "quickstart" else ("quantized", "original", "model", "out")
    positional = [name for name in known if name in type(config).model_fields]
    words += [str(getattr(config, name)) for name in positional]
    values = {name: getattr(config, name) for name in type(config).model_fields} | (config.model_extra or {})
    for name, value in values.items():
        field = type(config).model_fields.get(name)
        if name in (*positional, *_PASSING):
            continue
        if field is not None and value == field.get_default(call_default_factory=True):
            continue
        flag = "--" + ((field.alias if field and field.alias else name).replace("_", "-"))
        if isinstance(value, bool) and field is not None:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Of the libraries that decide the result."""
    found = {"lord_tune": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def identity_of(name: str, source: str) -> dict[str, object]:
    """Which model this was: the sha256 of its weights and of each file beside them that decides a result, if it is a
    local folder; the revision of a Hub model."""
    return {
        "name": name,
        "sha256": weights_sha256(source),
        "revision": hub_revision(source),
        "files": {path.name: sha256_files([path]) for path in settings_files(source)},
    }


def architecture_of(config: PreTrainedConfig) -> dict[str, object]:
    """The settings of a model as JSON, so that a changed one can be named."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def made_from(config: RunConfig, base: object, calibration: object) -> dict[str, Any]:
    """What a plan says of where it comes from; where it is written is no part of that."""
    options = {key: value for key, value in lasting(config).items() if key not in ("out", "save", "json_file")}
    return {"base": base, "calibration": calibration, "config": options}


def lasting(config: RunConfig) -> dict[str, Any]:
    """The configuration without what does not change the result."""
    return {key: value for key, value in config.resolved().items() if key not in _PASSING}
