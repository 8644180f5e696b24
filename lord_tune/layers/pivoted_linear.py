"""The left factor of pivoted factors: P [I; C], in the numbers of C (factorizations/pivoting.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..factorizations import pivoted_left, places_of
from ..kept import Standin
from .quantized_linear import NO_WRITING, CastLinear, QuantizedLinear, Stored


class PivotedLinear(nn.Linear):
    """z -> L z with L = P [I; C] (out, rank): `rest` is C; `rows` (rank,) int32, increasing, the outputs that are z."""

    def __init__(self, rest: CastLinear | QuantizedLinear, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = rest.in_features, rest.in_features + rest.out_features
        self._is_hf_initialized = True
        self._places: Tensor | None = None
        self.register_parameter("bias", None)
        self.rest = rest
        self.rows: nn.Parameter = Stored(torch.empty(self.in_features, dtype=torch.int32, device=device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        packed, shape = isinstance(self.rest, QuantizedLinear), (self.out_features, self.in_features)
        dtype = torch.float32 if packed else self.rest.weight.dtype
        return Standin(shape, dtype, self.rows.device, lambda: self.dense(dtype), NO_WRITING)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what a loader assigns."""
        if name == "rows":
            self._places = None
            if type(param) is nn.Parameter:
                param = Stored(param.data)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PivotedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._places = None
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = None

    def places(self) -> Tensor:
        """(out,) int64: which entry of [z; C z] each output is."""
        if torch.compiler.is_dynamo_compiling():
            return places_of(self.rows, self.out_features) if self._places is None else self._places
        if self._places is not None and not is_fake(self.rows):
            return self._places
        with torch.inference_mode(False):
            found = places_of(self.rows, self.out_features)
        if not is_fake(found):  # as torch.export makes them, which leaves this module in use
            self._places = found
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """L (out, rank)."""
        rest = self.rest
        decoded = rest.dequantize(dtype) if isinstance(rest, QuantizedLinear) else rest.weight.to(dtype)
        return pivoted_left(decoded, self.rows)

    def forward(self, z: Tensor) -> Tensor:  # (..., rank) -> (..., out)
        return torch.cat([z, self.rest(z)], -1).index_select(-1, self.places())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
