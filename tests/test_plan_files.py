"""Plans as files: what `plan --save` and a decomposition write is carried out by `decompose --plan`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import lord_tune
from lord_tune.allocation import Uniform
from lord_tune.decomposition import Bits, Given, LayerRecord, Ranks, Request, Sized
from lord_tune.decomposition.decide import decide
from lord_tune.decomposition.sizes import bits_at, stored_bytes
from lord_tune.errors import LordWarning, UsageError
from lord_tune.layers import FactoredLinear, factored_layers
from lord_tune.plans import LayerChoice, Plan
from lord_tune.sites import Site
from lord_tune.size_tables import show_equal_bits

SHORT: dict[str, Any] = {"context_length": 64, "calibration_tokens": 512}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def save_plan(model: Path, path: Path) -> None:
    """Plain SVD, rank 4 everywhere."""
    lord_tune.plan(str(model), save=str(path), json=str(path.with_suffix(".estimate")), method="svd", rank=4)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 12},
        {"rank": 4, "backbone": "nf4", "double_quant": True},
        {"rank": 4, "method": "caldera", "backbone": "e8-2", "iterations": 1, "targets": "q_proj"},
        {"bits_per_weight": 6, "backbone": "int4", "factor_format": "lloyd4", "targets": "up_proj"},
        {"kept_fraction": 0.8, "allocation": "uniform", "method": "afm"},
    ],
    ids=["rank", "nf4", "caldera", "bits", "uniform"],
)
def test_a_saved_plan_gives_the_bytes_of_its_options(llama_dir, rows_file, tmp_path, options):
    text = SHORT | {"calibration": [str(rows_file)]}
    lord_tune.plan(str(llama_dir), save=str(tmp_path / "plan.json"), json=str(tmp_path / "e.json"), **options, **SHORT)
    lord_tune.decompose(str(llama_dir), str(tmp_path / "direct"), **options, **text)
    where = {key: value for key, value in options.items() if key == "targets"}
    lord_tune.decompose(str(llama_dir), str(tmp_path / "planned"), plan=str(tmp_path / "plan.json"), **where, **text)
    assert shards(tmp_path / "direct") == shards(tmp_path / "planned")
    manifests = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("direct", "planned")]
    assert manifests[0]["quantization_config"] == manifests[1]["quantization_config"]


def test_the_plan_that_calibration_chose_can_be_carried_out_again(llama_dir, rows_file, tmp_path):
    text = SHORT | {"calibration": [str(rows_file)], "sensitivity_tokens": 128}
    lord_tune.decompose(str(llama_dir), str(tmp_path / "first"), kept_fraction=0.7, **text)
    plan = Plan.read(tmp_path / "first" / "plan.json")
    assert len(set(plan.ranks().values())) > 1
    report = lord_tune.decompose(
        str(llama_dir), str(tmp_path / "again"), plan=str(tmp_path / "first/plan.json"), **text
    )
    ranks = {name: "dense" if rank is None else rank for name, rank in plan.ranks().items()}
    assert {name: entry["rank"] for name, entry in report["layers"].items()} == ranks
    # the basis was kept in float32 between the passes, and is not here
    for name, tensor in load_file(tmp_path / "first" / "model-00001-of-00004.safetensors").items():
        again = load_file(tmp_path / "again" / "model-00001-of-00004.safetensors")[name]
        assert torch.allclose(tensor.float(), again.float(), atol=1e-4), name


def test_layers_of_one_plan_may_differ_in_everything(llama_dir, rows_file, tmp_path):
    """Dense, L R, Q + L R of two formats and methods, Q alone, packed factors: in one checkpoint that loads."""
    plain = lord_tune.decompose(str(llama_dir), str(tmp_path / "names"), method="svd", rank=4)
    kinds = [
        LayerChoice("svd", None, reason="it is left for comparison"),
        LayerChoice("whitened", 8, {"sink_weight": 0.0}),
        LayerChoice("afm", 8),
        LayerChoice("loftq", 4, {"iterations": 2}, "nf4", {"block_size": 64}),
        LayerChoice("caldera", 4, {"iterations": 1}, "e8-2", {"incoherence": True, "seed": 3}, "lloyd4"),
        LayerChoice("svd", 0, {}, "int8", {"group_size": 32}),
        LayerChoice("svd", 8, {}, "none", {}, "int4", {"group_size": 8}, 2, "fp16"),
    ]
    choices = {name: kinds[index % len(kinds)] for index, name in enumerate(plain["layers"])}
    Plan(choices).save(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json").layers == choices
    out = tmp_path / "mixed"
    options: dict[str, Any] = SHORT | {"calibration": [str(rows_file)], "plan": str(tmp_path / "plan.json")}
    estimate = lord_tune.plan(str(llama_dir), json=str(tmp_path / "e.json"), **SHORT, plan=str(tmp_path / "plan.json"))
    report = lord_tune.decompose(str(llama_dir), str(out), **options)
    assert estimate["model_bytes_after"] == report["totals"]["model_bytes"]
    model = AutoModelForCausalLM.from_pretrained(out)
    layers = factored_layers(model)
    for name, choice in choices.items():
        if choice.rank is None:
            assert name not in layers and report["layers"][name]["warnings"] == [f"left dense: {choice.reason}"]
            continue
        stored = layers[name].plan
        assert (stored.method, stored.rank, stored.backbone) == (choice.method, choice.rank, choice.backbone), name
        assert stored.left_format == (choice.factor_format or "fp32") and stored.top_rank == choice.stored_apart
        assert (layers[name].bias is not None) == (choice.method == "afm")
        assert 0 < report["layers"][name]["error_calibrated"] < 1
    assert isinstance(model.get_submodule(next(iter(layers))), FactoredLinear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop(next(iter(layers))), "has no entry for"),
        (lambda layers: layers.update(stray=next(iter(layers.values()))), "names 'stray', which the model lacks"),
        (lambda layers: next(iter(layers.values())).update(rank=63), "its largest is 56"),
        (lambda layers: next(iter(layers.values())).update(rank=-1), "expected a number from 0 or null"),
        (lambda layers: next(iter(layers.values())).update(rank=0), "rank 0 without a backbone"),
        (lambda layers: next(iter(layers.values())).update(method="whitend"), "whitened"),
        (lambda layers: next(iter(layers.values())).update(method_options={"sinks": 1}), "options it does not have"),
        (lambda layers: next(iter(layers.values())).update(method="loftq"), "needs a quantized backbone"),
        (lambda layers: next(iter(layers.values())).update(color="red"), "may come from a newer lord_tune"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_any_work(llama_dir, tmp_path, change, message):
    lord_tune.plan(
        str(llama_dir), save=str(tmp_path / "plan.json"), json=str(tmp_path / "e.json"), method="svd", rank=4
    )
    content = json.loads((tmp_path / "plan.json").read_text())
    change(content["layers"])
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), plan=str(tmp_path / "plan.json"))
    assert not list(tmp_path.glob("out*"))


def test_what_the_plan_says_is_not_said_twice(llama_dir, tmp_path):
    lord_tune.plan(
        str(llama_dir), save=str(tmp_path / "plan.json"), json=str(tmp_path / "e.json"), method="svd", rank=4
    )
    given = {"plan": str(tmp_path / "plan.json")}
    with pytest.raises(UsageError, match="got `rank` and `plan`"):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), rank=4, **given)
    with pytest.raises(UsageError, match="`backbone` has no effect beside `plan`"):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), backbone="nf4", **given)
    with pytest.raises(UsageError, match="The calibration text decides the ranks of this budget"):
        lord_tune.plan(str(llama_dir), kept_fraction=0.8, save=str(tmp_path / "later.json"))
    with pytest.raises(UsageError, match="does not exist"):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), plan=str(tmp_path / "none.json"))


def test_another_plan_is_another_run(llama_dir, tmp_path, monkeypatch):
    """A run is not continued with a plan that was changed."""
    plan = tmp_path / "plan.json"
    lord_tune.plan(str(llama_dir), save=str(plan), json=str(tmp_path / "e.json"), method="svd", rank=4)
    monkeypatch.setattr(
        "lord_tune.decomposition.engine.write_rest", lambda run, tables: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), plan=str(plan))
    monkeypatch.undo()
    layers = {name: dataclasses.replace(choice, rank=6) for name, choice in Plan.read(plan).layers.items()}
    Plan(layers).save(plan)
    with pytest.raises(UsageError, match="plan was"):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), plan=str(plan), resume=True)


def test_a_plan_is_portable_between_models_of_one_architecture(llama_dir, tmp_path):
    other = save_tiny(tiny_llama(seed=7), tmp_path / "other")
    lord_tune.plan(
        str(llama_dir), save=str(tmp_path / "plan.json"), json=str(tmp_path / "e.json"), method="svd", rank=4
    )
    report = lord_tune.decompose(str(other), str(tmp_path / "out"), plan=str(tmp_path / "plan.json"))
    assert {entry["rank"] for entry in report["layers"].values()} == {4}


SMALL = {"router": (4, 64), "gate": (1, 64), "dt_proj": (96, 4)}
LARGE = {"q_proj": (64, 64), "up_proj": (160, 64)}


def _decided(budget: Any, shapes: dict[str, tuple[int, int]], backbone: str = "none") -> Plan:
    layers = {name: Site(name, shape, torch.float32, False, False) for name, shape in shapes.items()}
    found = decide(layers, Request(LayerChoice("svd", None, backbone=backbone), budget))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("budget", "backbone", "says"),
    [
        (Ranks(8), "int4", "rank 8 exceeds its smaller side 1"),
        (Ranks(8), "none", "rank 8 is above its break-even 0"),
        (Sized(0.8, Uniform()), "none", "its break-even is 0"),
        (
            Bits(16.0, tuple(LayerChoice("svd", None, backbone=n) for n in ("int2", "int4"))),
            "none",
            "smaller side 1 is",
        ),
        (Bits(20.0, (LayerChoice("svd", None, backbone="int4"),), 8), "none", "rank 8 exceeds its smaller side 1"),
    ],
    ids=["rank and backbone", "rank", "kept", "bits", "bits and rank"],
)
def test_layers_too_small_for_the_rank_stay_dense_and_are_named(budget, backbone, says):
    alone = _decided(budget, LARGE, backbone)
    with pytest.warns(LordWarning) as said:
        plan = _decided(budget, LARGE | SMALL, backbone)
    assert {name: plan.layers[name] for name in LARGE} == alone.layers  # they change nothing for the others
    assert all(choice.rank for choice in alone.layers.values())
    assert all(plan.layers[name].rank is None and plan.layers[name].reason for name in SMALL)
    assert any("1 of 5 layers stay dense, gate: " in str(w.message) and says in str(w.message) for w in said)
    assert _decided(Given(plan), LARGE | SMALL) == plan


def test_a_rank_that_no_layer_can_take_is_refused():
    with pytest.raises(UsageError, match=r"every layer \(that of router, 4x64, is the largest\); choose at most 4"):
        _decided(Ranks(8), SMALL, "int4")


def test_a_gate_with_one_output_stays_dense_and_the_others_keep_their_rank(rows_file, tmp_path):
    """Qwen2's mixture has one; plan, decompose and decompose --plan agree."""
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=48,
        shared_expert_intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, initializer_range=0.12,
    )  # fmt: skip
    model = save_tiny(Qwen2MoeForCausalLM(config), tmp_path / "model")
    options: dict[str, Any] = {"rank": 8, "backbone": "nf4", "method": "svd"}
    with pytest.warns(LordWarning, match="1 of 16 layers stay dense, model.layers.0.mlp.shared_expert_gate: rank 8"):
        lord_tune.plan(str(model), save=str(tmp_path / "plan.json"), json=str(tmp_path / "e.json"), **options)
    with pytest.warns(LordWarning) as said:
        report = lord_tune.decompose(str(model), str(tmp_path / "direct"), **options)
    assert sum("shared_expert_gate" in str(warning.message) for warning in said) == 1
    lord_tune.decompose(str(model), str(tmp_path / "planned"), plan=str(tmp_path / "plan.json"))
    assert shards(tmp_path / "direct") == shards(tmp_path / "planned")
    left = {name: entry["warnings"] for name, entry in report["layers"].items() if entry["rank"] == "dense"}
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert left == {gate: ["left dense: rank 8 exceeds its smaller side 1"]}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "direct")
    assert gate not in factored_layers(again) and len(factored_layers(again)) == 15


@pytest.mark.parametrize("family", ["llama_dir", "gpt2_dir", "bert_dir"])
def test_spread_leaves_the_first_and_the_last_block_of_any_family(family, request, tmp_path):
    """Three blocks: only the second is between. A quarter of the numbers fits into it, half does not."""
    folder = str(request.getfixturevalue(family))
    options: dict[str, Any] = {"method": "tucker", "allocation": "spread", "rank": 1}
    chosen = {}
    for kept in (0.75, 0.5):
        path = tmp_path / f"{kept}.json"
        lord_tune.plan(folder, save=str(path), json=str(tmp_path / "estimate"), kept_fraction=kept, **options)
        ranks = Plan.read(path).ranks()
        blocks = [next(part for part in name.split(".") if part.isdigit()) for name in ranks]
        found = {block for block, rank in zip(blocks, ranks.values(), strict=True) if rank is not None}
        chosen[kept] = found
        assert {rank for rank in ranks.values() if rank is not None} == {1}
    assert chosen == {0.75: {"1"}, 0.5: {"1", "2"}}


def test_spread_asks_for_its_rank(llama_dir):
    with pytest.raises(UsageError, match="spread decomposes .* at one `rank`.*give `rank`"):
        lord_tune.plan(str(llama_dir), kept_fraction=0.9, method="tucker", allocation="spread")
    with pytest.raises(UsageError, match="Got rank 0; a rank is at least 1"):
        lord_tune.plan(str(llama_dir), kept_fraction=0.9, method="tucker", allocation="spread", rank=0)
    with pytest.raises(UsageError, match="Expected one of .* got `rank` and `kept_fraction`"):
        lord_tune.plan(str(llama_dir), kept_fraction=0.9, method="tucker", allocation="uniform", rank=1)
    with pytest.raises(UsageError, match="already keeps 1.000 of the parameters.*smaller `rank`"):
        lord_tune.plan(str(llama_dir), kept_fraction=0.9, method="tucker", allocation="spread", rank=64)


def test_rank_1_of_tucker_is_stored_and_loads(llama_dir, tmp_path):
    out = tmp_path / "out"
    lord_tune.decompose(
        str(llama_dir), str(out), method="tucker", kept_fraction=0.8, allocation="spread", rank=1, form="plain"
    )
    found = factored_layers(AutoModelForCausalLM.from_pretrained(out))
    assert found and all(".1." in name for name in found)
    dense = AutoModelForCausalLM.from_pretrained(llama_dir)
    for name, layer in found.items():
        u, s, vh = torch.linalg.svd(dense.get_submodule(name).weight.double())
        # stored in float32
        reference = s[0] * torch.outer(u[:, 0], vh[0])
        assert float((layer.dense_weight().double() - reference).norm()) < 1e-5 * float(reference.norm())


def test_a_small_layer_does_not_decide_the_format_of_all():
    """Rank 8 in 16 bits takes 0.89 bits per weight of the small layer and 0.31 of the large one."""
    shapes = {"k_proj": (192, 576), "up_proj": (1536, 576)}
    layers = {name: Site(name, shape, torch.bfloat16, False, False) for name, shape in shapes.items()}
    widths = tuple(LayerChoice("svd", None, backbone=n, factor_format="bf16") for n in ("e8-2", "e8-3", "e8-4"))
    for bits, form in ((3.45, "e8-3"), (3.9, "e8-3"), (4.5, "e8-4"), (3.35, "e8-2")):
        plan = decide(layers, Request(widths[0], Bits(bits, widths)))
        assert plan is not None
        assert {choice.backbone for choice in plan.layers.values()} == {form}
        assert min(choice.rank or 0 for choice in plan.layers.values()) >= 8
        stored = sum(stored_bytes(site, plan.layers[name]) for name, site in layers.items())
        spent = 8 * stored / sum(site.numbers for site in layers.values())
        assert bits - 0.35 < spent <= bits
    assert bits_at(layers["k_proj"], widths[1].at(8)) > 3.45  # by itself it would have taken the format from both
    with pytest.raises(UsageError, match=r"the narrowest format, e8-2, takes 2.398 with rank 8"):
        decide(layers, Request(widths[0], Bits(2.3, widths)))


def _record(bits: float, error: float) -> LayerRecord:
    curve = {"e8-2": (2.03, 0.3), "e8-3": (3.03, 0.15), "e8-4": (4.03, 0.075)}
    equal = {name: {"bits": b, "calibrated": e, "heldout": e} for name, (b, e) in curve.items()}
    return LayerRecord((8, 8), 8, "whitened", "int4", bits, error, error, None, None, 0.0, equal_bits=equal)


def test_what_l_r_pays_is_said_at_equal_bits_alone(capfd):
    show_equal_bits({"b.1.q_proj": _record(7.0, 0.01)})
    said = " ".join(capfd.readouterr().out.split())
    assert "makes the error smaller" not in said and "compared with none" in said
    show_equal_bits({"b.1.q_proj": _record(7.0, 0.01), "b.1.k_proj": _record(3.03, 0.3), "b.1.v_proj": _record(1, 0.9)})
    said = " ".join(capfd.readouterr().out.split())
    assert "(1 layers): 2.00; spent on a finer Q" in said
    show_equal_bits({"b.1.q_proj": _record(4.03, 0.0375)})
    assert "(1 layers): 0.50; L R makes the error smaller" in " ".join(capfd.readouterr().out.split())
