"""Pivoted factors in packed formats: C and B rounded with feedback, stored, trained and exported as L and R are."""

from __future__ import annotations

import pytest
import torch
from contracts import inputs, moments_of
from tiny import save_tiny, tiny_family

import lord_tune
from lord_tune.allocation import PIVOTED, PLAIN
from lord_tune.decomposition import Rates
from lord_tune.errors import UsageError
from lord_tune.factorizations import FactorForm, Whitened, pivoted_left, relative_error, round_factors, truncate
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import PivotedLinear, QuantizedLinear, factored_layers
from lord_tune.layers.sizes import sizes
from lord_tune.plans import LayerChoice
from lord_tune.quantizers import E8P2, E8P4, NF4, Int4, Lloyd4, Rotated

IDS = torch.arange(1, 60)[None]
TEXT = {"calibration_tokens": 512, "context_length": 64}
FORMATS = {
    "nf4": {"factor_format": "nf4"},
    "int4, rotated": {"factor_format": "int4", "incoherence": True},
    "e8-3": {"factor_format": "e8-3"},
    "spqr": {"factor_format": "spqr"},
    "beside Q": {"factor_format": "lloyd4", "backbone": "nf4"},
    "caldera": {"factor_format": "lloyd4", "backbone": "e8-2", "method": "caldera", "iterations": 1},
}
FORMS = [NF4(), Int4(), Rotated(Lloyd4()), Rotated(E8P2()), Rotated(E8P4())]


@pytest.fixture(scope="module")
def problem():
    """A weight with decaying directions, moments of its input, its factors of rank 24."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    weight = weight @ torch.diag(torch.logspace(0, -1, 64, dtype=torch.float64)) @ weight[:64].T
    moments = moments_of(inputs(64))
    spectrum = Whitened().spectrum(weight, moments)
    return weight, moments, truncate(weight, spectrum, 24)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_stored_is_the_product(form, problem):
    weight, moments, factors = problem
    found = round_factors(weight, moments.gram, factors, FactorForm(form, pivoted=True))
    rest = form.dequantize(found.left_parts, (72, 24), torch.float64)
    assert torch.equal(found.left, pivoted_left(rest, found.pivots))
    assert torch.equal(found.right, form.dequantize(found.right_parts, (24, 64), torch.float64))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_feedback_errs_less_than_rounding_to_the_nearest(form, problem):
    weight, moments, factors = problem
    found = round_factors(weight, moments.gram, factors, FactorForm(form, pivoted=True))
    nearest = round_factors(
        weight, torch.diag(moments.gram.diagonal()), factors, FactorForm(form, pivoted=True), rounds=1
    )
    errors = [relative_error(weight - f.product(), weight, moments) for f in (factors, found, nearest)]
    assert errors[0] < errors[1] < errors[2]


def test_as_many_components_as_outputs_stay_plain():
    choice = LayerChoice("svd", 16, backbone="nf4", factor_format="nf4", form=PIVOTED)
    assert choice.on((16, 40), torch.float32, False, False).form == PLAIN
    assert choice.on((17, 40), torch.float32, False, False).form == PIVOTED
    weight = torch.randn(16, 40, dtype=torch.float64)
    factors = truncate(weight, Whitened().spectrum(weight, moments_of(inputs(40))), 16)
    assert round_factors(weight, None, factors, choice.factor_form()).pivots is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory, rows_file):
    """name of FORMATS, form -> (folder, report)"""
    root, done = tmp_path_factory.mktemp("packed"), {}
    save_tiny(tiny_family("llama"), root / "base")

    def run(name: str, form: str = PIVOTED):
        if (name, form) not in done:
            out = root / str(len(done))
            options = TEXT | {"rank": 16, "calibration": [str(rows_file)], "form": form} | FORMATS[name]
            done[name, form] = out, lord_tune.decompose(str(root / "base"), str(out), **options)
        return done[name, form]

    run.base = root / "base"
    return run


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model(IDS).logits.double()


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", FORMATS)
def test_stored_in_fewer_bytes_foreseen_to_the_byte_and_exported(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Rates, "measure", lambda *probe: Rates(1e10, 1e10, 1e10, 1e10))  # which takes seconds
    (out, report), (_, plain) = runs(name), runs(name, PLAIN)
    assert report["totals"]["model_bytes"] < plain["totals"]["model_bytes"]
    plan = lord_tune.plan(str(runs.base), form=PIVOTED, rank=16, **FORMATS[name])
    assert plan["model_bytes_after"] == report["totals"]["model_bytes"]
    assert plan["linear_bits_per_weight"] == report["totals"]["linear_bits_per_weight"]
    model = load_dense_or_factored(str(out))
    assert sizes(model)["model_bytes"] == report["totals"]["model_bytes"]
    for layer in factored_layers(model).values():
        assert isinstance(layer.left, PivotedLinear) and isinstance(layer.left.rest, QuantizedLinear)
        assert isinstance(layer.right, QuantizedLinear) and layer.left.weight.dtype == torch.float32
    before = outputs(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(load_dense_or_factored(str(tmp_path / "saved"))), before)
    lord_tune.export(str(out), str(tmp_path / "dense"), "dense")
    near(outputs(load_dense_or_factored(str(tmp_path / "dense"))), before)
    shown = lord_tune.inspect(str(out))
    assert {row["form"] for row in shown["layers"].values()} == {PIVOTED}
    rank = shown["layers"]["model.layers.0.self_attn.q_proj"]
    assert rank["error_calibrated"] < 0.9


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options", [{"on": "both"}, {"on": "left"}, {"on": "right"}, {"scales": "components_and_outputs"}]
)
def test_adapters_train_and_fold_without_rounding(options, runs, tmp_path):
    out, _ = runs("nf4")
    model = load_dense_or_factored(str(out))
    before = outputs(model)
    scales = options.get("scales")
    exposed = lord_tune.add_scales(model, on=scales) if scales else lord_tune.add_lora(model, rank=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in exposed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    after = outputs(exposed.eval())
    assert (after - before).norm() > 1e-3 * before.norm()
    lord_tune.merge(exposed)
    near(outputs(exposed), after)
    lord_tune.unmerge(exposed)
    folded = lord_tune.fold(exposed)
    near(outputs(folded), after)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(outputs(load_dense_or_factored(str(tmp_path / "folded"))), outputs(folded))
    for layer in factored_layers(folded).values():
        if options.get("on") == "right":  # C is as it was
            assert layer.plan.form == PIVOTED and layer.plan.left_format == "nf4" and layer.plan.right_format == "fp32"
        elif options.get("on") == "both":
            assert layer.plan.form == PIVOTED and layer.plan.left_format == "fp32"


def test_scales_of_components_go_into_b(runs):
    exposed = lord_tune.add_scales(load_dense_or_factored(str(runs("nf4")[0])))
    before = outputs(exposed)
    folded = lord_tune.fold(exposed)
    near(outputs(folded), before)


@pytest.mark.parametrize("mode", ["factors", "split"])
def test_what_packed_factors_cannot_be_is_refused(mode, runs):
    message = "stored as nf4, which cannot be trained" if mode == "factors" else "no components stored apart"
    with pytest.raises(UsageError, match=message):
        lord_tune.expose_factors(load_dense_or_factored(str(runs("nf4")[0])), mode=mode)


def test_components_apart_need_plain_factors(runs, tmp_path):
    with pytest.raises(UsageError, match="`top_rank` needs `form` plain"):
        lord_tune.decompose(
            *(str(runs.base), str(tmp_path / "x")),
            **{"rank": 8, "method": "svd", "factor_format": "nf4", "top_rank": 2, "form": PIVOTED},
        )
    with pytest.raises(UsageError, match="pivoted factors and top_rank 2"):
        LayerChoice.from_dict("q", {"method": "svd", "rank": 8, "factor_format": "nf4", "top_rank": 2, "form": PIVOTED})


def test_training_is_foreseen_to_the_byte(runs, rows_file, tmp_path):
    given = {"model_name_or_path": str(runs("e8-3")[0]), "dataset_name": str(rows_file), "max_length": 64}
    given |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "max_steps": 2}
    metrics = lord_tune.train(output_dir=str(tmp_path / "run"), mode="lora", **given)
    predicted, measured = metrics["memory"]["predicted"], metrics["memory"]["measured"]
    for part in ("weights", "adapters", "gradients", "optimizer"):
        assert predicted[part] == measured[part], part
    assert lord_tune.export(str(tmp_path / "run"), str(tmp_path / "f"), "factored", text=str(rows_file))
