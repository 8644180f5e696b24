"""Which rows can be used, and as what: one set of rules for calibration, evaluation, training and DPO.

Recognised rows (in this order): `messages` or ShareGPT's `conversations` (chat), `prompt` + `completion` or `response`,
`instruction` (+ `input`) + `output` (alpaca), `text`, and for DPO `chosen` + `rejected` with or without `prompt`. Chats
bring their `tools` and `chat_template_kwargs`. A prompt that is text becomes the turn of a user, and its answer that of
the assistant, for a model with a chat template (`RowFormat.chat`). A row becomes what trl tokenizes. One that trl could
not, or that says nothing, is left out: a warning counts these and names row and column of the first. Rows count from 1.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import LordWarning, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

Row: TypeAlias = dict[str, Any]
BESIDE_CHATS = ("tools", "chat_template_kwargs")  # columns that a chat template reads
_PROMPTS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video")
_SAYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # keys of a message without content
_BATCH = 1000  # rows that are read at once


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a dataset hold the text."""

    kind: str  # messages | prompt_completion | text | pairs
    prompt: str = ""  # column; of messages the one that holds them, of pairs "" where the prompt is inside the answers
    completion: str = ""
    text: str = "text"
    chat: bool = False  # prompt_completion: whether prompt and answer that are text become turns of a chat

    def __str__(self) -> str:
        if self.kind == "pairs":
            return "prompt + chosen + rejected" if self.prompt else "chosen + rejected"
        return f"{self.prompt} + {self.completion}" if self.kind == "prompt_completion" else self.kind

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of trl that rows of this format get, without those of BESIDE_CHATS."""
        pairs = (*(["prompt"] if self.prompt else []), "chosen", "rejected")
        return {"messages": ("messages",), "text": (self.text,), "pairs": pairs}.get(
            self.kind, ("prompt", "completion")
        )


class Unusable(Exception):
    """Why a row is left out, with its column in quotes; backquotes are for options."""


def recognise(columns: Iterable[str], text: str = "text") -> RowFormat:
    """The row format of a dataset with these columns; `text`: the column of plain text. UsageError when none fits, and
    for images, which would be lost."""
    names = set(columns)
    for name in ("image", "images"):
        if name in names:
            raise UsageError(f"The dataset has a column {name}, but only text is read; remove the column.")
    for name in ("messages", "conversations"):
        if name in names:
            return RowFormat("messages", name)
    for prompt, completion in _PROMPTS:
        if prompt in names and completion in names:
            return RowFormat("prompt_completion", prompt, completion)
    if text in names:
        return RowFormat("text", text=text)
    if {"chosen", "rejected"} <= names:
        return RowFormat("pairs", "prompt" if "prompt" in names else "")
    raise UsageError(
        f"Got a dataset with the columns {sorted(names)}; expected {text}, or messages, or conversations, or prompt + "
        "completion (or response), or instruction (+ input) + output, or, for DPO, (prompt +) chosen + rejected. "
        "Rename the columns."
    )


def recognise_pairs(columns: Iterable[str], source: str) -> RowFormat:
    """The row format of a dataset for DPO; UsageError for other columns."""
    names = set(columns)
    if not {"chosen", "rejected"} <= names:
        raise UsageError(
            f"'{source}' has the columns {sorted(names)}; objective: dpo expects prompt, chosen and rejected. Rename "
            "the columns."
        )
    return recognise(names & {"prompt", "chosen", "rejected", "image", "images"})


def alpaca_prompt(instruction: str, extra: str | None) -> str:
    """The prompt of an alpaca row; its optional `input` follows the instruction."""
    return f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "") + "### Response:\n"


def usable(
    rows: Dataset, form: RowFormat, source: str, check: Callable[[Row, bool], str] = lambda row, chat: ""
) -> Iterator[tuple[int, Row, str]]:
    """(index, row in trl's columns, what `check` made of it) of the rows that can be used.

    `check`: of (row, whether it is a chat), may raise Unusable. After the last row a warning counts those left out;
    UsageError if none is left.
    """
    chat: bool | None = None  # as the first usable row is; trl asks this row alone
    left_out, first = 0, ""
    for index, row in enumerate(_iterate(rows, source)):
        try:
            values = in_columns_of_trl(row, form)
            kind = isinstance(values[form.columns[-1]], list)
            if chat is not None and kind != chat:
                here, there = ("messages", "text") if kind else ("text", "messages")
                raise Unusable(f"'{form.columns[-1]}' holds {here}, and that of earlier rows {there}")
            found = check(values, kind)
        except Unusable as reason:
            left_out, first = left_out + 1, first or f"row {index + 1}: {reason}"
            continue
        chat = kind
        yield index, values, found
    if len(rows) == 0:
        raise UsageError(f"The dataset '{source}' is empty; give rows.")
    if left_out == len(rows):
        raise UsageError(f"None of the {len(rows):,} rows of '{source}' can be used; {first}.")
    if left_out:
        message = f"{left_out:,} of {len(rows):,} rows of '{source}' are left out; the first is {first}."
        warnings.warn(message, LordWarning, stacklevel=3)


def in_trl_columns(rows: Dataset, form: RowFormat, kept: list[int]) -> Dataset:
    """The rows `kept` in the columns that trl reads, each with the type that holds what the row holds."""
    import datasets

    taken = rows if len(kept) == len(rows) else rows.select(kept)
    first, features = in_columns_of_trl(taken[0], form), dict(taken.features)
    source = {"prompt": form.prompt, "completion": form.completion, "messages": form.prompt}
    wanted: dict[str, Any] = {}
    for name, value in first.items():
        before = features[source.get(name, name)]
        if isinstance(value, str) and name not in BESIDE_CHATS:
            wanted[name] = datasets.Value("string")
        elif name == "chat_template_kwargs":
            wanted[name] = datasets.Json()  # one mapping may have other keys than the next
        elif form.chat and before == datasets.Value("string"):
            wanted[name] = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
        else:
            wanted[name] = datasets.List(datasets.Json()) if form.prompt == "conversations" else before
    if form.prompt != "instruction" and all(features.get(name) == kind for name, kind in wanted.items()):
        return taken.select_columns(list(wanted))
    options = {"remove_columns": taken.column_names, "features": datasets.Features(wanted)}
    return taken.map(in_columns_of_trl, fn_kwargs={"form": form}, **options)


def _iterate(rows: Dataset, source: str) -> Iterator[Row]:
    """All rows; UsageError for one whose bytes are no text: pyarrow's reader of JSON looks at them here only."""
    start = 0
    try:
        for batch in rows.iter(_BATCH):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(names, values, strict=True))
                start += 1
    except UnicodeDecodeError as error:
        while _decodes(rows, start):
            start += 1
        raise UsageError(
            f"Row {start + 1} of '{source}' is not UTF-8 text; convert it (for example with iconv)."
        ) from error


def _decodes(rows: Dataset, index: int) -> bool:
    try:
        return rows[index] is not None
    except UnicodeDecodeError:
        return False


def in_columns_of_trl(row: Row, form: RowFormat) -> Row:
    """A row as trl tokenizes it; Unusable if it cannot."""
    if form.kind == "messages":
        found: Row = {"messages": _messages(row[form.prompt], form.prompt)}
    elif form.kind == "text":
        found = {form.text: _words(row[form.text], form.text)}
    elif form.kind == "pairs":
        found = _pair(row, form)
    else:
        found = _answered(row, form)
    if isinstance(found[form.columns[-1]], list):
        found |= {name: _beside(row[name], name) for name in BESIDE_CHATS if name in row}
    return found


def _answered(row: Row, form: RowFormat) -> Row:
    prompt, completion = row[form.prompt], row[form.completion]
    if form.prompt == "instruction":
        extra = row.get("input")
        if extra is not None and not isinstance(extra, str):
            raise Unusable(f"'input' is {_kind(extra)}, expected text")
        instruction, answer = _words(prompt, "instruction"), _words(completion, form.completion)
        if form.chat:
            return _turns(f"{instruction}\n\n{extra}" if extra else instruction, answer)
        return {"prompt": alpaca_prompt(instruction, extra), "completion": answer}
    _same_kind({form.prompt: prompt, form.completion: completion})
    if isinstance(prompt, list):
        return {"prompt": _messages(prompt, form.prompt), "completion": _messages(completion, form.completion)}
    answer = _words(completion, form.completion)
    return _turns(prompt, answer) if form.chat else {"prompt": prompt, "completion": answer}


def _turns(prompt: str, answer: str) -> Row:
    asked, said = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    return {"prompt": [asked], "completion": [said]}


def _pair(row: Row, form: RowFormat) -> Row:
    values = {name: row[name] for name in form.columns}
    _same_kind(values)
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = _messages(value, name)
        elif name != "prompt":
            _words(value, name)
    if values["chosen"] == values["rejected"]:
        raise Unusable("'chosen' and 'rejected' are the same")
    if not form.prompt and isinstance(values["chosen"], list) and values["chosen"][0] != values["rejected"][0]:
        raise Unusable("'chosen' and 'rejected' begin differently, so there is no prompt")
    if not form.prompt and isinstance(values["chosen"], list):
        short, long = sorted((values["chosen"], values["rejected"]), key=len)
        if long[: len(short)] == short:
            raise Unusable("one of 'chosen' and 'rejected' begins with all of the other")
    return values


def _same_kind(values: Row) -> None:
    """Text all, or lists of messages all."""
    for name, value in values.items():
        if not isinstance(value, str | list):
            raise Unusable(f"'{name}' is {_kind(value)}, expected text or a list of messages")
    if len({isinstance(value, list) for value in values.values()}) > 1:
        raise Unusable(" and ".join(f"'{name}' is {_kind(value)}" for name, value in values.items()))


def _words(value: object, column: str) -> str:
    """Text with something in it."""
    if not isinstance(value, str):
        raise Unusable(f"'{column}' is {_kind(value)}, expected text")
    if not value.strip():
        raise Unusable(f"'{column}' is {'blank' if value else 'empty'}")
    return value


def _messages(value: object, column: str) -> list[Row]:
    """A conversation in which somebody says something; ShareGPT's keys become `role` and `content`, as trl does it."""
    if not isinstance(value, list):
        raise Unusable(f"'{column}' is {_kind(value)}, expected a list of messages")
    if not value:
        raise Unusable(f"'{column}' is empty")
    found = [_message(turn, column, number) for number, turn in enumerate(value, 1)]
    if not any(_says_something(turn) for turn in found):
        raise Unusable(f"no message of '{column}' says anything")
    return found


def _message(turn: object, column: str, number: int) -> Row:
    where = f"message {number} of '{column}'"
    if not isinstance(turn, dict):
        raise Unusable(f"{where} is {_kind(turn)}, expected role and content")
    if column == "conversations":
        names = {"from": "role", "value": "content"}
        turn = {names.get(str(key), str(key)): value for key, value in turn.items()}
    if not isinstance(turn.get("role"), str) or not turn["role"]:
        raise Unusable(f"{where} has no role")
    content = turn.get("content")
    if content is None and not any(turn.get(key) for key in _SAYS):
        raise Unusable(f"{where} has no content")
    if isinstance(content, list):
        for part in content:
            _check_part(part, where)
    elif content is not None and not isinstance(content, str):
        raise Unusable(f"{where} has {_kind(content)} as its content, expected text")
    return turn


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, dict):
        raise Unusable(f"the content of {where} holds {_kind(part)}, expected parts with a type")
    media = next((name for name in _MEDIA if part.get("type") == name or part.get(name) is not None), None)
    if media is not None:
        raise Unusable(f"{where} holds a part of type {media}, but only text is read")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Unusable(f"{where} holds a part of type {part.get('type')}, expected text")


def _says_something(turn: Row) -> bool:
    content = turn.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return any(text.strip() for text in texts) or any(turn.get(key) for key in _SAYS)


def _beside(value: object, column: str) -> object:
    """`tools`: a list of them, or its JSON; `chat_template_kwargs`: a mapping. null is none of them."""
    if column == "chat_template_kwargs":
        if value is not None and not isinstance(value, dict):
            raise Unusable(f"'{column}' is {_kind(value)}, expected a mapping")
        return value or {}
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError:
            raise Unusable(f"'{column}' is text but not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable(f"'{column}' is {_kind(tools)}, expected a list of tools")
    return value


def _kind(value: object) -> str:
    kinds = {str: "text", list: "a list", dict: "a mapping", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
