"""Blocks of a GGUF file as they are, of any type that the `gguf` package decodes, K and IQ types too.

A format of given codes: it decodes and rounds nothing, so it is no choice of a decomposition. `lord-tune correct`
stores Q in it. Decoding is the package's, in NumPy on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ..declared import Options
from ..errors import UsageError
from .base import Format, in_chunks


@dataclass(frozen=True)
class GGML(Format):
    """`weight` uint8 (out, bytes of a row); `type` is the name that GGUF has for it, like Q4_K."""

    name: ClassVar[str] = "ggml"
    type: str

    def __post_init__(self) -> None:
        if self.type not in _gguf().GGMLQuantizationType.__members__:
            raise UsageError(f"The installed gguf package knows no type {self.type!r}; update it.")

    @property
    def kind(self) -> Any:
        return _gguf().GGMLQuantizationType[self.type]

    def quantize(self, weight: Tensor) -> NoReturn:
        raise UsageError(f"{self.type} holds what a GGUF file holds and rounds nothing; choose another backbone.")

    def rounder(self, *given: object, **options: object) -> NoReturn:
        self.quantize(torch.empty(0))

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        size, stored = _gguf().GGML_QUANT_SIZES[self.kind]
        return {"weight": torch.empty(shape[0], shape[1] // size * stored, dtype=torch.uint8, device=device)}

    def row_step(self, shape: tuple[int, int]) -> int:
        return 1

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        return {"weight": parts["weight"][start:stop]}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if parts["weight"].is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return in_chunks(self, parts, shape, dtype)

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        stored = parts["weight"].cpu().contiguous().numpy()
        out.copy_(torch.from_numpy(_gguf().quants.dequantize(stored, self.kind)))

    def options(self) -> Options:
        return {"type": self.type}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "The model's Q is stored as in GGUF, which the package gguf decodes; pip install gguf"
        ) from error
    return gguf
