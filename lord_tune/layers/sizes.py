"""Numbers, bytes and bits of a model, counted from its tensors."""

from __future__ import annotations

from torch import Tensor, nn

from ..calibration.blocks import Blocks, find_blocks
from .factored_linear import FactoredLinear
from .quantized_linear import QuantizedLinear
from .surgery import is_linear, plain_model, weight_of


def sizes(model: nn.Module) -> dict[str, float]:
    """parameters (stored numbers; a packed code counts as one), model_bytes, linear_bits_per_weight.

    Counted from the tensors a checkpoint of the model holds, but for sentinels (a skeleton on the meta device will do);
    tied ones count once. The bits are those of the linear layers inside the blocks, decomposed or not, without biases,
    per weight of the dense matrices.
    """
    plain = plain_model(model)
    packed: dict[str, int] = {}
    for name, module in plain.named_modules():
        if isinstance(module, QuantizedLinear):
            packed[f"{name}.weight"] = module.in_features * module.out_features
    tied = getattr(plain, "all_tied_weights_keys", {}) if any(p.is_meta for p in plain.parameters()) else {}
    tensors: dict[tuple[int | str, int], tuple[str, Tensor]] = {}
    for name, tensor in plain.state_dict().items():
        if tensor.numel() and name not in tied:  # a tensor on the meta device has no address
            tensors[(tensor.data_ptr() or name, tensor.numel())] = name, tensor
    numbers = sum(packed.get(name, t.numel()) for name, t in tensors.values())
    stored = sum(t.numel() * t.element_size() for _, t in tensors.values())
    bits, weights = linear_bits(plain)
    return {
        "parameters": numbers,
        "model_bytes": stored,
        "linear_bits_per_weight": bits / weights if weights else float("nan"),
    }


def linear_bits(model: nn.Module, blocks: Blocks | None = None) -> tuple[int, int]:
    """(stored bits, dense weights) of all linear layers inside the blocks."""
    prefixes = (blocks or find_blocks(model)).names()
    inside = {n: m for n, m in model.named_modules() if any(p == "" or n.startswith(p + ".") for p in prefixes)}
    bits = weights = 0
    factored = [name for name, module in inside.items() if isinstance(module, FactoredLinear)]
    for name, module in inside.items():
        if isinstance(module, FactoredLinear):
            stored = [p for key, p in module.named_parameters() if key != "bias"]
            weights += module.in_features * module.out_features
        elif is_linear(module) and not any(name.startswith(f + ".") for f in factored):
            stored = [module.get_parameter("weight")]
            weights += weight_of(module).numel()
        else:
            continue
        bits += sum(8 * p.numel() * p.element_size() for p in stored)
    return bits, weights
