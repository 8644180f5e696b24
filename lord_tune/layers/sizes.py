"""Numbers, bytes and bits of a model, counted from its tensors."""

from __future__ import annotations

from torch import Tensor, nn

from ..calibration.blocks import Blocks, find_blocks
from .embeddings import token_modules
from .factored_linear import FactoredLinear
from .quantized_linear import Packed
from .surgery import is_linear, plain_model, weight_of

PARTS = ("embeddings", "head", "backbones", "factors", "dense_layers", "other")  # of a checkpoint


def sizes(model: nn.Module) -> dict[str, float]:
    """parameters (stored numbers; a packed code counts as one), model_bytes, linear_bits_per_weight.

    Counted from the tensors a checkpoint of the model holds, but for sentinels (a skeleton on the meta device will do);
    tied ones count once. The bits are those of the linear layers inside the blocks, decomposed or not, without biases,
    per weight of the dense matrices.
    """
    plain = plain_model(model)
    packed: dict[str, int] = {}
    for name, module in plain.named_modules(remove_duplicate=False):
        if isinstance(module, Packed):
            packed[f"{name}.weight"] = module.in_features * module.out_features
    tensors = _tensors_of(plain)
    numbers = sum(packed.get(name, t.numel()) for name, t in tensors.items())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    bits, weights = linear_bits(plain)
    return {
        "parameters": numbers,
        "model_bytes": stored,
        "linear_bits_per_weight": bits / weights if weights else float("nan"),
    }


def _tensors_of(plain: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the model but for sentinels; tied ones once."""
    tied = getattr(plain, "all_tied_weights_keys", {}) if any(p.is_meta for p in plain.parameters()) else {}
    found: dict[tuple[int | str, int], tuple[str, Tensor]] = {}
    for name, tensor in plain.state_dict().items():
        if tensor.numel() and name not in tied:  # a tensor on the meta device has no address
            found[(tensor.data_ptr() or name, tensor.numel())] = name, tensor
    return dict(found.values())


def bytes_by_part(model: nn.Module) -> dict[str, int]:
    """Of PARTS, what each has of `model_bytes`. A tied output head is part of the embeddings."""
    plain = plain_model(model)
    embeddings, heads = token_modules(plain)
    factored = {name for name, module in plain.named_modules() if isinstance(module, FactoredLinear)}
    inside = tuple("" if prefix == "" else f"{prefix}." for prefix in find_blocks(plain).names())
    dense = {name for name, module in plain.named_modules() if name.startswith(inside) and is_linear(module)}
    found = dict.fromkeys(PARTS, 0)
    for key, tensor in _tensors_of(plain).items():
        owner, leaf = key.rpartition(".")[::2]
        layer = next((name for name in _above(owner) if name in factored), None)
        part = "other"
        if any(name in embeddings for name in _above(owner)) and leaf != "bias":
            part = "embeddings"
        elif any(name in heads for name in _above(owner)) and leaf != "bias":
            part = "head"
        elif layer is not None and owner != layer:
            part = "backbones" if key.startswith(f"{layer}.backbone.") else "factors"
        elif layer is None and owner in dense and leaf == "weight":
            part = "dense_layers"
        found[part] += tensor.numel() * tensor.element_size()
    return found


def _above(path: str) -> list[str]:
    """A module's path and those of what it is in."""
    words = path.split(".")
    return [".".join(words[:count]) for count in range(len(words), 0, -1)]


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
