"""Which checkpoint of an earlier, perhaps killed, run a training run continues from.

transformers' get_last_checkpoint takes the folder with the largest number. If the run was killed while it wrote that
folder, files are missing or cut off, and the resume either fails or silently starts with a fresh optimizer. So a folder
counts only if every file that a resume reads is there and whole: trainer_state.json (written last) parses and names the
folder's step, safetensors files are as long as their headers say, and torch's files, which are zip archives, pass their
own CRC. No object is loaded for that.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..integrations.files import ADAPTER_FILE

if TYPE_CHECKING:
    from torch import nn

    from ..protocols import TrlConfig

LOG_FILE = "log_state.json"  # trainers.py
_WEIGHTS = "adapter_model.safetensors"


def defect(folder: Path, processes: int = 1, optimizer: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None. optimizer: whether the run saves one (save_only_model)."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        if f"checkpoint-{state['global_step']}" != folder.name:
            return "trainer_state.json is of another step"
        for name in (ADAPTER_FILE, LOG_FILE):
            json.loads((folder / name).read_text())
        with safe_open(folder / _WEIGHTS, framework="pt") as tensors:
            if not tensors.keys():
                return f"{_WEIGHTS} is empty"
    except FileNotFoundError as error:
        return f"{Path(error.filename or _WEIGHTS).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"it cannot be read ({str(error)[:80]})"
    if not optimizer:
        return None
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    scaler = ["scaler.pt"] if (folder / "scaler.pt").exists() else []  # of fp16
    for name in ["scheduler.pt", *scaler, *random, *([] if _sharded(folder) else ["optimizer.pt"])]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            with zipfile.ZipFile(folder / name) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError):
            broken = name
        if broken:
            return f"{name} is cut off"
    return None


def _sharded(folder: Path) -> bool:
    """FSDP writes its optimizer in files or folders of its own."""
    return (folder / "optimizer.bin").is_file() or (folder / "optimizer_0").is_dir()


def newest_complete(output: Path, arguments: TrlConfig) -> tuple[Path | None, dict[Path, str]]:
    """(the newest whole checkpoint of `output`, the later ones that are not with what is wrong with them)"""
    found = {
        int(m[1]): path for path in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    broken: dict[Path, str] = {}
    for step in sorted(found, reverse=True):
        wrong = defect(found[step], arguments.world_size, not arguments.save_only_model)
        if wrong is None:
            return found[step], broken
        broken[found[step]] = wrong
    return None, broken


def bytes_to_write(model: nn.Module, arguments: TrlConfig) -> int:
    """Of the adapter, and of one checkpoint where the run writes them: the adapter again, and torch's AdamW state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    if arguments.save_strategy == "no":
        return own
    state = not arguments.save_only_model and str(arguments.optim).startswith("adamw_torch")
    return 2 * own + (2 * own if state else 0)
