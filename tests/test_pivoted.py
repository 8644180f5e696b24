"""Pivoted factors: the matrix of L and R in r (out + in - r) numbers, through decomposing, reloading and exporting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_family
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

import lord_tune
from lord_tune.allocation import PIVOTED, PLAIN, break_even, factor_cost, rank_grid, rank_within
from lord_tune.config import DecomposeConfig
from lord_tune.errors import UsageError
from lord_tune.factorizations import pivoted
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import CastLinear, PivotedLinear, factored_layers
from lord_tune.layers.sizes import sizes
from lord_tune.linalg import principal
from lord_tune.plans import LayerChoice
from lord_tune.provenance import lasting
from lord_tune.resolve import request_of

IDS = torch.arange(1, 60)[None]
SHAPES = [(64, 32, 8), (32, 64, 31), (160, 64, 40), (20, 20, 1), (20, 20, 19)]


def matrices(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + rank)
    left = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    return left, torch.randn(rank, n, dtype=torch.float64, generator=generator)


def filled(left: torch.Tensor, right: torch.Tensor) -> tuple[PivotedLinear, torch.Tensor]:
    rows, rest, chosen = pivoted(left, right)
    layer = PivotedLinear(CastLinear(left.shape[1], len(left) - left.shape[1], torch.float64))
    layer.rows = torch.nn.Parameter(rows, requires_grad=False)
    layer.rest.weight = torch.nn.Parameter(rest, requires_grad=False)
    return layer, chosen


@pytest.mark.parametrize("m, n, rank", SHAPES)
def test_the_product_is_the_same(m, n, rank):
    left, right = matrices(m, n, rank)
    layer, chosen = filled(left, right)
    product = left @ right
    assert (layer.dense(torch.float64) @ chosen - product).norm() <= 1e-13 * product.norm()
    assert (chosen - product[layer.rows.long()]).norm() <= 1e-13 * product.norm()
    assert layer.rows.dtype == torch.int32 and bool((layer.rows.diff() > 0).all())
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


@pytest.mark.parametrize("used", [False, True])  # before
def test_fake_tensors_come_and_leave_nothing_behind(used):
    """As in a torch.export that fails."""
    z = torch.randn(3, 8, dtype=torch.float64)
    layer, _ = filled(*matrices(64, 32, 8))
    wanted = layer(z) if used else z @ layer.dense(torch.float64).T
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(parameter) for name, parameter in layer.named_parameters()}
        found = torch.func.functional_call(layer, fakes, (mode.from_tensor(z),))
    assert found.shape == wanted.shape and is_fake(found)
    assert not is_fake(layer(z))
    torch.testing.assert_close(layer(z), wanted)


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


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "whitened"), ("gpt2", "whitened"), ("mixtral", "whitened"), ("bert", "afm")]
)
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
    assert ranks[PIVOTED] >= ranks[PLAIN] > 0


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


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"rank": 8}, PIVOTED),
        ({"kept_fraction": 0.8, "factor_format": "nf4"}, PIVOTED),
        ({"rank": 8, "method": "afm"}, PIVOTED),
        ({"rank": 8, "form": PLAIN}, PLAIN),
        ({"rank": 8, "backbone": "nf4"}, PLAIN),
        ({"rank": 8, "backbone": "nf4", "form": PIVOTED}, PIVOTED),
        ({"bits_per_weight": 6.0}, PLAIN),
        ({"rank": 8, "factor_format": "int4", "top_rank": 2}, PLAIN),
    ],
)
def test_the_default_is_pivoted_without_a_backbone(options, form):
    config = DecomposeConfig.build({"model": "m", "out": "o", "calibration": ["c.txt"], **options})
    assert config.stored_form == form == lasting(config)["form"] == request_of(config).template.form


def test_checkpoints_and_plans_without_the_key_are_plain(runs, tmp_path):
    """Written before there were two forms."""
    out, _ = runs("llama", PLAIN, rank=8)
    old = shutil.copytree(out, tmp_path / "old")
    content = json.loads((old / "config.json").read_text())
    entries = content["quantization_config"]["layers"].values()
    assert all(entry.pop("form") == PLAIN for entry in entries)
    (old / "config.json").write_text(json.dumps(content))
    assert torch.equal(logits(old), logits(out))
    entry = json.loads((out / "plan.json").read_text())["layers"]["model.layers.0.self_attn.q_proj"]
    assert entry.pop("form") == PLAIN and LayerChoice.from_dict("q", entry).form == PLAIN


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


def trained(model, mode, seed=0):
    """The model with an adapter whose parameters moved, as training moves them."""
    if mode == "factors":
        exposed = lord_tune.expose_factors(model)
    elif mode == "lora":
        exposed = lord_tune.add_lora(model, rank=2)
    elif mode == "basis":
        exposed = lord_tune.add_basis(model, 2)
    else:
        exposed = lord_tune.add_scales(model, on="components_and_outputs")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exposed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return exposed.eval()


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model(IDS).logits.double()


@pytest.mark.parametrize("mode", ["factors", "lora", "scales", "basis"])
def test_an_adapter_trains_and_folds_into_pivoted_factors_again(mode, runs, tmp_path):
    out, report = runs("llama", PIVOTED, rank=8)
    model = load_dense_or_factored(str(out))
    before = outputs(model)
    exposed = trained(model, mode)
    after = outputs(exposed)
    assert (after - before).norm() > 1e-3 * before.norm()
    with exposed.disable_adapter():
        near(outputs(exposed), before)
    exposed.save_pretrained(tmp_path / "adapter")
    loaded = lord_tune.load_adapter(load_dense_or_factored(str(out)), str(tmp_path / "adapter"))
    near(outputs(loaded.eval()), after)
    lord_tune.merge(exposed)
    near(outputs(exposed), after)
    lord_tune.unmerge(exposed)
    folded = lord_tune.fold(exposed)
    near(outputs(folded), after)
    layers = factored_layers(folded)
    assert all(isinstance(layer.left, PivotedLinear) and layer.plan.form == PIVOTED for layer in layers.values())
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(tmp_path / "folded"), outputs(folded))
    assert (sizes(folded)["model_bytes"] == report["totals"]["model_bytes"]) == (mode != "basis")  # which adds two


def test_gradients_reach_l_and_r(runs):
    exposed = lord_tune.expose_factors(load_dense_or_factored(str(runs("llama", PIVOTED, rank=8)[0])))
    exposed(IDS, labels=IDS).loss.backward()
    trains = [p for p in exposed.parameters() if p.requires_grad]
    assert len(trains) == 42 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trains)
    host = exposed.base_model.model.model.layers[0].mlp.down_proj.host
    left, right = (found["default"].weight.detach().double() for found in (host.lora_B, host.lora_A))
    for gram in (left.T @ left, right @ right.T):  # orthogonal components of equal norm
        assert (gram - gram.diag().diag()).norm() <= 1e-5 * gram.norm()
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)


def test_several_adapters_are_differences(runs, tmp_path):
    out, _ = runs("llama", PIVOTED, rank=8)
    model = load_dense_or_factored(str(out))
    base = outputs(model)
    exposed = trained(model, "factors")
    one = outputs(exposed)
    again = lord_tune.expose_factors(exposed, adapter_name="other")
    again.set_adapter("other")
    near(outputs(again), base)
    again.set_adapter("default")
    near(outputs(again), one)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_what_reads_or_writes_a_stored_weight_is_refused(options, runs):
    with pytest.raises(UsageError, match="stored as pivoted factors"):
        lord_tune.add_lora(load_dense_or_factored(str(runs("llama", PIVOTED, rank=8)[0])), rank=2, **options)


def test_trained_by_the_command_foreseen_to_the_byte_and_exported(runs, rows_file, tmp_path):
    out, _ = runs("llama", PIVOTED, rank=8)
    given = {"model_name_or_path": str(out), "dataset_name": str(rows_file), "max_length": 64, "max_steps": 2}
    given |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "logging_steps": 1}
    metrics = lord_tune.train(output_dir=str(tmp_path / "run"), **given)
    predicted, measured = metrics["memory"]["predicted"], metrics["memory"]["measured"]
    for part in ("weights", "adapters", "gradients", "optimizer"):
        assert predicted[part] == measured[part], part
    report = lord_tune.export(str(tmp_path / "run"), str(tmp_path / "f"), "factored", text=str(rows_file))
    assert report
    model = load_dense_or_factored(str(tmp_path / "f"))
    assert all(isinstance(layer.left, PivotedLinear) for layer in factored_layers(model).values())


def test_components_of_no_size_can_train():
    """CALDERA's fallback has L = 0: with R = 0 as well no gradient would reach either."""
    left, right = matrices(20, 10, 4)
    left, right = left * torch.tensor([1.0, 1, 0, 0]), right.clone()
    found = principal(left, right)
    assert bool((principal(left * 0, right)[1].norm(dim=1) > 0.9).all())
    assert (found[0] @ found[1] - left @ right).norm() <= 1e-13 * (left @ right).norm()
    assert torch.equal(found[0][:, 2:], torch.zeros(20, 2).double())
    torch.testing.assert_close(found[1][2:].norm(dim=1), torch.ones(2).double())


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 5)])
def test_more_components_than_rows_or_columns_become_as_many_as_there_are(shape):
    left, right = matrices(*shape, 9)
    found = principal(left, right)
    assert found[0].shape == (shape[0], min(shape)) and found[1].shape == (min(shape), shape[1])
    assert (found[0] @ found[1] - left @ right).norm() <= 1e-13 * (left @ right).norm()
