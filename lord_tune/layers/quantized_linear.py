"""A linear layer whose weight is stored packed by a quantizer.

A subclass of `nn.Linear` so that PEFT's ordinary LoRA layer takes it as a base; its `weight` is the uint8 code tensor,
so any code that would add to the weight in place (PEFT's merge) fails on the shape instead of losing the update.

Where memory allows, `keep_dense` decodes once, for many small products (generation, a benchmark). The copy is a plain
attribute: it is never saved, goes when the codes change, and is decoded anew where the module moves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kept import Standin
from ..quantizers import Quantizer
from .compiled import compiled_linear, form_key

NO_WRITING = (
    "Something writes into the weight of a decomposed layer, which is made of stored parts, so the change would be "
    "lost; decompose again without the layer (`exclude`), or load the original model."
)


class Stored(nn.Parameter):
    """A parameter that never trains, so that `requires_grad_(True)` over a whole model leaves it alone, as integers
    have no gradient and scales get none."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Stored:
        return torch.Tensor._make_subclass(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> Stored:
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass


class Packed(nn.Module):
    """A matrix Q (out, in) in a format's parts, all frozen parameters, and its product x Q^T.

    Parameters rather than buffers: DistributedDataParallel broadcasts buffers at every forward.
    """

    def __init__(
        self, in_features: int, out_features: int, quantizer: Quantizer, device: torch.device | str | None = None
    ):
        nn.Module.__init__(self)  # of a linear layer not its own: it would allocate the dense weight
        self.in_features, self.out_features, self.quantizer = in_features, out_features, quantizer
        self._is_hf_initialized = True  # transformers must not draw normal numbers into the codes
        self._part_names: list[str] = []
        self._dense: Tensor | None = None
        self.register_parameter("bias", None)
        self.set_parts(quantizer.empty(self.shape, device or "cpu"))

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def codes(self) -> Tensor:
        """The stored part that every format has."""
        return self.get_parameter("weight")

    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).data for name in self._part_names}

    def set_parts(self, parts: dict[str, Tensor]) -> None:
        """Take over the stored parts (not copied)."""
        self.drop_dense()
        self._part_names = list(parts)
        self._form = form_key(self.quantizer, self._part_names)
        for name, value in parts.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what a loader assigns."""
        if type(param) is nn.Parameter:  # not a shard of FSDP2
            param = Stored(param.data)
        super().register_parameter(name, param)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q, (out, in)."""
        found = self.quantizer.dequantize(self.parts(), self.shape, dtype)
        check_values(self.codes, found)
        return found

    def keep_dense(self, dtype: torch.dtype = torch.float32) -> int:
        """Decode once and compute with the copy from now on; its bytes."""
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not take part in training later
            self._dense = self.dequantize(dtype)
        return self._dense.numel() * self._dense.element_size()

    def drop_dense(self) -> None:
        """Decode at every product again."""
        self._dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Moves the parts and leaves their dtypes alone: rounding a scale would change every weight it belongs to."""
        kept, before = self._dense, [part.data_ptr() for part in self.parts().values()]
        super()._apply(_moving(fn), recurse)  # type: ignore[no-untyped-call]
        for name in self._part_names:  # torch makes new ones on some devices
            self.register_parameter(name, self._parameters[name])
        if kept is not None and before != [part.data_ptr() for part in self.parts().values()]:
            self.drop_dense()
            if not self.weight.is_meta:  # a trainer moves its model to the device
                self.keep_dense(kept.dtype)
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.drop_dense()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self._dense is not None and x.dtype != torch.float64:
            return nn.functional.linear(x, self._dense.to(x.dtype))
        check_values(self.codes, x)
        # the parameters themselves: formats remember what they looked up of a tensor (`on_host`)
        parts = {name: getattr(self, name) for name in self._part_names}
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return compiled_linear(x, list(parts.values()), self._form, self.shape)
        return self.quantizer.linear(x, parts, self.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.quantizer.name}"


def check_values(codes: Tensor, other: Tensor) -> None:
    """RuntimeError where codes without values would be decoded to numbers: some kernels give what the memory held."""
    if codes.is_meta and not other.is_meta:
        raise RuntimeError("a packed matrix on the meta device has no values to compute with")


class QuantizedLinear(Packed, nn.Linear):
    """y = x Q^T (+ bias), Q decoded from `weight` and the format's other parts."""


def dequantize_once(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """`keep_dense` in every packed layer of a model; the bytes held."""
    return sum(module.keep_dense(dtype) for module in model.modules() if isinstance(module, Packed))


def _moving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `fn` (of `Module.to`, `half`, `cuda`, ...) does to the place of a tensor, not what it does to its dtype."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class CastLinear(nn.Linear):
    """An `nn.Linear` without bias, computed in the input's dtype and stored in one of its own, which no cast of the
    model changes."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str | None = None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._is_hf_initialized = True
        empty = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CastLinear:
        super()._apply(_moving(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class ZeroLinear(nn.Linear):
    """The zero map, without memory: PEFT hangs the factors of a layer without backbone on it."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._is_hf_initialized = True
        self._place = torch.empty(0, device=device)  # says where the module is
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        shape, place = (self.out_features, self.in_features), self._place
        return Standin(shape, place.dtype, place.device, lambda: place.new_zeros(shape), NO_WRITING)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZeroLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place = fn(self._place)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
