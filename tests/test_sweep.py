"""The sweep over tiny architectures (scripts/sweep_architectures.py): all of them, slowly, and what makes a verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from architectures import build, names
from tiny import write_code_rows

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import sweep_architectures as sweep  # noqa: E402

# tensors beside parameters and buffers, which cannot be loaded block by block; a language that has to be set first
REFUSED = {"CTRLLMHeadModel", "FSMTForConditionalGeneration", "XmodForMaskedLM"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_code_rows(tmp_path_factory.mktemp("sweep") / "rows.jsonl")


def test_the_sweep_knows_at_least_sixty_architectures():
    assert len(names()) > 200 and not any("Musicgen" in name for name in names())


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_right_or_refused(name, rows, tmp_path):
    model = build(name)
    if model is None:
        pytest.skip("the common settings do not make it small or do not fit it")
    found = sweep.verdict(name, model, tmp_path, rows)
    assert found.kind == (sweep.REFUSED if name in REFUSED else sweep.RIGHT), found.detail


@pytest.mark.parametrize("name", ["MarianMTModel", "MraForMaskedLM"])
def test_what_needs_care_is_right(name, rows, tmp_path):
    """Marian's positions are in no file and computed by its code; MRA's attention passes no gradient on a CPU."""
    found = sweep.verdict(name, build(name), tmp_path, rows)
    assert found.kind == sweep.RIGHT, found.detail


@pytest.mark.parametrize(
    "broken, says",
    [
        ("_calibration", "calibration: the Gram matrix"),
        ("_densely", "reload: the outputs differ"),
        ("optimizer", "layers did not change"),
    ],
)
def test_what_is_wrong_is_called_wrong(broken, says, rows, tmp_path, monkeypatch):
    if broken == "_calibration":
        run = sweep.run_model
        monkeypatch.setattr(sweep, "run_model", lambda model, ids: run(model, ids.roll(1)))
    elif broken == "_densely":
        monkeypatch.setattr(sweep, "_densely", lambda base, factored: sweep.load_dense_or_factored(base))
    else:
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    found = sweep.verdict("LlamaForCausalLM", build("LlamaForCausalLM"), tmp_path, rows)
    assert found.kind == sweep.WRONG and says in found.detail
