"""The files beside the weights that belong to a model: pooling, custom code, processors, vocabularies, licences.

Everything in the source folder goes along that this package does not write itself, except weights (and the indexes of
weights), hidden files, data, what looks like a secret, and what is larger than 64 MiB. A folder inside it that holds
weights is another copy of the model (`onnx/`, `checkpoint-500/`) and is left whole, unless modules.json names it: the
dense layers of a sentence-transformers model have weights of their own. What is left and is not plainly another copy of
the weights is said.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from ..console import note
from ..errors import CheckpointError
from ..storage import OWN_FILES, read_json
from .files import ADAPTER_FILE, TOKENIZER_FILES, check_not_pointers, first_line, is_pointer
from .remote_code import REMOTE_FILE
from .sources import base_of_adapter

MODULES = "modules.json"  # of sentence-transformers: its modules and their folders
LARGEST = 64 << 20  # bytes of one file
_OURS = {*OWN_FILES, "config.json", "README.md", "plan.json", ADAPTER_FILE, REMOTE_FILE}
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5"),
    *("*.msgpack", "*.ot", "*.tflite", "*.mlmodel", "*.npz", "*.pkl", "*.nemo", "*.pdparams", "*.index"),
    *("*.data-?????-of-?????", "*.index.json"),
)
# copies of the weights, and the state of a training run: left without a word
_KNOWN = (
    *("model*.safetensors", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot"),
    *("*.index.json", "optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin"),
)
_DATA = (
    *("*.parquet", "*.arrow", "*.jsonl", "*.csv", "*.tsv", "*.zip", "*.tar", "*.gz", "*.tgz", "*.zst", "*.7z"),
    *("*.db", "*.sqlite", "*.log", "*.tfevents.*", "trainer_state.json"),
)
_SECRET = re.compile(
    r"secret|credential|passw|(private|api|access)[._-]?key|^id_(rsa|dsa|ecdsa|ed25519)|^((hf|access|api)[._-]?)?token"
    r"(\.txt)?$|\.(pem|key|p12|pfx|env)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Companions:
    """What to copy from a model's folder, and what not."""

    root: Path
    files: dict[str, Path]  # by the name relative to `root`
    left: tuple[str, ...] = ()

    def copy(self, folder: Path) -> None:
        """Into a folder that holds what this package writes, which stays as it is; says what was left."""
        for name, path in self.files.items():
            target = folder / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        if self.left:
            more = f" and {len(self.left) - 8} more" if len(self.left) > 8 else ""
            note(f"not copied from {self.root}: {', '.join(self.left[:8])}{more}; copy by hand what you need")


def companions_of(source: str) -> Companions:
    """Of a model folder or a Hub id, whose small files are fetched. Of a training output: those of its base, but for
    the tokenizer's, which lie beside the adapter and are written anew."""
    trained = (Path(source) / ADAPTER_FILE).is_file()
    if trained:
        source = base_of_adapter(Path(source))
    root = Path(source) if Path(source).is_dir() else hub_folder(source)
    modules = module_folders(root)
    files: dict[str, Path] = {}
    left: list[str] = []
    for path in _files_of(root, modules, left):
        name = path.relative_to(root).as_posix()
        if "/" not in name and (name in _OURS or (trained and _matches(name, TOKENIZER_FILES))):
            continue
        if any(PurePosixPath(name).is_relative_to(module) for module in modules):
            check_not_pointers([path])
            files[name] = path
        elif _is_left(path):
            if not _matches(path.name, _KNOWN):
                left.append(name)
        else:
            files[name] = path
    return Companions(root, files, tuple(left))


def _files_of(root: Path, modules: list[str], left: list[str]) -> Iterator[Path]:
    """Sorted; of the folders in `root` only those without weights, and modules. The others are added to `left`."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            yield path
        elif path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(root))]
            module = any(PurePosixPath(m).parts[0] == path.name for m in modules)
            if not module and any(_matches(p.name, _WEIGHTS) for p in inside):
                left.append(f"{path.name}/")
            else:
                yield from inside


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def _is_left(path: Path) -> bool:
    unwanted = _matches(path.name, _WEIGHTS + _DATA) or _SECRET.search(path.name)
    return bool(unwanted) or path.stat().st_size > LARGEST or is_pointer(path)


def module_folders(root: Path) -> list[str]:
    """The folders that modules.json names, in its order; without the model's own, which is `root`."""
    if not (root / MODULES).is_file():
        return []
    content: Any = read_json(root / MODULES)
    names = [entry.get("path") for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    return [str(PurePosixPath(name)) for name in names if isinstance(name, str) and name not in ("", ".", "./")]


def hub_folder(name: str) -> Path:
    """The cached snapshot of a Hub id, once the files beside its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        root = Path(snapshot_download(name, ignore_patterns=[*_WEIGHTS, *_DATA]))
        modules = module_folders(root)
        if modules:
            snapshot_download(name, allow_patterns=[f"{module}/*" for module in modules])
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"The files beside the weights of {name} could not be fetched: {first_line(error)}; try again, or download "
            f"the model with `hf download {name}`."
        ) from error
    return root
