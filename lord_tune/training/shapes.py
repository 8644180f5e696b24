"""Stand-ins for what cannot run on tensors that have shapes and no content, because it reads what it is given or needs
tables: packed formats (`ShapesOnly`), attention (`Attention`) and trl's loss (`LossInPieces`). Each allocates and saves
for the backward pass what the original does, in the same order. forecast.py runs a training step on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..integrations.models import default_device
from ..layers import Packed
from ..protocols import AutogradContext
from ..quantizers import Quantizer, Rotated
from ..quantizers.base import spans, tile_of
from .pieces import piece_width

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..protocols import TrlConfig

Further = ParamSpec("Further")
Result = TypeVar("Result")


class _MaskShape(TypedDict):
    batch_size: int
    q_length: int
    device: torch.device


class _ProductContext(AutogradContext, Protocol):
    shape: tuple[int, int]
    rows: int
    dtype: torch.dtype


class _LossContext(AutogradContext, Protocol):
    dtype: torch.dtype
    on_gpu: bool


@dataclass(frozen=True)
class ShapesOnly:
    """Stands for a format while shapes alone are asked for."""

    inner: Quantizer

    @property
    def name(self) -> str:
        return self.inner.name

    def dequantize(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return _decoded(shape[0], shape, parts["weight"], dtype)

    def linear(self, x: Tensor, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if not isinstance(self.inner, Rotated):
            return _Product.apply(x, parts["weight"], shape, self.inner.row_step(shape))
        return _Turned.apply(_Product.apply(_Turned.apply(x), parts["weight"], shape, self.inner.inner.row_step(shape)))


def _decoded(rows: int, shape: tuple[int, int], codes: Tensor, dtype: torch.dtype) -> Tensor:
    decoded = torch.empty(rows, shape[1], dtype=dtype, device=codes.device)
    if dtype != torch.float32:  # formats decode in single precision
        torch.empty(min(decoded.numel(), tile_of(default_device())), dtype=torch.float32, device=codes.device)
    return decoded


class _Product(torch.autograd.Function):
    """quantizers/base.py's product with tiles of Q, by shapes: one tile and one share of the result beside it."""

    @staticmethod
    def forward(ctx: _ProductContext, x: Tensor, codes: Tensor, shape: tuple[int, int], step: int) -> Tensor:
        start, stop = next(spans(shape, step, tile_of(default_device())))
        ctx.save_for_backward(codes)
        ctx.shape, ctx.rows, ctx.dtype = shape, stop - start, x.dtype
        tile = _decoded(ctx.rows, shape, codes, x.dtype)
        product = x.new_empty(*x.shape[:-1], ctx.rows)
        del tile
        return product if ctx.rows == shape[0] else x.new_empty(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: _ProductContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        tile = _decoded(ctx.rows, ctx.shape, ctx.saved_tensors[0], gradient.dtype)
        whole = gradient.new_empty(*gradient.shape[:-1], ctx.shape[1])
        if ctx.rows < ctx.shape[0]:
            total = torch.empty_like(whole, dtype=torch.promote_types(gradient.dtype, torch.float32))
            whole = total.to(gradient.dtype)
        del tile
        return whole, None, None, None


class _Turned(torch.autograd.Function):
    """A rotation by shapes: signs are saved, results and gradients are new tensors."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape[-1], dtype=x.dtype, device=x.device))
        return torch.empty_like(torch.empty_like(x))

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> Tensor:
        return torch.empty_like(torch.empty_like(gradients[0]))


@contextlib.contextmanager
def without_content(model: nn.Module, arguments: TrlConfig) -> Iterator[None]:
    """Operations on the model compute shapes. torch's meta device does so at a fraction of FakeTensorMode's cost, but
    knows no autocast, and computes attention in another way than any device does."""
    if arguments.bf16 or arguments.fp16:
        with FakeTensorMode():
            _materialise(model)
            yield
    else:
        yield


class Attention(TorchFunctionMode):
    """Scaled dot products as the fused kernels have them: q, k, v, a mask in their dtype, the result and one number per
    query are saved. With dropout a CPU has no such kernel and computes the plain way, as the meta device does."""

    def __init__(self, on_gpu: bool):
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        names = dict(zip(("attn_mask", "dropout_p"), args[3:], strict=False)) | given
        product = function is nn.functional.scaled_dot_product_attention
        if not product or (names.get("dropout_p") and not self._on_gpu):
            return function(*args, **given)
        query, key, value = cast(tuple[Tensor, Tensor, Tensor], args[:3])
        mask = names.get("attn_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=query.dtype)
        return _FusedAttention.apply(query, key, value, mask)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, length, heads, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        return result

    @staticmethod
    def backward(ctx: AutogradContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)


def decode_by_shapes(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Packed):
            module.quantizer = ShapesOnly(module.quantizer)  # type: ignore[assignment]


def _materialise(model: nn.Module) -> None:
    """Put tensors of the fake CPU, under the active FakeTensorMode, in place of those on the meta device."""
    made: dict[int, Tensor] = {}
    kept = []  # an id is unique as long as its tensor lives

    def replace(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trains = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(blank, trains) if isinstance(tensor, nn.Parameter) else blank
        return made[id(tensor)]

    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]  # type: ignore[list-item]
        for table in tables:
            for name, value in table.items():
                if isinstance(value, Tensor):
                    table[name] = replace(value)


_MASKED, _UNMASKED = "lord_tune_masked", "lord_tune_unmasked"


def _whole_mask(*, batch_size: int, q_length: int, kv_length: int, device: torch.device, **more: object) -> Tensor:
    """transformers' mask for scaled dot products where rows are padded or packed, by its shape."""
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


def _no_mask(*, kv_length: int, local_size: int | None = None, **more: Unpack[_MaskShape]) -> Tensor | None:
    """The same where no row is: none, unless attention is to a window only."""
    return None if local_size is None or kv_length < local_size else _whole_mask(kv_length=kv_length, **more)


def set_attention(config: PreTrainedConfig, masked: bool, on_gpu: bool) -> None:
    """transformers looks at the content of masks before it makes one; ours tell what it would find."""
    if config._attn_implementation != "sdpa":  # the others do not look, or have no mask
        return
    name, mask = (_MASKED, _whole_mask) if masked else (_UNMASKED, _no_mask)

    AttentionInterface.register(name, _by_shapes(sdpa_attention_forward, on_gpu))
    AttentionMaskInterface.register(name, mask)
    config._attn_implementation = name


def _by_shapes(
    compute: Callable[Concatenate[nn.Module, Tensor, Further], Result], on_gpu: bool
) -> Callable[Concatenate[nn.Module, Tensor, Further], Result]:
    def attention(module: nn.Module, query: Tensor, *given: Further.args, **more: Further.kwargs) -> Result:
        with Attention(on_gpu) if query.is_meta else contextlib.nullcontext():
            return compute(module, query, *given, **more)

    return attention


_TOKENS_AT_ONCE = 4096
# bytes per logit at the worst moment of trl's torch operations on a piece, beside the piece: three float32 and one mask
# forward, seven and one backward. On a GPU one kernel needs none.
_FORWARD_BYTES, _BACKWARD_BYTES = 13, 29


class LossInPieces(torch.autograd.Function):
    """trl's ChunkedLogProbFunction by shapes: the hidden states, the targets and two numbers per token are saved."""

    @staticmethod
    def forward(ctx: _LossContext, hidden: Tensor, weight: Tensor, on_gpu: bool) -> Tensor:
        cast = torch.is_autocast_enabled("cpu")
        ctx.dtype, ctx.on_gpu = torch.get_autocast_dtype("cpu") if cast else hidden.dtype, on_gpu
        count = len(hidden)
        per_token = [hidden.new_empty(count, dtype=torch.float32) for _ in range(7)]
        ctx.save_for_backward(hidden, weight, hidden.new_empty(count, dtype=torch.long), *per_token[:2])
        _piece(ctx, hidden, weight, _FORWARD_BYTES)
        return hidden.new_empty(count, dtype=torch.float32)

    @staticmethod
    def backward(ctx: _LossContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *_ = ctx.saved_tensors
        result = torch.empty_like(hidden, dtype=torch.float32)
        _piece(ctx, hidden, weight, _BACKWARD_BYTES)
        return result.to(hidden.dtype), None, None


def _piece(ctx: _LossContext, hidden: Tensor, weight: Tensor, bytes_per_logit: int) -> None:
    tokens, width = min(len(hidden), _TOKENS_AT_ONCE), piece_width()
    words = min(len(weight), width)
    piece = hidden.new_empty(tokens, width, dtype=ctx.dtype)
    cast = [
        torch.empty_like(part, dtype=ctx.dtype) for part in (weight[:words], hidden[:tokens]) if part.dtype != ctx.dtype
    ]
    if not ctx.on_gpu:
        hidden.new_empty(bytes_per_logit, tokens, words, dtype=torch.uint8)
    del piece, cast
