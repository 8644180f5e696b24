"""The input embedding and the output head, stored packed by a quantizer; a tied pair reads one set of parts.

Both hold a child `table` with the parts, in the tied case the very same module, so that nothing can untie them. The
embedding decodes the rows it looks up, the head multiplies by tiles of decoded rows; neither holds the whole matrix.
`weight` is for code that looks at it or computes with it (trl multiplies by the head's): decoded when something does.

`unit` of the embedding is a single 1 in the dtype of the rows. transformers takes the dtype of a model from its first
floating-point parameter, which would be the 16-bit scales of the table otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kept import Standin
from ..quantizers import Quantizer
from ..quantizers.lookup import take_rows
from .quantized_linear import Packed, Stored, check_values

NO_TABLE_WRITING = (
    "Something writes into the weight of an embedding or output head that is stored in low precision, so the change "
    "would be lost; decompose again with `embeddings` dense, or load the original model."
)


class Table(Packed):
    """Q (tokens, width) in a format's parts. Not an nn.Linear: adapters would be put on it, and not be heard."""

    def __init__(self, width: int, tokens: int, quantizer: Quantizer, device: torch.device | str | None = None):
        super().__init__(width, tokens, quantizer, device)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # (...,) -> (..., width)
        """Decoded alone, unless `keep_dense` has them."""
        if self._dense is not None:
            return nn.functional.embedding(ids, self._dense).to(dtype)
        check_values(self.codes, ids)
        if self.codes.is_meta:
            return torch.empty(*ids.shape, self.in_features, dtype=dtype, device=ids.device)
        found = take_rows(self.quantizer, self.parts(), self.shape, ids.reshape(-1))
        return found.to(dtype).view(*ids.shape, self.in_features)

    def whole(self, dtype: torch.dtype) -> Tensor:  # (tokens, width)
        if self.codes.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        return self.dequantize(torch.float32).to(dtype) if self._dense is None else self._dense.to(dtype)


class _Reader(nn.Module):
    """What reads a table; `root` says whether its parts stand under this module's name in files."""

    table: Table
    root: bool
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """(tokens, width), decoded by whatever computes with it."""
        return Standin(self.table.shape, self.dtype, self.table.codes.device, self._decoded, NO_TABLE_WRITING)

    def _decoded(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.table.whole(self.dtype)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise UsageError(NO_TABLE_WRITING)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, _, unexpected, _ = args
        if f"{prefix}weight" in unexpected:  # a sentinel of a file
            unexpected.remove(f"{prefix}weight")


class QuantizedEmbedding(_Reader):
    """ids (...) -> rows (..., width)"""

    def __init__(self, table: Table, dtype: torch.dtype, padding_idx: int | None = None, root: bool = True):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx, self.root = padding_idx, root
        self._is_hf_initialized = True
        self.unit = Stored(torch.ones(1, dtype=dtype, device=table.codes.device))
        self.table = table

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.unit.dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what a loader assigns."""
        if type(param) is nn.Parameter:  # not a shard of FSDP2
            param = Stored(param.data)
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        return self.table.rows(input, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class QuantizedHead(_Reader):
    """x (..., width) -> x Q^T (+ bias) (..., tokens)"""

    def __init__(self, table: Table, dtype: torch.dtype, bias: nn.Parameter | None = None, root: bool = True):
        super().__init__()
        self.out_features, self.in_features = table.shape
        self.root, self.dtype = root, dtype
        self._is_hf_initialized = True
        self.bias = bias
        self.table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedHead:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.table(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
