"""Of a training run: the command that repeats it, and the checkpoint that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import LordError
from ..integrations.files import fingerprint
from ..integrations.sources import candidates
from ..provenance import command_line

# what the run's record has beside the options of its command
OF_THE_RUN = ("base", "base_folder", "processes", "teacher", "rows", "eval_rows")


def repeated_command(config: Mapping[str, Any]) -> str | None:
    """From train_config.json; None where it does not suit the options of today."""
    fields = TrainConfig.model_fields
    given = {
        key: value
        for key, value in config.items()
        if key not in OF_THE_RUN
        and not (key in fields and not fields[key].is_required() and value == fields[key].get_default())
    }
    try:
        return command_line("train", TrainConfig.build(given))
    except LordError:
        return None


def base_of(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Where the checkpoint lies that the adapter was trained on; sentences for the page where there is none."""
    name, known = config.get("model_name_or_path"), config.get("base")
    if not isinstance(name, str):
        return None, ["The record of the run does not say which checkpoint it trained."]
    relative = config.get("base_folder")
    other = False
    for place in candidates(name, folder, relative if isinstance(relative, str) else None):
        path = Path(place).expanduser()
        if any((path / record).is_file() for record in ("decomposition.json", "export.json")):
            if known is None or known == fingerprint(str(path)):
                return path, []
            other = True
    if other:
        return None, [f"The checkpoint {name} was written again since, so that its figures are not those of this run."]
    return None, [f"The checkpoint {name}, on which this run trained, is not there, so that its figures are left out."]
