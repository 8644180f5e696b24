"""The contract of a quantizer: a weight in, a packed record out, and the exact tensor the record stands for.

A quantizer is a frozen dataclass of its hyperparameters. It sees tensors, never a model. `quantize` returns the parts
that are stored; `dequantize` of these parts is the backbone Q, exactly: factorizations work on W - dequantize(parts),
and a reload decodes the same bytes, so what was compensated is what is there.

No product holds more of Q than a tile of weights (`tile_of`): rows of Q are decoded, used and dropped, forward and
backward. Decoding itself goes CHUNK weights at a time, so that its temporaries stay in the second-level cache; that is
why every format can decode a range of rows alone, to the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import nullcontext
from functools import cache, wraps
from typing import ClassVar, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..declared import Options
from ..errors import LordWarning

TILE = 2**22  # weights decoded at once for a product on a CPU: 16 MiB of float32
DEVICE_TILE = 2**25  # on an accelerator, whose caches matter less than the size of a product: 128 MiB of float32
CHUNK = 2**18  # weights decoded at once on a CPU: 1 MiB of float32

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Rounder(Protocol):
    """One matrix being rounded, in its scales; see ldlq.py."""

    @property
    def block(self) -> int:
        """Columns rounded together."""
        ...

    def round(self, values: Tensor, start: int) -> Tensor:
        """Decoded values of columns start..start + width, transposed, (width, out), width <= block; remembers their
        codes."""
        ...

    def parts(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The stored parts, when every column has been rounded; of these rows (their numbers) where the format's
        `rows_apart` says so."""
        ...


class Quantizer(Protocol):
    """Packed storage of a matrix in few bits."""

    name: ClassVar[str]

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:  # weight (out, in)
        """The stored parts; `weight` holds the packed codes, the others are named by the format."""
        ...

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Q, (out, in)."""
        ...

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        """Parts of the right shapes and dtypes with undefined content (meta device included)."""
        ...

    def row_step(self, shape: tuple[int, int]) -> int:
        """The least number of rows between two whose codes and scales start on a stored boundary."""
        ...

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        """Parts of rows start..stop alone, views where possible: decoded with shape (stop - start, in) they are these
        rows of Q to the bit. `start` is a multiple of row_step; `stop` is one too or `out`."""
        ...

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """x Q^T with a gradient to x, (..., in) -> (..., out)."""
        ...

    def transposed(self, y: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """y Q, (..., out) -> (..., in): what the gradient of `linear` is."""
        ...

    @property
    def block(self) -> int:
        """Columns rounded together."""
        ...

    def turned(self, weight: Tensor) -> Tensor:
        """A matrix in the coordinates that the format rounds in. (out, in)"""
        ...

    def turned_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix of the inputs in these coordinates. (in, in)"""
        ...

    def turned_inputs(self, rows: Tensor) -> Tensor:
        """Linear forms of the inputs in these coordinates. (k, in)"""
        ...

    def returned_inputs(self, rows: Tensor) -> Tensor:
        """The inverse of `turned_inputs`. (k, in)"""
        ...

    def rows_apart(self, shape: tuple[int, int]) -> bool:
        """Whether every row has codes and scales of its own that no other row decides."""
        ...

    def completed(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
        """The parts of a rounder, with what a loader needs to turn them back."""
        ...

    def rounder(
        self,
        weight: Tensor,  # (out, in), turned
        stretch: float | Tensor = 1.0,  # times the scales; of each row as (out, 1)
        importance: Tensor | None = None,  # (in,) >= 0: what an error in this input costs, for formats with outliers
    ) -> Rounder:
        """In the scales of `weight` times `stretch`."""
        ...

    def options(self) -> Options:
        """The hyperparameters, as the manifest stores them."""
        ...


class Format:
    """What a format declares unless it says otherwise: columns are rounded one by one, in the weight's coordinates."""

    block: ClassVar[int] = 1
    rotated_by_default: ClassVar[bool] = False  # random rotations (incoherence.py) gain more than they cost

    def turned(self, weight: Tensor) -> Tensor:
        return weight

    def turned_gram(self, gram: Tensor) -> Tensor:
        return gram

    def turned_inputs(self, rows: Tensor) -> Tensor:
        return rows

    def returned_inputs(self, rows: Tensor) -> Tensor:
        return rows

    def rows_apart(self, shape: tuple[int, int]) -> bool:
        return True

    def completed(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
        return parts

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return decoded_linear(x, cast(Quantizer, self), parts, shape)

    def transposed(self, y: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return decoded_transposed(y, cast(Quantizer, self), parts, shape)


class Decoder(Protocol):
    """A format that decodes through `in_chunks`."""

    def row_step(self, shape: tuple[int, int]) -> int: ...

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]: ...

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """Write Q into `out` (rows, in), float32 and contiguous."""
        ...


def constant(build: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Cache by arguments, for tensors on a named device: whoever calls first, under inference mode or a default device,
    leaves an ordinary tensor for all. Nothing of a mode that makes other tensors (fake ones, of torch.export) is kept:
    it gets its own copies."""

    @cache
    @wraps(build)
    def built(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        plain = _disable_current_modes() if active_fake_mode() is not None else nullcontext()
        with plain, torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return build(*args, **kwargs)

    @wraps(build)
    def found(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result = cast(Callable[Arguments, Result], built)(*args, **kwargs)
        fake = None if torch.compiler.is_compiling() else active_fake_mode()
        if fake is None or fake.allow_non_fake_inputs:
            return result
        return cast(Result, tree_map_only(Tensor, fake.from_tensor, result))

    return found


_LARGEST_HALF = 65504.0
_SMALLEST_STEP = 2.0**-24  # between float16 numbers near 0
_COARSE = 16 * _SMALLEST_STEP  # below it a scale is off by more than 3 % when rounded


def stored_half(values: Tensor) -> Tensor:
    """Values as float16; what float16 cannot hold becomes its largest number, never infinity."""
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()


def stored_scales(scales: Tensor, zero_is_a_code: bool = True, beside: Tensor | None = None) -> Tensor:
    """Scales >= 0 as float16, with a LordWarning where that is not close. Above its largest number codes saturate. Near
    0 its steps are coarse: where a group of codes holds the value 0, or its minimum, a scale is rounded up, since 0
    would decode the group to one value; where not, that value is 0 and no worse than any. `beside` are the minima that
    are added: a scale below their own last bit is the rounding of a constant group, and stays as it is."""
    small, large = (scales > 0) & (scales < _COARSE), scales > _LARGEST_HALF
    if beside is not None:
        small &= scales > beside.abs().float() * 2.0**-11
    result = stored_half(scales)
    poor = float((small | large).float().mean()) if scales.numel() and not scales.is_meta else 0.0
    if not poor:
        return result
    warnings.warn(
        f"{poor:.1%} of the scales of a packed matrix are outside the range of float16 (they reach from "
        f"{float(scales.min()):.2g} to {float(scales.max()):.2g}): their weights are stored coarsely. "
        "Use NF4 for this layer, whose scales are float32, or leave it out with `exclude`.",
        LordWarning,
        stacklevel=2,
    )
    if not zero_is_a_code:
        return result
    return torch.where(small, ((scales / _SMALLEST_STEP).ceil() * _SMALLEST_STEP).half(), result)


_read: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()  # -> (version, its values on the CPU)


def on_host(tensor: Tensor) -> Tensor:
    """A stored tensor where Python can look at it: copied from an accelerator once, not at every forward pass, and
    again if it was written to."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.is_inference() or active_fake_mode() is not None:  # has no version that would tell of a write; no values
        return tensor.cpu()
    known = _read.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _read[tensor] = tensor._version, tensor.detach().cpu()
    return known[1]


def tile_of(device: torch.device) -> int:
    """Weights that a product decodes at once."""
    return TILE if device.type == "cpu" else DEVICE_TILE


def spans(shape: tuple[int, int], step: int, weights: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of rows with at most so many weights, starting at multiples of `step`."""
    rows = max(step, weights // max(shape[1], 1) // step * step)
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def in_chunks(form: Decoder, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The `dequantize` of a Decoder. (out, in)"""
    device = parts["weight"].device
    q = torch.empty(shape, dtype=dtype, device=device)
    for start, stop in spans(shape, form.row_step(shape), CHUNK if device.type == "cpu" else DEVICE_TILE):
        target = q[start:stop]
        out = target if dtype == torch.float32 else torch.empty(target.shape, dtype=torch.float32, device=device)
        form.decode(form.rows(parts, shape, start, stop), out)
        if out is not target:
            target.copy_(out)
    return q


def one_tile(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a product may decode the whole matrix."""
    return shape[0] * shape[1] <= tile_of(device)


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    quantizer: Quantizer
    shape: tuple[int, int]
    names: list[str]
    saved_tensors: tuple[Tensor, ...]


class _DecodedLinear(torch.autograd.Function):
    """x Q^T that decodes Q in the forward and again in the backward pass: what is saved are the codes."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, quantizer: Quantizer, shape: tuple[int, int], names: list[str], *values: Tensor
    ) -> Tensor:
        ctx.quantizer, ctx.shape, ctx.names = quantizer, shape, names
        ctx.save_for_backward(*values)
        parts = dict(zip(names, values, strict=True))
        output = None
        for start, stop in spans(shape, quantizer.row_step(shape), tile_of(x.device)):
            product = torch.nn.functional.linear(x, _tile(quantizer, parts, shape, start, stop, x.dtype))
            if stop - start == shape[0]:
                return product
            if output is None:
                output = product.new_empty(*x.shape[:-1], shape[0])
            output[..., start:stop] = product
        assert output is not None, "a matrix has rows"
        return output

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return (
            decoded_transposed(gradients[0], ctx.quantizer, parts, ctx.shape),
            None,
            None,
            None,
            *(None for _ in parts),
        )


def decoded_transposed(y: Tensor, quantizer: Quantizer, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The `transposed` of any format, by decoding tiles of rows. (..., out) -> (..., in)"""
    total: Tensor | None = None
    for start, stop in spans(shape, quantizer.row_step(shape), tile_of(y.device)):
        share = y[..., start:stop] @ _tile(quantizer, parts, shape, start, stop, y.dtype)
        if stop - start == shape[0]:
            return share
        if total is None:  # sums of tiles in float32 at least
            total = share.to(torch.promote_types(share.dtype, torch.float32))
        else:
            total += share
    assert total is not None, "a matrix has rows"
    return total.to(y.dtype)


def _tile(
    form: Quantizer, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    return form.dequantize(form.rows(parts, shape, start, stop), (stop - start, shape[1]), dtype)


def decoded_linear(x: Tensor, quantizer: Quantizer, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The `linear` of any format, by decoding tiles of rows. (..., in) -> (..., out)"""
    product: Tensor = _DecodedLinear.apply(  # type: ignore[no-untyped-call]
        x, quantizer, shape, list(parts), *parts.values()
    )
    return product
