"""What a caller from Python (or a YAML file) may write in place of an option's own form.

One name where a list is wanted is a list of one, a `Path` is its text, and the numbers of a list of words are words. A
model, a tokenizer or a data set that is in memory stands for no path, and is refused in a sentence that says what to
pass instead.
"""

from __future__ import annotations

import os
import typing
from pathlib import Path

from .errors import UsageError

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))  # what pydantic has a sentence for


def as_written(key: str, value: object, annotation: object) -> object:
    """The value of the option `key` as its record takes it. annotation: the field's type.

    Raises UsageError for an object in memory where a path or a name is wanted.
    """
    kinds = typing.get_args(annotation) or (annotation,)
    listed = annotation == list[str] or list[str] in kinds
    if not listed and str not in kinds:
        return value
    if not listed:
        return _text(key, value)
    if isinstance(value, list | tuple):
        return [str(item) if _is_number(item) else _text(key, item) for item in value]
    return [str(value)] if isinstance(value, str | os.PathLike) or _is_number(value) else _text(key, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(key: str, value: object) -> object:
    if isinstance(value, os.PathLike):
        return str(Path(value))
    if isinstance(value, _PLAIN):
        return value
    raise UsageError(_in_memory(key, value))


def _in_memory(key: str, value: object) -> str:
    """The sentence for an object that stands for no path."""
    name = type(value).__name__
    if hasattr(value, "state_dict"):
        origin = getattr(getattr(value, "config", None), "_name_or_path", "")
        came = f" (it was loaded from {origin})" if origin else ""
        return (
            f"Got a loaded model ({name}) for `{key}`; pass the folder or Hub id{came}, because models are read from "
            "their files block by block. If it was changed in memory, write it first: model.save_pretrained(FOLDER) "
            "and tokenizer.save_pretrained(FOLDER)."
        )
    if hasattr(value, "to_json") and hasattr(value, "column_names"):
        return (
            f'Got a data set in memory ({name}) for `{key}`; write it first: rows.to_json("rows.jsonl"), and pass that.'
        )
    return f"Got an object of the type {name} for `{key}`; pass the path or name as text."
