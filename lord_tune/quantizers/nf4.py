"""NormalFloat 4-bit (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

The only file that imports bitsandbytes. Its functional API is used, not its modules: `Linear4bit` repacks its weight in
place at the first evaluation forward on CPUs with AVX512-BF16 (rounding the scales to bfloat16), and a module flagged
4-bit makes trl cast the trainable factors to bfloat16. The stored tensors are bitsandbytes' own, so the `peft` export
writes them unchanged.

Layout: `weight` uint8 ((out*in + 1) // 2, 1), row-major (out, in), first code of a pair in the high nibble; `absmax`
float32 (blocks,), blocks running along the flattened matrix. With double quantization `absmax` is uint8 and
`nested_absmax` float32 (blocks / 256,), `nested_offset` float32 (1,) hold its scale. FSDP2 takes no tensor without
dimensions; checkpoints of earlier versions hold the offset as one, which the loader still reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..declared import Options, option
from ..errors import UsageError
from .base import Format, constant, decoded_linear, one_tile
from .grouped import divisor_of

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_NESTED_BLOCK = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@constant
def _codebooks(device: str) -> tuple[Tensor, Tensor]:
    import bitsandbytes.functional as bnb

    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


@dataclass(frozen=True)
class NF4(Format):
    """16 quantiles of a normal distribution, one absolute maximum per block; 4.5 bits per weight at block 64."""

    name: ClassVar[str] = "nf4"
    block_size: int = option(64, "weights per scale")
    # 4.127 instead of 4.5 bits per weight at block 64
    double_quant: bool = option(False, "store the scales in 8 bits")

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"NF4 has no block size {self.block_size}; use one of {', '.join(map(str, BLOCK_SIZES))}.")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.detach().float().contiguous(),
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        parts = {"weight": packed, "absmax": state.absmax}
        if self.double_quant:
            parts |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.reshape(1)}
        return parts

    def scales_of(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of `quantize` but the codes, for which bitsandbytes takes 16 numbers a weight on a CPU."""
        if self.double_quant:
            return {name: part for name, part in self.quantize(weight).items() if name != "weight"}
        flat = torch.nn.functional.pad(weight.detach().reshape(-1), (0, -weight.numel() % self.block_size))
        return {"absmax": flat.view(-1, self.block_size).abs().amax(1)}

    def state(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> QuantState:
        """bitsandbytes' own description of the parts."""
        from bitsandbytes.functional import QuantState

        device = parts["weight"].device
        code, nested_code = _codebooks(str(device))
        nested = None
        if "nested_absmax" in parts:
            nested = QuantState(parts["nested_absmax"], code=nested_code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        return QuantState(
            parts["absmax"],
            shape=torch.Size(shape),
            code=code,
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype,
            offset=None if nested is None else parts["nested_offset"].reshape(()),
            state2=nested,
        )

    def rows_are_blocks(self, shape: tuple[int, int]) -> bool:
        """Whether every row starts a block. Where it does not (in % block_size != 0), bitsandbytes 0.50's AVX512 kernel
        takes each row's first weights for a block of its own and decodes garbage (relative error 0.25 instead of 0.09).
        """
        return shape[1] % self.block_size == 0

    def rows_apart(self, shape: tuple[int, int]) -> bool:
        return self.rows_are_blocks(shape) and not self.double_quant

    def block_scales(self, parts: dict[str, Tensor], start: int = 0, stop: int | None = None) -> Tensor:
        """Absolute maxima of blocks start..stop, float32; a view unless they are stored in 8 bits."""
        import bitsandbytes.functional as bnb

        absmax = parts["absmax"][start:stop]
        if "nested_absmax" not in parts:
            return absmax
        first = start // _NESTED_BLOCK
        whole, nested = parts["absmax"][first * _NESTED_BLOCK : stop], parts["nested_absmax"][first:]
        _, code = _codebooks(str(absmax.device))
        scales = bnb.dequantize_blockwise(whole, absmax=nested.contiguous(), code=code, blocksize=_NESTED_BLOCK)
        return (scales + parts["nested_offset"])[start - first * _NESTED_BLOCK :]

    def row_step(self, shape: tuple[int, int]) -> int:
        return self.block_size // math.gcd(self.block_size, shape[1])  # of even blocks, so codes start on a byte

    def rows(self, parts: dict[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        """With double quantization the block scales come decoded."""
        first, last = start * shape[1], stop * shape[1]
        blocks = first // self.block_size, -(-last // self.block_size)
        kept = {name: value for name, value in parts.items() if not name.startswith("nested_")}
        codes = parts["weight"][first // 2 : (last + 1) // 2]
        return kept | {"weight": codes, "absmax": self.block_scales(parts, *blocks)}

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        decoded_as = shape if self.rows_are_blocks(shape) else (1, math.prod(shape))  # one long row is always right
        q = bnb.dequantize_4bit(parts["weight"], self.state(parts, decoded_as, torch.float32))
        return q.reshape(shape).to(dtype)

    def empty(self, shape: tuple[int, int], device: torch.device | str) -> dict[str, Tensor]:
        count = math.prod(shape)
        blocks = -(-count // self.block_size)
        parts = {"weight": torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)}
        if self.double_quant:
            parts["absmax"] = torch.empty(blocks, dtype=torch.uint8, device=device)
            parts["nested_absmax"] = torch.empty(-(-blocks // _NESTED_BLOCK), device=device, dtype=torch.float32)
            parts["nested_offset"] = torch.empty(1, device=device, dtype=torch.float32)
        else:
            parts["absmax"] = torch.empty(blocks, device=device, dtype=torch.float32)
        return parts

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        import bitsandbytes as bnb

        fused = x.is_cuda and x.numel() == shape[1]
        if x.dtype == torch.float64:  # bitsandbytes has no kernel for it and says nothing
            return decoded_linear(x, self, parts, shape)
        if not self.rows_are_blocks(shape) or not (fused or one_tile(shape, x.device)):
            return decoded_linear(x, self, parts, shape)
        product: Tensor = bnb.matmul_4bit(x, parts["weight"], quant_state=self.state(parts, shape, x.dtype))
        return product

    def rounder(self, weight: Tensor, stretch: float | Tensor = 1.0, importance: Tensor | None = None) -> NF4Rounder:
        """Rounds columns one by one in the block scales of `weight` times `stretch`."""
        return NF4Rounder(self, weight, stretch)

    def options(self) -> Options:
        return {"block_size": self.block_size, "double_quant": self.double_quant}


class NF4Rounder:
    """A matrix being rounded column by column (ldlq.Rounder)."""

    block = 1

    def __init__(self, form: NF4, weight: Tensor, stretch: float | Tensor):
        self._form = form
        self._scales = form.scales_of(weight.float() * stretch)
        self._absmax = form.block_scales(self._scales)
        self._divisor = divisor_of(self._absmax)
        self._book, _ = _codebooks(str(weight.device))
        self._edges = (self._book[1:] + self._book[:-1]) / 2
        if form.rows_are_blocks((weight.shape[0], weight.shape[1])):  # (blocks of a row, out)
            self._absmax, self._divisor = (
                scale.view(len(weight), -1).T.contiguous() for scale in (self._absmax, self._divisor)
            )
        self._codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)

    def _scales_at(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(block scale, what to divide by) of every weight of these columns, (out,) or (width, out)."""
        width, out = self._codes.shape
        size = self._form.block_size
        if self._absmax.dim() == 2 and start // size == (stop - 1) // size:
            return self._absmax[start // size], self._divisor[start // size]
        columns = torch.arange(start, stop, device=self._codes.device)[:, None]
        if self._absmax.dim() == 2:
            blocks = (columns // size).squeeze(1)
        else:  # blocks cross rows
            blocks = (torch.arange(0, out * width, width, device=columns.device) + columns) // size
        return self._absmax[blocks], self._divisor[blocks]

    def round(self, values: Tensor, start: int) -> Tensor:
        factor, divisor = self._scales_at(start, start + len(values))
        codes = torch.bucketize(values / divisor, self._edges)
        self._codes[start : start + len(values)] = codes
        return self._book.take(codes) * factor

    def parts(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        codes, scales = self._codes, self._scales
        if rows is not None:
            codes = codes[:, rows]
            scales = {"absmax": scales["absmax"].view(self._codes.shape[1], -1)[rows].reshape(-1)}
        flat = codes.T.reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
        return {"weight": ((flat[0::2] << 4) | flat[1::2])[:, None], **scales}
