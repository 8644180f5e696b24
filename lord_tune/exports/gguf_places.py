"""Which tensor of a GGUF file is which of a model, and where its rows lie there.

That is seen, not assumed: llama.cpp's converter reorders rows of some layers (q and k of the Llama family), stores
Conv1D transposed, and adds 1 to some norms (Gemma). Each tensor of the file is compared with the model's in each way,
which also tells a file of another model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..layers import FactoredLinear

_ALIKE = 0.2  # least cosine of a decomposed weight and its original; those of unrelated weights are near 0
_ROUNDED = 0.2  # largest relative distance of what was not decomposed, where the file holds it quantized
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

    def back(self, value: Tensor) -> Tensor:
        """As the model holds it."""
        if self.order is not None:
            value = torch.empty_like(value).index_copy_(0, self.order, value)
        value = value - self.added
        return value.T if self.turned else value


def opened(like: Path) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(like)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UsageError(f"{like} is not a GGUF file that can be read ({error}); pass one of the original.") from error
    if reader.byte_order == "S":
        raise UsageError(f"{like} has the other byte order; pass a little-endian GGUF file of the original.")
    return reader


def metadata(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def decoded(gguf: Any, tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()


def _dense_names(model: PreTrainedModel, layers: dict[str, FactoredLinear]) -> dict[str, Tensor | None]:
    """Tensors of the model as it was before the decomposition; None for weights of decomposed layers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Tensor | None] = {}
    for key, value in model.state_dict().items():
        owner = next((name for name in layers if key.startswith(name + ".")), None)
        if owner is None or key == f"{owner}.bias":
            if key not in tied:
                found[key] = value.detach().float().cpu()
    return found | {f"{name}.weight": None for name in layers}


def places_in(reader: Any, model: PreTrainedModel, layers: dict[str, FactoredLinear], like: Path) -> dict[str, Place]:
    """Key of the model -> its place. Refuses a file of another model."""
    import gguf

    arch = metadata(reader, gguf.Keys.General.ARCHITECTURE)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in kinds:
        raise UsageError(f"{like} is of the architecture {arch}, which the installed gguf package does not know.")
    blocks = metadata(reader, f"{arch}.block_count")
    if blocks is None:
        raise UsageError(f"{like} says of no blocks, so it holds no language model; pass a GGUF file of the original.")
    names = gguf.get_tensor_name_map(kinds[arch], blocks)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads: set[int] = set()
    for counted in ("head_count", "head_count_kv"):  # of some families a number per block
        value = metadata(reader, f"{arch}.attention.{counted}")
        heads |= {n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int) and n > 0}
    wanted = _dense_names(model, layers)
    named = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in wanted}
    for key, name in named.items():
        if name in tensors:
            continue
        if key.endswith(".bias") and key.removesuffix(".bias") in layers:
            raise UsageError(
                f"'{key}' has no place in {like.name}: the method afm added it; export with `format` factored or "
                "dense, or decompose with `method` whitened."
            )
        raise UsageError(f"'{key}' of the model has no tensor in {like}; pass a GGUF file of the original model.")
    found: dict[str, Place] = {}
    for key in sorted(wanted, key=lambda key: key.endswith(".bias")):  # a layer's bias lies as its weight does
        value, tensor, owner = wanted[key], tensors[named[key]], key.rpartition(".")[0]
        theirs = decoded(gguf, tensor)
        if key.endswith(".bias") and owner in layers:  # the method may have changed it: its values tell nothing
            found[key] = Place(tensor.name, found[f"{owner}.weight"].order)
            continue
        own = layers[owner].dense_weight(torch.float32).cpu() if value is None else value
        found[key] = _place(key, own, tensor.name, theirs, heads, like)
        if value is not None:
            _check_untouched(key, own, found[key], theirs, tensor, like)
    _check_others(tensors, found, like, gguf)
    return found


def _check_others(tensors: dict[str, Any], found: dict[str, Place], like: Path, gguf: Any) -> None:
    """Refuse a file with more than the model has: its layers would run, and nothing that is compared would tell."""
    placed = {place.name: key for key, place in found.items()}
    for name in tensors:
        if name in placed or name.startswith(("rope_freqs", "rope_factors")):
            continue
        if name == "output.weight" and "token_embd.weight" in placed:  # a tied head, written twice
            head, embedding = (decoded(gguf, tensors[key]) for key in (name, "token_embd.weight"))
            if head.shape == embedding.shape and float((head - embedding).norm() / embedding.norm()) <= _ROUNDED:
                continue
        raise UsageError(f"'{name}' in {like} is not in the model; pass a GGUF file of the original model.")


def _place(key: str, own: Tensor, name: str, theirs: Tensor, heads: Iterable[int], like: Path) -> Place:
    """The order in which the two agree best."""
    # stored transposed in the model, as Conv1D is; of a square matrix the values tell
    turns = [turned for turned in (False, True) if (own.T if turned else own).shape == theirs.shape]
    turns = turns if own.dim() == 2 else turns[:1]
    if not turns:
        raise UsageError(
            f"'{key}' is {tuple(own.shape)} and '{name}' in {like} is {tuple(theirs.shape)}; pass a GGUF file of the "
            "original model."
        )
    rows = theirs.shape[0]
    orders: list[Tensor | None] = [None]
    for count in sorted(heads):
        if rows % (2 * count) == 0:
            orders.append(torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1))
    added = (0.0, 1.0) if own.dim() == 1 and "norm" in name else (0.0,)
    tried = [Place(name, order, more, turned) for more in added for turned in turns for order in orders]
    judged = [(_cosine(place.into(own) - place.added, theirs - place.added), place) for place in tried]
    best = max(judged, key=lambda entry: entry[0])
    if own.dim() == 2 and best[0] < _ALIKE:
        raise UsageError(
            f"'{name}' in {like} is not what '{key}' was made from (cosine of the two {best[0]:.2f}); pass a GGUF file "
            "of the original model."
        )
    return best[1]


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else float(torch.equal(x, y))


def _check_untouched(key: str, own: Tensor, place: Place, theirs: Tensor, tensor: Any, like: Path) -> None:
    expected = place.into(own)
    distance = float((expected - theirs).norm() / expected.norm().clamp_min(1e-30))
    limit = _CAST if tensor.tensor_type.name in ("F32", "F16", "BF16") else _ROUNDED
    if not distance <= limit:
        raise UsageError(
            f"'{tensor.name}' in {like} is not '{key}' of the model (relative distance {distance:.2g}, expected at "
            f"most {limit}); pass a GGUF file of the original model."
        )
