"""Small runs write what they wrote before: scripts/make_golden.py says how they are recorded, and by how much they
differ (--against REV)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import make_golden as golden  # noqa: E402

RUNS = [run if run in golden.QUICK else pytest.param(run, marks=pytest.mark.slow) for run in golden.RUNS]


@pytest.fixture(scope="module")
def recorded():
    return golden.read_golden()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return golden.Workbench(tmp_path_factory.mktemp("golden"))


def test_the_recorded_runs_are_those_of_the_script(recorded):
    assert recorded["runs"].keys() == set(golden.RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_structure(recorded, bench, run):
    """Tensors, manifests, ranks and keys of reports, on any machine."""
    assert [*golden.differences(recorded["runs"][run]["structure"], bench.record(run)["structure"])] == []


@pytest.mark.parametrize("run", RUNS)
def test_config(recorded, bench, run):
    """Of a checkpoint: no rounding reaches it, so it is the same on any machine with these libraries."""
    if "config.json" not in recorded["runs"][run]["bytes"]:
        pytest.skip("no checkpoint")
    if any(golden.fingerprint()[name] != recorded["fingerprint"][name] for name in golden.LIBRARIES):
        pytest.skip("recorded with other libraries")
    assert bench.record(run)["bytes"]["config.json"] == recorded["runs"][run]["bytes"]["config.json"]


@pytest.mark.parametrize("run", RUNS)
def test_bytes(recorded, bench, run):
    now, then = golden.fingerprint(), recorded["fingerprint"]
    unlike = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
    if unlike:
        pytest.skip(f"the bytes were recorded with another {', '.join(unlike)}")
    assert [*golden.differences(recorded["runs"][run]["bytes"], bench.record(run)["bytes"])] == []


def test_a_change_of_one_number_and_of_one_key_is_found(recorded):
    """What compares must be able to fail."""
    record = recorded["runs"]["llama/svd"]
    changed = {**record, "bytes": record["bytes"] | {"model-00001-of-00004.safetensors": "0" * 64}}
    found = golden.compare({"llama/svd": record}, {"llama/svd": changed}, ("structure", "bytes"))
    assert [*found] == [("llama/svd", "bytes", "model-00001-of-00004.safetensors has other content")]
    keys = dict(record["structure"]["keys"]) | {"decomposition.json": ["top: base"]}
    changed = {**record, "structure": record["structure"] | {"keys": keys}}
    lines = [line for _, _, line in golden.compare({"llama/svd": record}, {"llama/svd": changed}, ("structure",))]
    assert len(lines) == 1 and lines[0].startswith("keys: decomposition.json: got ['top: base'], expected")


@pytest.mark.slow
def test_against_a_revision():
    """HEAD and the files as they are: the same, unless the tree has changes that --against is for."""
    words = [sys.executable, "scripts/make_golden.py", "--against", "HEAD", "--only", "llama/svd", "llama/train-lora"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "2 runs are the same." in run.stdout, run.stdout + run.stderr
