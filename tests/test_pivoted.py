"""Pivoted factors: the matrix of L and R in r (out + in - r) numbers, through decomposing, reloading and exporting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_family

import lord_tune
from lord_tune.allocation import PIVOTED, PLAIN, break_even, factor_cost, rank_grid, rank_within
from lord_tune.errors import UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import CastLinear, PivotedLinear, factored_layers, pivoted
from lord_tune.layers.sizes import sizes

IDS = torch.arange(1, 60)[None]
SHAPES = [(64, 32, 8), (32, 64, 31), (160, 64, 40), (20, 20, 1), (20, 20, 19)]


def matrices(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + rank)
    left = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    return left, torch.randn(rank, n, dtype=torch.float64, generator=generator)


def filled(left: torch.Tensor, right: torch.Tensor) -> tuple[PivotedLinear, torch.Tensor]:
    rows, rest, chosen = pivoted(left, right)
    layer = PivotedLinear(CastLinear(left.shape[1], len(left) - left.shape[1], torch.float64))
    layer.set_rows(rows)
    layer.rest.weight = torch.nn.Parameter(rest, requires_grad=False)
    return layer, chosen


@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_the_product_is_the_same(m, n, rank):
    left, right = matrices(m, n, rank)
    layer, chosen = filled(left, right)
    product = left @ right
    assert (layer.dense(torch.float64) @ chosen - product).norm() <= 1e-13 * product.norm()
    assert torch.equal(chosen, chosen) and (chosen - product[layer.rows.long()]).norm() <= 1e-13 * product.norm()
    assert layer.rows.dtype == torch.int32 and (layer.rows.diff() > 0).all() if rank > 1 else True
    x = torch.randn(2, 3, n, dtype=torch.float64)
    assert (layer(x @ chosen.T) - x @ product.T).norm() <= 1e-12 * (x @ product.T).norm()
    assert layer.rest.weight.numel() + chosen.numel() + layer.rows.numel() == factor_cost((m, n), rank, PIVOTED)


def test_a_left_factor_without_full_rank_loses_nothing():
    left, right = matrices(64, 32, 8)
    left[:, 5] = left[:, 2]
    left[:, 7] = 0
    layer, chosen = filled(left, right)
    assert (layer.dense(torch.float64) @ chosen - left @ right).norm() <= 1e-13 * (left @ right).norm()


def test_gradients_are_those_of_the_matrix():
    layer, _ = filled(*matrices(20, 10, 4))
    layer.rest.weight.requires_grad_(True)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 20, dtype=torch.float64)
    (layer(z) * weights).sum().backward()
    other = z.detach().clone().requires_grad_(True)
    (other @ layer.dense(torch.float64).detach().T * weights).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    assert layer.rest.weight.grad is not None and layer.rest.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (576, 1536), (20, 20), (8, 4096)])
def test_what_a_rank_costs(shape):
    for form in (PLAIN, PIVOTED):
        limit, numbers = break_even(shape, form), shape[0] * shape[1]
        assert factor_cost(shape, limit, form) < numbers <= factor_cost(shape, limit + 1, form)
        for rank in range(limit):
            assert factor_cost(shape, rank, form) < factor_cost(shape, rank + 1, form)
            assert rank_within(shape, factor_cost(shape, rank, form), form) == rank
    assert break_even(shape, PIVOTED) >= break_even(shape, PLAIN)
    assert break_even((64, 64), PIVOTED) == 56 and break_even((64, 64), PLAIN) == 31
    assert set(rank_grid(shape)) <= set(rank_grid(shape, form=PIVOTED))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, rows_file):
    """(family, form, options) -> (folder, report)"""
    root, done = tmp_path_factory.mktemp("pivoted"), {}

    def run(family: str, form: str, **options):
        key = family, form, json.dumps(options)
        if key not in done:
            base = root / family
            if not base.exists():
                save_tiny(tiny_family(family), base)
            out = root / str(len(done))
            given = {"calibration": [str(rows_file)], "calibration_tokens": 512, "context_length": 64} | options
            done[key] = out, lord_tune.decompose(str(base), str(out), form=form, **given)
        return done[key]

    return run


def logits(folder: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return load_dense_or_factored(str(folder))(IDS).logits.double()


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("method", ["whitened", "afm"])
def test_the_decomposed_model_is_that_of_plain_factors(family, method, runs):
    """float32 forward passes of one matrix in two orders of sums."""
    (plain, before), (out, report) = (runs(family, form, rank=8, method=method) for form in (PLAIN, PIVOTED))
    near(logits(out), logits(plain))
    assert report["totals"]["model_bytes"] < before["totals"]["model_bytes"]
    model = load_dense_or_factored(str(out))
    assert sizes(model)["model_bytes"] == report["totals"]["model_bytes"]
    for name, layer in factored_layers(model).items():
        numbers = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
        assert numbers == factor_cost(layer.plan.shape, layer.rank, PIVOTED), name


def test_plan_foresees_what_is_written(runs):
    out, report = runs("llama", PIVOTED, rank=8)
    plan = lord_tune.plan(str(out.parent / "llama"), rank=8, form=PIVOTED)
    assert plan["model_bytes_after"] == report["totals"]["model_bytes"]
    assert plan["linear_bits_per_weight"] == report["totals"]["linear_bits_per_weight"]


@pytest.mark.parametrize("allocation", ["uniform", "loss_weighted"])
def test_a_kept_fraction_is_met_with_higher_ranks(allocation, runs):
    ranks = {}
    for form in (PLAIN, PIVOTED):
        _, report = runs("llama", form, kept_fraction=0.8, allocation=allocation)
        cost = {
            name: e["shape"][0] * e["shape"][1] if e["rank"] == "dense" else factor_cost(e["shape"], e["rank"], form)
            for name, e in report["layers"].items()
        }
        dense = sum(e["shape"][0] * e["shape"][1] for e in report["layers"].values())
        assert report["totals"]["kept_fraction"] == pytest.approx(sum(cost.values()) / dense)
        assert 0.7 < report["totals"]["kept_fraction"] <= 0.8
        ranks[form] = sum(min(e["shape"]) if e["rank"] == "dense" else e["rank"] for e in report["layers"].values())
    assert ranks[PIVOTED] > ranks[PLAIN]


def test_a_rank_above_the_break_even_of_plain_factors(runs):
    _, report = runs("llama", PIVOTED, rank=56)
    ranks = {tuple(entry["shape"]): entry["rank"] for entry in report["layers"].values()}
    assert ranks[64, 64] == 56 and ranks[32, 64] == "dense"
    with pytest.raises(UsageError, match="above break-even for every layer"):
        runs("llama", PIVOTED, rank=64)


def test_beside_a_backbone_and_with_bits(runs):
    (plain, _), (out, _) = (
        runs("llama", form, rank=8, backbone="nf4", factor_format="bf16") for form in (PLAIN, PIVOTED)
    )
    near(logits(out), logits(plain), 0.02)  # both round to bfloat16, different numbers
    ranks = {}
    for form in (PLAIN, PIVOTED):
        _, report = runs("llama", form, bits_per_weight=13.5, backbone="int4", factor_format="fp16")
        assert report["totals"]["linear_bits_per_weight"] <= 13.5
        ranks[form] = sum(entry["rank"] for entry in report["layers"].values())
    assert ranks[PIVOTED] > ranks[PLAIN]


def test_saved_again_cast_and_exported(runs, tmp_path):
    out, _ = runs("llama", PIVOTED, rank=8)
    model = load_dense_or_factored(str(out))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(out))
    layer = next(iter(factored_layers(model).values()))
    dense = layer.dense_weight(torch.float64)
    model.to(torch.bfloat16)
    assert torch.equal(layer.dense_weight(torch.float64), dense) and layer.left.rows.dtype == torch.int32
    assert layer.weight.shape == layer.plan.shape and layer.weight.dtype == torch.bfloat16
    lord_tune.export(str(out), str(tmp_path / "dense"), "dense")
    near(logits(tmp_path / "dense"), logits(out))


def test_blocks_are_recovered_in_place(runs):
    _, report = runs("llama", PIVOTED, rank=8, recover_epochs=2)
    found = report["recovery"].values()
    assert len(found) == 3 and any(entry["after"] < entry["before"] for entry in found)
    assert report["totals"]["model_bytes"] == runs("llama", PIVOTED, rank=8)[1]["totals"]["model_bytes"]


def test_packed_factors_are_refused(runs):
    with pytest.raises(UsageError, match="`factor_format` nf4 needs `form` plain"):
        runs("llama", PIVOTED, rank=8, factor_format="nf4")


def test_a_plan_carries_the_form(runs, rows_file, tmp_path):
    out, report = runs("llama", PIVOTED, rank=8)
    again = lord_tune.decompose(
        *(str(out.parent / "llama"), str(tmp_path / "again")),
        **{"plan": str(out / "plan.json"), "calibration": [str(rows_file)]},
        **{"calibration_tokens": 512, "context_length": 64},
    )
    assert again["totals"]["model_bytes"] == report["totals"]["model_bytes"]
    content = json.loads((out / "plan.json").read_text())
    next(iter(content["layers"].values()))["form"] = "pivotal"
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="'pivotal'.*pivoted"):
        lord_tune.decompose(str(out.parent / "llama"), str(tmp_path / "x"), plan=str(tmp_path / "bad.json"))
