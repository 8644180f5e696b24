"""`lord-tune recipes`: every recipe is listed, shown and copied as it is, and its name stands for its file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import lord_tune
from lord_tune import recipe_files
from lord_tune.cli import main
from lord_tune.config import RECORDS
from lord_tune.table_layout import fitted
from lord_tune.yaml_files import load_yaml

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): path
    for path in FOLDER.rglob("*")
    if path.suffix in (".yaml", ".ipynb")
}
RECIPES = [name for name in FILES if not name.startswith("notebooks/")]
NOTEBOOK = "notebooks/compare_methods"
SMALL = "smollm2_135m/decompose/max_60mb"


def test_every_recipe_has_a_row_with_what_it_does_and_what_takes_it(capsys):
    rows = lord_tune.recipes()
    assert [row["name"] for row in rows] == sorted(FILES)
    for row in rows:
        profile = row["name"].startswith("accelerate_configs/")
        wanted = "accelerate" if profile else "decompose" if "/decompose/" in row["name"] else "train"
        wanted = "jupyter" if row["name"].startswith("notebooks/") else wanted
        assert row["verb"] == wanted and Path(row["path"]).samefile(FILES[row["name"]])
        assert 5 < len(row["description"]) < 230 and "command:" not in row["description"], row
        assert re.sub(r"\s", "", row["description"]) in re.sub(r"[\s#]", "", FILES[row["name"]].read_text()), row
    assert "smollm2_135m/decompose/max_60mb" in capsys.readouterr().out
    console = Console(width=80, color_system=None)
    with console.capture() as shown:
        console.print(fitted("", ["recipe", "for", "what it does"], [list(row.values())[:3] for row in rows], 80))
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80 and any(
        re.match(rf"{SMALL} +decompose +SmolLM2 in 60 MB", line) for line in lines
    )


def test_a_word_chooses_rows_and_json_takes_them(tmp_path, capsys):
    found = lord_tune.recipes("list", "bolaco", json=str(tmp_path / "rows.json"))
    assert {row["name"].rpartition("/")[2] for row in found} == {"lord_20_bolaco", "lord_20_bolaco_scales"}
    assert json.loads((tmp_path / "rows.json").read_text()) == found and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [SMALL, f"recipes/{SMALL}.yaml"])
def test_show_prints_the_file(name, capsys):
    lord_tune.recipes("show", name)
    assert capsys.readouterr().out == FILES[SMALL].read_text()


@pytest.mark.parametrize("name", [*RECIPES[::9], SMALL, "accelerate_configs/ddp"])
def test_the_copy_is_the_file_and_its_next_command_is_valid(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lord_tune.recipes("copy", name, "mine/of it.yaml")
    assert (tmp_path / "mine/of it.yaml").read_bytes() == FILES[name].read_bytes()
    shown = capsys.readouterr()
    line = next(line for line in shown.out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    if name.startswith("accelerate_configs/"):
        start = ["accelerate", "launch", "--config_file", "mine/of it.yaml", "-m", "lord_tune", "train", "--config"]
        assert words[: len(start)] == start
        return
    built = []
    verb = words[words.index("--config") - 1]
    monkeypatch.setattr(lord_tune, verb, lambda **given: built.append(RECORDS[verb].build(given)), raising=False)
    with pytest.raises(SystemExit) as stop:
        main(words[words.index(verb) :])
    assert stop.value.code == 0 and built[0].model_fields_set
    assert name != SMALL or "the recipe reads what is not here: data/code_train.jsonl;" in shown.err


def test_a_notebook_is_copied_as_well(tmp_path, capsys):
    (row,) = lord_tune.recipes("copy", NOTEBOOK, f"{tmp_path}/")
    assert Path(row["path"]).read_bytes() == FILES[NOTEBOOK].read_bytes()
    assert f"next: jupyter lab {tmp_path / 'compare_methods.ipynb'}" in capsys.readouterr().out
    with pytest.raises(lord_tune.UsageError, match=r"a name that ends in \.ipynb"):
        lord_tune.recipes("copy", NOTEBOOK, f"{tmp_path}/mine.yaml")


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "max_60mb.yaml").write_text("mine: 1\n")
    with pytest.raises(lord_tune.UsageError, match="exists already"):
        lord_tune.recipes("copy", SMALL, str(tmp_path))  # a folder: the file keeps its name
    assert (tmp_path / "max_60mb.yaml").read_text() == "mine: 1\n"
    (row,) = lord_tune.recipes("copy", SMALL, str(tmp_path), overwrite=True)
    assert load_yaml(row["path"])["max_bytes"] == "60MB" and list(tmp_path.iterdir()) == [tmp_path / "max_60mb.yaml"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["show", "max_60mb"], f"There is no recipe max_60mb; did you mean {SMALL}?"),
        (["show", "smollm2_135m/decompose/max_60m"], f"did you mean {SMALL} or "),
        (["show", "qqqq"], "lord-tune recipes list names them all"),
        (["show"], "NAME is missing"),
        (["show", SMALL, "mine.yaml"], "DEST has no effect"),
        (["copy", SMALL], "DEST is missing"),
        (["copy", SMALL, "notes.txt"], "neither a folder nor a name that ends in .yaml"),
        (["list", "qqqq"], "No recipe has 'qqqq'"),
        (["print"], "'list', 'show' or 'copy'"),
        (["list", "--overwrite"], "--overwrite has no effect with list"),
    ],
)
def test_one_sentence_says_what_is_wrong(given, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["recipes", *given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_config_takes_the_name_of_a_recipe_unless_a_file_has_it(tmp_path, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(lord_tune, "decompose", lambda **given: built.append(given), raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["decompose", "--config", SMALL])
    assert built[0]["max_bytes"] == "60MB"
    (tmp_path / SMALL).parent.mkdir(parents=True)
    (tmp_path / SMALL).write_text("model: demo\nout: x\nrank: 3\n")
    with pytest.raises(SystemExit):
        main(["decompose", "--config", SMALL])
    assert built[1] == {"model": "demo", "out": "x", "rank": 3}
    with pytest.raises(SystemExit):
        main(["decompose", "--config", SMALL.replace("60", "61")])
    error = capsys.readouterr().err
    assert f"does not exist; check the path. There is no recipe {SMALL.replace('60', '61')}; did you mean" in error


def test_a_wheel_has_them_in_the_package(tmp_path, monkeypatch):
    """scripts/build_recipes.py copies the folder; scripts/check_package.sh builds a wheel and asks it."""
    inside = tmp_path / "lord_tune" / "_recipes"
    shutil.copytree(FOLDER, inside)
    monkeypatch.setattr(recipe_files, "_FOLDERS", (inside, tmp_path / "recipes"))
    assert {row["name"] for row in lord_tune.recipes("list", json=str(tmp_path / "rows.json"))} == set(FILES)
    shutil.rmtree(inside)
    with pytest.raises(lord_tune.LordError, match="has no recipes"):
        lord_tune.recipes()
