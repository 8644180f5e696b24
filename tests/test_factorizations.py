"""The contract laws, and what is particular to each method. References are float64 throughout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contracts import FACTORIZATIONS, SHAPES, FactorizationRow, fisher_of, inputs, moments_of, output_gram_of, weight

from lord_tune.calibration.moments import SampleAccumulator
from lord_tune.errors import UsageError
from lord_tune.factorizations import (
    AFM,
    METHODS,
    LoftQ,
    OutputErrors,
    PlainSVD,
    Tucker,
    Whitened,
    error_curves,
    relative_error,
    truncate,
)
from lord_tune.linalg import balanced
from lord_tune.quantizers import Int2

# float64 eigendecompositions of matrices of norm <= 1e4: a relative 1e-10 leaves four digits for accumulation
EXACT = 1e-10

rows = pytest.mark.parametrize("row", FACTORIZATIONS, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def split(row: FactorizationRow, shape: tuple[int, int], rank: int):
    w, x = weight(shape), inputs(shape[1])
    return w, x[0], split_of(row, w, moments_of(x), rank)


def split_of(row: FactorizationRow, w, moments, rank: int):
    """With all that the method says it needs."""
    measured = {"fisher": fisher_of(tuple(w.shape)), "output_gram": output_gram_of(len(w))}
    gradients = {name: found for name, found in measured.items() if name in row.method.needs}
    return row.method.split(w, moments, rank, row.quantizer, **gradients)


def output_error(w, x, result) -> float:
    """Relative error of the layer's outputs, with the bias shift of affine methods."""
    y = x @ w.T
    approximation = x @ result.factors.product().T
    if result.backbone is not None:
        approximation = approximation + x @ result.backbone.T
    if result.factors.bias_shift is not None:
        approximation = approximation + result.factors.bias_shift
    return float((y - approximation).norm() / y.norm())


def test_every_method_has_a_row():
    assert {type(row.method) for row in FACTORIZATIONS} == set(METHODS.values())


@rows
@shapes
def test_shapes(row, shape):
    _, _, result = split(row, shape, 5)
    factors = result.factors
    apart = 0 if factors.top is None else factors.top.rank
    assert factors.rank == 5 and factors.product().shape == shape
    assert factors.left.shape == (shape[0], 5 - apart)
    assert factors.right.shape == (5 - apart, shape[1])
    assert (result.backbone is None) == (row.quantizer is None)


@rows
@shapes
def test_full_rank_recovers_the_layer(row, shape):
    if "full_rank" in row.excused:
        pytest.skip(row.excused["full_rank"])
    w, x, result = split(row, shape, min(shape))
    assert output_error(w, x, result) < EXACT


@rows
@shapes
def test_error_falls_with_rank(row, shape):
    if "error_falls_with_rank" in row.excused:
        pytest.skip(row.excused["error_falls_with_rank"])
    measure = row.method.needs and output_error or weight_error
    errors = [measure(*split(row, shape, rank)) for rank in (1, 4, 8, 12, min(shape))]
    slack = 1.05 if row.method == Whitened() else 1 + 1e-9  # the sink weight tilts the basis a little
    assert all(b <= a * slack + EXACT for a, b in zip(errors, errors[1:], strict=False))
    assert errors[1] < errors[0]


def weight_error(w, x, result) -> float:
    residual = w - result.factors.product()
    return float((residual if result.backbone is None else residual - result.backbone).norm() / w.norm())


@rows
@shapes
def test_weight_error_reaches_eckart_young(row, shape):
    if "weight_optimum" in row.excused:
        pytest.skip(row.excused["weight_optimum"])
    w, x, result = split(row, shape, 6)
    best = torch.linalg.svdvals(w)[6:].norm() / w.norm()
    assert weight_error(w, x, result) == pytest.approx(float(best), rel=1e-9)


@rows
@shapes
def test_output_error_reaches_eckart_young(row, shape):
    """No rank-6 map of the inputs beats the sixth truncation of Y = X W^T; the optimal methods reach it."""
    w, x, result = split(row, shape, 6)
    singular = torch.linalg.svdvals(x @ w.T)
    best = float(singular[6:].norm() / singular.norm())
    error = output_error(w, x, result)
    if row.quantizer is not None:
        alone = float((x @ (w - result.backbone).T).norm() / (x @ w.T).norm())
        # data-free methods may spoil the output
        assert error < alone or not row.method.needs or "gain_on_outputs" in row.excused
    elif result.factors.bias_shift is not None:
        pytest.skip(row.excused["output_optimum"])
    elif "output_optimum" in row.excused:
        assert error >= best * (1 - 1e-9)
    else:
        assert error == pytest.approx(best, rel=1e-6)  # sqrt of a difference of nearly equal energies


@rows
def test_arguments_are_not_changed(row):
    w, x = weight((24, 16)), inputs(16)
    moments = moments_of(x)
    before = [w.clone(), moments.gram.clone(), moments.mean.clone(), moments.sink_gram.clone()]
    split_of(row, w, moments, 4)
    after = [w, moments.gram, moments.mean, moments.sink_gram]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@rows
def test_same_input_same_result(row):
    first, second = (split(row, (24, 16), 4)[2].factors for _ in range(2))
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)


@rows
def test_rank_outside_the_matrix_is_refused(row):
    with pytest.raises(UsageError, match="expected 0 to"):
        split(row, (24, 16), 17)


@rows
def test_float32_weights_match_the_float64_reference(row):
    """Factorizations compute in float64 whatever comes in; a float32 weight differs by its own rounding (6e-8)."""
    w, x = weight((24, 16)), inputs(16)
    exact = split_of(row, w.float().double(), moments_of(x), 4).factors
    single = split_of(row, w.float(), moments_of(x), 4).factors
    assert torch.allclose(exact.product(), single.product(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_rank_deficient_gram_is_no_special_case(tokens, shape):
    """Fewer tokens than channels, and dead channels: finite, optimal on the tokens seen, exact at their rank."""
    w, x = weight(shape), inputs(shape[1], tokens)
    x[..., 3] = 0.0
    result = Whitened(0.0).split(w, moments_of(x), min(tokens, min(shape)), None)
    assert torch.isfinite(result.factors.left).all() and torch.isfinite(result.factors.right).all()
    assert output_error(w, x[0], result) < 1e-6  # sqrt of float64 rounding on squared energies


def test_whitened_equals_cholesky_whitening():
    w, x = weight((24, 16)), inputs(16)
    moments = moments_of(x)
    factor = torch.linalg.cholesky(moments.gram)
    u, s, vh = torch.linalg.svd(w @ factor)
    reference = (u[:, :6] * s[:6]) @ vh[:6] @ torch.linalg.inv(factor)
    result = Whitened(0.0).split(w, moments, 6, None).factors
    assert torch.allclose(result.left @ result.right, reference, atol=1e-7 * float(reference.abs().max()))


def test_sink_weight_lowers_the_error_at_position_zero():
    w = weight((24, 24))
    x = inputs(24)
    x[:, 0] = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 0.05
    sink = x[0, :1]
    plain, aware = (Whitened(weight_).split(w, moments_of(x), 6, None) for weight_ in (0.0, 1e4))
    assert output_error(w, sink, aware) < 0.5 * output_error(w, sink, plain)


def test_afm_is_the_affine_optimum_with_its_bias():
    w, x = weight((24, 16)), inputs(16)
    y = x[0] @ w.T
    centred = y - y.mean(0)
    singular = torch.linalg.svdvals(centred)
    result = AFM().split(w, moments_of(x), 6, None)
    best = float(singular[6:].norm() / y.norm())
    assert output_error(w, x[0], result) == pytest.approx(best, rel=1e-6)
    without = dataclasses.replace(result, factors=dataclasses.replace(result.factors, bias_shift=None))
    assert output_error(w, x[0], without) > output_error(w, x[0], result)


def test_loftq_keeps_its_best_iterate_and_beats_plain_rounding():
    """Two coarse bits, on which the iterates after the second get worse: 0.388, 0.376, 0.381, 0.384, 0.394."""
    w, x, form = weight((64, 64)), inputs(64), Int2(group_size=8, symmetric=True)
    errors = [weight_error(w, x[0], LoftQ(t).split(w, None, 8, form)) for t in (1, 2, 3, 5)]
    plain = w - form.dequantize(form.quantize(w), (64, 64), torch.float64)
    assert errors[3] == errors[2] == errors[1] < errors[0] < float(plain.norm() / w.norm())


def test_loftq_without_quantizer_is_refused():
    with pytest.raises(UsageError, match="backbone"):
        LoftQ().split(weight((8, 8)), None, 2, None)


@pytest.mark.parametrize("method", [PlainSVD(), Whitened(), Whitened(0.0), AFM(), AFM(centred=False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["gram", "rows"])
def test_error_curve_equals_the_measured_error_at_every_rank(method, shape, sampled):
    w, calibration, other = weight(shape), inputs(shape[1]), inputs(shape[1], seed=7)
    moments = moments_of(calibration)
    solution = method.solve(w, moments)
    spectrum = solution.spectrum
    curves = error_curves(solution, moments, sample(other) if sampled else moments_of(other))
    plain = PlainSVD().spectrum(w, None)
    for name, x, used in (
        ("calibrated", calibration, spectrum),
        ("heldout", other, spectrum),
        ("plain", calibration, plain),
    ):
        assert curves[name].shape == (min(shape) + 1,)
        for rank in (0, 1, 3, min(shape) - 1):
            factors = truncate(w, used, rank)
            y = x[0] @ w.T
            measured = x[0] @ (factors.left @ factors.right).T
            measured = measured if factors.bias_shift is None or rank == 0 else measured + factors.bias_shift
            if rank == 0 and used.centre is not None:
                measured = used.centre @ w.T  # the bias alone
            # the plain basis is float32: its vectors are off by 6e-8 over the gap of neighbouring singular values
            tolerance = 1e-3 if name == "plain" else 1e-5
            expected = float((y - measured).norm() / y.norm())
            assert float(curves[name][rank]) == pytest.approx(expected, rel=tolerance, abs=1e-7)


def sample(x):
    accumulator = SampleAccumulator(x.shape[-1], x.device)
    accumulator.update(x)
    return accumulator.result("test")


def test_the_error_beyond_the_top_direction_ignores_it():
    """One output direction holds nearly all energy: the plain error looks small, the one beyond it does not."""
    w, x = weight((16, 16)), inputs(16)
    x = x + 1e4 * torch.nn.functional.one_hot(torch.tensor(0), 16)
    moments = moments_of(x)
    solution = Whitened(0.0).solve(w, moments)
    curves = error_curves(solution, moments)
    energies = solution.spectrum.energies
    assert float(curves["calibrated"][4]) < 0.01
    expected = float((energies[4:].sum() / energies[1:].sum()).sqrt())
    assert float(curves["beyond_top"][4]) == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_shrinkage_moves_the_basis_towards_the_diagonal():
    """Full shrinkage is the whitened solution for H's diagonal alone; with few tokens it helps on other text."""
    w, x = weight((12, 16)), inputs(16)
    moments = moments_of(x)
    diagonal = dataclasses.replace(moments, gram=torch.diag(moments.gram.diagonal()))
    one = Whitened(0.0, shrinkage=1.0).split(w, moments, 4, None).factors
    two = Whitened(0.0).split(w, diagonal, 4, None).factors
    assert torch.allclose(one.left @ one.right, two.left @ two.right, atol=1e-8)
    with pytest.raises(UsageError, match="0 to 1"):
        Whitened(shrinkage=1.5)


def test_relative_error_equals_the_measured_error():
    w, x = weight((24, 16)), inputs(16)
    residual = weight((24, 16), seed=4)
    measured = float((x[0] @ residual.T).norm() / (x[0] @ w.T).norm())
    assert relative_error(residual, w, moments_of(x)) == pytest.approx(measured, rel=1e-9)


def test_balanced_factors_have_equal_norms_and_the_same_product():
    left, right = weight((24, 6)), 100 * weight((6, 16), seed=2)
    right[3] = 0  # a direction without energy keeps its place
    new_left, new_right = balanced(left, right)
    assert torch.allclose(new_left @ new_right, left @ right)
    alive = torch.arange(6) != 3
    assert torch.allclose(new_left.norm(dim=0)[alive], new_right.norm(dim=1)[alive])


def hooi(w, rank: int, sweeps: int = 300):
    """U, G, V of the paper, from a start of its own: De Lathauwer et al. 2000, algorithm 4.2, for two modes."""
    start = torch.randn(w.shape[1], rank, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    v = torch.linalg.qr(start).Q
    for _ in range(sweeps):
        u = torch.linalg.svd(w @ v, full_matrices=False).U
        v = torch.linalg.svd(w.T @ u, full_matrices=False).U
    return u, u.T @ w @ v, v


@shapes
@pytest.mark.parametrize("rank", [1, 4])
def test_tucker_of_a_matrix_is_truncated_svd_with_the_core_in_a_factor(shape, rank):
    """HOOI converges as (s_{r+1} / s_r)^2 a sweep: values that fall by half leave 4^-300 of the start."""
    u, _, vh = torch.linalg.svd(weight(shape), full_matrices=False)
    values = 0.5 ** torch.arange(min(shape), dtype=torch.float64)
    w = u * values @ vh
    factors = Tucker().split(w, None, rank, None).factors
    assert factors.left.shape == (shape[0], rank) and factors.right.shape == (rank, shape[1])
    truncated = (u[:, :rank] * values[:rank]) @ vh[:rank]
    left, core, right = hooi(w, rank)
    assert float((factors.product() - truncated).norm()) < EXACT * float(w.norm())
    assert float((factors.product() - left @ core @ right.T).norm()) < EXACT * float(w.norm())
    svd = PlainSVD().split(w, None, rank, None).factors
    assert torch.equal(factors.left, svd.left) and torch.equal(factors.right, svd.right)


@shapes
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_output_errors_are_those_of_the_whole_residual(shape, rank):
    """With and without a centre. 1e-6: `inputs` are float32, whose products the moments sum in float64."""
    w, x = weight(shape).double(), inputs(shape[1])
    moments, rows = moments_of(x), x[0].double()
    backbone = torch.round(w * 4) / 4
    left, right = weight((shape[0], rank)).double() / 10, weight((rank, shape[1])).double() / 10
    found = OutputErrors(w - backbone, moments, moments.energies(w).sum())
    for centre in (None, rows.mean(0) / 2):
        outputs = (rows if centre is None else rows - centre) @ (w - backbone - left @ right).T
        expected = float(outputs.norm() / (rows @ w.T).norm())
        assert found(left, right, centre) == pytest.approx(expected, rel=1e-6)
