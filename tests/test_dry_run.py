"""`--dry-run` refuses what is not there, and says what the options come to."""

from __future__ import annotations

import pytest

import lord_tune
from lord_tune.errors import UsageError

MODEL, TEXT = "./no_model", "no_text.txt"


def calls(model: str, text: str, out: str) -> dict:
    """A dry run of every verb that has one."""
    rows, dry = {"calibration": text}, {"dry_run": True}
    return {
        "decompose": lambda: lord_tune.decompose(model, out, rank=4, **rows, **dry),
        "correct": lambda: lord_tune.correct(model, model, out, **rows, **dry),
        "train": lambda: lord_tune.train(model_name_or_path=model, dataset_name=text, output_dir=out, **dry),
        "evaluate": lambda: lord_tune.evaluate(model, text, **dry),
        "export": lambda: lord_tune.export(model, out, "factored", text=text, **dry),
        "compare": lambda: lord_tune.compare(model, out, methods="svd", text=text, bits_per_weight=4, **dry),
        "quickstart": lambda: lord_tune.quickstart(model=model, out=out, **dry),
    }


@pytest.mark.parametrize("verb", calls("", "", ""))
def test_a_missing_model_or_file_is_refused(verb, llama_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no_model does not exist"):
        calls(MODEL, str(rows_file), "out")[verb]()
    if verb != "quickstart":
        with pytest.raises(UsageError, match="text file no_text.txt does not exist"):
            calls(str(llama_dir), TEXT, "out")[verb]()
        with pytest.raises(UsageError, match=r"No file matches none/\*.csv"):
            calls(str(llama_dir), "none/*.csv", "out")[verb]()
    assert not list(tmp_path.iterdir())


def test_other_files_are_looked_for(llama_dir, rows_file, tmp_path):
    out, dry = str(tmp_path / "out"), {"dry_run": True}
    with pytest.raises(UsageError, match="no_plan.json does not exist"):
        lord_tune.decompose(llama_dir, out, plan="no_plan.json", **dry)
    with pytest.raises(UsageError, match="no_teacher does not exist"):
        teacher = {"objective": "distill", "teacher_model_name_or_path": "./no_teacher"}
        lord_tune.train(model_name_or_path=llama_dir, dataset_name=rows_file, output_dir=out, **teacher, **dry)
    with pytest.raises(UsageError, match="no.gguf does not exist"):
        lord_tune.export(llama_dir, out, "gguf", like="no.gguf", **dry)
    with pytest.raises(UsageError, match="no_base does not exist"):
        lord_tune.export(llama_dir, out, "peft", base="./no_base", **dry)
    with pytest.raises(UsageError, match="no_tasks does not exist"):
        lord_tune.evaluate(llama_dir, tasks="piqa", tasks_dir="./no_tasks", **dry)


def test_what_the_options_come_to_is_said(llama_dir, rows_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    lord_tune.decompose(llama_dir, out, rank=4, calibration=rows_file, calibration_tokens=100, context_length=64,
                        dry_run=True)  # fmt: skip
    assert "calibration: 128 tokens in 2 windows of 64" in capsys.readouterr().out
    lord_tune.evaluate(llama_dir, rows_file, max_tokens=2000, dry_run=True)
    assert "at most 2,000 tokens of each, in windows of 1,024" in capsys.readouterr().out
    given = {"methods": "svd", "text": rows_file, "bits_per_weight": 4, "dataset_name": rows_file, "max_length": 32}
    lord_tune.compare(llama_dir, out, **given, steps=7, learning_rate=[1e-4, 2e-4], dry_run=True)
    assert (
        "7 steps of 1 sequence of at most 32 tokens, 224 in all, learning rate 0.0001, 0.0002"
        in capsys.readouterr().out
    )


def test_the_steps_of_several_processes_are_counted(rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 4)
    given = {"model_name_or_path": "org/model", "dataset_name": rows_file, "output_dir": str(tmp_path / "out")}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_length": 10}
    found = lord_tune.train(**given, **sizes, max_steps=5, dry_run=True)["effective"]
    assert (found["sequences_per_step"], found["tokens_per_step"], found["learning_rate"]) == (24, 240, 1e-4)
    shown = capsys.readouterr()
    assert "2 sequences at once x 3 accumulated x 4 processes = 24 sequences" in shown.out
    assert "5 steps, at most 1,200 tokens" in shown.out and "org/model is not on this machine" in shown.err
