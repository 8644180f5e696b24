"""The files of a model folder: weights, shards, records, the base of an adapter."""

from __future__ import annotations

import hashlib
import json
import os
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


def fingerprint(name: str) -> str | None:
    """Which weights a local folder holds, the same for two runs of one command: from the checksums of the shards in
    decomposition.json, cheap for any size, where the shards are those and not newer; else from the files themselves."""
    record, files = Path(name) / "decomposition.json", stored_weights(name)
    shards = read_json(record).get("shards") if record.is_file() else None
    if not shards:
        return sha256_files(files) if files else None
    written = record.stat().st_mtime_ns
    if {path.name for path in files} != set(shards) or any(path.stat().st_mtime_ns > written for path in files):
        shards = {path.name: sha256_files([path]) for path in files}
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def weights_sha256(name: str) -> str | None:
    """One sha256 over the weight files of a local folder; None for a Hub id."""
    files = stored_weights(name)
    return sha256_files(files) if files else None


def relative_folder(source: str, beside: Path) -> str | None:
    """The way from one folder to another, by which it is found again when both were moved; None for a Hub id."""
    if not Path(source).is_dir():
        return None
    try:
        return os.path.relpath(Path(source).resolve(), beside.resolve())
    except ValueError:  # on another drive
        return None


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


def stored_weights(name: str) -> list[Path]:
    """The weight files of a local model folder that transformers reads: .bin files only without model*.safetensors."""
    found = weight_files(name)
    return found if any(path.name.startswith("model") for path in found) else bin_weight_files(name) or found


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a local model directory, in order; empty for a Hub id."""
    return sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
