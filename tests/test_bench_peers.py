"""scripts/bench_peers.py: its protocol measures what `evaluate` measures, and the bytes that lie on the disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lord_tune
from tests.tiny import read_tensors, save_tiny, tiny_llama, without_sentinels

_SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def peers(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(_SCRIPTS))
    import peers.experiments
    import peers.protocol
    import peers.rows

    return peers


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("peers") / "dense")


@pytest.fixture
def setting(peers, dense, rows_file) -> Any:
    text = str(rows_file)
    small = {"calibration_tokens": 512, "error_tokens": 256, "validation_tokens": 128, "tokens": 512, "length": 128}
    texts = {"code": text, "wikitext": text}
    return peers.protocol.Setting(
        str(dense), text, text, texts, **small, steps=3, train_length=64, rates=(1e-3, 1e-2), rank=4
    )


def test_perplexity_and_bytes_are_those_of_evaluate(peers, setting, rows_file, tmp_path):
    made = peers.experiments.EXPERIMENTS["ours_nearest"].made(setting, tmp_path, {})
    found = lord_tune.evaluate(
        str(tmp_path / "decomposed"), text=[str(rows_file)], context_length=setting.length, max_tokens=setting.tokens
    )
    # what the row keeps in 16 bits lies in 16 bits in the checkpoint, so that the two are one model
    assert peers.protocol.perplexities(made.model, setting)["code"] == pytest.approx(found["perplexity"], rel=1e-5)
    stored = peers.protocol.sizes(made, setting.dense())
    files = list((tmp_path / "decomposed").glob("*.safetensors"))
    assert stored["bytes"] == sum(path.stat().st_size for path in files)
    tensors = without_sentinels(read_tensors(tmp_path / "decomposed"))
    assert sum(value.nbytes for value in tensors.values()) == found["model_bytes"]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert 0 <= stored["bytes"] - headers - found["model_bytes"] <= len(tensors)  # a sentinel a layer


def test_errors_are_those_of_the_outputs(peers, setting, tmp_path):
    """By their definition, from the inputs themselves instead of their Gram matrix."""
    files = peers.rows.prepare(setting, tmp_path)
    moments = {name: peers.protocol.Moments(path) for name, path in files.items()}
    model, dense = setting.dense(), setting.dense()
    torch.manual_seed(0)
    changed = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        changed.weight += 0.1 * torch.randn_like(changed.weight) * changed.weight.std()
    found = peers.protocol.errors(model, dense, moments)
    inputs: list[torch.Tensor] = []
    layer = dense.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for window in setting.windows(setting.calibration, setting.error_tokens):
            dense(input_ids=window[None])
        x = torch.cat(inputs)
        lost = float((changed(x) - layer(x)).norm() / layer(x).norm())
    # all other layers are unchanged, up to the float32 of the unit vectors
    assert found["calibrated"] * len(peers.protocol.dense_linears(dense)) == pytest.approx(lost, rel=1e-3)


def test_a_row_is_made_trained_merged_and_kept(peers, setting, tmp_path):
    row = peers.rows.Row("loftq_1", setting, tmp_path)
    row.run(list(peers.rows.PHASES))
    content = json.loads((tmp_path / "rows" / "loftq_1.json").read_text())
    assert {"versions", "commit", "dirty", "setting", "machine", "start", "end", "merged", "rates"} <= set(content)
    best = min(content["rates"], key=lambda rate: content["rates"][rate]["validation"])
    assert float(best) == content["rate"] and set(content["rates"]) == {"0.001", "0.01"}
    assert content["end"]["code"] < content["start"]["code"] and math.isfinite(content["merged"]["code"])
    again = peers.rows.Row("loftq_1", setting, tmp_path)
    again.run(list(peers.rows.PHASES))
    assert json.loads(again.path.read_text()) == content
    with pytest.raises(SystemExit, match="was measured with steps 3, and 4 is asked for"):
        peers.rows.Row("loftq_1", replace(setting, steps=4), tmp_path)
    qlora = peers.rows.Row("qlora", setting, tmp_path)
    qlora.run(["start"])
    assert content["errors"]["weight"] < qlora.found["errors"]["weight"]
    assert content["trainable"] == qlora.found["trainable"]
    assert abs(content["made"]["bytes"] - qlora.found["made"]["bytes"]) < 64
