"""Bytes by part of a checkpoint, from the headers of its safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import read_json

EMBEDDINGS, HEAD, FACTORS, BACKBONES = "embeddings", "output head", "factors (L and R)", "backbones (Q)"
DENSE, BASE, ADAPTER, REST = "linear layers left dense", "base", "adapter", "rest"
PARTS = (EMBEDDINGS, HEAD, FACTORS, BACKBONES, DENSE, BASE, ADAPTER, REST)
_HEADER = 100 << 20  # bytes; a longer header is no safetensors file
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|head|cls|decoder|predictions)(\.|$)")
_EMBEDDINGS = re.compile(r"embed|(^|\.)(wte|wpe)(\.|$)|position_embeddings")


def tensor_bytes(path: Path) -> dict[str, tuple[int, list[int]]]:
    """name -> (bytes, shape); nothing of a file that is not whole."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _HEADER:
            return {}
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return {}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: (end_of(entry) - entry["data_offsets"][0], entry["shape"]) for name, entry in entries.items()}


def end_of(entry: Mapping[str, Any]) -> int:
    return int(entry["data_offsets"][1])


def bytes_by_part(
    folder: Path,
    layers: Mapping[str, bool],  # linear layer -> whether it is decomposed
) -> dict[str, int]:
    """part -> bytes, without those of no bytes; empty where the folder has no tensors of a whole model."""
    found: dict[str, int] = dict.fromkeys(PARTS, 0)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:  # an export for another engine: a base and an adapter
        for path in folder.rglob("*"):
            if path.suffix in (".safetensors", ".gguf"):
                adapter = "adapter" in str(path.relative_to(folder))
                found[ADAPTER if adapter else BASE] += path.stat().st_size
    else:
        vocabulary = _vocabulary(folder)
        for path in files:
            for name, (size, shape) in tensor_bytes(path).items():
                found[_part(name, shape, layers, vocabulary)] += size
    return {part: size for part, size in found.items() if size}


def _vocabulary(folder: Path) -> int | None:
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    for settings in (config, config.get("text_config") or {}):
        if isinstance(settings.get("vocab_size"), int):
            return int(settings["vocab_size"])
    return None


def _part(name: str, shape: list[int], layers: Mapping[str, bool], vocabulary: int | None) -> str:
    owner = name
    while "." in owner:  # the layer, if it is one, is a beginning of the tensor's name
        owner = owner.rpartition(".")[0]
        if owner in layers:
            if not layers[owner]:
                return DENSE
            inner = name.removeprefix(f"{owner}.")
            return BACKBONES if inner.startswith("backbone") else REST if inner == "bias" else FACTORS
    if len(shape) == 2 and shape[0] == vocabulary and _HEADS.search(name) and not _EMBEDDINGS.search(name):
        return HEAD
    return EMBEDDINGS if len(shape) == 2 and _EMBEDDINGS.search(name) else REST
