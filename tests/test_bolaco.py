"""The Bayesian search over fractions by role: sizes are met, seeds decide, a killed search continues, whole runs."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from typing import Any

import pytest
import torch
from architectures import build
from test_plan_files import shards
from tiny import save_tiny, tiny_bert, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

import lord_tune
from lord_tune.allocation import ALLOCATORS, Bolaco, Choices, Score, Search
from lord_tune.allocation.bolaco import DENSE, LEAST
from lord_tune.calibration.moments import MomentAccumulator
from lord_tune.cli import main
from lord_tune.config import DecomposeConfig
from lord_tune.decomposition import searching
from lord_tune.decomposition.choices import Menu, Sized
from lord_tune.decomposition.searching import compared, logs_of
from lord_tune.errors import UsageError
from lord_tune.factorizations import AFM
from lord_tune.plans import LayerChoice, Plan
from lord_tune.sites import Site

TEXT: dict[str, Any] = {"context_length": 64, "calibration_tokens": 1024, "validation_tokens": 256}
SEARCH: dict[str, Any] = {"kept_fraction": 0.7, "allocation": "bolaco", "probes": 2, "trials": 4} | TEXT
LLAMA = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def table(layers: int = 30, form: str = "pivoted", shapes: dict[str, tuple[int, int]] = LLAMA) -> dict[str, Choices]:
    sites = {
        f"model.layers.{index}.{name}": Site(f"model.layers.{index}.{name}", shape, torch.float32, False, False)
        for index in range(layers)
        for name, shape in shapes.items()
    }
    return Menu(sites, LayerChoice("whitened", None, form=form), Sized(0.8, Bolaco())).table(None)


def spent(layers: dict[str, Choices], chosen: dict[str, int]) -> float:
    return sum(float(layers[name].costs[index]) for name, index in chosen.items())


def dense_cost(layers: dict[str, Choices]) -> float:
    return sum(layer.dense for layer in layers.values())


def kept(layers: dict[str, Choices], chosen: dict[str, int]) -> dict[str, list[float]]:
    """Role -> the fractions of its layers."""
    found: dict[str, list[float]] = {}
    for name, index in chosen.items():
        found.setdefault(layers[name].role, []).append(float(layers[name].costs[index]) / layers[name].dense)
    return found


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("seed", range(4))
def test_any_point_meets_the_size_from_below_within_half_a_percent(seed, form):
    layers, rule, rolls = table(form=form), Bolaco(), random.Random(seed)
    names = rule.names(layers)
    assert names == ["qk", "o", "gate", "up", "down"]
    for fraction in (0.6, 0.8, 0.9):
        budget = fraction * dense_cost(layers)
        point = {name: rolls.uniform(LEAST, DENSE) for name in names} | {"o": 0.5}
        shares = kept(layers, chosen := rule.at(point).allocate(layers, budget))
        assert 0.995 * budget < spent(layers, chosen) <= budget
        assert set(shares["v"]) == {1.0}
        for role, own in shares.items():  # of one role, all keep the same but for a step of a rank, or of the last rank
            steps = [c.costs.sort().values.diff().max() / c.dense for c in layers.values() if c.role == role]
            assert max(own) - min(own) <= 2 * float(max(steps)) + 1e-9


def test_order_of_fractions_is_kept_and_values_give_way_last():
    layers = table(2)
    rule, whole = Bolaco(), dense_cost(layers)
    point = {"qk": 0.2, "o": 0.9, "gate": 0.6, "up": 0.7, "down": DENSE}
    shares = {role: min(own) for role, own in kept(layers, rule.at(point).allocate(layers, 0.8 * whole)).items()}
    assert shares["qk"] < shares["gate"] < shares["up"] < shares["o"] < shares["down"] == shares["v"] == 1.0
    least = sum(float(layer.costs.min()) for layer in layers.values())
    values = sum(layer.dense - float(layer.costs.min()) for layer in layers.values() if layer.role == "v")
    for budget, dense in ((least + values, True), (least + 0.9 * values, False), (least, False)):
        chosen = rule.at(point).allocate(layers, budget)
        assert spent(layers, chosen) <= budget and (min(kept(layers, chosen)["v"]) == 1.0) == dense


def test_the_searched_roles_are_an_option():
    layers = table(2)
    assert Bolaco(searched="qk,gate+up").names(layers) == ["qk", "gate+up"]
    shares = kept(
        layers,
        Bolaco(searched="qk,gate+up").at({"qk": 0.9, "gate+up": 0.5}).allocate(layers, 0.8e0 * dense_cost(layers)),
    )
    assert set(shares["down"]) == set(shares["o"]) == {1.0} and max(shares["gate"]) < min(shares["qk"])
    assert "v" in Bolaco(searched="v,up").names(layers)
    with pytest.raises(UsageError, match="names the role up twice"):
        Bolaco(searched="up,up+gate").names(layers)
    with pytest.raises(UsageError, match="role of `searched` 'upp'"):
        Bolaco(searched="upp").names(layers)
    with pytest.raises(UsageError, match="the roles are down, gate, o, qk, up, v"):
        Bolaco(searched="qkv").names(layers)


COSTS = {"qk": 0.02, "o": 0.3, "gate": 1.0, "up": 3.0, "down": 1.5}


class Synthetic:
    """A model whose loss is known: the sum over roles of a weight times the squared share that is removed."""

    def __init__(self, rule: Bolaco, windows: int = 6):
        self.rule, self.layers, self.windows = rule, table(1), windows
        self.calls: list[Any] = []

    def loss(self, point: dict[str, float]) -> float:
        chosen = self.rule.at(point).allocate(self.layers, 0.7 * dense_cost(self.layers))
        shares = kept(self.layers, chosen)
        return 1.0 + sum(cost * (1 - sum(shares[role]) / len(shares[role])) ** 2 for role, cost in COSTS.items())

    def __call__(self, point: dict[str, float], chosen: list[int] | None) -> list[Score]:
        self.calls.append((point, chosen))
        loss = self.loss(point)
        # odd windows notice twice as much
        every = [Score(10 * (loss + (loss - 1.0) * (window % 2)), 0.0, 10) for window in range(self.windows)]
        return every if chosen is None else [every[window] for window in chosen]


def best_loss(case: Synthetic, found: Search) -> float:
    return case.loss(found.trials[found.best].point)


def test_the_search_comes_close_to_a_known_optimum_and_beats_random():
    rule = Bolaco(probes=4, trials=18)
    case = Synthetic(rule)
    names = rule.names(case.layers)
    found = rule.search(names, case, 3, seed=0)
    assert found.windows == [1, 3, 5]  # those that vary most
    assert [chosen for _, chosen in case.calls] == [None] * 4 + [[1, 3, 5]] * 18
    rolls = random.Random(7)
    rows = [[case.loss({n: rolls.uniform(LEAST, DENSE) for n in names}) for _ in range(22)] for _ in range(5)]
    grid = itertools.product((0.2, 0.5, 0.75, 0.95), repeat=len(names))
    optimum = min(case.loss(dict(zip(names, point, strict=True))) for point in grid if min(point) < 1)
    assert best_loss(case, found) < min(min(row) for row in rows)
    # the grid's best point is near the optimum, not at it; random search misses it by several times as much
    assert best_loss(case, found) - 1 < 1.1 * (optimum - 1)


def test_the_seed_decides_and_a_search_that_was_killed_proposes_the_same():
    rule = Bolaco(probes=3, trials=7)
    case = Synthetic(rule)
    names = rule.names(case.layers)
    whole = rule.search(names, case, 2, seed=1)
    assert rule.search(names, case, 2, seed=1) == whole
    other = rule.search(names, case, 2, seed=2)
    assert [t.point for t in other.probes] != [t.point for t in whole.probes]
    for probes, trials in ((1, 0), (3, 0), (3, 1), (3, 4), (3, 6)):
        case.calls.clear()
        earlier = Search(rule, list(whole.probes[:probes]), list(whole.trials[:trials]))
        assert rule.search(names, case, 2, seed=1, search=earlier) == whole
        assert len(case.calls) == 10 - probes - trials


def test_what_is_not_a_number_is_worst():
    rule = Bolaco()
    bad = [[Score(math.nan, math.nan, 5)], [Score(math.inf, 0.0, 5)], [Score(1e9, 1e9, 5)]]
    assert all(math.isfinite(rule.objective(scores)) for scores in bad)
    assert min(map(rule.objective, bad)) > rule.objective([Score(50.0, 5.0, 5)])


def test_the_score_is_that_of_the_formula():
    torch.manual_seed(0)
    reference, own, labels = torch.randn(7, 50) * 3, torch.randn(7, 50) * 3, torch.randint(0, 50, (7,))
    p, q = own.double().softmax(-1), reference.double().softmax(-1)
    score = compared(logs_of(reference), own, labels)
    assert score.tokens == 7
    assert score.loss == pytest.approx(float(-p[range(7), labels].log().sum()), rel=1e-5)
    assert score.divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    padded = (
        torch.cat([own, torch.full((7, 3), -math.inf)], 1),
        torch.cat([reference, torch.full((7, 3), -math.inf)], 1),
    )
    assert compared(logs_of(padded[1]).half(), padded[0], labels).divergence == pytest.approx(
        score.divergence, rel=1e-2
    )


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(llama_dir, rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bolaco") / "out"
    return folder, lord_tune.decompose(str(llama_dir), str(folder), calibration=[str(rows_file)], **SEARCH)


def test_a_run_keeps_the_best_trial(searched):
    folder, report = searched
    trials = report["search"]["trials"]
    assert len(trials) == 4 and report["search"]["best"] == min(range(4), key=lambda n: trials[n]["objective"])
    for trial in trials:
        assert trial["objective"] == pytest.approx(trial["perplexity"] + 4 * trial["kl"])
    assert 0.65 < report["totals"]["kept_fraction"] <= 0.7
    ranks = {name: entry["rank"] for name, entry in report["layers"].items()}
    assert {rank for name, rank in ranks.items() if "v_proj" in name} == {"dense"} != set(ranks.values())
    assert len(report["search"]["windows"]) == 4 and report["calibration"]["validation_tokens"] == 512
    assert not (folder / ".work").exists()


def test_the_best_trial_was_measured_as_what_is_written(searched, llama_dir, rows_file):
    from lord_tune.integrations.models import load_tokenizer
    from lord_tune.resolve import windows_of

    folder, report = searched
    original, own = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (llama_dir, folder))
    config = DecomposeConfig.build({"model": "m", "out": "o", "calibration": [str(rows_file)]} | SEARCH)
    windows, _ = windows_of(config, own, load_tokenizer(str(folder)))
    assert windows.validation is not None and windows.validation.shape == (8, 64)
    held = {tuple(row.tolist()) for row in windows.heldout}
    assert not held & {tuple(row.tolist()) for row in windows.validation}
    assert not held & {tuple(row.tolist()) for row in windows.calibration}
    loss = divergence = 0.0
    for window in windows.validation[report["search"]["windows"]]:
        with torch.no_grad():
            p, q = (model(window[None]).logits[0, :-1].double().log_softmax(-1) for model in (own, original))
        loss -= float(p[range(63), window[1:]].sum())
        divergence += float((p.exp() * (p - q)).sum())
    best = report["search"]["trials"][report["search"]["best"]]
    tokens = 63 * len(report["search"]["windows"])
    assert best["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert best["kl"] == pytest.approx(divergence / tokens, abs=2e-3)  # float16 holds ln p to 2^-8 around -8


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_run_continues_with_the_same_models_and_bytes(
    after, searched, llama_dir, rows_file, tmp_path, monkeypatch
):
    folder, report = searched
    whole, calls = searching._Models.scores, []

    def dying(models: Any, plan: Plan) -> list[Score]:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(plan)
        return whole(models, plan)

    given = SEARCH | {"calibration": [str(rows_file)]}
    monkeypatch.setattr(searching._Models, "scores", dying)
    with pytest.raises(KeyboardInterrupt):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), **given)
    monkeypatch.setattr(searching._Models, "scores", lambda models, plan: (calls.append(plan), whole(models, plan))[1])
    again = lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), **given, resume=True)
    assert len(calls) == 6  # each model once
    assert again["search"] == report["search"] and shards(tmp_path / "out") == shards(folder)


def test_a_plan_is_the_same_and_serves_a_sibling(searched, llama_dir, rows_file, tmp_path):
    folder, report = searched
    given = SEARCH | {"calibration": [str(rows_file)]}
    lord_tune.plan(str(llama_dir), save=str(tmp_path / "plan.json"), **given)
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.layers == Plan.read(folder / "plan.json").layers
    sibling = save_tiny(tiny_llama(seed=5), tmp_path / "sibling")
    text = {"calibration": [str(rows_file)], "calibration_tokens": 1024, "context_length": 64}
    other = lord_tune.decompose(str(sibling), str(tmp_path / "out"), plan=str(tmp_path / "plan.json"), **text)
    assert {n: e["rank"] for n, e in other["layers"].items()} == {n: e["rank"] for n, e in report["layers"].items()}
    assert list(tmp_path.glob(".lord_tune_plan_*")) == []


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_other_families(family, rows_file, tmp_path):
    """Fused projections; a masked model; one whose own forward is followed."""
    model = {"gpt2": tiny_gpt2, "bert": tiny_bert}.get(family, lambda: build("BartForConditionalGeneration"))()
    folder = save_tiny(model, tmp_path / family)
    report = lord_tune.decompose(
        str(folder), str(tmp_path / "out"), calibration=[str(rows_file)], **SEARCH | {"trials": 3}
    )
    points = [trial["point"] for trial in report["search"]["trials"]]
    assert set(points[0]) == {"gpt2": {"qkv", "o", "up", "down"}}.get(family, {"qk", "o", "up", "down"})
    assert report["totals"]["kept_fraction"] <= 0.7 and points[0] != points[1] != points[2]
    values = {e["rank"] for n, e in report["layers"].items() if n.endswith((".value", ".v_proj"))}
    assert values == (set() if family == "gpt2" else {"dense"})
    assert all(math.isfinite(trial["objective"]) and trial["kl"] > 0 for trial in report["search"]["trials"])


def test_a_method_that_weighs_the_outputs(llama_dir, rows_file, tmp_path):
    given = SEARCH | {"trials": 2, "method": "two_sided", "sensitivity_tokens": 256}
    report = lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), calibration=[str(rows_file)], **given)
    assert len(report["search"]["trials"]) == 2 and report["totals"]["kept_fraction"] <= 0.7


REFUSED = {
    "a backbone": ("--backbone nf4", "`allocation` bolaco cuts the models", "--allocation bolaco"),
    "a packed format": ("--factor-format lloyd4", "which --factor-format lloyd4 is not", "--allocation bolaco"),
    "refining": ("--refine 2", "--refine has no effect", "--allocation bolaco"),
    "trials of another": ("--trials 5", "--trials has no effect", "--allocation uniform"),
    "weights of another": ("--kl-weight 5", "--kl-weight has no effect", ""),
    "roles of another": ("--searched up", "--searched has no effect", "--allocation typed"),
    "no trial": ("--trials 0", "--trials", "--allocation bolaco"),
    "no role": ("--searched upp", "role of --searched", "--allocation bolaco"),
    "groups without a centre": (
        "--method afm --no-centred --covariance-groups 4",
        "--covariance-groups changes means alone",
        "",
    ),
    "groups of another method": ("--method whitened --covariance-groups 4", "--covariance-groups has no effect", ""),
    "more groups than windows": ("--method afm --covariance-groups 999", "999 groups", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_a_sentence(case, llama_dir, rows_file, tmp_path, capsys):
    words, says, rule = REFUSED[case]
    given = ["--calibration", str(rows_file), "--kept-fraction", "0.8", "--context-length", "64", *rule.split()]
    with pytest.raises(SystemExit) as stopped:
        main(["decompose", str(llama_dir), str(tmp_path / "out"), *given, *words.split()])
    told = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and says.replace("`allocation`", "--allocation") in told, told
    assert told.count("error:") == 1 and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_it_says_what_to_install(llama_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"optuna is not installed; pip install 'lord-tune\[bolaco\]'"):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), calibration=[str(rows_file)], **SEARCH)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_head_is_refused_before_any_block_is_run(rows_file, tmp_path):
    bare = save_tiny(tiny_llama().model, tmp_path / "bare")
    with pytest.raises(UsageError, match="without a language-model head has no loss on text, by which"):
        lord_tune.decompose(str(bare), str(tmp_path / "out"), calibration=[str(rows_file)], **SEARCH)
    assert not (tmp_path / "out.partial").exists()


# ---- pooled covariances --------------------------------------------------------------------------------------------


def moving_windows(windows: int = 6, tokens: int = 20, width: int = 10) -> torch.Tensor:
    """Windows whose means differ much."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(windows, tokens, width, generator=generator, dtype=torch.float64)
    return x + 3 * torch.randn(windows, 1, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_the_basis_is_that_of_the_averaged_covariances(groups):
    x = moving_windows()
    weight = torch.randn(8, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = MomentAccumulator(10, torch.device("cpu"))
    for window in x:
        sums.update(window[None])
    moments = sums.result("layer")
    average = sum(torch.cov(part.flatten(0, 1).T, correction=0) for part in x.tensor_split(groups)) / groups
    energies, axes = torch.linalg.eigh(weight @ average @ weight.T)
    found = AFM(covariance_groups=groups).spectrum(weight, moments)
    torch.testing.assert_close(found.energies, energies.flip(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.basis.abs(), axes.flip(1).abs(), rtol=0, atol=1e-7)
    whole = AFM().spectrum(weight, moments)
    assert not torch.allclose(found.basis[:, :3].abs(), whole.basis[:, :3].abs(), atol=1e-2)
    assert torch.equal(found.centre, whole.centre)  # the bias is that of the mean of all tokens
    # of second moments without a centre, the average over groups is that of all tokens
    gram = sum(p.flatten(0, 1).T @ p.flatten(0, 1) / p[..., 0].numel() for p in x.tensor_split(groups)) / groups
    torch.testing.assert_close(gram, moments.gram, rtol=1e-12, atol=1e-12)


def test_one_group_is_today():
    x = moving_windows()
    sums = MomentAccumulator(10, torch.device("cpu"))
    for window in x:
        sums.update(window[None])
    moments, weight = sums.result("layer"), torch.eye(8, 10, dtype=torch.float64)
    assert torch.equal(AFM(covariance_groups=1).spectrum(weight, moments).basis, AFM().spectrum(weight, moments).basis)


def test_groups_change_a_run(llama_dir, rows_file, tmp_path):
    text = {"calibration": [str(rows_file)], "context_length": 64, "calibration_tokens": 1024, "method": "afm"}
    runs = [
        lord_tune.decompose(str(llama_dir), str(tmp_path / f"{groups}"), rank=8, covariance_groups=groups, **text)
        for groups in (1, 8)
    ]
    assert json.dumps(runs[0]["layers"]) != json.dumps(runs[1]["layers"])


def test_bolaco_is_an_allocator_like_the_others():
    assert ALLOCATORS["bolaco"] is Bolaco and Bolaco().trials == 50
