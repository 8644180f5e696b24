"""What a verb prints as next works when it is pasted, and stock code reads the results after one import."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lord_tune
from lord_tune import console


@pytest.fixture(scope="module")
def place(llama_dir, rows_file, tmp_path_factory):
    """A folder whose name needs quotes, with a checkpoint and a training output."""
    folder = tmp_path_factory.mktemp("with space & $HOME")
    lord_tune.decompose(llama_dir, folder / "nf4", method="svd", backbone="nf4", rank=4)
    lord_tune.train(model_name_or_path=folder / "nf4", dataset_name=rows_file, output_dir=folder / "sft", max_steps=1,
                    max_length=32, report_to="none")  # fmt: skip
    return folder


def pasted(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = line.removeprefix("next: ").partition("   (")[0]
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


def test_the_next_command_runs_as_it_is_printed(llama_dir, place, capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")  # a wrapped line would end the command
    monkeypatch.setenv("PYTHONPATH", str(Path(lord_tune.__file__).parent.parent))
    lord_tune.decompose(llama_dir, place / "again", method="svd", rank=4)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    done = pasted(line, place)
    assert done.returncode == 0 and "self_attn.q_proj" in done.stdout, done.stderr


def test_training_names_an_export_that_can_be_made(place, rows_file, tmp_path, capsys):
    given = {"model_name_or_path": place / "nf4", "dataset_name": rows_file, "output_dir": tmp_path / "it's"}
    lord_tune.train(**given, max_steps=1, max_length=32, report_to="none")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: ").partition("   (")[0])
    assert words[-5:] == ["export", str(tmp_path / "it's"), str(tmp_path / "it's_dense"), "--format", "dense"]


def test_the_command_is_named_as_this_shell_reaches_it(monkeypatch):
    monkeypatch.setattr(console.shutil, "which", lambda name: str(Path(sys.executable).parent / name))
    assert console._as_called() == ["lord-tune"]
    for other in (None, "/another/bin/lord-tune"):
        monkeypatch.setattr(console.shutil, "which", lambda name, other=other: other)
        assert console._as_called() == [sys.executable, "-m", "lord_tune"]


STOCK = """
import sys
import lord_tune
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base, adapter = sys.argv[1:]
ids = torch.arange(8)[None]
own = lord_tune.load(adapter)[0](input_ids=ids).logits
told = pipeline("text-generation", base)("def f", max_new_tokens=2)[0]["generated_text"]
assert told.startswith("def f"), told
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
assert torch.equal(model(input_ids=ids).logits, own)
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float32")
assert torch.equal(model(input_ids=ids).logits, own)
print("loaded")
"""


def test_pipelines_and_peft_read_the_folders_after_one_import(place):
    words = [sys.executable, "-c", STOCK, str(place / "nf4"), str(place / "sft")]
    root = str(Path(lord_tune.__file__).parent.parent)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0 and done.stdout.strip().endswith("loaded"), done.stderr[-2000:]
