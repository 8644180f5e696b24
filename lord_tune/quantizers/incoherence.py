"""Randomized orthogonal rotations that make any weight look normal before it is quantized (QuIP#, arXiv 2402.04396,
section 3), for any dimension.

U_n = DCT_m (x) H_(2^p) for n = m 2^p with m odd: an orthonormal DCT-II of the odd part and a Hadamard matrix of the
power of two; entries are at most sqrt(2 / n). It exists for every n, unlike tables of Hadamard matrices. In front of it
a diagonal of random signs. It is applied as small products, never as an n x n matrix.

A rotated format stores the code of (U_out D_out) W (U_in D_in)^T. Signs come from a seed and the dimension alone, so
that layers with one input (q, k, v; gate, up) share theirs; they are stored, one bit each, and a loader needs no
generator.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..declared import Options
from .base import Quantizer, Rounder, constant, on_host
from .packing import pack

_WIDEST = 64  # of a factor; 576 = 9 2^6 is 36 x 16


def odd_part(size: int) -> int:
    """The m of size = m 2^p, size >= 1."""
    assert size >= 1, "a matrix without columns has no rotation"
    while size % 2 == 0:
        size //= 2
    return size


def _hadamard(size: int, device: str, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normed: Tensor = matrix / size**0.5
    return normed.to(device=device, dtype=dtype)


def _cosines(size: int, device: str, dtype: torch.dtype) -> Tensor:
    """Orthonormal DCT-II."""
    n = torch.arange(size, dtype=torch.float64)
    matrix: Tensor = torch.cos(torch.pi / size * (n[None, :] + 0.5) * n[:, None]) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.to(device=device, dtype=dtype)


@constant
def _factors(size: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Orthonormal matrices whose Kronecker product is U, outermost first; of width up to 64 unless the odd part is
    wider: few wide factors are faster than many narrow ones."""
    first = _cosines(odd_part(size), device, dtype)
    power = size // len(first)
    while power > 1 and 2 * len(first) <= _WIDEST:
        first, power = torch.kron(first, _hadamard(2, device, dtype)), power // 2
    found = [first] if len(first) > 1 else []
    while power > 1:
        part = min(power, _WIDEST)
        found.append(_hadamard(part, device, dtype))
        power //= part
    return found


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """U x (or U^T x) along the last dimension. (..., n) -> (..., n)"""
    size = x.shape[-1]
    shape = x.shape
    after = size
    for matrix in _factors(size, str(x.device), x.dtype):
        width = len(matrix)
        after //= width
        used = matrix if inverse else matrix.T
        if after == 1:
            x = x.reshape(-1, width) @ used
        else:  # transposed, so that each factor is one large product
            turned = x.reshape(-1, width, after).transpose(1, 2).reshape(-1, width) @ used
            x = turned.view(-1, after, width).transpose(1, 2)
    return x.reshape(shape)


def random_signs(size: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(size,) float32 of +-1."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + size)
    return (torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2.0 - 1.0).to(device)


def into(x: Tensor, signs: Tensor) -> Tensor:
    """U (D x) along the last dimension."""
    return rotate(x * signs.to(x.dtype))


def out_of(x: Tensor, signs: Tensor) -> Tensor:
    """D (U^T x), the inverse of `into`."""
    return rotate(x, inverse=True) * signs.to(x.dtype)


class _Shared(threading.local):
    """The last rotated input. q, k and v (gate and up) get the same tensor one after the other and rotate it alike."""

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._signs: Tensor | None = None
        self._turned: Tensor | None = None

    def into(self, x: Tensor, packed_signs: Tensor) -> Tensor:
        """`into(x, signs)`, computed once while x lives and is not written to, where no gradient is wanted."""
        if x.is_inference():  # has no version that would tell of a write
            return into(x, _unpacked(packed_signs, x.shape[-1]))
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if self._input is not None and self._input() is x and self._version == x._version and not differentiable:
            assert self._turned is not None and self._signs is not None
            if self._signs is packed_signs or torch.equal(on_host(self._signs), on_host(packed_signs)):
                return self._turned
        turned = into(x, _unpacked(packed_signs, x.shape[-1]))
        if turned.requires_grad:  # its graph belongs to one backward pass, and is recomputed under checkpointing
            return turned
        self._input, self._version = weakref.ref(x, self._forget), x._version
        self._signs, self._turned = packed_signs, turned
        return turned

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._input is reference:
            self._input = self._signs = self._turned = None


_shared = _Shared()


@dataclass(frozen=True)
class Rotated:
    """A format applied in rotated coordinates."""

    inner: Quantizer
    seed: int = 0

    @property
    def name(self) -> str:
        return self.inner.name

    def signs(self, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(out signs, in signs), in the order of the dimensions."""
        return random_signs(shape[0], self.seed, device), random_signs(shape[1], self.seed, device)

    @property
    def block(self) -> int:
        return self.inner.block

    def turned(self, weight: Tensor) -> Tensor:
        """(U_out D_out) W (U_in D_in)^T"""
        out, inputs = self.signs((weight.shape[0], weight.shape[1]), weight.device)
        return into(into(weight, inputs).T, out).T

    def turned_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix of the rotated inputs. (in, in)"""
        signs = random_signs(len(gram), self.seed, gram.device)
        return into(into(gram, signs).T, signs)

    def turned_inputs(self, rows: Tensor) -> Tensor:
        """Linear forms of the inputs, (k, in), as forms of the rotated ones."""
        return into(rows, random_signs(rows.shape[1], self.seed, rows.device))

    def returned_inputs(self, rows: Tensor) -> Tensor:
        """Linear forms of the rotated inputs, (k, in), as forms of the inputs."""
        return out_of(rows, random_signs(rows.shape[1], self.seed, rows.device))

    def rows_apart(self, shape: tuple[int, int]) -> bool:
        return self.inner.rows_apart(shape)

    def completed(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Parts of the inner format, completed by the packed signs."""
        out, inputs = self.signs(shape, parts["weight"].device)
        return parts | {"out_signs": pack((out < 0).int(), 1), "in_signs": pack((inputs < 0).int(), 1)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        return self.completed(self.inner.quantize(self.turned(weight.detach().float())), shape)

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        out, inputs = _unpacked(parts["out_signs"], shape[0]), _unpacked(parts["in_signs"], shape[1])
        inner = self.inner.dequantize(parts, shape, torch.promote_types(dtype, torch.float32))
        return out_of(out_of(inner, inputs).T, out).T.to(dtype).contiguous()

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        parts = self.inner.empty(shape, device)
        parts["out_signs"] = torch.empty(-(-shape[0] // 8), dtype=torch.uint8, device=device)
        parts["in_signs"] = torch.empty(-(-shape[1] // 8), dtype=torch.uint8, device=device)
        return parts

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Rotates x and the product instead of the matrix."""
        out = _unpacked(parts["out_signs"], shape[0])
        turned = _shared.into(x, parts["in_signs"])
        return out_of(self.inner.linear(turned, parts, shape), out)

    def transposed(self, y: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        out, inputs = _unpacked(parts["out_signs"], shape[0]), _unpacked(parts["in_signs"], shape[1])
        return out_of(self.inner.transposed(into(y, out), parts, shape), inputs)

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> Rounder:
        """Of a matrix that is turned already."""
        return self.inner.rounder(weight, stretch, importance)

    def options(self) -> Options:
        return {**self.inner.options(), "incoherence": True, "seed": self.seed}


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """(size,) float32 of +-1."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:size].float()
