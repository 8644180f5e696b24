"""The one step of the build that pyproject.toml cannot say, which names this class: a wheel has the recipes, which lie
beside the package in a checkout, inside it as lord_tune/_recipes (see lord_tune/recipe_files.py)."""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py


def recipe_files() -> list[str]:
    """Paths from the root of the checkout, without what runs of the notebooks left."""
    found = [path for path in Path("recipes").rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if not {"runs", ".ipynb_checkpoints"} & set(path.parts))


class BuildPy(build_py):
    """Also takes the recipes, except into an editable installation, which reads those of the checkout."""

    def get_source_files(self) -> list[str]:
        """What an sdist has."""
        return [*super().get_source_files(), *recipe_files(), "scripts/build_recipes.py"]

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lord_tune" / "_recipes"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        for name in recipe_files():
            place = target / Path(name).relative_to("recipes")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, place)
