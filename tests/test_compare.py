"""compare: rows at equal bytes, measured as the verbs alone measure them; continued, refused, drawn."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_engine import CALIBRATION

import lord_tune
from lord_tune.config import CompareConfig
from lord_tune.errors import UsageError
from lord_tune.storage import read_json

OPTIONS: dict[str, Any] = {
    **{key: value for key, value in CALIBRATION.items() if key in ("calibration_tokens", "context_length")},
    "bits_per_weight": 12.0,
    "max_tokens": 128,
}
METHODS = ["lord", "loftq", "whitened:backbone=int4", "rounding"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("near.txt", "a b c d e f g h "), ("far.txt", "zebra quartz vex jolly ")):
        (folder / name).write_text(words * 200)
    return [str(folder / "near.txt"), str(folder / "far.txt")]


@pytest.fixture(scope="module")
def compared(llama_dir, rows_file, texts, tmp_path_factory):
    """A comparison with four rows and its report."""
    out = tmp_path_factory.mktemp("compare") / "out"
    report = lord_tune.compare(
        str(llama_dir), str(out), methods=METHODS, text=texts, calibration=[str(rows_file)], **OPTIONS
    )
    return out, report


def test_the_rows_are_what_decompose_and_evaluate_say(compared, texts):
    out, report = compared
    assert list(report["rows"]) == METHODS and read_json(out / "report.json") == report
    for word, row in report["rows"].items():
        base = row["options"]["out"]
        totals = read_json(Path(base) / "decomposition.json")["totals"]
        assert row["start"]["model_bytes"] == totals["model_bytes"]
        # never above the size; formats come in steps, which are large beside layers as small as these
        assert 0.75 * 12 < totals["linear_bits_per_weight"] <= 12, word
        found = lord_tune.evaluate(base, texts, context_length=OPTIONS["context_length"], max_tokens=128)
        assert row["start"]["losses"] == pytest.approx([found["texts"][text]["loss"] for text in texts], abs=1e-6)
    assert len({tuple(row["start"]["losses"]) for row in report["rows"].values()}) == 4
    dense = lord_tune.evaluate(
        report["compared"]["model"], texts, context_length=OPTIONS["context_length"], max_tokens=128
    )
    assert report["dense"]["start"]["losses"][1] == pytest.approx(dense["texts"][texts[1]]["loss"], abs=1e-6)
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (out / f"comparison.{kind}").read_bytes().startswith(magic)
    svg = (out / "comparison.svg").read_text()
    assert all(f"<!-- {word} -->" in svg for word in METHODS)


def test_loftq_gets_no_text_and_rounding_no_rank(compared):
    rows = compared[1]["rows"]
    assert "calibration" not in rows["loftq"]["options"] and "calibration" in rows["lord"]["options"]
    plan = read_json(Path(rows["rounding"]["options"]["out"]) / "plan.json")
    kinds = {(choice["rank"], choice["backbone"] == "none") for choice in plan["layers"].values()}
    assert (0, False) in kinds and kinds <= {(0, False), (None, True)}  # a few layers may stay dense


def test_the_same_command_continues_and_another_is_refused(
    compared, llama_dir, rows_file, texts, monkeypatch, tmp_path
):
    """Finished rows are not run again; one more row is."""
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    ran = []
    whole = lord_tune.comparing.decompose

    def spy(**options: Any) -> Any:
        ran.append(options["method"] if "method" in options else "")
        return whole(**options)

    monkeypatch.setattr(lord_tune.comparing, "decompose", spy)
    (out / "rows" / "loftq.json").unlink()
    given: dict[str, Any] = {"text": texts, "calibration": [str(rows_file)], **OPTIONS}
    again = lord_tune.compare(str(llama_dir), str(out), methods=[*METHODS, "svd"], **given)
    assert ran == ["loftq", "svd"]
    assert again["rows"]["loftq"]["start"]["losses"] == compared[1]["rows"]["loftq"]["start"]["losses"]
    for change, named in (
        ({"seed": 1}, "seed"),
        ({"max_tokens": 64}, "max_tokens"),
        ({"bits_per_weight": 11.0}, "bits"),
    ):
        with pytest.raises(UsageError, match=f"differs in '{named}'"):
            lord_tune.compare(str(llama_dir), str(out), methods=METHODS, **given | change)


def test_training_is_measured_beside_the_start(llama_dir, rows_file, texts, tmp_path):
    given: dict[str, Any] = {"text": texts[:1], "calibration": [str(rows_file)], **OPTIONS}
    options = given | {"steps": 4, "learning_rate": ["1e-3", "1e-6"], "max_length": 16}
    report = lord_tune.compare(str(llama_dir), str(tmp_path / "out"), methods=["loftq"], **options)
    row = report["rows"]["loftq"]
    losses = {run["learning_rate"]: run["losses"][0] for run in row["tried"]}
    assert set(losses) == {1e-3, 1e-6} and row["end"]["losses"][0] == min(losses.values())
    assert losses[1e-6] == pytest.approx(row["start"]["losses"][0], abs=1e-4)
    assert math.isfinite(losses[1e-3]) and abs(losses[1e-3] - row["start"]["losses"][0]) > 1e-4
    assert (tmp_path / "out" / "loftq" / "trained-0.001" / "adapter_model.safetensors").is_file()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown method": ({"methods": ["whitend"]}, "whitened"),
    "an option without a value": ({"methods": ["caldera:backbone"]}, "'backbone', without a value"),
    "a size of its own": ({"methods": ["svd:kept_fraction=0.5"]}, "the same for all rows"),
    "an option that the method lacks": ({"methods": ["loftq", "svd:damping=0.5"]}, "The row svd:damping=0.5 cannot"),
    "no text to calibrate on": ({"methods": ["lord"], "calibration": []}, "The row lord cannot be run"),
    "too few bits": ({"methods": ["loftq"], "bits_per_weight": 1.0}, "The row loftq cannot be run"),
    "fewer bytes than the embeddings": ({"methods": ["loftq"], "bits_per_weight": None, "max_bytes": "1kB"}, "alone"),
    "two sizes": ({"max_bytes": "1MB"}, "Expected one of"),
    "several texts to train on": ({"calibration": ["a.txt:0.5", "b.txt:0.5"], "steps": 2}, "one source"),
    "a rate without steps": ({"learning_rate": ["1e-4"]}, "no effect without `steps`"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_refuses_before_anything_is_run(kind, llama_dir, rows_file, texts, tmp_path):
    options, words = REFUSED[kind]
    out = tmp_path / "out"
    given: dict[str, Any] = {"methods": ["svd"], "text": texts, "calibration": [str(rows_file)], **OPTIONS} | options
    with pytest.raises(UsageError, match=words):
        lord_tune.compare(str(llama_dir), str(out), **{key: value for key, value in given.items() if value is not None})
    assert not out.exists()


@pytest.mark.parametrize("order", [(3000, 2000, 2000), (2000, 3000, 3000)])
def test_rows_of_other_sizes_are_named_the_smaller_first(order, capfd):
    """Also where several rows have one size."""
    start = {"losses": [1.0], "linear_bits_per_weight": 4.0}
    rows = {name: {"start": start | {"model_bytes": size}} for name, size in zip("abc", order, strict=True)}
    config = CompareConfig.build({"model": "m", "out": "o", "methods": ["svd"], "text": ["t"], "bits_per_weight": 4})
    lord_tune.comparing._show(config, {"dense": {"start": start | {"model_bytes": 9000}}, "rows": rows})
    small, large = ("b", "a") if order[0] == 3000 else ("a", "b")
    said = capfd.readouterr()
    assert f"{small} stores 33.3% less than {large}" in said.out + said.err
