"""The recipes and notebooks that come with lord_tune, by name: where they are, what for, and the verb `recipes`.

One copy of the files is kept: in a checkout the folder `recipes` beside the package, in an installed wheel the same
files inside the package (scripts/build_recipes.py puts them there).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

from .config import RecipesConfig
from .console import note, say, show_next, show_table
from .errors import LordError, UsageError
from .keywords import documented
from .signatures import RecipesOptions
from .storage import check_json_file, read_json, write_json, write_text
from .yaml_files import load_yaml

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")  # of a wheel, of a checkout
_PROFILES = "accelerate_configs"
_RECIPE, _NOTEBOOK = ".yaml", ".ipynb"
_READ = ("model", "model_name_or_path", "calibration", "dataset_name", "eval_dataset_name")
_END = re.compile(r"(?<=\.) | (?=command:)")  # of the first sentence of a header
_MADE_BEFORE = ("data/", "runs/")  # where recipes look for what scripts and other recipes write


@dataclass(frozen=True)
class Recipe:
    """One file. name: its path below the folder of recipes without the ending, with / on every system; verb: what takes
    it as `config`, or jupyter; description: the first sentence of its header, or its title."""

    name: str
    verb: str
    description: str
    path: str


@documented(RecipesConfig)
def recipes(
    action: Literal["list", "show", "copy"] = "list",
    name: str | None = None,
    dest: str | None = None,
    **options: Unpack[RecipesOptions],
) -> list[dict[str, Any]]:
    """List the recipes that come with lord_tune, print one, or copy one; returns those that are meant: name, verb,
    description and path (of the copy, where one is made)."""
    config = RecipesConfig.build({"action": action, "name": name, "dest": dest, **options})
    check_json_file(config.json_file)
    if config.action == "list":
        found = [recipe for recipe in all_recipes() if _mentions(recipe, config.name or "")]
        if not found:
            raise UsageError(f"No recipe has '{config.name}' in its name or description; run lord-tune recipes list.")
    else:
        assert config.name is not None, "the record requires it"
        found = [recipe_named(config.name)]
    if config.dest is not None:
        found = [_copied(found[0], config.dest, config.overwrite)]
    rows = [asdict(recipe) for recipe in found]
    if config.json_file is not None:
        write_json(Path(config.json_file), rows)
    elif config.action == "list":
        show_table("recipes", ["recipe", "for", "what it does"], [[r.name, r.verb, r.description] for r in found])
        say("lord-tune recipes show RECIPE prints one, and lord-tune recipes copy RECIPE FILE makes it yours.")
    elif config.action == "show":
        say(Path(found[0].path).read_text(encoding="utf-8").rstrip("\n"))
    else:
        _show_use(found[0])
    return rows


def recipes_folder() -> Path:
    """Where the files are; LordError for an installation without them."""
    for folder in _FOLDERS:
        if (folder / _PROFILES).is_dir():
            return folder
    raise LordError(f"This installation of lord_tune has no recipes in {_FOLDERS[0]}; install lord-tune again.")


def all_recipes() -> list[Recipe]:
    """In the order of their names."""
    return [_recipe(name, path) for name, path in sorted(_files().items())]


def recipe_named(name: str) -> Recipe:
    """The recipe of this name, which may have the ending and the folder `recipes/` that it has in a checkout;
    UsageError with the nearest names."""
    paths = _files()
    bare = name.removeprefix("recipes/").removesuffix(_RECIPE).removesuffix(_NOTEBOOK)
    if bare in paths:
        return _recipe(bare, paths[bare])
    near = _nearest(bare, sorted(paths))
    hint = f"did you mean {' or '.join(near)}?" if near else "lord-tune recipes list names them all."
    raise UsageError(f"There is no recipe {name}; {hint}")


def config_file(given: str) -> str:
    """What `config` names: a file, or else a recipe by its name, which has no ending."""
    if Path(given).expanduser().exists() or Path(given).suffix:
        return given
    try:
        return recipe_named(given).path
    except UsageError as error:
        raise UsageError(f"The config file {given} does not exist; check the path. {error}") from error


def _files() -> dict[str, Path]:
    folder = recipes_folder()
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (_RECIPE, _NOTEBOOK)]
    hidden = [path for path in found if any(part.startswith(".") for part in path.parts)]  # Jupyter's copies
    return {path.with_suffix("").as_posix(): folder / path for path in found if path not in hidden}


def _recipe(name: str, path: Path) -> Recipe:
    if path.suffix == _NOTEBOOK:
        title = "".join(read_json(path)["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        return Recipe(name, "jupyter", title, str(path))
    header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    sentence = _END.split(" ".join(header))[0].rstrip(".")
    keys = {} if name.startswith(_PROFILES) else load_yaml(str(path))
    verb = "train" if "output_dir" in keys else "decompose" if "out" in keys else "accelerate"
    return Recipe(name, verb, sentence, str(path))


def _mentions(recipe: Recipe, word: str) -> bool:
    return word.lower() in f"{recipe.name} {recipe.verb} {recipe.description}".lower()


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """At most three: those that end or begin as the name does, else those that are spelt alike."""
    inside = [other for other in known if name and f"/{name}/" in f"/{other}/"]
    last = {other.rpartition("/")[2]: other for other in known}
    alike = difflib.get_close_matches(name, known, n=3)
    by_last = [last[part] for part in difflib.get_close_matches(name.rpartition("/")[2], last, n=2)]
    return list(dict.fromkeys([*inside, *alike, *by_last]))[:3]


def _copied(recipe: Recipe, dest: str, overwrite: bool) -> Recipe:
    """A copy of the file at `dest`, or in it where that is a folder or ends in a slash."""
    source = Path(recipe.path)
    path = Path(dest, source.name) if Path(dest).is_dir() or dest.endswith("/") else Path(dest)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; name another file or pass `overwrite`.")
    if path.suffix != source.suffix:
        raise UsageError(f"{path} is neither a folder nor a name that ends in {source.suffix}; give one of them.")
    if path.resolve() != source.resolve():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, source.read_text(encoding="utf-8"))
    return Recipe(recipe.name, recipe.verb, recipe.description, str(path))


def _show_use(copy: Recipe) -> None:
    """The command that runs a copy, and what it reads that has to be made before."""
    say(f"wrote {copy.path}")
    if copy.verb == "jupyter":
        say(f"next: {shlex.join(['jupyter', 'lab', copy.path])}   (it comes with pip install jupyterlab)")
        return
    if copy.verb == "accelerate":
        show_next("train", "--config", "RECIPE.yaml", launcher=["accelerate", "launch", "--config_file", copy.path])
        return
    values = load_yaml(copy.path)
    named = [values[key] for key in _READ if key in values]
    names = [str(name) for entry in named for name in (entry if isinstance(entry, list) else [entry])]
    local = [name.partition(":")[0] for name in names if name.startswith(_MADE_BEFORE)]
    if missing := [name for name in dict.fromkeys(local) if not Path(name).exists()]:
        note(f"the recipe reads what is not here: {', '.join(missing)}; its header says how they are made")
    show_next(copy.verb, "--config", copy.path)
