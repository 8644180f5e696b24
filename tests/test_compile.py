"""torch.compile takes decomposed layers whole: no graph breaks, and what eager gives."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny, tiny_llama
from torch import nn
from torch._dynamo.utils import counters

import lord_tune
from lord_tune.factorizations import Factors
from lord_tune.layers.factored_linear import FactoredLinear, build_layer
from lord_tune.plans import LayerPlan
from lord_tune.quantizers import QUANTIZERS, make_quantizer

OUT, IN, RANK = 64, 96, 8
FORMATS = [("none", False), *((name, False) for name in QUANTIZERS), ("e8-2", True), ("spqr", True), ("lloyd3", True)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def layer_of(name: str, rotated: bool, form: str) -> FactoredLinear:
    torch.manual_seed(0)
    weight, left, right = torch.randn(OUT, IN), torch.randn(OUT, RANK).double(), torch.randn(RANK, IN).double()
    if name == "none":
        plan = LayerPlan((OUT, IN), RANK, "svd", form=form, bias=True)
        return build_layer(plan, Factors(left, right), None, torch.zeros(OUT), torch.float32)
    quantizer = make_quantizer(name, {"incoherence": True} if rotated else None)
    options = quantizer.options()
    packed = {"left_format": name, "right_format": name, "factor_options": options}
    plan = LayerPlan((OUT, IN), RANK, "svd", backbone=name, backbone_options=options, form=form, bias=True, **packed)
    return build_layer(plan, Factors(left, right), quantizer.quantize(weight), torch.zeros(OUT), torch.float32)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize(("name", "rotated"), FORMATS[::-1], ids=[f"{n}{'-rotated' * r}" for n, r in FORMATS[::-1]])
def test_a_layer_is_one_graph(name, rotated, form):
    model = nn.Sequential(layer_of(name, rotated, form))
    x = torch.randn(2, 5, IN, requires_grad=True)
    expected = model(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a break is an error
    found = compiled(x)
    (own,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(found, expected)
    # a rotated product goes back through the rotation in another order of sums
    assert torch.allclose(own, slope, rtol=1e-5, atol=1e-5 * float(slope.abs().max()))
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("name", ["nf4", "int4", "none"])
def test_under_autocast_the_result_has_the_narrow_dtype(name):
    model = nn.Sequential(layer_of(name, False, "plain"))
    x = torch.randn(5, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_rotated_inputs_are_never_those_of_another_pass():
    """Compiled code writes new values into the tensors of earlier ones, where eager code makes new tensors."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(layer_of("lloyd3", True, "plain") for _ in range(2)))
    layers.insert(1, nn.Linear(OUT, IN))
    compiled = torch.compile(layers, backend="inductor", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, IN)
            assert torch.allclose(compiled(x), layers(x), rtol=1e-4, atol=1e-3)


SPLIT = {"backbone": "e8-2", "factor_format": "int4", "top_rank": 4}


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("factors", {"backbone": "int3"}),
        ("factors", {}),
        ("split", SPLIT),
        ("lora", {"backbone": "nf4"}),
        ("scales", {"backbone": "int4"}),
    ],
    ids=["factors-int3", "factors", "split", "lora", "scales"],
)
def test_training_compiled_is_training(mode, how, rows_file, tmp_path):
    """The losses are those of the eager run, and what is not one graph is trl's loss."""
    source, base = save_tiny(tiny_llama(layers=1), tmp_path / "model"), tmp_path / "base"
    text = {"calibration": [str(rows_file)], "calibration_tokens": 512, "context_length": 64}
    lord_tune.decompose(str(source), str(base), rank=8, **text, **how)
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        out = str(tmp_path / f"run{len(losses)}")
        given = {"model_name_or_path": str(base), "dataset_name": str(rows_file), "output_dir": out}
        short = {"max_steps": 2, "max_length": 32, "per_device_train_batch_size": 2, "save_strategy": "no"}
        losses.append(lord_tune.train(**given, mode=mode, bf16=False, **short, **options)["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    reasons = list(counters["graph_break"])
    assert all("built-in method mm" in reason for reason in reasons), reasons  # into a part of a tensor, in trl
