"""What `inspect` reads of a factored checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UsageError
from .integrations.files import ADAPTER_FILE
from .integrations.sources import base_of_adapter
from .layers.sizes import bytes_by_part
from .storage import read_json
from .training.forecast import factored_skeleton


def report_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, that of the base for a training output, and the content of its decomposition.json, or what the
    manifest alone says. The bytes of its parts are counted where an earlier version wrote none."""
    if (folder / ADAPTER_FILE).is_file() and not (folder / "decomposition.json").is_file():
        folder = Path(base_of_adapter(folder))
    if not folder.is_dir():
        raise UsageError(f"The folder {folder} does not exist; pass one that lord-tune decompose or train wrote.")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json; pass a factored checkpoint.")
    if (folder / "decomposition.json").is_file():
        report: dict[str, Any] = read_json(folder / "decomposition.json")
    else:
        manifest = read_json(folder / "config.json").get("quantization_config") or {}
        if manifest.get("quant_method") != "lord":
            raise UsageError(f"{folder} is not a factored checkpoint; run lord-tune decompose first.")
        report = {"layers": manifest["layers"], "totals": {}}
    if "bytes_by_part" not in report["totals"]:
        report["totals"]["bytes_by_part"] = bytes_by_part(factored_skeleton(str(folder)))
    return folder, report
