"""What other processes, other working folders and moved folders do to a run: nothing, or a sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import SHORT, train, write_rows
from tiny import code_document, save_tiny, tiny_llama

import lord_tune
from lord_tune.cli import main
from lord_tune.errors import CheckpointError, LordWarning, UsageError
from lord_tune.integrations.files import fingerprint
from lord_tune.storage import OutputLock, check_destination, sole_writer

_HOLD = """
import sys
from pathlib import Path
from lord_tune.storage import OutputLock
held = OutputLock(Path(sys.argv[1]))
held.take()
print("holds", flush=True)
sys.stdin.read()
"""
IDS = torch.arange(1, 60)[None]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": code_document(n)} for n in range(8)])


@contextmanager
def writing(out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes `out`, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.wait()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


# ---- two runs on one output ----------------------------------------------------------------------------------------


def test_no_verb_writes_what_another_process_writes(llama_dir, rows, tmp_path, capfd):
    """Whoever holds it and whatever it asks for; nothing is touched, and the death of the first is enough."""
    base = tmp_path / "base"
    lord_tune.decompose(str(llama_dir), str(base), rank=8, method="svd", backbone="int4")
    run, work = tmp_path / "work" / "run", tmp_path / "work"
    train(base, rows, run)
    shutil.copy(run / "train_results.json", work / "report.json")  # `work` is a folder of the quickstart
    short = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    commands = {
        "train": ["train", "--model_name_or_path", str(base), "--dataset_name", str(rows), "--output_dir", str(run)]
        + [*short, "--max_steps", "4"],
        "export": ["export", str(base), str(run), "--format", "factored", "--overwrite"],
        "decompose": ["decompose", str(llama_dir), str(run), "--method", "svd", "--rank", "4", "--overwrite"],
        "resume": ["decompose", str(llama_dir), str(run), "--method", "svd", "--rank", "4", "--resume"],
        "quickstart": ["quickstart", "--out", str(work), "--overwrite", "--model", str(llama_dir)],
    }
    with writing(run) as holder:
        before = files_of(tmp_path)
        for name, words in commands.items():
            with pytest.raises(SystemExit) as end:
                main(words)
            said = capfd.readouterr().err
            assert end.value.code == 2 and f"run is being written by process {holder.pid} on " in said, (name, said)
        assert files_of(tmp_path) == before
    assert (work / ".run.lock").is_file()  # it was killed
    lord_tune.export(str(base), str(run), "factored", overwrite=True)
    assert (run / "export.json").is_file() and {path.name for path in work.iterdir()} == {"run", "report.json"}


def test_the_lock_goes_with_its_run_and_leaves_no_folders(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with sole_writer(out):
        with pytest.raises(UsageError, match=f"being written by process {os.getpid()} on"):
            OutputLock(out).take()
        with pytest.raises(UsageError, match="being written by"):
            OutputLock(out).check()
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
    assert not [*tmp_path.iterdir()]
    with pytest.raises(RuntimeError, match="mine"), sole_writer(out):
        raise RuntimeError("mine")
    with sole_writer(out):
        out.mkdir()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_is_not_replaced_while_a_run_writes_inside_it(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with sole_writer(tmp_path / "a" / "run"):
        with pytest.raises(UsageError, match=r"a/run is being written by process"):
            check_destination(tmp_path, overwrite=True)
    check_destination(tmp_path, overwrite=True)


def test_where_no_lock_can_be_made_there_is_a_warning_and_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *given, **more: (_ for _ in ()).throw(PermissionError(13, "not yours")))
    with pytest.warns(LordWarning, match=r"\.out\.lock cannot be made \(not yours\)"), sole_writer(tmp_path / "out"):
        pass


# ---- runs that are moved -------------------------------------------------------------------------------------------


@pytest.fixture
def world(llama_dir, rows, tmp_path, monkeypatch) -> Path:
    """A folder with an original, its decomposition and a training run, all made with relative names."""
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(llama_dir, here / "original")
    shutil.copy(rows, here / "rows.jsonl")
    monkeypatch.chdir(here)
    lord_tune.decompose("original", "base", rank=8, method="svd", backbone="int4")
    train(Path("base"), Path("rows.jsonl"), Path("run"), save_strategy="steps", save_steps=1)
    return here


def another_model(folder: Path) -> None:
    """The same name and shapes, other weights."""
    shutil.rmtree(folder)
    save_tiny(tiny_llama(seed=7), folder)


def test_what_was_moved_together_is_found_and_goes_on(world, tmp_path, monkeypatch):
    before = logits(lord_tune.load("run")[0])
    monkeypatch.chdir(tmp_path)
    shutil.move(world, tmp_path / "there")
    there = tmp_path / "there"
    for folder in ("run", "run/checkpoint-2"):
        assert torch.equal(logits(lord_tune.load(str(there / folder))[0]), before)
    assert lord_tune.inspect(str(there / "run"))["layers"]
    lord_tune.export(str(there / "run"), str(there / "dense"), "dense")
    # the same run with other names of the same things, from another working folder
    continued = train(
        there / "base", there / "rows.jsonl", there / "run", save_strategy="steps", save_steps=1, max_steps=3
    )
    assert continued["resumed_from"].endswith("checkpoint-2") and continued["steps"] == 3
    distilled = {"objective": "distill", "teacher_logits": str(there / "logits")}
    train(there / "base", there / "rows.jsonl", there / "distilled", **distilled)


def test_what_is_gone_is_asked_for(world, tmp_path, monkeypatch):
    shutil.move(world / "base", tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"base that .*run was trained on is not there; .*base_model_name_or_path"
    ):
        lord_tune.load("run")
    settings = world / "run" / "adapter_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "elsewhere")})
    )
    lord_tune.load("run")
    shutil.rmtree(world / "original")
    with pytest.raises(UsageError, match=r"original model original, .* is not there; set teacher_model_name_or_path"):
        train(tmp_path / "elsewhere", world / "rows.jsonl", world / "distilled", objective="distill")


def test_a_relative_name_never_finds_another_model(world, tmp_path, monkeypatch):
    """The teacher's name in another working folder, where a model of the same shapes has it; and where it was."""
    (tmp_path / "other").mkdir()
    save_tiny(tiny_llama(seed=7), tmp_path / "other" / "original")
    lord_tune.decompose(
        str(tmp_path / "other" / "original"), str(tmp_path / "other" / "base"), rank=8, method="svd", backbone="int4"
    )
    monkeypatch.chdir(tmp_path / "other")
    right = train(world / "base", world / "rows.jsonl", world / "right", objective="distill", learning_rate=0.0)
    named = {"objective": "distill", "learning_rate": 0.0, "teacher_model_name_or_path": str(world / "original")}
    expected = train(world / "base", world / "rows.jsonl", world / "named", **named)
    assert [entry["loss"] for entry in right["history"]] == [entry["loss"] for entry in expected["history"]]
    another_model(world / "original")
    with pytest.raises(UsageError, match=r"original is not the model that .*base was decomposed from"):
        train(world / "base", world / "rows.jsonl", world / "wrong", objective="distill")
    another = tmp_path / "other" / "base"
    shutil.rmtree(world / "base")
    shutil.copytree(another, world / "base")
    for folder in ("run", "run/checkpoint-2"):
        with pytest.raises(CheckpointError, match="base is not the checkpoint that .* was trained on"):
            lord_tune.load(str(world / folder))


def test_an_adapter_saved_from_python_names_its_base_for_every_working_folder(world, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = lord_tune.add_lora(AutoModelForCausalLM.from_pretrained("base", dtype="auto"))
    model.save_pretrained("adapter")
    monkeypatch.chdir(tmp_path)
    assert json.loads((world / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        (world / "base").resolve()
    )
    settings = world / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str((world / "base").resolve()), "here/base"))  # as it was before
    with pytest.warns(LordWarning, match="names its base model 'here/base' without saying which weights"):
        base = lord_tune.integrations.sources.base_of_adapter(world / "adapter")
    assert base == str((world / "base").resolve())


@pytest.mark.parametrize("changed", ["teacher", "rows"])
def test_a_run_does_not_go_on_with_something_else_under_the_same_name(world, changed):
    options = {
        "objective": "distill",
        "teacher_model_name_or_path": "original",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    train(Path("base"), Path("rows.jsonl"), Path("distilled"), **options)
    if changed == "teacher":
        another_model(world / "original")
    else:
        write_rows(world / "rows.jsonl", [{"text": code_document(n)} for n in range(20, 28)])
    with pytest.raises(UsageError, match=f"holds a run with another {changed}; choose another output_dir"):
        train(Path("base"), Path("rows.jsonl"), Path("distilled"), **options, max_steps=3)


def test_the_best_checkpoint_of_a_copied_run_is_its_own(world, tmp_path):
    """transformers keeps the path; where it is gone, it takes the last weights instead."""
    best = {"eval_dataset_name": "rows.jsonl", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    best |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best |= {"greater_is_better": True}  # so that the first one is the best
    train(Path("base"), Path("rows.jsonl"), Path("best"), **best, max_steps=3)
    whole = (world / "best" / "adapter_model.safetensors").read_bytes()
    state = json.loads((world / "best" / "checkpoint-3" / "trainer_state.json").read_text())
    assert not state["best_model_checkpoint"].endswith("checkpoint-3")
    shutil.move(world / "best", world / "moved")
    for name in ("train_results.json", "adapter_config.json"):  # killed after its last checkpoint
        (world / "moved" / name).unlink()
    train(Path("base"), Path("rows.jsonl"), Path("moved"), **best, max_steps=3)
    assert (world / "moved" / "adapter_model.safetensors").read_bytes() == whole


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_cached_logits_belong_to_the_weights_of_their_teacher(world, form):
    """Other weights under the same name, pickled ones too, also beside a safetensors file that is no model's."""
    teacher = world / "teacher"
    shutil.copytree(world / "original", teacher)
    options = {"objective": "distill", "teacher_logits": "logits", "teacher_model_name_or_path": "teacher"}

    def write(seed: int) -> None:
        model = tiny_llama(seed=seed)
        if form == "safetensors":
            model.save_pretrained(teacher)
        else:
            (teacher / "model.safetensors").unlink(missing_ok=True)
            torch.save(model.state_dict(), teacher / "pytorch_model.bin")
            shutil.copy(world / "run" / "adapter_model.safetensors", teacher / "adapter_model.safetensors")

    write(0)
    train(Path("base"), Path("rows.jsonl"), Path("first"), **options)
    train(Path("base"), Path("rows.jsonl"), Path("again"), **options)
    write(7)
    with pytest.raises(
        UsageError, match="teacher_logits logits was made with teacher .*name another folder, or remove"
    ):
        train(Path("base"), Path("rows.jsonl"), Path("second"), **options)


def test_a_checkpoint_that_was_saved_again_is_another_one(world):
    """`save_pretrained` into the folder leaves decomposition.json with the checksums of before."""
    before = fingerprint("base")
    shutil.copytree("base", "copy", copy_function=shutil.copyfile)  # of any times
    for path in Path("copy").glob("*.safetensors"):
        os.utime(path)
    assert fingerprint("copy") == before
    model = lord_tune.integrations.models.load_dense_or_factored("base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.left.weight.mul_(2)
    model.save_pretrained("base")
    assert fingerprint("base") != before
    with pytest.raises(CheckpointError, match="base is not the checkpoint that .*run was trained on"):
        lord_tune.load("run")
