"""The child `host` of a factored layer, around which PEFT puts the adapter that is L and R (modes factors and split).

`expose_factors` makes hosts for a new adapter; `make_hosts` for a saved one that PEFT itself loads, in a program that
knows nothing of lord_tune but a checkpoint that imports it (lm_eval with `peft=`).
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import FactoredLinear, FrozenSum, PivotedLinear, QuantizedLinear, ZeroLinear, factored_layers, plain_model
from ..linalg import principal
from .route import Route, trained_start
from .stored_tensors import StoredPivot, StoredTensors

FACTORS, SPLIT, LORA = "factors", "split", "lora"


def make_hosts(tuner: BaseTuner, model: nn.Module, config: PeftConfig) -> None:
    """Hosts where a configuration names them, on a model that has none yet; L and R are what the adapter starts from.

    Only for targets that say `host`: a pattern of the user's that happens to match the name means the layer. A further
    adapter, on other layers than the first, stays the business of `load_adapter`.
    """
    targets = getattr(config, "target_modules", None)
    named = [targets] if isinstance(targets, str) else list(targets or ())
    if not isinstance(config, LoraConfig) or not any("host" in name for name in named):
        return
    layers = factored_layers(model)
    if any(layer.host is not None for layer in layers.values()):
        return
    stored: StoredTensors | None = None
    for name, layer in layers.items():
        if tuner._check_target_module_exists(config, f"{name}.host"):
            mode = FACTORS if layer.top_left is None else SPLIT
            check_trainable(name, layer, mode)
            stored = stored or StoredTensors(plain_model(model))
            host_factors(name, layer, mode, stored)


def check_trainable(name: str, layer: FactoredLinear, mode: str) -> None:
    """UsageError unless the mode fits how the layer stores its factors."""
    if mode == SPLIT and layer.top_left is None:
        raise UsageError(f"'{name}' has no components stored apart; decompose with `top_rank`, or use mode: factors.")
    if mode == FACTORS and layer.top_left is not None:
        usable = LORA if isinstance(layer.top_left, QuantizedLinear) else SPLIT
        raise UsageError(f"'{name}' has its first {layer.plan.top_rank} components stored apart; use mode: {usable}.")
    pair = (layer.top_left, layer.top_right) if mode == SPLIT else (layer.left, layer.right)
    if any(isinstance(factor, QuantizedLinear) for factor in pair):
        form = layer.plan.top_format if mode == SPLIT else layer.plan.left_format
        raise UsageError(
            f"The factors of '{name}' are stored as {form}, which cannot be trained directly; use mode: lora."
        )


def host_factors(name: str, layer: FactoredLinear, mode: str, stored: StoredTensors) -> tuple[Tensor, Tensor]:
    """L and R to train: the parameters themselves, moved out of the layer, or for a further adapter copies."""
    if layer.host is not None:
        assert isinstance(layer.route, Route) and layer.route.start is not None
        return trained_start(layer.route.start, layer.device)
    if isinstance(layer.left, PivotedLinear) and mode == FACTORS:
        return _unpivoted(name, layer, stored)
    top = "top_" if mode == SPLIT else ""
    left, right = (getattr(layer, f"{top}{side}").weight for side in ("left", "right"))
    kept = stored.keep(f"{name}.{top}left.weight", left), stored.keep(f"{name}.{top}right.weight", right)
    layer.route = Route(kept, right.shape[0])
    if mode == SPLIT:
        layer.host = FrozenSum(layer.left, layer.right, layer.backbone)
    else:
        layer.host = layer.backbone or ZeroLinear(layer.in_features, layer.out_features, left.device)
    layer.left = layer.right = layer.backbone = layer.top_left = layer.top_right = None
    return left, right


def _unpivoted(name: str, layer: FactoredLinear, stored: StoredTensors) -> tuple[Tensor, Tensor]:
    """L and R to train of pivoted factors, which `fold` makes of them again."""
    rest, right, rows = layer.left.rest.weight, layer.right.weight, layer.left.rows.data
    kept = stored.keep(f"{name}.left.rest.weight", rest), stored.keep(f"{name}.right.weight", right)
    start = StoredPivot(kept[0], rows, kept[1])
    layer.route = Route(start, right.shape[0])
    layer.host = layer.backbone or ZeroLinear(layer.in_features, layer.out_features, right.device)
    left, right = principal(layer.left.dense(torch.float64), right.detach())
    layer.left = layer.right = layer.backbone = None
    return left.float(), right.float()
