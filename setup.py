"""The one step of the build that pyproject.toml cannot say: a wheel has the recipes, which lie beside the package in a
checkout, inside it as lord_tune/_recipes (see lord_tune/recipe_files.py)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Also copies the recipes, except into an editable installation, which reads those of the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lord_tune" / "_recipes"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        # not what Jupyter, and notebooks that were run there, leave beside them
        shutil.copytree("recipes", target, ignore=shutil.ignore_patterns(".*", "runs"))


setup(cmdclass={"build_py": BuildPy})
