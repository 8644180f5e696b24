"""Mode basis: the singular values of L R are learnt, and k new components beside them.

Basis Selection (Li et al. 2024, arXiv 2405.15877): of W = sum_i s_i u_i v_i^T the vectors are frozen and the s_i
trained on the target task, with k new pairs of vectors (L zero, R random / sqrt(k)) from the first step;
training/basis.py then takes away those that the task does not need, and `fold` merges what is left. Here s_i = w_i^2,
as in the authors' code: s stays positive, and small ones move little.

u_i and v_i are the components of L R as they are stored, of the size s_i = |column of L| |row of R|: singular vectors
after `decompose --method svd`, those of the outputs after `whitened`; packed ones too. Pivoted factors have no
components of their own, so they are decomposed here, into float32. Q, where there is one, stays as it is. Components
stored apart (`top_rank`) are refused.

The adapter is an ordinary LoRA of rank k on the child `host`, with one more tensor per layer, `lora_basis` (w). A
component whose w is 0 is pruned. The adapter belongs to the components of its base: of two that have the same size to
the last bits, singular vectors are arbitrary, and an adapter on pivoted factors that tells them apart would be lost.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel

from ..errors import LordError, UsageError
from ..layers import FactoredLinear, FrozenBasis, PivotedLinear, factored_layers, plain_model
from ..linalg import principal
from ..protocols import CausalModel
from .attach import BASIS, chosen_layers, exactly, task_type_of, wrap
from .injection import check_host_config
from .route import linear_of
from .wrappers import BasisLora


def add_basis(
    model: CausalModel, new: int = 32, targets: str | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Learnable singular values of the factored layers (those matching the regex `targets`), and `new` components more
    in each; see the top. UsageError where components are stored apart."""
    if new < 1:
        raise UsageError(f"Got `basis_new` {new}; expected at least 1.")
    return attach_basis(model, targets, adapter_name, None, new)


def attach_basis(
    model: CausalModel, targets: str | None, adapter_name: str, config: LoraConfig | None, new: int = 0
) -> PeftModel:
    """`add_basis`, or with the configuration of a saved adapter, whose tensors are still to be loaded."""
    chosen = chosen_layers(model, targets, BASIS)
    for name, layer in chosen.items():
        if layer.top_left is not None:
            raise UsageError(
                f"'{name}' has its first {layer.plan.top_rank} components stored apart, which mode: basis does not "
                "prune; decompose without `top_rank`."
            )
    if config is not None:
        check_host_config(config, {})
    for layer in chosen.values():
        if layer.host is None:
            _freeze(layer)
    given = config or LoraConfig(
        r=new,
        lora_alpha=new,
        target_modules=exactly([f"{name}.host" for name in chosen]),
        bias="none",
        init_lora_weights=False,
        task_type=task_type_of(model),
    )
    peft_model = wrap(model, given, adapter_name)
    for name, layer in chosen.items():
        if not isinstance(layer.host, BasisLora) or adapter_name not in layer.host.lora_basis:
            raise LordError(f"PEFT did not wrap '{name}.host'; report this model.")
        # PEFT's move to float32 may make those of an adapter that is not the active one trainable
        layer.host.lora_basis[adapter_name].requires_grad_(adapter_name in peft_model.active_adapters)
    return peft_model


def learnt(model: CausalModel, adapter_name: str = "default") -> dict[str, torch.nn.Parameter]:
    """Layer -> w (rank,), the roots of its singular values; 0 where they are pruned."""
    layers = factored_layers(plain_model(model)).items()
    hosts = {name: layer.host for name, layer in layers if isinstance(layer.host, BasisLora)}
    return {name: host.lora_basis[adapter_name] for name, host in hosts.items() if adapter_name in host.lora_basis}


def _freeze(layer: FactoredLinear) -> None:
    """Move the parts of a layer into its host."""
    left, right = layer.left, layer.right
    if isinstance(left, PivotedLinear):
        if layer.device.type == "meta":  # nothing to decompose: a training step is foreseen
            pair = torch.empty(layer.out_features, layer.rank), torch.empty(layer.rank, layer.in_features)
            left, right = (linear_of(value.to("meta")) for value in pair)
        else:
            left, right = (linear_of(value.float()) for value in principal(*layer.dense_factors()))
    layer.host = FrozenBasis(left, right, layer.backbone)
    layer.left = layer.right = layer.backbone = None
