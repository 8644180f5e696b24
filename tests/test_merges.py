"""`export --merge` and `--advise`: the merged models against the weights they should have, and what is said of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import read_tensors, save_tiny, tiny_llama, write_code_rows
from transformers import AutoModelForCausalLM

import lord_tune
from lord_tune.errors import LordError, UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers
from lord_tune.quantizers import make_quantizer

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `m`, `d` = int3 + rank 8 of it and `a`, trained on that; r.jsonl and, held out, h.jsonl."""
    folder = tmp_path_factory.mktemp("runs")
    rows, _ = write_code_rows(folder / "r.jsonl"), write_code_rows(folder / "h.jsonl", rows=40)
    save_tiny(tiny_llama(), folder / "m")
    text = {"calibration": [str(rows)], "calibration_tokens": 512, "context_length": 64}
    lord_tune.decompose(str(folder / "m"), str(folder / "d"), backbone="int3", rank=8, **text)
    common = {"dataset_name": str(rows), "max_steps": 10, "max_length": 64, "learning_rate": 3e-3}
    lord_tune.train(model_name_or_path=str(folder / "d"), output_dir=str(folder / "a"), mode="factors", **common)
    return folder


def options(runs, **more):
    return {"text": str(runs / "h.jsonl"), "calibration": [str(runs / "r.jsonl")], "calibration_tokens": 512} | more


def trained_weight(runs, name):
    model, _ = lord_tune.load(str(runs / "a"))
    return factored_layers(lord_tune.fold(model))[name].dense_weight(torch.float64)


def test_every_way_is_measured_and_the_smallest_that_fits_is_advised(runs, tmp_path, capsys):
    result = lord_tune.export(str(runs / "a"), str(tmp_path / "e"), "factored", **options(runs, advise=True))
    costs = result["merges"]
    assert list(costs) == ["unmerged", "decoded", "original", "nearest", "feedback"]
    assert costs["decoded"]["kl"] < 1e-9 < costs["feedback"]["kl"] < costs["nearest"]["kl"]
    assert costs["feedback"]["bytes"] == costs["nearest"]["bytes"] < costs["unmerged"]["bytes"]
    limit, best = 0.05, result["advice"]
    fitting = [c["bytes"] for c in costs.values() if c["loss"] - costs["unmerged"]["loss"] <= limit]
    assert costs[best]["bytes"] == min(fitting)
    assert "Q, rounded with feedback" in capsys.readouterr().out
    own = lord_tune.evaluate(str(runs / "a"), [str(runs / "h.jsonl")], context_length=256, max_tokens=4096)
    assert math.isclose(own["loss"], costs["unmerged"]["loss"], rel_tol=1e-6)


def test_into_the_original_weights_goes_what_training_changed(runs, tmp_path):
    lord_tune.export(str(runs / "a"), str(tmp_path / "e"), "dense", **options(runs, merge="original", merge_limit=9.0))
    original, found = (read_tensors(path)[f"{NAME}.weight"].double() for path in (runs / "m", tmp_path / "e"))
    start = factored_layers(load_dense_or_factored(str(runs / "d")))[NAME].dense_weight(torch.float64)
    change = trained_weight(runs, NAME) - start
    assert change.norm() > 1e-3 * original.norm()
    assert torch.allclose(found, original + change, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert "merges" in json.loads((tmp_path / "e" / "export.json").read_text())


@pytest.mark.parametrize("way", ["nearest", "feedback"])
def test_rounded_again_is_q_alone(runs, tmp_path, way):
    folder = tmp_path / "e"
    lord_tune.export(str(runs / "a"), str(folder), "factored", **options(runs, merge=way, merge_limit=9.0))
    layer = factored_layers(load_dense_or_factored(str(folder)))[NAME]
    assert layer.rank == 0 and layer.plan.backbone == "int3"
    wanted = trained_weight(runs, NAME)
    quantizer = make_quantizer("int3", layer.plan.backbone_options)
    plain = quantizer.dequantize(quantizer.quantize(wanted.float()), wanted.shape, torch.float64)
    found = layer.dense_weight(torch.float64)
    if way == "nearest":
        assert torch.allclose(found, plain, atol=1e-6)
    else:  # further away weight by weight, nearer in its outputs
        assert (found - wanted).norm() > (plain - wanted).norm()


def test_merges_that_cost_too_much_or_do_not_exist_are_refused(runs, tmp_path):
    out = tmp_path / "e"
    with pytest.raises(LordError, match=r"Merging L R \(nearest\) costs too much"):
        lord_tune.export(str(runs / "a"), str(out), "factored", **options(runs, merge="nearest", merge_limit=0.0))
    with pytest.raises(UsageError, match="is no training output"):
        lord_tune.export(str(runs / "d"), str(out), "dense", **options(runs, merge="original"))
    with pytest.raises(UsageError, match="error feedback needs calibration text"):
        lord_tune.export(str(runs / "a"), str(out), "factored", merge="feedback", text=str(runs / "h.jsonl"))
    with pytest.raises(UsageError, match="it is not held out"):
        lord_tune.export(
            str(runs / "a"), str(out), "factored", **options(runs, advise=True, text=str(runs / "r.jsonl"))
        )
    with pytest.raises(UsageError, match="pass `text` FILE"):
        lord_tune.export(str(runs / "a"), str(out), "factored", advise=True)
    with pytest.raises(UsageError, match="`merge` nearest is written as factored"):
        lord_tune.export(str(runs / "a"), str(out), "dense", **options(runs, merge="nearest"))
    with pytest.raises(UsageError, match="`merge_limit` has no effect without"):
        lord_tune.export(str(runs / "a"), str(out), "dense", merge_limit=1.0)
    assert not out.exists() and not list(tmp_path.iterdir())


def test_low_rank_alone_has_no_q_to_round_into(runs, tmp_path, capsys):
    lord_tune.decompose(str(runs / "m"), str(tmp_path / "d"), rank=8, method="svd")
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "factored", **options(runs, advise=True))
    assert list(result["merges"]) == ["unmerged", "decoded"] and result["advice"] == "unmerged"
    assert "without a Q to round into" in capsys.readouterr().out
