"""Lets programs that do not import lord_tune load this factored checkpoint with trust_remote_code.

Nothing of the model is in this file. Importing lord_tune registers the checkpoint format with transformers, and
transformers' own classes do the rest.
"""

from typing import Any

try:
    import lord_tune  # noqa: F401
except ImportError as error:
    raise ImportError("This checkpoint is factored, and only lord_tune can read it: pip install lord-tune") from error

from transformers import AutoConfig


class LordTuneConfig:
    """Stands for the configuration class of transformers that config.json names."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to register: no configuration is an instance of this class."""
