"""Budgets are met, the dense option is taken, and no other allocation of a small case is better."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import pytest
import torch

from lord_tune.allocation import (
    ALLOCATORS,
    Choices,
    Infeasible,
    LossWeighted,
    Uniform,
    break_even,
    factor_cost,
    role_of,
)
from lord_tune.decomposition import Sized
from lord_tune.decomposition.choices import Measured, Menu, Noise
from lord_tune.decomposition.decide import Request, decide, decide_from
from lord_tune.errors import UsageError
from lord_tune.plans import LayerChoice
from lord_tune.sites import Site

SHAPES = {"q": (64, 64), "k": (32, 64), "up": (160, 64), "down": (64, 160)}
DECAYS = {"q": (0.2, 1.0), "k": (0.05, 10.0), "up": (0.01, 3.0), "down": (0.1, 0.1)}  # and weights


def sites(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Site]:
    return {name: Site(name, shape, torch.float32, False, False) for name, shape in shapes.items()}


def measured(shape: tuple[int, int], decay: float, weight: float = 1.0, seed: int = 0, widths: tuple[int, ...] = ()):
    """A spectrum that falls, and roundings whose noise falls by four with every bit."""
    k = min(shape)
    energies = torch.exp(-decay * torch.arange(k, dtype=torch.float64))
    weights = weight * (0.5 + torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    noise = {}
    for bits in widths:
        flat = torch.full((k,), 4.0**-bits, dtype=torch.float64) * float(energies.mean())
        noise[f"int{bits}"] = Noise(flat, flat, flat.sum())
    return Measured(shape, energies, weights, float(weights.sum()), noise)


LAYERS = {name: measured(SHAPES[name], *DECAYS[name], seed=i + 1) for i, name in enumerate(SHAPES)}
TEMPLATE = LayerChoice("whitened", None)
DENSE = sum(m * n for m, n in SHAPES.values())


def tables(fraction: float, of: Mapping[str, Measured] = LAYERS) -> dict[str, Choices]:
    sized = Sized(fraction, LossWeighted())
    return Menu(sites({name: m.shape for name, m in of.items()}), TEMPLATE, sized).table(of)


def spent(table: Mapping[str, Choices], chosen: Mapping[str, int]) -> float:
    return sum(float(table[name].costs[index]) for name, index in chosen.items())


def loss(table: Mapping[str, Choices], chosen: Mapping[str, int]) -> float:
    return sum(float(table[name].losses[index]) for name, index in chosen.items())


@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (160, 64), (1, 1), (3, 2), (576, 1536)])
def test_break_even_is_the_largest_rank_that_saves(shape):
    rank = break_even(shape)
    assert factor_cost(shape, rank) < shape[0] * shape[1] <= factor_cost(shape, rank + 1)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9, 0.99])
def test_a_budget_is_met(name, fraction):
    table = tables(fraction)
    chosen = ALLOCATORS[name]().allocate(table, fraction * DENSE)
    assert chosen.keys() == LAYERS.keys()
    if name == "uniform":  # dense layers are beyond its control, every factored layer meets the fraction by itself
        ends = {layer: len(table[layer].costs) - 1 for layer in table}
        own = {layer: float(table[layer].costs[i]) for layer, i in chosen.items() if i != ends[layer]}
        assert own and all(cost <= fraction * table[layer].dense for layer, cost in own.items())
    else:
        assert spent(table, chosen) <= fraction * DENSE


@pytest.mark.parametrize("fraction", [0.6, 0.75, 0.9])
def test_loss_weighted_is_close_to_the_exhaustive_optimum(fraction):
    """The Lagrangian is optimal on the convex hull; the last upgrade may be missed: 10 % is allowed."""
    table = tables(fraction)
    every = itertools.product(*(range(len(layer.costs)) for layer in table.values()))
    possible = (dict(zip(table, indices, strict=True)) for indices in every)
    best = min(loss(table, chosen) for chosen in possible if spent(table, chosen) <= fraction * DENSE)
    found = loss(table, LossWeighted().allocate(table, fraction * DENSE))
    assert best <= found <= 1.1 * best + 1e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2.75, 4.0, 7.0])  # int2 in groups of 64, padded, takes up to 3
def test_mixed_is_close_to_the_optimum_of_integer_programming(seed, bits):
    scipy = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"l{i}": ((64, 96), (96, 64), (64, 64))[i % 3] for i in range(9)}
    of = {}
    for i, (name, shape) in enumerate(shapes.items()):
        decay, weight = torch.rand(2, generator=generator).tolist()
        of[name] = measured(shape, 0.3 * decay, 10**weight, seed * 100 + i, (2, 3, 4, 8))
    sized = Sized(
        bits,
        ALLOCATORS["mixed"](),
        "bits_per_weight",
        tuple(LayerChoice("whitened", None, backbone=f"int{b}") for b in (2, 3, 4, 8)),
        ranks=(0, 8, 16),
    )
    table = Menu(sites(shapes), TEMPLATE, sized).table(of)
    budget = sized.budget(sites(shapes), 0)
    chosen = sized.allocator.allocate(table, budget)
    assert spent(table, chosen) <= budget
    costs, losses = (torch.cat([getattr(layer, what) for layer in table.values()]) for what in ("costs", "losses"))
    one_each = torch.block_diag(*(torch.ones(1, len(layer.costs)) for layer in table.values()))
    solved = scipy.milp(
        losses.numpy(),
        integrality=1,
        bounds=scipy.Bounds(0, 1),
        constraints=[
            scipy.LinearConstraint(one_each.numpy(), 1, 1),
            scipy.LinearConstraint(costs[None].numpy(), 0, budget),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert solved.status == 0
    # nine layers: a last step that does not fit is a large part of the whole
    assert solved.fun - 1e-9 <= loss(table, chosen) <= 1.15 * solved.fun + 1e-12


def test_loss_weighted_beats_the_baselines_and_leaves_sensitive_layers_dense():
    table = tables(0.8)
    found = {name: loss(table, allocator().allocate(table, 0.8 * DENSE)) for name, allocator in ALLOCATORS.items()}
    chosen = LossWeighted().allocate(table, 0.8 * DENSE)
    assert found["loss_weighted"] < 0.7 * min(found[name] for name in ("uniform", "energy", "typed"))
    assert any(chosen[name] == len(table[name].costs) - 1 for name in ("k", "up"))


def test_weights_decide():
    heavy = LAYERS | {"q": measured(SHAPES["q"], *DECAYS["q"][:1], 1e4, seed=1)}
    ranks = [LossWeighted().allocate(tables(0.8, of), 0.8 * DENSE)["q"] for of in (LAYERS, heavy)]
    assert ranks[1] > ranks[0]


def test_energy_gives_all_layers_one_error():
    table = tables(0.7)
    chosen = ALLOCATORS["energy"]().allocate(table, 0.7 * DENSE)
    errors = {name: table[name].errors for name in table}
    worst = max(float(errors[name][i]) for name, i in chosen.items())
    for name, index in chosen.items():  # the next cheaper choice would be worse than the worst
        cheaper = table[name].costs < table[name].costs[index]
        assert not bool((errors[name][cheaper] < worst - 1e-12).any())


def test_roles_share_the_typed_budget():
    layers = {
        f"{i}.{name}": Choices(torch.arange(1.0, 101.0, dtype=torch.float64), 100.0, role=role_of(name, (8, 8)))
        for i in range(2)
        for name in ("attn.q_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj")
    }
    chosen = ALLOCATORS["typed"]().allocate(layers, 0.8 * 800)
    kept = {name: float(layers[name].costs[i]) for name, i in chosen.items()}
    assert sum(kept.values()) <= 640 and kept["0.attn.v_proj"] == 100
    assert kept["0.attn.q_proj"] == kept["1.attn.o_proj"] < kept["0.mlp.up_proj"] < 100
    lowest = ALLOCATORS["typed"]().allocate(layers, 8.0)
    assert set(lowest.values()) == {0}


def deep(blocks: int, per_block: int = 2) -> dict[str, Choices]:
    """Layers that keep 2 of 10 or all of it."""
    costs = torch.tensor([2.0, 10.0], dtype=torch.float64)
    names = [(block, layer) for block in range(blocks) for layer in range(per_block)]
    return {f"h.{block}.{layer}": Choices(costs, 10.0, block=block) for block, layer in names}


def blocks_of(layers: Mapping[str, Choices], chosen: Mapping[str, int]) -> list[int]:
    return sorted({layers[name].block for name, index in chosen.items() if index == 0})


@pytest.mark.parametrize("blocks", [5, 6, 12, 31])
def test_spread_takes_few_blocks_that_are_apart(blocks):
    layers = deep(blocks)
    for count in range(1, (blocks - 2) // 2 + 1):
        budget = 20.0 * blocks - 16 * count
        chosen = ALLOCATORS["spread"]().allocate(layers, budget)
        found = blocks_of(layers, chosen)
        assert len(found) == count and found[0] > 0 and found[-1] < blocks - 1
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(found))
        assert spent(layers, chosen) == budget  # whole blocks: nothing more than was needed


def test_spread_decomposes_of_its_last_block_only_what_it_needs():
    layers = deep(12, per_block=7)
    chosen = ALLOCATORS["spread"]().allocate(layers, 840.0 - 70)
    by_block = {block: sum(chosen[n] == 0 for n in layers if layers[n].block == block) for block in range(12)}
    assert sorted(by_block.values())[-2:] == [2, 7] and sum(by_block.values()) == 9  # 9 * 8 >= 70 > 8 * 8


def test_spread_gives_up_the_last_block_and_then_the_first_when_the_others_are_not_enough():
    layers = deep(6)
    assert blocks_of(layers, ALLOCATORS["spread"]().allocate(layers, 120.0 - 64)) == [1, 2, 3, 4]
    assert blocks_of(layers, ALLOCATORS["spread"]().allocate(layers, 120.0 - 65)) == [1, 2, 3, 4, 5]
    assert blocks_of(layers, ALLOCATORS["spread"]().allocate(layers, 120.0 - 96)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(Infeasible):
        ALLOCATORS["spread"]().allocate(layers, 120.0 - 97)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_beside_a_size_is_the_only_one_offered(rank):
    """Also below the grid of multiples of 8; a layer whose break-even is lower can only stay dense."""
    sized = Sized(0.9, ALLOCATORS["spread"](), ranks=(rank,))
    shapes = {"wide": (64, 64), "narrow": (2, 64)}
    menu = Menu(sites(shapes), TEMPLATE, sized)
    assert [choice.rank for choice in menu.choices["wide"]] == [rank, None]
    assert [choice.rank for choice in menu.choices["narrow"]] == ([1, None] if rank == 1 else [None])


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.layers.0.self_attn.q_proj", (64, 64), "qk"),
        ("model.layers.0.self_attn.k_proj", (32, 64), "qk"),
        ("model.layers.0.self_attn.v_proj", (32, 64), "v"),
        ("model.layers.0.self_attn.o_proj", (64, 64), "o"),
        ("model.layers.0.mlp.gate_proj", (160, 64), "gate"),
        ("model.layers.0.mlp.down_proj", (64, 160), "down"),
        ("transformer.h.3.attn.c_attn", (192, 64), "qkv"),
        ("transformer.h.3.attn.c_proj", (64, 64), "o"),
        ("transformer.h.3.mlp.c_fc", (256, 64), "up"),
        ("transformer.h.3.mlp.c_proj", (64, 256), "down"),
        ("gpt_neox.layers.1.attention.query_key_value", (192, 64), "qkv"),
        ("gpt_neox.layers.1.attention.dense", (64, 64), "o"),
        ("bert.encoder.layer.0.attention.self.query", (64, 64), "qk"),
        ("bert.encoder.layer.0.attention.output.dense", (64, 64), "o"),
        ("bert.encoder.layer.0.intermediate.dense", (128, 64), "up"),
        ("bert.encoder.layer.0.output.dense", (64, 128), "down"),
        ("backbone.layers.0.mixer.something", (64, 64), "other"),
    ],
)
def test_roles_are_told_by_words_and_shapes(name, shape, role):
    assert role_of(name, shape) == role


def test_a_layer_too_small_for_any_rank_stays_dense():
    of = {"t": measured((8, 8), 0.1), "q": LAYERS["q"]}
    for allocator in (Uniform(), LossWeighted()):
        request = Request(TEMPLATE, Sized(0.8, allocator))
        plan = decide_from(sites({"t": (8, 8), "q": (64, 64)}), request, of)
        assert plan.layers["t"].rank is None and "its break-even is 3" in str(plan.layers["t"].reason)
        assert plan.layers["q"].rank


def test_impossible_budgets_name_the_smallest_that_is_possible():
    with pytest.raises(Infeasible, match="cannot be met: the cheapest choices cost 64"):
        LossWeighted().allocate({"t": Choices(torch.tensor([64.0]), 64.0, torch.zeros(1))}, 32)
    for fraction in (0.0, 1.0, 1.7, -0.1):
        for allocator in (LossWeighted(), Uniform()):
            with pytest.raises(UsageError, match="between 0"):
                decide(sites(SHAPES), Request(TEMPLATE, Sized(fraction, allocator)))
    request = Request(TEMPLATE, Sized(0.1, LossWeighted()))
    with pytest.raises(UsageError, match=r"already keeps 0\.(\d+) of the parameters") as refused:
        decide(sites(SHAPES), request)
    least = float(str(refused.value).split("already keeps ")[1].split()[0])
    assert decide(sites(SHAPES), Request(TEMPLATE, Sized(least, LossWeighted()))) is None
    with pytest.raises(UsageError, match="cannot be met"):
        decide(sites(SHAPES), Request(TEMPLATE, Sized(least - 0.002, LossWeighted())))
    with pytest.raises(UsageError, match=r"the smallest checkpoint .* has (\S+) kB, 10.0 kB of them outside"):
        decide(sites(SHAPES), Request(TEMPLATE, Sized(11_000, LossWeighted(), "max_bytes")), rest=10_000)


def test_a_size_in_bytes_counts_everything_else():
    for rest in (0, 50_000):
        request = Request(TEMPLATE, Sized(90_000 + rest, LossWeighted(), "max_bytes"))
        table = Menu(sites(SHAPES), TEMPLATE, request.budget).table(LAYERS)
        plan = decide_from(sites(SHAPES), request, LAYERS, rest)
        chosen = {n: next(i for i, c in enumerate(Menu(sites(SHAPES), TEMPLATE, request.budget).choices[n])
                          if c.rank == plan.layers[n].rank) for n in SHAPES}  # fmt: skip
        assert 80_000 < spent(table, chosen) <= 90_000


def test_spectra_without_energy_meet_the_budget():
    flat = {n: Measured(m.shape, m.energies * 0, m.loss_weights, m.gradient) for n, m in LAYERS.items()}
    table = tables(0.7, flat)
    for name in ALLOCATORS:
        if name != "uniform":
            assert spent(table, ALLOCATORS[name]().allocate(table, 0.7 * DENSE)) <= 0.7 * DENSE


def test_noise_beyond_the_reach_of_a_tall_matrix_costs_what_is_left_of_the_gradient():
    """Against tr(G D H D^T) itself, for a G and noise without preferred directions."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(48, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    gram = inputs.T @ inputs
    noise = torch.randn(48, 16, generator=generator, dtype=torch.float64)
    gradient = torch.eye(48, dtype=torch.float64) * torch.rand(48, generator=generator, dtype=torch.float64)
    basis = torch.linalg.svd(weight @ gram @ weight.T).U[:, :16]
    moved = noise @ gram @ noise.T
    spread = (basis.T @ moved @ basis).diagonal()
    found = Noise(moved.trace()[None], spread, moved.trace())
    weights = (basis.T @ gradient @ basis).diagonal()
    cost = found.cost((48, 16), weights, float(gradient.trace()))
    assert cost * float(moved.trace()) == pytest.approx(float((gradient @ moved).trace()), rel=0.1)
    forgotten = found.cost((48, 16), weights, float(weights.sum()))
    assert forgotten < 0.6 * cost


def test_a_model_of_seven_billion_is_shared_out_in_seconds():
    """Shapes of Llama-2 7B, random spectra; measured 0.2 s on one thread."""
    shapes = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
    shapes |= {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    generator = torch.Generator().manual_seed(0)
    of = {}
    for block in range(32):
        for name, shape in shapes.items():
            energies = torch.rand(4096, generator=generator, dtype=torch.float64).sort(descending=True).values
            of[f"{block}.{name}"] = Measured(shape, energies, torch.rand(4096, generator=generator).double(), 4096.0)
    pivoted = LayerChoice("whitened", None, form="pivoted")
    start = time.perf_counter()
    request = Request(pivoted, Sized(0.8, LossWeighted()))
    plan = decide_from(sites({name: m.shape for name, m in of.items()}), request, of)
    seconds = time.perf_counter() - start
    assert len(plan.layers) == 224 and seconds < 5
