"""An adapter without its base: for a base that an earlier export wrote, and that is served already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UsageError
from .gguf import ADAPTER_FILE, MODEL_FILE
from .stock import ADAPTER, BASE


def check_base(base: Path, form: str) -> Path:
    """What of the earlier export `base` is served: a folder, or a GGUF file."""
    served = base / (MODEL_FILE if form == "gguf" else BASE)
    if not served.exists():
        raise UsageError(f"{base} holds no {served.name}; pass the folder of an earlier export in `format` {form}.")
    return served


def keep_adapter(folder: Path, form: str, base: Path) -> None:
    """Take the base out of the export in `folder`, after comparing its tensors with those of `base`."""
    served = check_base(base, form)
    written = folder / served.name
    adapter = folder / (ADAPTER_FILE if form == "gguf" else ADAPTER)
    if not adapter.exists():
        raise UsageError("The model has no L R that goes into an adapter, so nothing would be left; leave `base` out.")
    ours, theirs = (_tensors(path) for path in (written, served))
    for (name, value), (other, known) in zip_longest(ours, theirs, fillvalue=("", None)):
        if value is None or known is None:
            raise UsageError(
                f"'{name or other}' is only in one of the base in {base} and this model's; export without `base`."
            )
        if name != other or value.dtype != known.dtype or not torch.equal(value, known):
            raise UsageError(
                f"The base in {base} differs from this model's in '{name}', so that the adapter does not belong to it; "
                "export without `base`."
            )
    if form == "gguf":
        written.unlink()
        return
    shutil.rmtree(written)
    settings = adapter / "adapter_config.json"
    told = json.loads(settings.read_text()) | {"base_model_name_or_path": str(served.resolve())}
    settings.write_text(json.dumps(told, indent=2) + "\n")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and stored bytes, one by one, in the order of the names."""
    if path.is_file():
        import gguf

        for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: str(tensor.name)):
            yield str(tensor.name), torch.from_numpy(tensor.data.copy())
        return
    with safe_open(path / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)
