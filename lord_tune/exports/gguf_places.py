"""Which tensor of a GGUF file is which of a model, and where its rows lie there.

That is seen, not assumed: llama.cpp's converter reorders rows of some layers (q and k of the Llama family), stores
Conv1D transposed, and adds 1 to some norms (Gemma). Each tensor of the file is compared with the model's in each way,
which also tells a file of another model.
"""

from __future__ import annotations

import json
import mmap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..layers import FactoredLinear
from ..memory import give_back
from .parts import Parts

_ALIKE = 0.2  # least cosine of a decomposed weight and its original; those of unrelated weights are near 0
_ROUNDED = 0.2  # largest relative distance of what was not decomposed, where the file holds it quantized
_CHUNK = 2**22  # weights decoded at once
_COMPARED = 2048  # rows of a matrix that are looked at to tell where they lie
_CAST = 0.02  # the same where the file holds it in 16 or 32 bits


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model lies in the file."""

    name: str
    order: Tensor | None  # row i of the file is row order[i] of the model
    added: float = 0.0  # what the converter added: 1 to the norms of some families
    turned: bool = False  # stored transposed, as Conv1D is not in the file

    def into(self, value: Tensor) -> Tensor:
        """As the file holds it."""
        value = (value.T if self.turned else value) + self.added
        return value if self.order is None else value[self.order]

    def rows_into(self, value: Tensor, rows: Tensor) -> Tensor:
        """These rows, as the file holds them."""
        value = value.T if self.turned else value
        return (value[rows] if self.order is None else value[self.order[rows]]) + self.added

    def back(self, value: Tensor) -> Tensor:
        """As the model holds it."""
        if self.order is not None:
            value = torch.empty_like(value).index_copy_(0, self.order, value)
        value = value - self.added
        return value.T if self.turned else value


@dataclass(frozen=True)
class Field:
    """A key of the file, its types and its value, as text. The package's own keeps two arrays for every word of a
    vocabulary: 430 MB for 152,000 words; among these, words of our own would keep half of that from the system."""

    name: str
    types: list[Any]
    text: str | None  # None: words that are no text, which only an export with this vocabulary needs

    @classmethod
    def of(cls, field: Any) -> Field:
        try:
            return cls(field.name, field.types, json.dumps(field.contents()))
        except UnicodeDecodeError:
            return cls(field.name, field.types, None)

    def contents(self) -> Any:
        if self.text is None:
            raise UsageError(f"'{self.name}' of the GGUF file is not UTF-8 text, so it cannot be written again.")
        return json.loads(self.text)


def opened(like: Path) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(like)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UsageError(f"{like} is not a GGUF file that can be read ({error}); pass one of the original.") from error
    if reader.byte_order == "S":
        raise UsageError(f"{like} has the other byte order; pass a little-endian GGUF file of the original.")
    fields: dict[str, Any] = {name: Field.of(field) for name, field in reader.fields.items()}
    reader.fields = OrderedDict(fields)
    give_back()
    return reader


def metadata(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def decoded(gguf: Any, tensor: Any, rows: Tensor | None = None) -> Tensor:
    """Float32; of a matrix these rows alone, or all, a few million weights at a time."""
    if rows is not None:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data[rows.numpy()], tensor.tensor_type).copy()).float()
    shape = tuple(reversed(tensor.shape.tolist()))
    if len(shape) != 2:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
    found = torch.empty(shape)
    for place, part in decoded_rows(gguf, tensor):
        found[place] = part
    return found


def decoded_rows(gguf: Any, matrix: Any) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix and their values, float32, a few million weights at a time."""
    width, count = matrix.shape.tolist()
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = gguf.quants.dequantize(matrix.data[rows], matrix.tensor_type)
        yield rows, torch.from_numpy(part.astype("float32"))


def _keys(model: PreTrainedModel, layers: dict[str, FactoredLinear]) -> dict[str, bool]:
    """Tensors of the model as it was before the decomposition; False for weights of decomposed layers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, bool] = {}
    for key in model.state_dict():
        owner = next((name for name in layers if key.startswith(name + ".")), None)
        if (owner is None or key == f"{owner}.bias") and key not in tied:
            found[key] = True
    return found | {f"{name}.weight": False for name in layers}


def let_go_pages(reader: Any) -> None:
    """Of the file, which is mapped: pages that were read count as memory of the process until then."""
    mapped = getattr(reader.data, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


class Located:
    """A GGUF file, and which of its tensors a model's are."""

    def __init__(self, like: Path):
        import gguf

        self.like, self.reader = like, opened(like)
        arch = metadata(self.reader, gguf.Keys.General.ARCHITECTURE)
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in kinds:
            raise UsageError(f"{like} is of the architecture {arch}, which the installed gguf package does not know.")
        blocks = metadata(self.reader, f"{arch}.block_count")
        if blocks is None:
            raise UsageError(
                f"{like} says of no blocks, so it holds no language model; pass a GGUF file of the original."
            )
        self._names = gguf.get_tensor_name_map(kinds[arch], blocks)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self._heads: set[int] = set()
        for counted in ("head_count", "head_count_kv"):  # of some families a number per block
            value = metadata(self.reader, f"{arch}.attention.{counted}")
            self._heads |= {n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int) and n > 0}

    def tensor(self, key: str) -> Any:
        """Of the file, None where it has none."""
        return self.tensors.get(self._names.get_name(key, try_suffixes=(".weight", ".bias")))

    def wanted(self, key: str) -> Any:
        tensor = self.tensor(key)
        if tensor is None:
            raise UsageError(
                f"'{key}' of the model has no tensor in {self.like}; pass a GGUF file of the original model."
            )
        return tensor

    def place(self, key: str, own: Tensor) -> tuple[Place, float]:
        """Where the model's tensor lies, and its relative distance from what is there."""
        import gguf

        tensor = self.wanted(key)
        # stored transposed in the model, as Conv1D is; of a square matrix the values tell
        theirs = tuple(reversed(tensor.shape.tolist()))
        shapes = (
            {False: tuple(own.shape), True: tuple(own.shape[::-1])} if own.dim() == 2 else {False: tuple(own.shape)}
        )
        turns = [turned for turned, shape in shapes.items() if shape == theirs]
        if not turns:
            raise UsageError(
                f"'{key}' is {tuple(own.shape)} and '{tensor.name}' in {self.like} is {theirs}; pass a GGUF file of "
                "the original model."
            )
        count = theirs[0]
        orders: list[Tensor | None] = [None]
        for heads in sorted(self._heads):
            if count % (2 * heads) == 0:
                orders.append(torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1))
        rows = None
        if own.dim() == 2:
            rows = torch.linspace(0, count - 1, min(count, _COMPARED)).round().long()
        found = decoded(gguf, tensor, rows)
        added = (0.0, 1.0) if own.dim() == 1 and "norm" in tensor.name else (0.0,)
        tried = [Place(tensor.name, order, more, turned) for more in added for turned in turns for order in orders]

        def ours(place: Place) -> Tensor:
            return (place.into(own) if rows is None else place.rows_into(own, rows)).float().cpu()

        def alike(place: Place) -> float:
            return _cosine(ours(place) - place.added, found - place.added)

        likeness, best = max(((alike(place), place) for place in tried), key=lambda entry: entry[0])
        if own.dim() == 2 and likeness < _ALIKE:
            raise UsageError(
                f"'{tensor.name}' in {self.like} is not what '{key}' was made from (cosine of the two {likeness:.2f}); "
                "pass a GGUF file of the original model."
            )
        expected = ours(best)
        return best, float((expected - found).norm() / expected.norm().clamp_min(1e-30))

    def check_untouched(self, key: str, distance: float) -> None:
        """Refuse a tensor that is not the model's."""
        tensor = self.wanted(key)
        limit = _CAST if tensor.tensor_type.name in ("F32", "F16", "BF16") else _ROUNDED
        if not distance <= limit:
            raise UsageError(
                f"'{tensor.name}' in {self.like} is not '{key}' of the model (relative distance {distance:.2g}, "
                f"expected at most {limit}); pass a GGUF file of the original model."
            )


def places_in(
    file: Located, model: PreTrainedModel, layers: dict[str, FactoredLinear], parts: Parts
) -> dict[str, Place]:
    """Key of the model -> its place. Refuses a file of another model."""
    import gguf

    wanted = _keys(model, layers)
    for key in wanted:
        if key.endswith(".bias") and key.removesuffix(".bias") in layers and file.tensor(key) is None:
            raise UsageError(
                f"'{key}' has no place in {file.like.name}: the method afm added it; export with `format` factored or "
                "dense, or decompose with `method` whitened."
            )
        file.wanted(key)
    found: dict[str, Place] = {}
    for key in sorted(wanted, key=lambda key: key.endswith(".bias")):  # a layer's bias lies as its weight does
        stored, owner = wanted[key], key.rpartition(".")[0]
        if key.endswith(".bias") and owner in layers:  # the method may have changed it: its values tell nothing
            found[key] = Place(file.wanted(key).name, found[f"{owner}.weight"].order)
            continue
        with parts.seen(key if stored else owner):
            own = parts.read(key).float().cpu() if stored else layers[owner].dense_weight(torch.float32).cpu()
        found[key], distance = file.place(key, own)
        if stored:
            file.check_untouched(key, distance)
        del own
        let_go_pages(file.reader)
        give_back()
    check_others(file, found, gguf)
    return found


def check_others(file: Located, found: dict[str, Place], gguf: Any) -> None:
    """Refuse a file with more than the model has: its layers would run, and nothing that is compared would tell."""
    placed = {place.name: key for key, place in found.items()}
    for name in file.tensors:
        if name in placed or name.startswith(("rope_freqs", "rope_factors")):
            continue
        if name == "output.weight" and "token_embd.weight" in placed:  # a tied head, written twice
            head, embedding = (file.tensors[key] for key in (name, "token_embd.weight"))
            if head.shape.tolist() == embedding.shape.tolist():
                rows = torch.linspace(0, int(head.shape[1]) - 1, min(int(head.shape[1]), _COMPARED)).round().long()
                first, second = (decoded(gguf, tensor, rows) for tensor in (head, embedding))
                if float((first - second).norm() / second.norm()) <= _ROUNDED:
                    continue
        raise UsageError(f"'{name}' in {file.like} is not in the model; pass a GGUF file of the original model.")


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else float(torch.equal(x, y))
