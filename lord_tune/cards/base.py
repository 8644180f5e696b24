"""What all cards share: the base and its licence, the metadata, tables.

Nothing is guessed: a licence is the one that the base's own card states, a base model is named in the metadata where it
is one of the Hub, a data set likewise. What is not known is said to be not stated, or left out of the metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import human_bytes
from ..errors import LordError
from ..integrations.files import ADAPTER_FILE
from ..integrations.sources import base_of_adapter
from ..layers import place_of
from ..storage import read_json

PLACE = "THIS_FOLDER"  # stands for the folder of the card, in code and commands
_LICENCE_FILES = re.compile(r"(licen[cs]e|notice|copying)", re.IGNORECASE)
_TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(frozen=True)
class Base:
    """The model that all comes from."""

    name: str
    sha256: str | None = None
    revision: str | None = None  # only of a model of the Hub
    stated: Mapping[str, Any] = field(default_factory=dict)  # license, license_name, license_link, language
    licence_files: tuple[str, ...] = ()  # beside the card

    @property
    def hub_id(self) -> str | None:
        return self.name if self.revision else None

    def sentence(self) -> str:
        digest = f", weights with sha256 `{self.sha256}`" if self.sha256 else ""
        revision = f", revision `{self.revision}`" if self.revision else ""
        return f"Base: `{self.name}`{revision}{digest}. {self.licence()}"

    def licence(self) -> str:
        stated, files = self.stated.get("license"), ", ".join(f"`{name}`" for name in self.licence_files)
        beside = f" Its files {files} are beside this card." if files else ""
        if stated is None:
            return f"Licence: not stated by the base's card.{beside}"
        named = self.stated.get("license_name")
        return f"Licence: {stated}{f' ({named})' if named else ''}, as the card of the base states.{beside}"


def base_of(identity: Mapping[str, Any], source: str, folder: Path) -> Base:
    """identity: `base` of decomposition.json. source: a folder, or a Hub id, whose card states the licence. folder: of
    the card that is written."""
    return Base(
        str(identity.get("name", source)),
        identity.get("sha256"),
        identity.get("revision"),
        stated_by(source),
        tuple(sorted(path.name for path in folder.glob("*") if _LICENCE_FILES.match(path.name))),
    )


def stated_by(source: str) -> dict[str, Any]:
    """Licence and language as the card of a folder, or of a model in the Hub's cache, states them."""
    import yaml
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path: object = Path(source) / "README.md"
    if not Path(source).is_dir():
        path = try_to_load_from_cache(source, "README.md") if HUB_ID.fullmatch(source) else None
    try:
        found = metadata_load(Path(path)) if isinstance(path, str | Path) and Path(path).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # YAML that cannot be read states nothing
        found = None
    keys = ("license", "license_name", "license_link", "language")
    known = {key: (found or {}).get(key) for key in keys}
    return {key: value for key, value in known.items() if isinstance(value, str | list) and value}


def lineage_of(source: str) -> dict[str, Any]:
    """decomposition.json of a factored checkpoint, or of the one that an adapter was trained on; empty without one."""
    folder = Path(source)
    try:
        if (folder / ADAPTER_FILE).is_file():
            folder = Path(base_of_adapter(folder))
        found = read_json(folder / "decomposition.json") if (folder / "decomposition.json").is_file() else {}
    except LordError:
        return {}
    return found if isinstance(found, dict) and "layers" in found else {}


def written(text: str, tags: Iterable[str], base: Base | None, **metadata: Any) -> str:
    """The whole card. Metadata without a value is left out."""
    from huggingface_hub import ModelCardData

    stated = dict(base.stated) if base is not None else {}
    data = ModelCardData(tags=["lord_tune", "low-rank", *tags], **{**stated, **metadata})
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def task_of(folder: Path) -> str | None:
    """The Hub's name of what a checkpoint is for, where its configuration says so."""
    if not (folder / "config.json").is_file():
        return None
    names = read_json(folder / "config.json").get("architectures") or []
    return next((task for name in names for end, task in _TASKS.items() if str(name).endswith(end)), None)


_FLOATS = ("fp32", "fp16", "bf16")


def training_of(folder: Path, place: str = PLACE) -> str:
    """How a factored checkpoint is trained on, in the mode that its stored factors take."""
    found = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    entries = ((found.get("quantization_config") or {}).get("layers") or {}).values()
    layers = [entry for entry in entries if entry.get("rank")]
    if not layers:
        return "There is no L R to train: decompose with `--rank 16` for that.\n"
    told, mode = "L and R are trained; Q, where there is one, stays as it is.", ""
    if all(entry.get("top_rank") and entry.get("top_format") in _FLOATS for entry in layers):
        told, mode = "The components that are stored apart are trained; all else stays as it is.", " --mode split"
    elif any(entry.get("top_rank") or entry.get("left_format") not in _FLOATS for entry in layers):
        told, mode = "L and R are packed, so LoRA on them is trained.", " --mode lora"
    command = f"lord-tune train --model_name_or_path {place}{mode} --dataset_name ROWS.jsonl --output_dir OUT"
    return f"{told} Any option of trl works.\n\n" + code("bash", command)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column to the left, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def sizes_table(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> str:
    """Numbers and bytes, before and after; keys as in `totals` of decomposition.json."""
    rows = []
    for label, key, show in (
        ("stored numbers", "parameters", lambda v: f"{v:,.0f}"),
        ("bytes of the tensors", "model_bytes", human_bytes),
        ("bits per weight of the linear layers", "linear_bits_per_weight", lambda v: f"{v:.2f}"),
    ):
        values = [before.get(key), after.get(key)]
        if values[1] is not None:
            rows.append([label, *("–" if value is None else show(value) for value in values)])
    return table(["", "original", name], rows)


def layers_table(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Ranks, formats, bits and errors by kind of linear layer."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in layers.items():
        kinds.setdefault(place_of(name)[2], []).append(entry)
    rows = []
    for kind, own in kinds.items():
        chosen = [entry for entry in own if isinstance(entry.get("rank"), int)]
        ranks = sorted(entry["rank"] for entry in chosen)
        span = "–" if not ranks else f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        formats = ", ".join(dict.fromkeys(str(entry.get("backbone", "none")) for entry in chosen)) or "–"
        cells = [f"`{kind}`", f"{len(chosen)} of {len(own)}", span, formats, _mean(own, "bits_per_weight", 2)]
        rows.append([*cells, _mean(chosen, "error_calibrated", 4), _mean(chosen, "error_heldout", 4)])
    columns = ["layer", "decomposed", "rank", "backbone", "bits per weight", "error", "held-out error"]
    kept = [i for i in range(len(columns)) if i < 4 or any(row[i] != "–" for row in rows)]
    return table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _mean(entries: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [value for entry in entries if isinstance(value := entry.get(key), int | float)]
    return f"{sum(values) / len(values):.{digits}f}" if values else "–"


def backbones_in(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The formats of Q, in the order in which they come; "none" for plain L R."""
    return list(
        dict.fromkeys(str(e.get("backbone", "none")) for e in layers.values() if isinstance(e.get("rank"), int))
    )


def code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


def config_block(config: Mapping[str, object]) -> str:
    return code("json", json.dumps(dict(config), indent=1))
