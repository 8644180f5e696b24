"""The README's commands run, in order, on a tiny model; other documents' commands are valid; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lord_tune
from lord_tune.cli import main
from lord_tune.config import RECORDS
from lord_tune.integrations import sources
from lord_tune.yaml_files import load_yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "recipes/README.md", "scripts/RESULTS.md")
README = (ROOT / "README.md").read_text()


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def commands(document: str = "README.md") -> list[list[str]]:
    lines = [re.split(r"\s\s+#", line)[0].strip() for block in blocks("bash", document) for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, aligned_llama_dir):
    """A working folder in which `demo` is a tiny model and paths of the checkout resolve."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "scripts"):
        (place / name).symlink_to(ROOT / name)
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    patch.setattr(sources, "demo_model", lambda: str(aligned_llama_dir))
    yield place
    patch.undo()


SMALL = {
    "decompose": ["--calibration-tokens", "512", "--context-length", "64"],
    "train": ["--max_steps", "2", "--max_length", "64"],
    "evaluate": ["--context-length", "64", "--max-tokens", "256"],
    "chat": ["--max-new-tokens", "8"],
    "compare": [
        *("--bits-per-weight", "12", "--calibration-tokens", "512"),  # rank 8 is much beside layers as small as these
        *("--context-length", "64", "--max-tokens", "256"),
    ],
}


def smaller(words: list[str]) -> list[str]:
    """The same command at the size of the tiny model: the sizes it sets are replaced. Models of the Hub: a dry run."""
    recipe = load_yaml(words[words.index("--config") + 1]) if "--config" in words else {}
    here = recipe.get("model", "demo") == "demo" and Path(recipe.get("model_name_or_path", ".")).exists()
    override = list(SMALL.get(words[1], [])) if here else ["--dry-run"]
    if words[1] == "decompose" and not recipe and "--calibration" not in words:
        override = []  # without text, sizes of the text are refused
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


def verb(words: list[str]) -> list[str] | None:
    """What a command gives to `lord-tune`, itself or through a launcher (test_recipes and test_engine launch)."""
    if words[0] == "lord-tune":
        return words
    if "accelerate" in words and "lord_tune" in words:
        return ["lord-tune", *words[words.index("lord_tune") + 1 :]]
    if "accelerate" in words:
        return ["lord-tune", "train", *words[words.index("scripts/train.py") + 1 :]]
    return None


def run(words: list[str]) -> None:
    called = verb(words)
    if called is not None:
        with pytest.raises(SystemExit) as stop:
            main(smaller(called)[1:])
        # a run on a checkpoint of a Hub model's decomposition, which was not made here
        absent = called[1] == "train" and "--dry-run" in smaller(called)
        assert stop.value.code == (2 if absent else 0), words
    elif words[:2] == ["python", "scripts/make_code_data.py"]:
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    else:
        assert words == [".", ".venv/bin/activate"] or (words[0] == "bash" and (ROOT / words[1]).is_file()), words


def test_every_command_runs_in_order(folder):
    found = commands()
    assert {words[1] for words in found if words[0] == "lord-tune"} >= {
        "plan",
        "decompose",
        "train",
        "evaluate",
        "export",
        "inspect",
    }
    for words in found:
        run(words)
    assert (folder / "runs/peft/adapter").is_dir() and (
        folder / "runs/two_bits_sft/adapter_model.safetensors"
    ).is_file()
    assert not (folder / "runs/qwen2.5_7b").exists()


def test_the_python_example_runs(folder, monkeypatch):
    (code,) = blocks("python")
    small = 'calibration=["data/code_train.jsonl"], calibration_tokens=512, context_length=64'
    assert 'calibration=["data/code_train.jsonl"]' in code
    if not (folder / "runs/nf4").exists():  # what the commands made
        for words in commands():
            if "runs/nf4" in words[:4] or words[1] == "scripts/make_code_data.py":
                run(words)
    namespace: dict = {}
    exec(code.replace('calibration=["data/code_train.jsonl"]', small), namespace)  # noqa: S102
    assert namespace["report"]["totals"]["factored_layers"] == 21 and lord_tune.fold is not None
    assert not hasattr(namespace["plain"], "peft_config")
    assert namespace["answer"][0]["generated_text"].startswith("def add(a, b):")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_valid(document, monkeypatch):
    """Verbs and options exist, and so does every script and recipe that a command names."""
    monkeypatch.chdir(ROOT)
    built: list[Any] = []
    for name, record in RECORDS.items():
        build = lambda record=record, **values: built.append(record.build(values))  # noqa: E731
        monkeypatch.setattr(lord_tune, name, build, raising=False)
    expected = 0
    for words in commands(document):
        called = verb(words)
        if called is not None:
            with pytest.raises(SystemExit) as stop:
                main(called[1:])
            assert stop.value.code == 0, words
            expected += 1
        for word in words:
            if word.startswith(("scripts/", "recipes/")):
                assert Path(word).is_file(), words
    assert len(built) == expected


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    found = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if "://" not in link]
    assert found
    for link in found:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_no_placeholder_is_left():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        assert not re.findall(r"^(REPORT|BENCH)$|\bMACHINE\b|\bTODO\b|about TIME", text, re.MULTILINE), document


def test_the_map_of_the_code_is_complete():
    """Every module of the package is named, and every named file exists."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("<!-- map -->")[1].split("```")[1]
    for path in (ROOT / "lord_tune").glob("*"):
        if path.name.startswith("__") or path.suffix not in ("", ".py"):
            continue
        assert path.name in tree, path.name
    for name in re.findall(r"\b[\w]+\.(?:py|sh|md)\b", tree):
        assert list(ROOT.rglob(name)), name


def test_every_verb_is_in_the_readme():
    for name in RECORDS:
        assert f"`{name}`" in README or f"`lord-tune {name}`" in README, name
