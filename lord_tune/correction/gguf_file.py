"""A GGUF file, of any types that the `gguf` package decodes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..declared import Options
from ..exports.gguf_places import Located, Place, check_others, decoded, decoded_rows, let_go_pages
from ..quantizers import GGML
from .base import Code

_WHOLE = ("F32", "F16", "BF16", "F64")
_FAMILY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # by their bits: what rounds here


class GGUFFile:
    """`correction.base.Quantized` of a GGUF file."""

    def __init__(self, path: Path):
        self.name, self._file = str(path), Located(path)
        self._places: dict[str, Place] = {}

    def check(self, keys: Iterable[str]) -> None:
        import gguf

        check_others(self._file, {key: Place(str(self._file.wanted(key).name), None) for key in keys}, gguf)

    def code(self, layer: str, weight: Tensor) -> Code | None:
        key = f"{layer}.weight"
        tensor = self._file.wanted(key)
        if tensor.tensor_type.name in _WHOLE:
            return None
        place = self._place(key, weight)
        stored = torch.from_numpy(tensor.data.copy())
        if place.order is not None:
            stored = torch.empty_like(stored).index_copy_(0, place.order, stored)
        let_go_pages(self._file.reader)
        options: Options = {"type": tensor.tensor_type.name}
        return Code(GGML.name, options, {"weight": stored})

    def restore(self, key: str, held: Tensor) -> None:
        import gguf

        place, tensor = self._place(key, held), self._file.wanted(key)
        if held.dim() == 2 and place.order is None and not place.turned:  # an embedding: never all of it twice
            for rows, values in decoded_rows(gguf, tensor):
                held[rows] = place.back(values).to(held)
                let_go_pages(self._file.reader)
        else:
            held.copy_(place.back(decoded(gguf, tensor)))
            let_go_pages(self._file.reader)

    def _place(self, key: str, own: Tensor) -> Place:
        if key not in self._places:
            place, distance = self._file.place(key, own.detach())
            if own.dim() < 2 or not key.endswith(".weight"):
                self._file.check_untouched(key, distance)
            self._places[key] = place
        return self._places[key]

    def larger(self, layer: str) -> list[tuple[str, Options]]:
        import gguf

        own = _bits(self._file.wanted(f"{layer}.weight").tensor_type)
        kinds = [(name, gguf.GGMLQuantizationType[name.upper()]) for name in _FAMILY]
        return [(name, {}) for name, kind in kinds if _bits(kind) > own]


def _bits(kind: Any) -> float:
    import gguf

    size, stored = gguf.GGML_QUANT_SIZES[kind]
    return float(8 * stored / size)
