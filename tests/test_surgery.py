"""Which modules are linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.pytorch_utils import Conv1D

from lord_tune.layers import CastLinear, is_linear


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
