"""The folder of a run in progress: one process at a time, and what a killed one leaves.

Whole runs that are killed are in test_engine.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import tiny_llama, tiny_tokenizer

from lord_tune import storage
from lord_tune.decomposition import Journal
from lord_tune.errors import LordWarning, UsageError
from lord_tune.integrations import sources
from lord_tune.provenance import identity_of

IDENTITY = {"config": {"rank": 8}, "versions": {"torch": "2"}}


def begun(out: Path, *steps: str) -> Journal:
    """A run of this process that has done some steps."""
    journal = Journal(out)
    journal.check(resume=False, overwrite=True)
    assert not journal.open(IDENTITY, resume=False)
    for step in steps:
        journal.commit(step)
    return journal


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_HOLD = """
import sys
from pathlib import Path
from lord_tune.decomposition import Journal
journal = Journal(Path(sys.argv[1]))
journal.check(False, False)
journal.open({"config": {"rank": 8}, "versions": {"torch": "2"}}, False)
journal.commit("writing/0")
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    """Whatever it asks for, with the first one's number; nothing of the first is touched, and its death is enough."""
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
        before = files_of(tmp_path)
        says = rf"out is being written by process {holder.pid} on \S+; wait for it"
        for resume, overwrite in ((True, False), (False, True), (True, True), (False, False)):
            with pytest.raises(UsageError, match=says):
                Journal(out).check(resume, overwrite)
            with pytest.raises(UsageError, match=says):  # that it began after the second had looked
                Journal(out).open(IDENTITY, resume)
        assert files_of(tmp_path) == before
    finally:
        holder.kill()
        holder.wait()
    journal = Journal(out)
    journal.check(resume=True, overwrite=False)
    assert journal.open(IDENTITY, resume=True) and journal.has("writing/0")


def test_starting_over_clears_the_folder_and_the_end_lets_go(tmp_path):
    begun(tmp_path / "out", "writing/0").abandon()
    (tmp_path / "out.partial" / "model.safetensors").write_text("a shard")
    second = begun(tmp_path / "out")
    assert not (tmp_path / "out.partial" / "model.safetensors").exists()
    with pytest.raises(UsageError, match=f"process {os.getpid()} "):
        Journal(tmp_path / "out").check(False, True)
    second.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not [*(tmp_path / "out").iterdir()]


def test_what_another_process_finished_meanwhile_is_not_replaced(tmp_path):
    late = Journal(tmp_path / "out")
    late.check(resume=False, overwrite=False)
    first = begun(tmp_path / "out")
    (first.folder / "decomposition.json").write_text("{}")
    first.finish()
    with pytest.raises(UsageError, match="already holds files"):
        late.open(IDENTITY, resume=False)
    assert (tmp_path / "out" / "decomposition.json").is_file()


def test_without_locks_there_is_a_warning_and_a_run(tmp_path, monkeypatch):
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with pytest.warns(LordWarning, match=r"\.out\.lock cannot be locked \(No locks available\)"):
        journal = begun(tmp_path / "out", "writing/0")
    assert journal.has("writing/0")


def test_a_refused_run_changes_nothing(tmp_path):
    begun(tmp_path / "out", "writing/0").abandon()
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=r"config\.rank was 8, now it is 9"):
        Journal(tmp_path / "out").open({"config": {"rank": 9}}, resume=True)
    assert files_of(tmp_path) == before
    assert Journal(tmp_path / "out").open(IDENTITY, resume=True)  # and lets go


def test_a_folder_of_another_program_is_left_alone(tmp_path):
    """Jupyter makes .ipynb_checkpoints where it looks; half-written files go."""
    begun(tmp_path / "out", "writing/0").abandon()
    (tmp_path / "out.partial" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "out.partial" / ".model.safetensors.partial").write_text("half")
    assert Journal(tmp_path / "out").open(IDENTITY, resume=True)
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [".ipynb_checkpoints", ".work"]


SETTINGS = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "vocab.txt"]
SETTINGS += ["special_tokens_map.json", "merges.txt", "spiece.model", "chat_template.jinja"]


@pytest.mark.parametrize("changed", [*SETTINGS, "pytorch_model-00002-of-00002.bin", "README.md", "metrics.json"])
def test_the_identity_of_a_base_covers_what_decides_a_result(tmp_path, changed):
    """Weights as pickles too; not what somebody wrote beside them."""
    for name in (*SETTINGS, "README.md", "metrics.json", *(f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2))):
        (tmp_path / name).write_text("before")
    before = identity_of("name", str(tmp_path))
    assert before["name"] == "name" and before["revision"] is None and [*before["files"]] == sorted(SETTINGS)
    (tmp_path / changed).write_text("after")
    differs = {key for key, value in identity_of("name", str(tmp_path)).items() if value != before[key]}
    assert differs == ({"files"} if changed in SETTINGS else {"sha256"} if changed.endswith(".bin") else set())


def test_a_gguf_file_is_converted_by_one_of_those_who_need_it(tmp_path, monkeypatch):
    """A lock belongs to an open file, so threads stand for processes here."""
    monkeypatch.setenv("LORD_TUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    converted = []

    def load(kind: str) -> Any:
        converted.append(kind)
        time.sleep(0.1)
        return tiny_llama(layers=1) if kind == "model" else tiny_tokenizer()

    for kind, automatic in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer")):
        monkeypatch.setattr(getattr(transformers, automatic), "from_pretrained", lambda *a, kind=kind, **k: load(kind))
    with ThreadPoolExecutor(3) as threads:
        folders = {*threads.map(sources.convert_gguf, [tmp_path / "model.gguf"] * 3)}
    assert converted == ["tokenizer", "model"] and len(folders) == 1
    assert (folders.pop() / "model.safetensors").is_file()


class Second:
    """Process 1 of two, with what process 0 sends."""

    rank, size = 1, 2

    def send(self, value, owner):
        return self.sent


class First(Second):
    rank = 0

    def send(self, value, owner):
        Second.sent = value
        return value


@pytest.mark.parametrize("moment", ["check", "open"])
def test_every_process_hears_of_every_error_of_the_first(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(Journal, "_check", lambda self, resume: (_ for _ in ()).throw(PermissionError("not yours")))
    for workers in (First(), Second()):
        journal = Journal(tmp_path / "out", workers)
        with pytest.raises(PermissionError, match="not yours"):
            journal.check(False, False) if moment == "check" else journal.open(IDENTITY, False)


@pytest.mark.parametrize("begins_anew", [False, True])
def test_what_overwrite_took_away_comes_back_or_goes(tmp_path, begins_anew):
    """A run that dies between its two last renames has no OUT: continued it gets there, otherwise the old OUT does."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "decomposition.json").write_text('"old"')
    first = begun(out, "writing/0")
    (first.folder / "decomposition.json").write_text('"new"')
    replace = os.replace
    with pytest.MonkeyPatch.context() as patch:

        def dying(source, target):
            if Path(target) == out:
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            first.finish()
    first._lock.release()
    assert not out.exists() and len([*tmp_path.iterdir()]) == 2
    second = Journal(out)
    if begins_anew:
        with pytest.raises(UsageError, match="already holds files"):
            second.check(resume=False, overwrite=False)
        assert (out / "decomposition.json").read_text() == '"old"'
    else:
        second.check(resume=True, overwrite=False)
        assert second.open(IDENTITY, resume=True)
        second.finish()
        assert (out / "decomposition.json").read_text() == '"new"'
    rest = {"out", "out.partial"} if begins_anew else {"out"}
    assert {path.name for path in tmp_path.iterdir()} == rest


def test_what_overwrite_took_away_goes_when_its_removal_was_cut_short(tmp_path):
    begun(tmp_path / "out").finish()
    left = tmp_path / ".out.lord_tune_replaced"
    left.mkdir()
    (left / "model.safetensors").write_text("a whole model")
    Journal(tmp_path / "out").check(resume=False, overwrite=False)
    assert not left.exists()
