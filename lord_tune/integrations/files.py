"""The files of a model folder: weights, shards, records, the base of an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from ..storage import read_json, sha256_files

ADAPTER_FILE = "adapter_config.json"
RUN_FILE = "train_config.json"  # beside an adapter: the resolved configuration of its run
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*chat_template*")
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_SETTINGS = ("config.json", "generation_config.json", "*.index.json", *TOKENIZER_FILES)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-sentence reports."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git puts in the place of a large one until Git LFS fetches it."""
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def check_not_pointers(paths: Iterable[Path]) -> None:
    """CheckpointError for the first that is a Git LFS pointer."""
    for path in paths:
        if path.is_file() and is_pointer(path):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, a text of three lines in place of the file itself; run `git lfs pull` "
                "in its folder, or download the model again with `hf download`."
            )


def check_shards(folder: Path) -> None:
    """CheckpointError if a safetensors file is missing, truncated or has a broken header, or a weight file is a Git LFS
    pointer."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
    names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    check_not_pointers([folder / name for name in names] or bin_weight_files(str(folder)))
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the shard {name} that its index names; download it again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({first_line(error)}); download or write it again."
            ) from error


def base_of_adapter(folder: Path) -> str:
    """The factored checkpoint an adapter folder was trained on."""
    base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / ADAPTER_FILE} names no base model; pass the folder that `train` wrote.")
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    return base


def fingerprint(name: str) -> str | None:
    """Which weights a local folder holds, the same for two runs of one command: from the checksums of the shards in
    decomposition.json (cheap for any size), else from the files themselves."""
    record = Path(name) / "decomposition.json"
    shards = read_json(record).get("shards") if record.is_file() else None
    if shards:
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
    files = weight_files(name) or bin_weight_files(name)
    return sha256_files(files) if files else None


def hub_revision(name: str) -> str | None:
    """The commit of a Hub id whose configuration is in the cache; None for a local folder."""
    from huggingface_hub import try_to_load_from_cache

    path = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def bin_weight_files(name: str) -> list[Path]:
    """The pytorch_model*.bin files of a local model directory, which transformers reads where there is no safetensors
    file; in order."""
    return sorted(Path(name).glob("pytorch_model*.bin")) if Path(name).is_dir() else []


def settings_files(name: str) -> list[Path]:
    """What decides the results of a local model directory beside its weights: configuration, index, tokenizer."""
    if not Path(name).is_dir():
        return []
    return sorted({path for pattern in _SETTINGS for path in Path(name).glob(pattern) if path.is_file()})


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a local model directory, in order; empty for a Hub id."""
    return sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
