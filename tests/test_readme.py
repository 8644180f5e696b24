"""The README's commands run, in order, on a tiny model; its Python runs; the files it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lord_tune
from lord_tune.cli import main
from lord_tune.integrations import models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, aligned_llama_dir):
    """A working folder in which `demo` is a tiny model and paths of the checkout resolve."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "scripts"):
        (place / name).symlink_to(ROOT / name)
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    patch.setattr(models, "demo_model", lambda: str(aligned_llama_dir))
    yield place
    patch.undo()


SMALL = {
    "decompose": ["--calibration-tokens", "512", "--context-length", "64"],
    "train": ["--max_steps", "2", "--max_length", "64"],
    "evaluate": ["--context-length", "64", "--max-tokens", "256"],
}


def smaller(words: list[str]) -> list[str]:
    """The same command at the size of the tiny model: the sizes it sets are replaced."""
    override = SMALL.get(words[1], [])
    names = {name.strip("-").replace("-", "_") for name in override[::2]}
    kept: list[str] = []
    position = 0
    while position < len(words):
        if words[position].startswith("--") and words[position][2:].replace("-", "_") in names:
            position += 2
            continue
        kept.append(words[position])
        position += 1
    return kept + override


def run(words: list[str]) -> None:
    if words[0] == "lord-tune":
        with pytest.raises(SystemExit) as stop:
            main(smaller(words)[1:])
        assert stop.value.code == 0, words
    elif words[0] == "accelerate":  # launched for real in test_recipes.py; here the script's own command
        position = words.index("scripts/train.py")
        with pytest.raises(SystemExit) as stop:
            main(smaller(["lord-tune", "train", *words[position + 1 :]])[1:])
        assert stop.value.code == 0, words
    elif words[0] == "ACCELERATE_USE_CPU=true":  # launched for real in test_engine.py; here what it launches
        run(["lord-tune", *words[words.index("lord_tune") + 1 :]])
    elif words[0] == "python" and words[1] == "scripts/make_code_data.py":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    else:
        assert words[:1] == ["bash"] and (ROOT / words[1]).is_file(), words


def test_every_command_runs_in_order(folder):
    found = commands()
    assert {words[1] for words in found if words[0] == "lord-tune"} >= {
        "decompose",
        "train",
        "evaluate",
        "export",
        "inspect",
    }
    for words in found:
        run(words)
    assert (folder / "runs/dense/model.safetensors").is_file() and (folder / "runs/peft/adapter").is_dir()


def test_the_python_example_runs(folder, monkeypatch):
    (code,) = blocks("python")
    small = 'calibration=["data/code_train.jsonl"], calibration_tokens=512, context_length=64'
    assert 'calibration=["data/code_train.jsonl"]' in code
    if not (folder / "data").exists():
        run(["python", "scripts/make_code_data.py", "data"])
    namespace: dict = {}
    exec(code.replace('calibration=["data/code_train.jsonl"]', small), namespace)  # noqa: S102
    assert namespace["report"]["totals"]["factored_layers"] == 21 and lord_tune.fold is not None
    assert not hasattr(namespace["plain"], "peft_config")


def test_no_placeholder_is_left():
    assert not re.findall(r"^(REPORT|BENCH)$|\bMACHINE\b|about TIME", README, re.MULTILINE)


def test_the_file_tree_is_complete():
    """Every module of the package is named, and every named file exists."""
    tree = README.split("## Files")[1].split("```")[1]
    for path in (ROOT / "lord_tune").glob("*"):
        if path.name.startswith("__") or path.suffix not in ("", ".py"):
            continue
        assert path.name in tree, path.name
    for name in re.findall(r"\b[\w]+\.(?:py|sh)\b", tree):
        assert list(ROOT.rglob(name)), name


def test_every_verb_is_in_the_table():
    from lord_tune.cli import _RECORDS

    for verb in _RECORDS:
        assert f"`{verb}" in README
