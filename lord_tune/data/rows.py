"""Rows and documents: files, JSON lines, Parquet and Hub datasets, with their columns recognised.

Recognised rows (in this order): `messages` (chat), `prompt` + `completion` or `response`, `instruction` (+ `input`) +
`output` (alpaca), `text`. Calibration and training use the same recognition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..protocols import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset


ROW_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_FILES = {".txt", ".text", ".md", ".rst", ".tex", ".csv", ".tsv", ".log", ".html", ".xml", ".py", ".c", ".gz"}
_PROMPTS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a dataset hold the text."""

    kind: str  # messages | prompt_completion | text
    prompt: str = ""
    completion: str = ""

    def __str__(self) -> str:
        return f"{self.prompt} + {self.completion}" if self.kind == "prompt_completion" else self.kind


def recognise(columns: Iterable[str]) -> RowFormat:
    """The row format of a dataset with these columns; UsageError when none fits."""
    names = set(columns)
    if "messages" in names:
        return RowFormat("messages")
    for prompt, completion in _PROMPTS:
        if prompt in names and completion in names:
            return RowFormat("prompt_completion", prompt, completion)
    if "text" in names:
        return RowFormat("text")
    raise UsageError(
        f"Got a dataset with the columns {sorted(names)}; expected text, or messages, or prompt + completion, "
        "or instruction (+ input) + output. Rename the columns."
    )


def prompt_of(row: dict[str, Any], form: RowFormat) -> str:
    """The prompt of a prompt + completion or alpaca row; alpaca's optional `input` follows its instruction."""
    prompt = row[form.prompt]
    extra = row.get("input") if form.prompt == "instruction" else None
    if form.prompt == "instruction":
        return f"### Instruction:\n{prompt}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:\n"
    return prompt


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """Rows of a local .jsonl/.json/.parquet file, a folder saved by `datasets`, or a Hub dataset."""
    path = Path(source)
    kind = ROW_FILES.get(path.suffix.lower())
    if kind and not path.is_file():
        raise UsageError(f"The data file {source} does not exist; check the path.")
    if path.is_file() and kind is None:
        raise UsageError(f"{source} is not .jsonl, .json or .parquet; convert it, or give a Hub dataset id.")
    if kind and config is not None:
        raise UsageError(f"dataset_config {config} has no effect on the file {source}; remove it.")
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind:
            return datasets.load_dataset(kind, data_files=str(path.resolve()), split=split)
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(source, config, split=split)
    except UsageError:
        raise
    except Exception as error:
        if kind and path.read_bytes().strip() in (b"", b"[]", b"{}") or "corresponds to no data" in str(error):
            raise UsageError(f"The dataset '{source}' is empty; give rows to train on.") from error
        # the libraries below raise dozens of types for one cause: the file or id is unusable
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise UsageError(f"The dataset '{source}' could not be read: {reason[:300]}") from error


def documents(sources: list[str], tokenizer: Tokenizer | None = None) -> list[str]:
    """The texts of all sources: text files are one document each, rows of data files one document each."""
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if path.suffix.lower() in ROW_FILES or _is_hub_id(source):
            rows = load_rows(source)
            form = recognise(rows.column_names)
            found.extend(_render(row, form, tokenizer, source) for row in rows)
        elif path.is_file():
            try:
                found.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise UsageError(f"{source} is not UTF-8 text ({error.reason}); give a text or data file.") from error
        elif path.is_dir() and any(path.glob("*.arrow")):
            rows = load_rows(source)
            form = recognise(rows.column_names)
            found.extend(_render(row, form, tokenizer, source) for row in rows)
        elif path.is_dir():
            raise UsageError(f"{source} is a folder; give its files, for example {source}/*.txt.")
        else:
            raise UsageError(f"The text file {source} does not exist; check the path.")
    return [text for text in found if text and text.strip()]


def _is_hub_id(source: str) -> bool:
    """Whether a name is meant for the Hub: nothing local has it, and it is a bare word, or org/name without the suffix
    of a text file; a dataset's name may hold dots."""
    path = Path(source)
    if path.exists():
        return False
    named = re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+", source) and path.suffix.lower() not in _TEXT_FILES
    return bool(named) or "." not in path.name


def _render(row: dict[str, Any], form: RowFormat, tokenizer: Tokenizer | None, source: str) -> str:
    if form.kind == "text":
        return row["text"]
    if form.kind == "prompt_completion" and not isinstance(row[form.prompt], list):
        return (prompt_of(row, form) or "") + (row[form.completion] or "")
    messages = row["messages"] if form.kind == "messages" else row[form.prompt] + row[form.completion]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"{source} holds chat messages and the model has no chat template; give plain text.")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def text_sha256(texts: list[str]) -> str:
    """sha256 over the documents, in order."""
    import hashlib

    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
