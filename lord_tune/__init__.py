"""lord_tune: low-rank fine-tuning of compressed language models.

Importing this package is cheap (no torch, no transformers) and makes `AutoModelForCausalLM.from_pretrained` read
factored checkpoints: the transformers plugin is registered at once if transformers' quantizers are imported already,
else the moment they are.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # names an optional kernel it misses

_NAMES = {
    "decompose": "commands",
    "train": "commands",
    "evaluate": "commands",
    "export": "commands",
    "correct": "commands",
    "chat": "commands",
    "inspect": "commands",
    "plan": "commands",
    "report": "reporting.verb",
    "recipes": "recipe_files",
    "quickstart": "demo",
    "compare": "comparing",
    "doctor": "checkup",
    "expose_factors": "adapters.attach",
    "add_lora": "adapters.attach",
    "add_basis": "adapters.basis",
    "add_scales": "adapters.attach",
    "load_adapter": "adapters.loading",
    "merge": "adapters.fold",
    "unmerge": "adapters.fold",
    "fold": "adapters.fold",
    "load": "adapters.loading",
    "Plan": "plans",
    "LayerChoice": "plans",
    "LordError": "errors",
    "UsageError": "errors",
}

if TYPE_CHECKING:
    from .adapters.attach import add_lora, add_scales, expose_factors
    from .adapters.basis import add_basis
    from .adapters.fold import fold, merge, unmerge
    from .adapters.loading import load, load_adapter
    from .checkup import doctor
    from .commands import chat, correct, decompose, evaluate, export, inspect, plan, train
    from .comparing import compare
    from .demo import quickstart
    from .errors import LordError, UsageError
    from .plans import LayerChoice, Plan
    from .recipe_files import recipes
    from .reporting.verb import report

__all__ = [
    "LayerChoice",
    "LordError",
    "Plan",
    "UsageError",
    "add_lora",
    "add_basis",
    "add_scales",
    "chat",
    "compare",
    "correct",
    "decompose",
    "doctor",
    "evaluate",
    "export",
    "expose_factors",
    "fold",
    "inspect",
    "load",
    "load_adapter",
    "merge",
    "plan",
    "quickstart",
    "recipes",
    "report",
    "train",
    "unmerge",
]


@wrapt.when_imported("transformers.quantizers.auto")
def _register(module: object) -> None:
    importlib.import_module("lord_tune.integrations.transformers_quantizer")


@wrapt.when_imported("peft.tuners.tuners_utils")
def _translate_targets(module: Any) -> None:
    """See adapters/injection.py, which is imported at the first adapter on a decomposed model."""

    def injected(inject: Any, tuner: Any, args: Any, kwargs: Any) -> None:
        if "lord_tune.layers" not in sys.modules:  # so that no model has decomposed layers
            return inject(*args, **kwargs)
        importlib.import_module("lord_tune.adapters.injection").injected(inject, tuner, args, kwargs)

    wrapt.wrap_function_wrapper(module, "BaseTuner.inject_adapter", injected)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"lord_tune.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'lord_tune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
