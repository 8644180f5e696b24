"""two_sided: the optimum in both norms, against brute force; the statistic it needs; runs from end to end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts import SHAPES, inputs, moments_of, output_gram_of, weight
from sklearn.covariance import ledoit_wolf_shrinkage
from test_engine import CALIBRATION, decompose_recorded, linear_weight
from tiny import read_tensors, save_tiny, tiny_family, tiny_llama, tiny_tokenizer
from torch import Tensor, nn

import lord_tune
from lord_tune.calibration.blocks import find_blocks
from lord_tune.calibration.collect import BlockWalk
from lord_tune.calibration.moments import SampleAccumulator
from lord_tune.calibration.sensitivity import output_grams, whole_model_output_grams
from lord_tune.decomposition.gradients import gram_beside
from lord_tune.decomposition.layerwise import NO_GRADIENT, analyse, install, project_layer
from lord_tune.errors import UsageError
from lord_tune.factorizations import TwoSided, Whitened, error_curves, relative_error, truncate
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.running import task_of
from lord_tune.layers import factored_layers, select_linears
from lord_tune.plans import LayerChoice, Plan

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def damped(gram: Tensor, damping: float) -> Tensor:
    return (1 - damping) * gram + damping * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)


def loss(residual: Tensor, gram: Tensor, moments: Any) -> float:
    """tr(G (W - W') H (W - W')^T)"""
    return float((gram @ residual @ moments.gram * residual).sum())


def optimum(w: Tensor, gram: Tensor, moments: Any, rank: int) -> Tensor:
    """A^-1 [A W S]_r S^-1 with the symmetric roots of both moments and their explicit inverses."""

    def root(matrix: Tensor) -> tuple[Tensor, Tensor]:
        energies, axes = torch.linalg.eigh(matrix)
        return axes * energies.sqrt() @ axes.T, axes / energies.sqrt() @ axes.T

    (a, a_inverse), (s, s_inverse) = root(gram), root(moments.gram)
    u, sigma, vt = torch.linalg.svd(a @ w @ s, full_matrices=False)
    return a_inverse @ (u[:, :rank] * sigma[:rank]) @ vt[:rank] @ s_inverse


# ---- the optimum ---


@shapes
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("rank", [1, 6, 13])
def test_the_loss_is_that_of_whitening_both_sides_explicitly(shape, damping, rank):
    w, moments, gram = weight(shape), moments_of(inputs(shape[1])), output_gram_of(shape[0])
    metric = damped(gram, damping)
    found = TwoSided(0.0, damping).split(w, moments, rank, None, output_gram=gram).factors
    expected = optimum(w, metric, moments, rank)
    least = loss(w - expected, metric, moments)
    assert loss(w - found.product(), metric, moments) == pytest.approx(least, rel=1e-9)
    if damping < 1:  # what weighs the outputs alike costs more; measured: 1.048 to 10 times
        plain = Whitened(0.0).split(w, moments, rank, None).factors.product()
        assert loss(w - plain, metric, moments) > 1.03 * least


@shapes
def test_the_energies_are_the_loss_of_what_is_dropped(shape):
    """In the damped metric; the allocators' prediction at every rank."""
    w, moments, gram = weight(shape), moments_of(inputs(shape[1])), output_gram_of(shape[0])
    spectrum = TwoSided(0.0, 0.01).spectrum(w, moments, gram)
    whole = loss(w, damped(gram, 0.01), moments)
    for rank in range(0, min(shape) + 1, 4):
        factors = truncate(w, spectrum, rank)
        # differences of the matrix at full rank are rounding of its entries
        expected = loss(w - factors.product(), damped(gram, 0.01), moments)
        assert float(spectrum.energies[rank:].sum()) == pytest.approx(expected, rel=1e-9, abs=1e-14 * whole)


@shapes
@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.9], ids=["massive activations", "others"])
def test_the_foreseen_noise_is_the_loss_of_what_rank_leaves(shape, ranked, share):
    """tr(G_d E H E^T) of truncations of W, and of what is left beside a Q; with H_g where that is less than half."""
    w, moments, gram = weight(shape), moments_of(inputs(shape[1])), output_gram_of(shape[0])
    weighed = moments_of(inputs(shape[1], seed=7))
    metric, method = damped(gram, 0.01), TwoSided(0.0, 0.01)
    least = share * loss(w, metric, moments) / loss(w, metric, weighed)
    other = replace(weighed, gram=least * weighed.gram)
    counted = other if share < 0.5 else moments
    solution = method.spectrum(w, moments, gram)
    energies = method.energies(w, moments, gram, ranked, other.gram)
    assert len(energies) == (min(shape) if ranked else 1)
    whole = loss(w, metric, counted)
    for rank in range(0, min(shape) + 1 if ranked else 1, 4):
        expected = loss(w - truncate(w, solution, rank).product(), metric, counted)
        assert float(energies[rank:].sum()) == pytest.approx(expected, rel=1e-9, abs=1e-13 * whole)


@shapes
def test_full_damping_is_whitened(shape):
    w, moments = weight(shape), moments_of(inputs(shape[1]))
    found = TwoSided(damping=1.0).split(w, moments, 5, None, output_gram=output_gram_of(shape[0])).factors
    expected = Whitened().split(w, moments, 5, None).factors
    assert torch.allclose(found.product(), expected.product(), rtol=0, atol=1e-9)


@shapes
@pytest.mark.parametrize("sampled", [False, True], ids=["gram", "rows"])
def test_the_error_curves_are_those_of_the_oblique_projection(shape, sampled):
    w, calibration, other = weight(shape), inputs(shape[1]), inputs(shape[1], seed=7)
    moments = moments_of(calibration)
    solution = TwoSided(damping=0.01).solve(w, moments, output_gram_of(shape[0]))
    heldout: Any = moments_of(other)
    if sampled:
        accumulator = SampleAccumulator(shape[1], other.device)
        accumulator.update(other)
        heldout = accumulator.result("test")
    curves = error_curves(solution, moments, heldout)
    top = torch.linalg.svdvals(calibration[0] @ w.T)[0]
    for rank in (0, 1, 3, 8, min(shape) - 1):
        for name, x in (("calibrated", calibration[0]), ("heldout", other[0])):
            y = x @ w.T
            lost = (y - x @ truncate(w, solution.spectrum, rank).product().T).norm()
            assert float(curves[name][rank]) == pytest.approx(float(lost / y.norm()), rel=1e-6, abs=1e-8), name
            if name == "calibrated":
                beyond = min(1.0, float(lost / (y.norm() ** 2 - top**2).sqrt()))
                assert float(curves["beyond_top"][rank]) == pytest.approx(beyond, rel=1e-5, abs=1e-8)
    assert all(float(curve[-1]) == 0 for name, curve in curves.items() if name != "plain")


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_what_is_rank_deficient_stays_finite(tokens, shape, damping):
    """Fewer tokens than channels on both sides, dead inputs and dead outputs, no gradient at all (no token)."""
    w, x = weight(shape), inputs(shape[1], 5)
    x[..., 3] = 0.0
    w[2] = 0.0
    gram = output_gram_of(shape[0], tokens) if tokens else torch.zeros(shape[0], shape[0])
    gram[4] = gram[:, 4] = 0.0
    moments = moments_of(x)
    solution = TwoSided(0.0, damping).solve(w, moments, gram)
    curves = error_curves(solution, moments, moments)
    factors = truncate(w, solution.spectrum, 5)
    for tensor in (factors.left, factors.right, solution.spectrum.energies, *curves.values()):
        assert torch.isfinite(tensor).all()
    # five tokens' outputs have rank 5; the Gram matrix of the inputs is squared, that of the outputs inverted
    error = (x[0] @ (w - factors.product()).T).norm() / (x[0] @ w.T).norm()
    assert float(error) < 1e-6 / damping**0.5


def test_without_a_gradient_it_is_whitened_and_says_so():
    """Its predicted loss is 0: the loss did not notice anything."""
    layer = nn.Linear(16, 24, bias=False)
    x, nothing = inputs(16), torch.zeros(24, 24)
    moments = moments_of(x)
    module_weight = layer.weight.detach().double()
    expected = Whitened().split(module_weight, moments, 4, None).factors.product()
    for rank, options in ((4, {}), (4, {"damping": 1e-3})):
        made = project_layer(layer, moments, moments, LayerChoice("two_sided", rank, options), nothing)
        assert made.record.warnings == [NO_GRADIENT]
        assert torch.allclose(made.layer.dense_weight(torch.float64), expected, rtol=0, atol=1e-6)
    kept = analyse(layer.weight.detach(), moments, None, TwoSided(), 8, nothing)
    assert not kept.spectrum.energies.any()
    cut = install(layer, type(kept).of(kept.tensors(), kept.facts), LayerChoice("two_sided", 4))
    assert cut.record.warnings == [NO_GRADIENT]
    assert torch.allclose(cut.layer.dense_weight(torch.float64), expected, rtol=0, atol=1e-5)


def test_arguments_are_not_changed_and_the_damping_is_bounded():
    w, moments, gram = weight((24, 16)), moments_of(inputs(16)), output_gram_of(24)
    before = gram.clone()
    TwoSided().split(w, moments, 4, None, output_gram=gram)
    assert torch.equal(gram, before)
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="from 1e-06 to 1"):
            TwoSided(damping=wrong)


# ---- the statistic ---


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_output_grams_are_those_of_one_backward_pass(whole, tmp_path):
    model = tiny_llama().eval().requires_grad_(False)
    ids = torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(2))
    blocks = find_blocks(model)
    layers, _ = select_linears(model, blocks.names(), None, None)
    layers = {name: layer for name, layer in layers.items() if ".q_proj" in name or "down_proj" in name}
    layer_shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    task = task_of(tiny_tokenizer())
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}

    read: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            read[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
            output.register_hook(lambda gradient: rows[name].append(gradient.reshape(-1, gradient.shape[-1]).double()))

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    model.get_input_embeddings().requires_grad_(True)
    for window in ids:
        task.loss(model, window[None]).backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    found: dict[str, Tensor] = {}
    if whole:
        found = whole_model_output_grams(model, ids, layers, layer_shapes, task.loss, ids.numel(), inputs=True)
    else:
        walk = BlockWalk(model, blocks, {"s": ids}, task.forward, tmp_path)
        walk.start()
        for index in range(len(blocks.modules)):
            walk.advance(index, "s")
        walk.write_gradients("s", task.loss)
        for index in reversed(range(len(blocks.modules))):
            members = {name: layer for name, layer in layers.items() if blocks.holds(index, name)}
            found |= output_grams(walk, index, "s", members, layer_shapes, ids.numel(), inputs=True)
    assert found.keys() == {f"{name}:{kind}" for name in layers for kind in ("gram", "chance", "inputs")}
    for name in layers:
        g, gram = torch.cat(rows[name]), found[f"{name}:gram"]
        expected = g.T @ g / ids.numel()
        assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
        assert torch.allclose(gram.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max())), name
        share = ledoit_wolf_shrinkage(g.numpy(), assume_centered=True)  # of scikit-learn
        assert 0.05 < share < 1 and abs(float(found[f"{name}:chance"]) - share) < 1e-3, name
        beside = (1 - share) * expected + share * expected.trace() / len(expected) * torch.eye(len(expected))
        assert torch.allclose(
            gram_beside(found, name, backbone=True).double(), beside, rtol=2e-3, atol=1e-5 * float(beside.max())
        )
        assert gram_beside(found, name, backbone=False) is gram
        x, noticed = torch.cat(read[name]), found[f"{name}:inputs"]
        weights = g.square().sum(1, keepdim=True)
        expected = (weights * x).T @ x / weights.sum()
        assert noticed.dtype == torch.float32 and torch.equal(noticed, noticed.T)
        assert torch.allclose(noticed.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


# ---- runs ---

TEXT: dict[str, Any] = CALIBRATION | {"method": "two_sided"}
RUNS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 12},
    "uniform": {"kept_fraction": 0.8, "allocation": "uniform"},
    "loss weighted": {"kept_fraction": 0.8},
    "loss weighted, pivoted": {"kept_fraction": 0.8, "form": "pivoted"},
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_recorded_errors_are_those_of_the_layers(kind, llama_dir, rows_file, tmp_path):
    made = decompose_recorded(llama_dir, tmp_path / "out", calibration=[str(rows_file)], **TEXT, **RUNS[kind])
    dense, model = (load_dense_or_factored(str(folder)) for folder in (llama_dir, made.folder))
    layers = factored_layers(model)
    assert {layer.plan.method for layer in layers.values()} == {"two_sided"}
    for name, layer in layers.items():
        entry, w = made.report["layers"][name], linear_weight(dense, name)
        statistics = made.statistics[int(name.split(".")[2])]
        for stream, key in (("calibration", "error_calibrated"), ("heldout", "error_heldout")):
            error = relative_error(w - layer.dense_weight(torch.float64), w, statistics[stream][name])
            # float32 bases between the passes, float32 factors and float32 held-out rows
            assert error == pytest.approx(entry[key], rel=1e-5), (name, key)


def test_noise_is_foreseen_by_what_the_loss_notices(llama_dir, rows_file, tmp_path, monkeypatch):
    """Where formats are compared, every layer is analysed with H_g and with G less chance; L R alone needs neither."""
    seen: list[Any] = []

    def spy(weight: Tensor, moments: Any, heldout: Any, method: Any, limit: Any, gram: Any, *rest: Any) -> Any:
        *_, noticed, beside = rest
        seen.append((moments.gram, noticed, gram, beside))
        return analyse(weight, moments, heldout, method, limit, gram, *rest)

    monkeypatch.setattr("lord_tune.decomposition.calibrating.analyse", spy)
    text = TEXT | {"calibration": [str(rows_file)]}
    mixed = {"bits_per_weight": 4.0, "allocation": "mixed", "mix": ["int2", "int4"]}
    lord_tune.decompose(str(llama_dir), str(tmp_path / "mixed"), **text, **mixed)
    assert len(seen) == 21
    for gram, noticed, outputs, beside in seen:
        assert noticed.shape == gram.shape and not torch.allclose(noticed.double(), gram, rtol=0.01)
        assert beside.shape == outputs.shape and not torch.allclose(beside, outputs, rtol=0.01)
    seen.clear()
    lord_tune.decompose(str(llama_dir), str(tmp_path / "alone"), **text, kept_fraction=0.8)
    assert len(seen) == 21 and all(noticed is None and beside is None for _, noticed, _, beside in seen)


def test_an_expert_that_no_token_of_the_backward_pass_chose_is_told(rows_file, tmp_path):
    """64 experts' worth of calibration, eight tokens of gradients."""
    base = save_tiny(tiny_family("qwen3-moe"), tmp_path / "base")
    options = TEXT | {"sensitivity_tokens": 8, "context_length": 8, "rank": 4, "targets": "experts"}
    made = decompose_recorded(base, tmp_path / "out", calibration=[str(rows_file)], **options)
    told = [name for name, entry in made.report["layers"].items() if NO_GRADIENT in entry["warnings"]]
    assert 0 < len(told) < len(made.report["layers"])
    assert sum(NO_GRADIENT in text for text in made.warnings) == len(told)
    layers = factored_layers(load_dense_or_factored(str(made.folder)))
    assert all(torch.isfinite(layer.dense_weight(torch.float64)).all() for layer in layers.values())


def test_a_plan_may_need_gradients_of_both_kinds(llama_dir, rows_file, tmp_path):
    """Each layer is what it is in a plan of its own; a block without either still hands the gradients on."""
    choices = {
        "model.layers.0.self_attn.q_proj": LayerChoice("two_sided", 8, {"damping": 0.01}),
        "model.layers.0.self_attn.o_proj": LayerChoice(
            "caldera", 4, {"weighting": "fisher", "iterations": 1}, "lloyd2", {"incoherence": True, "seed": 0}
        ),
        "model.layers.2.self_attn.o_proj": LayerChoice("two_sided", 8, {}, "int4"),
    }
    found = {}
    for number, names in enumerate([[*choices], *([name] for name in choices)]):
        plan, out = tmp_path / f"{number}.json", tmp_path / f"out{number}"
        dense = LayerChoice("whitened", None)
        layers = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qo"]
        Plan({name: choices[name] if name in names else dense for name in layers}).save(plan)
        text = CALIBRATION | {"calibration": [str(rows_file)], "sensitivity_tokens": 128, "targets": "[qo]_proj"}
        lord_tune.decompose(str(llama_dir), str(out), plan=str(plan), **text)
        found[number] = read_tensors(out)
    for number, name in enumerate(choices, 1):
        own = {key: tensor for key, tensor in found[number].items() if key.startswith(f"{name}.")}
        assert len(own) >= 2 and all(torch.equal(tensor, found[0][key]) for key, tensor in own.items()), name
