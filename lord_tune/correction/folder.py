"""Quantized Hugging Face folders: bitsandbytes NF4, compressed-tensors (pack-quantized), GPTQ and AWQ.

Read from the files, without the programs that wrote them. Integer codes become the formats w2a16, w4a16 and w8a16,
which hold them as they are: weight = scale * (code - zero), scales in float16.

compressed-tensors: NAME.weight_packed int32 (out, in bits / 32) little end first, weight_scale (out, groups),
  weight_zero_point packed along the outputs.
GPTQ: qweight int32 (in bits / 32, out), qzeros (groups, out bits / 32), scales (groups, out); in its first form zeros
  are stored less 1.
AWQ (gemm): qweight int32 (in, out / 8), qzeros (groups, out / 8), each word's nibbles in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..declared import Options
from ..errors import CheckpointError, UsageError
from ..quantizers.packing import pack
from ..storage import read_json
from .base import Code

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in the word of output 0, 1, ... of eight
_CHANGED = 0.02  # relative: what is not quantized was cast at most
_PARTS = {
    "compressed-tensors": "weight_packed",
    "gptq": "qweight",
    "awq": "qweight",
    "bitsandbytes": "weight.absmax",
}


class QuantizedFolder:
    """`correction.base.Quantized` of a folder."""

    def __init__(self, folder: Path):
        self.name = str(folder)
        self._config: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
        self.method = str(self._config.get("quant_method"))
        if self.method not in _PARTS:
            raise UsageError(
                f"{folder} is quantized by {self.method}, which correct does not read; it reads GGUF files and "
                f"{', '.join(_PARTS)}."
            )
        self._check_form()
        self._finest: set[str] = set()  # layers of 8 bits
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        if not self._files:
            raise CheckpointError(f"{folder} holds no .safetensors files; convert it to safetensors first.")

    def _check_form(self) -> None:
        config = self._config
        if self.method == "bitsandbytes" and not (
            config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4"
        ):
            raise UsageError(f"{self.name} is quantized by bitsandbytes in another form than NF4; expected NF4.")
        if self.method == "compressed-tensors" and config.get("format") != "pack-quantized":
            raise UsageError(
                f"{self.name} is compressed-tensors in the format {config.get('format')}; expected pack-quantized."
            )
        if self.method == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
            raise UsageError(f"{self.name} is AWQ in the version {config.get('version')}; expected gemm.")

    def check(self, keys: Iterable[str]) -> None:
        known = {key.removesuffix(".weight") for key in keys} | {"lm_head"}
        for name in self._files:
            owner = name
            while owner and owner not in known:
                owner = owner.rpartition(".")[0]
            if not owner:
                raise UsageError(f"'{name}' in {self.name} is not in the model; pass the model that was quantized.")

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise UsageError(f"{self.name} lacks the tensor '{name}'; pass the model that was quantized.")
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def code(self, layer: str, weight: Tensor) -> Code | None:
        if f"{layer}.{_PARTS[self.method]}" not in self._files:
            return None
        shape = (weight.shape[0], weight.shape[1])
        if self.method == "bitsandbytes":
            return self._nf4(layer, shape)
        read: Callable[[str, tuple[int, int]], tuple[Tensor, Tensor, Tensor | None, int]] = {
            "compressed-tensors": self._packed,
            "gptq": self._gptq,
            "awq": self._awq,
        }[self.method]
        codes, scales, zeros, bits = read(layer, shape)
        half = scales.half()
        if not torch.equal(half.float(), scales.float()):
            raise UsageError(f"'{layer}' in {self.name} has scales that float16 does not hold, so Q would change.")
        if bits == 8:
            self._finest.add(layer)
        groups, middle = scales.shape[1], 2 ** (bits - 1)
        group = next((size for size in self._group_sizes(shape[1]) if -(-shape[1] // size) == groups), None)
        if tuple(codes.shape) != shape or scales.shape[0] != shape[0] or group is None:
            raise UsageError(
                f"'{layer}' in {self.name} is {codes.shape[0]}x{codes.shape[1]} in {groups} groups, which does not fit "
                f"the original's {shape[0]}x{shape[1]} and the groups that its config.json names."
            )
        parts = {"weight": pack(codes, bits), "scales": half.contiguous()}
        symmetric = zeros is None or bool((zeros == middle).all())
        if not symmetric and zeros is not None:
            parts["zeros"] = zeros.to(torch.uint8).contiguous()
        options: Options = {"group_size": group, "symmetric": symmetric}
        return Code(f"w{bits}a16", options, parts)

    def _group_sizes(self, width: int) -> list[int]:
        """That config.json names, of a row of this width."""
        schemes = [group.get("weights") or {} for group in self._config.get("config_groups", {}).values()]
        named = [scheme.get("group_size") for scheme in schemes] or [self._config.get("group_size")]
        return [int(size) if size and int(size) > 0 else width for size in named]

    def _bits_of(self, layer: str, words: int, width: int) -> int:
        """Of codes that fill so many words of 32 bits."""
        bits = words * 32 // width
        if bits not in (2, 4, 8):
            raise UsageError(
                f"'{layer}' in {self.name} has {bits} bits for each of the original's {width} inputs; correct reads 2, "
                "4 and 8. Pass the model that was quantized."
            )
        return bits

    def _packed(self, layer: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        if f"{layer}.weight_g_idx" in self._files:
            raise UsageError(
                f"'{layer}' in {self.name} has reordered groups (weight_g_idx), which no format here holds."
            )
        words, scales = self._read(f"{layer}.weight_packed"), self._read(f"{layer}.weight_scale")
        bits = self._bits_of(layer, words.shape[1], shape[1])
        zeros, key = None, f"{layer}.weight_zero_point"
        if key in self._files:
            zeros = _fields(self._read(key).T, bits)[:, : shape[0]].T
        return _fields(words, bits)[:, : shape[1]], scales.reshape(shape[0], -1), zeros, bits

    def _gptq(self, layer: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        words, scales = self._read(f"{layer}.qweight"), self._read(f"{layer}.scales")
        bits = self._bits_of(layer, words.shape[0], shape[1])
        if (key := f"{layer}.g_idx") in self._files:
            plain = [torch.arange(shape[1]) // size for size in self._group_sizes(shape[1])]
            if not any(torch.equal(self._read(key).long(), order) for order in plain):
                raise UsageError(
                    f"'{layer}' in {self.name} has reordered groups (desc_act), which no format here holds."
                )
        first = self._config.get("checkpoint_format", "gptq") == "gptq"
        zeros = _fields(self._read(f"{layer}.qzeros"), bits)[:, : shape[0]].T + (1 if first else 0)
        return _fields(words.T, bits)[:, : shape[1]], scales.T, zeros, bits

    def _awq(self, layer: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        def nibbles(name: str) -> Tensor:  # (rows, out)
            fields = _fields(self._read(f"{layer}.{name}"), 4)
            return fields.view(fields.shape[0], -1, 8)[..., list(_AWQ_ORDER)].flatten(1)

        return nibbles("qweight").T, self._read(f"{layer}.scales").T, nibbles("qzeros").T, 4

    def _nf4(self, layer: str, shape: tuple[int, int]) -> Code:
        state = self._read(f"{layer}.weight.quant_state.bitsandbytes__nf4")
        told = json.loads(bytes(state.tolist()))
        if tuple(told["shape"]) != shape:
            raise UsageError(f"'{layer}' in {self.name} is {told['shape']}, the original's {list(shape)}.")
        parts = {
            "weight": self._read(f"{layer}.weight").contiguous().view(torch.uint8).reshape(-1, 1),
            "absmax": self._read(f"{layer}.weight.absmax"),
        }
        nested = f"{layer}.weight.nested_absmax"
        if nested in self._files:
            parts |= {
                "nested_absmax": self._read(nested).float(),
                "nested_offset": torch.tensor([told["nested_offset"]], dtype=torch.float32),
            }
        options: Options = {"block_size": int(told["blocksize"]), "double_quant": nested in self._files}
        return Code("nf4", options, parts)

    def restore(self, key: str, held: Tensor) -> None:
        held.copy_(self._tensor(key, held))

    def _tensor(self, key: str, original: Tensor) -> Tensor:
        if original.dim() == 2 and key.endswith(".weight"):
            code = self.code(key.removesuffix(".weight"), original)
            if code is not None:  # quantized as well, and not to be corrected
                return code.weight((original.shape[0], original.shape[1])).to(original.dtype)
        found = self._read(key)
        if found.shape != original.shape:
            raise UsageError(
                f"'{key}' in {self.name} is {tuple(found.shape)}, the original's {tuple(original.shape)}; pass the "
                "model that was quantized."
            )
        distance = float((found.float() - original.float()).norm() / original.float().norm().clamp_min(1e-30))
        if not distance <= _CHANGED:
            raise UsageError(
                f"'{key}' in {self.name} differs from the original's (relative distance {distance:.2g}): the quantizer "
                "moved scales between layers (AWQ, SmoothQuant), or it is another model. Pass the model with these "
                "scales as the original."
            )
        return found.to(original.dtype)

    def larger(self, layer: str) -> list[tuple[str, Options]]:
        return [] if layer in self._finest else [("w8a16", {"group_size": 128, "symmetric": True})]


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 (rows, n) -> (rows, n * 32 / bits) uint8, the low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.contiguous()[..., None] >> shifts) & (2**bits - 1)).flatten(1).to(torch.uint8)
