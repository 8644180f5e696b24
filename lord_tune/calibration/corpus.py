"""Text to token windows: files, JSON lines, Parquet and Hub datasets, with their columns recognised.

Recognised rows (in this order): `messages` (chat), `prompt` + `completion` or `response`, `instruction` (+ `input`) +
`output` (alpaca), `text`. Training uses the same recognition.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CalibrationError, LordWarning, UsageError

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
        f"The dataset has the columns {sorted(names)}; wanted: text, or messages, or prompt + completion, "
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


def documents(sources: list[str], tokenizer: Any = None) -> list[str]:
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


def _render(row: dict[str, Any], form: RowFormat, tokenizer: Any, source: str) -> str:
    if form.kind == "text":
        return row["text"]
    if form.kind == "prompt_completion" and not isinstance(row[form.prompt], list):
        return (prompt_of(row, form) or "") + (row[form.completion] or "")
    messages = row["messages"] if form.kind == "messages" else row[form.prompt] + row[form.completion]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"{source} holds chat messages and the model has no chat template; give plain text.")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def token_windows(
    texts: list[str],
    tokenizer: Any,
    tokens: int,
    heldout_tokens: int,
    length: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Calibration and held-out windows, (window, length) ids each, from different documents where there are several.

    Documents are shuffled by `seed` and give at most two windows each before any gives more, so that the windows cover
    many of them. A single document is split by position. Raises CalibrationError when the text does not fill one
    window of each.
    """
    if not texts:
        raise CalibrationError("The calibration text is empty; give files with text in them.")
    order = list(texts)
    random.Random(seed).shuffle(order)
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    windows = -(-tokens // length), -(-heldout_tokens // length)
    wanted = sum(windows) * length
    encoded: list[list[int]] = []
    for text in _encode(order, tokenizer, separator, 2 * length):
        encoded.append(text)
        if sum(map(len, encoded)) >= wanted + 2 * length * 2 and len(encoded) > 1:
            break
    if sum(map(len, encoded)) < wanted:
        encoded = list(_encode(order, tokenizer, separator, None))
    available = sum(map(len, encoded))
    if available < 2 * length:
        raise CalibrationError(
            f"The calibration text has {available} tokens; at least {2 * length} are needed (one window of {length} to "
            "calibrate, one held out). Give more text or a smaller --context-length."
        )
    # a text that is too short for both keeps eight ninths to calibrate on
    share = windows[1] if available >= wanted else max(1, available // 9 // length)
    heldout = _take_heldout(encoded, min(windows[1], share) * length, length)
    flat = [token for document in encoded for token in document]
    count = min(windows[0], len(flat) // length)
    if count < 1:
        raise CalibrationError(
            f"The calibration text has {available} tokens in too few documents; give more than {2 * length} tokens."
        )
    if count < windows[0]:
        warnings.warn(
            f"The calibration text fills {count} of {windows[0]} windows of {length} tokens; all of it is used.",
            LordWarning,
            stacklevel=2,
        )
    return (torch.tensor(flat[: count * length]).view(count, length), torch.tensor(heldout).view(-1, length))


def _encode(texts: list[str], tokenizer: Any, separator: list[int], limit: int | None) -> Iterator[list[int]]:
    for text in texts:
        # a token is at least one character and rarely more than 8: cut before tokenizing megabytes for 2k tokens
        piece = text if limit is None else text[: 8 * limit]
        ids = tokenizer(piece, verbose=False)["input_ids"][:limit]
        yield [*ids, *separator]


def _take_heldout(encoded: list[list[int]], wanted: int, length: int) -> list[int]:
    """Remove documents from the end of `encoded` (or the tail of the only one) and return `wanted` of their ids."""
    taken: list[int] = []
    while len(encoded) > 1 and len(taken) < wanted and sum(map(len, encoded[:-1])) >= length:
        taken = encoded.pop() + taken
    if len(taken) < length:  # one long document is left: its tail is held out
        tail, missing = encoded.pop(), wanted - len(taken)
        taken = tail[-missing:] + taken
        encoded.append(tail[:-missing])
    return taken[: min(wanted, len(taken) // length * length)]


def file_windows(path: str, tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Non-overlapping evaluation windows of one text source, all documents joined. (window, length)

    Text shorter than a window gives one shorter window of at least two tokens.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for text in documents([path], tokenizer):
        ids.extend(tokenizer(text, verbose=False)["input_ids"] + separator)
        if limit is not None and len(ids) >= limit:
            ids = ids[:limit]
            break
    if len(ids) < 2:
        raise UsageError(f"{path} holds {len(ids)} tokens; at least 2 are needed to measure perplexity.")
    length = min(length, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def text_sha256(texts: list[str]) -> str:
    """sha256 over the documents, in order."""
    import hashlib

    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
