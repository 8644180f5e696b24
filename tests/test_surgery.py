"""Which modules are linear layers, and what becomes of those that share one weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import read_tensors, save_tiny
from torch import Tensor, nn
from transformers import ZambaConfig, ZambaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.pytorch_utils import Conv1D

import lord_tune
from lord_tune.errors import LordWarning
from lord_tune.layers import CastLinear, factored_layers, is_linear


class Renamed(nn.Linear):
    """A class that changes nothing."""


class Named(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        found = torch.matmul(hidden, self.weight.t())
        return found if self.bias is None else found + self.bias


class Rectified(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Paired(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


class Normed(nn.Linear):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])


class Scaled(nn.Linear):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


class Doubled(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


LINEAR = {
    "linear": lambda: nn.Linear(8, 4),
    "conv1d": lambda: Conv1D(4, 8),
    "a new name": lambda: Renamed(8, 4),
    "another argument": lambda: Named(8, 4),
    "without bias": lambda: Named(8, 4, bias=False),
    "half": lambda: FalconLinear(8, 4).bfloat16(),
    "falcon": lambda: FalconLinear(8, 4),
    "meta": lambda: FalconLinear(8, 4, device="meta"),
}
OTHER = {
    "activation": lambda: Rectified(8, 4),
    "tuple": lambda: Paired(8, 4),
    "a part of its own": lambda: Normed(8, 4),
    "a parameter of its own": lambda: Scaled(8, 4),
    "call": lambda: Doubled(8, 4),
    "router": lambda: Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)),
    "groups": lambda: DeepseekV4GroupedLinear(4, 8, 2),
    "fp8": lambda: FP8Linear(128, 128),
    "attention's": lambda: nn.MultiheadAttention(8, 2).out_proj,
    "ours": lambda: CastLinear(8, 4, torch.float32),
    "lookup": lambda: nn.Embedding(8, 4),
}


@pytest.mark.parametrize("name", LINEAR | OTHER)
def test_a_layer_is_linear_if_it_computes_as_one(name):
    module = (LINEAR | OTHER)[name]()
    before = dict(module.__dict__)
    assert is_linear(module) == (name in LINEAR)
    assert module.__dict__ == before


def test_layers_that_two_blocks_share_stay_dense_and_are_written_once(rows_file, tmp_path):
    """Zamba has one attention block in several places, with weights of its own around it."""
    config = ZambaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=8, initializer_range=0.12,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    torch.manual_seed(0)
    dense = ZambaForCausalLM(config).eval()
    base = save_tiny(dense, tmp_path / "base")
    text: dict[str, Any] = {"calibration": [str(rows_file)], "calibration_tokens": 128, "context_length": 32}
    with pytest.warns(LordWarning, match="14 layers share their weights and stay dense"):
        report = lord_tune.decompose(str(base), str(tmp_path / "out"), backbone="nf4", rank=8, **text)
    inside = {name for name, module in dense.model.layers.named_modules(prefix="model.layers") if is_linear(module)}
    shared = {name for name in inside if ".shared_transf." in name}
    assert len(shared) == 14 and not shared & set(report["layers"])
    assert all(report["skipped"][name].startswith("shares its weight with") for name in shared)

    stored = [name for name in read_tensors(tmp_path / "out") if name.endswith("shared_transf.self_attn.q_proj.weight")]
    assert len(stored) == 1
    again = ZambaForCausalLM.from_pretrained(tmp_path / "out").eval()
    one, other = (again.model.layers[i].shared_transf.self_attn.q_proj.weight for i in (1, 3))
    assert one is other and torch.equal(one, dense.model.layers[1].shared_transf.self_attn.q_proj.weight)
    layers = factored_layers(again)
    assert set(layers) == set(report["layers"]) != set()
    with torch.no_grad():
        ids = torch.randint(1, 250, (2, 32))
        before = dense(input_ids=ids, use_cache=False).logits
        for name, layer in layers.items():
            dense.get_submodule(name).weight.copy_(layer.dense_weight())
        expected = dense(input_ids=ids, use_cache=False).logits
        found = again(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, before, atol=1e-3)
