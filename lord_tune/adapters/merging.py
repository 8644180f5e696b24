"""A layer of PEFT, of any kind, and what it computes, as one module without PEFT.

LoRA and the scales of IA3 are written out (fold.py). For every other kind (DoRA, LoHa, VeRA, OFT, trained tokens, ...)
PEFT's own `merge` runs on a float64 copy of the layer, and random inputs decide whether that merge was the layer: so
whatever comes is folded exactly, or refused by name.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..layers import CastLinear, FactoredLinear, FrozenSum, PivotedLinear, QuantizedLinear, ZeroLinear, dense_factor
from .route import linear_of
from .wrappers import HostLora, LayerLora

ROWS = 5  # random inputs of the comparison
CLOSE = 1e-5  # of the largest output: some kinds compute in float32, whose last bit is 6e-8


def deltas_of(name: str, wrapper: BaseTunerLayer, adapters: tuple[str, ...]) -> list[tuple[Tensor, Tensor]] | None:
    """[(s B, A)] of plain LoRA, float64, whose products are added to what is wrapped; None for other kinds."""
    _check_unmerged(name, wrapper)
    if type(wrapper) not in (lora.Linear, LayerLora, HostLora):
        return None
    assert isinstance(wrapper, lora.Linear)
    found = []
    for adapter in adapters:
        if adapter in wrapper.lora_variant:
            return None
        left, right = (m[adapter].get_parameter("weight").double() for m in (wrapper.lora_B, wrapper.lora_A))
        found.append((wrapper.scaling[adapter] * left, right))
    return found


def bias_of_lora(wrapper: BaseTunerLayer, adapters: tuple[str, ...]) -> Tensor | None:
    """What `lora_bias` adds to the outputs, float64, (out,)."""
    if not isinstance(wrapper, lora.Linear):
        return None
    biases = [(wrapper.lora_B[adapter].bias, wrapper.scaling[adapter]) for adapter in adapters]
    found = [scaling * bias.double() for bias, scaling in biases if bias is not None]
    return torch.stack(found).sum(0) if found else None


def merged_factor(name: str, wrapper: BaseTunerLayer, adapters: tuple[str, ...]) -> nn.Linear:
    """L or R with adapters of any kind in it, float32."""
    dense = _merged(name, wrapper, adapters)
    if not isinstance(dense, nn.Linear) or dense.bias is not None:
        raise UsageError(f"'{name}' cannot be folded: its adapter has a bias, for which a factor has no place.")
    return linear_of(dense.weight.float())


def merged_module(name: str, wrapper: BaseTunerLayer, adapters: tuple[str, ...]) -> nn.Module:
    """A dense layer or an embedding with adapters of any kind in it."""
    base = wrapper.get_base_layer()
    low = [p.dtype for p in base.parameters() if p.dtype != torch.float32]
    if low:
        raise UsageError(
            f"'{name}' is dense and stored as {str(low[0]).removeprefix('torch.')}, into which an adapter would be "
            "rounded; load the model with `dtype` float32 and fold that."
        )
    return _merged(name, wrapper, adapters).float()


def trained_module(name: str, wrapper: AuxiliaryTrainingWrapper, adapters: tuple[str, ...]) -> nn.Module:
    """A module that was trained as a whole, or tokens of it."""
    present = [adapter for adapter in adapters if adapter in wrapper._adapters]
    if not present:
        return wrapper.original_module
    if isinstance(wrapper, ModulesToSaveWrapper):
        if len(present) > 1:
            raise UsageError(f"'{name}' is trained as a whole by {len(present)} active adapters; set one of them.")
        return wrapper.modules_to_save[present[0]]
    copied = copy.deepcopy(wrapper)
    return copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=present)


def needs_float32(model: nn.Module) -> bool:
    """Whether an adapter changes a dense layer that is stored in 16 bits, so that folding would round."""
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    own = (CastLinear, QuantizedLinear, PivotedLinear, ZeroLinear, FrozenSum, FactoredLinear)
    dense = [base for base in bases if not isinstance(base, own)]
    return any(p.dtype in (torch.float16, torch.bfloat16) for base in dense for p in base.parameters())


def _check_unmerged(name: str, wrapper: BaseTunerLayer) -> None:
    if wrapper.merged:
        raise UsageError(f"PEFT has merged the adapter into '{name}' for a while; call unmerge_adapter first.")


def _merged(name: str, wrapper: BaseTunerLayer, adapters: tuple[str, ...]) -> nn.Module:
    """The base layer with the adapters in it, float64."""
    _check_unmerged(name, wrapper)
    kind = type(wrapper).__module__.removeprefix("peft.tuners.").partition(".")[0]
    base = wrapper.get_base_layer()
    inputs = _inputs(base)
    if inputs is None or wrapper.base_layer is not base:  # type: ignore[attr-defined]
        raise UsageError(f"'{name}' ({type(base).__name__} with {kind}) cannot be folded exactly; unload the adapter.")
    try:
        copied = copy.deepcopy(wrapper, {id(base): _dense(base)}).double().eval()  # type: ignore[attr-defined]
        copied.enable_adapters(True)
        copied.set_adapter(list(adapters), inference_mode=True)
        wanted = copied(inputs)
        copied.merge(adapter_names=list(adapters))
        merged: nn.Module = copied.get_base_layer()
        found = merged(inputs)
    except Exception as error:  # a kind of PEFT may fail in any way
        raise UsageError(f"'{name}' cannot be folded, as PEFT does not merge its {kind} adapter: {error}") from error
    if not torch.allclose(found, wanted, rtol=0, atol=CLOSE * float(wanted.abs().max())):
        raise UsageError(f"'{name}' cannot be folded: its {kind} adapter is no change of the weight; unload it.")
    return merged.requires_grad_(False)


def _dense(base: nn.Module) -> nn.Module:
    if not isinstance(base, CastLinear | QuantizedLinear | PivotedLinear):
        return copy.deepcopy(base).double()
    weight = dense_factor(base)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense


def _inputs(base: nn.Module) -> Tensor | None:
    device = next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (1, ROWS), generator=generator).to(device)
    if not isinstance(base, nn.Linear | Conv1D):
        return None
    width = base.in_features if isinstance(base, nn.Linear) else base.nx
    return torch.randn(ROWS, width, generator=generator, dtype=torch.float64).to(device)
