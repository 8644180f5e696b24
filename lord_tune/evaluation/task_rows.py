"""The rows of question files, in the columns that lm-eval's task of that name reads.

A file is JSONL, and its rows have either the columns of the task's data set on the Hub, which are taken as they are, or
are written as prompts already (`query`, `choices`, `gold` and their like, as llm-foundry's local files are). The latter
are taken apart into the columns that they were made from, so that lm-eval's own prompt comes out whatever wrapping the
file has: "Question: X" in a query becomes the question X. What was changed or lost in making them (a title before a
passage, capital letters) stays so.

A file of any other name with `query`, `choices` and `gold` is measured as it stands: log p(" " + choice | query).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UsageError

Row: TypeAlias = dict[str, Any]
_QUERY = ("query", "choices", "gold")
_SPLITS = ("", "_validation", "_valid", "_dev", "_test")  # endings of file names, the first that is there
_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Rows:
    """Rows that a task can be asked with."""

    task: str  # lm-eval's name, or that of a file
    path: Path
    rows: list[Row]
    columns: str  # "data set": as they are; "prompt": taken apart; "as given": no task of lm-eval has this name


@dataclass(frozen=True)
class Form:
    """What rows of one task may look like."""

    columns: tuple[str, ...]  # of the data set on the Hub, those that lm-eval's task reads
    written: tuple[str, ...]  # of rows that are prompts already
    take_apart: Callable[[Row], Row]
    folder: str  # of lm-eval's own task files
    files: tuple[str, ...] = ()  # other names of the file
    as_written: bool = False  # whether `take_apart` gives what lm-eval's own preparation of rows would give


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def _arc(row: Row) -> Row:
    return {"question": _question(row), **_lettered(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["query"], **_lettered(row)}


def _boolq(row: Row) -> Row:
    found = re.fullmatch(r"(?:Passage: )?(.*)\nQuestion: (.*?)\??\s*", row["query"], re.DOTALL)
    if found is None or [choice.strip().lower() for choice in row["choices"]] != ["no", "yes"]:
        raise ValueError("expected a query 'Passage: ...\\nQuestion: ...?' and the choices no and yes")
    return {"passage": found[1], "question": found[2], "label": row["gold"]}


def _copa(row: Row) -> Row:
    found = re.fullmatch(r"(.*?),? (because|therefore)\s*", row["query"], re.DOTALL)
    if found is None:
        raise ValueError("expected a query that ends in 'because' or 'therefore'")
    first, second = (choice.strip() for choice in row["choices"])
    kind = "cause" if found[2] == "because" else "effect"
    return {"premise": found[1] + ".", "question": kind, "choice1": first, "choice2": second, "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]  # whole, so that the blank stands at the beginning
    sentence = "_ " + row["continuation"].strip()
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(row["gold"] + 1)}


def _rte(row: Row) -> Row:
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]}


def _lambada(row: Row) -> Row:
    word = row["continuation"].strip()
    if " " in word:
        raise ValueError("expected one word as continuation")
    return {"text": f"{row['context']} {word}"}


def _gsm8k(row: Row) -> Row:
    if "####" not in row["response"]:
        raise ValueError("expected a response that ends in '#### ANSWER'")
    return {"question": row["prompt"], "answer": row["response"]}


def _question(row: Row) -> str:
    text: str = row["query"]
    return text.removeprefix("Question: ").removesuffix("Answer:").strip()


def _lettered(row: Row) -> Row:
    """The choices as ARC and OpenBookQA have them."""
    letters = list(_LETTERS[: len(row["choices"])])
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["gold"]]}


FORMS: dict[str, Form] = {
    "piqa": Form(("goal", "sol1", "sol2", "label"), _QUERY, _piqa, "piqa"),
    "arc_easy": Form(("question", "choices", "answerKey"), _QUERY, _arc, "arc"),
    "arc_challenge": Form(("question", "choices", "answerKey"), _QUERY, _arc, "arc"),
    "hellaswag": Form(
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"), _QUERY, _hellaswag, "hellaswag", as_written=True
    ),
    "winogrande": Form(
        ("sentence", "option1", "option2", "answer"),
        ("context_options", "continuation", "gold"),
        _winogrande,
        "winogrande",
    ),
    "boolq": Form(("passage", "question", "label"), _QUERY, _boolq, "super_glue/boolq"),
    "rte": Form(("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label"), _rte, "glue/rte"),
    "lambada_openai": Form(("text",), ("context", "continuation"), _lambada, "lambada", ("lambada",)),
    "openbookqa": Form(("question_stem", "choices", "answerKey"), _QUERY, _openbookqa, "openbookqa", ("openbook_qa",)),
    "copa": Form(("premise", "question", "choice1", "choice2", "label"), _QUERY, _copa, "super_glue/copa"),
    "gsm8k": Form(("question", "answer"), ("prompt", "response"), _gsm8k, "gsm8k"),
}


def find_file(task: str, folder: Path) -> Path:
    """TASK.jsonl, TASK_validation.jsonl, ... in a folder or in one inside it; UsageError if there is none, or two."""
    others = FORMS[task].files if task in FORMS else ()
    for name in (f"{stem}{split}.jsonl" for stem in (task, *others) for split in _SPLITS):
        found = [path for place in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz") for path in folder.glob(place)]
        if len(found) > 1:
            raise UsageError(f"Task '{task}' has two files, {found[0]} and {found[1]}; name a folder with one of them.")
        if found:
            return found[0]
    raise UsageError(
        f"Task '{task}' needs the file {task}.jsonl in {folder}, and there is none; add it, or drop the task."
    )


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a file, compressed or not; UsageError names the first line that is none."""
    found: list[Row] = []
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON ({error}); repair it.") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number} is no object of columns; repair it.")
            found.append(row)
    if not found:
        raise UsageError(f"{path} is empty; it should hold one question per line.")
    return found


def task_rows(task: str, path: Path, limit: int | None = None) -> Rows:
    """The first `limit` rows of a file for a task, as the top of this file says."""
    rows = read_jsonl(path)[:limit]
    form, first = FORMS.get(task), set(rows[0])
    if form is not None and first.issuperset(form.columns):
        _check_columns(path, rows, form.columns)
        return Rows(task, path, [{name: row[name] for name in form.columns} for row in rows], "data set")
    if form is not None and first.issuperset(form.written):
        _check_columns(path, rows, form.written)
        return Rows(task, path, _converted(path, rows, form.take_apart), "prompt")
    if form is None and first.issuperset(_QUERY):
        _check_columns(path, rows, _QUERY)
        return Rows(task, path, [{name: row[name] for name in _QUERY} for row in rows], "as given")
    wanted = [_QUERY] if form is None else [form.columns, form.written]
    raise UsageError(
        f"{path} has the columns {', '.join(rows[0])}; task '{task}' needs {' or '.join(', '.join(w) for w in wanted)}."
    )


def _converted(path: Path, rows: list[Row], take_apart: Callable[[Row], Row]) -> list[Row]:
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(take_apart(row))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(f"{path}, row {number} cannot be asked: {error}.") from error
    return found


def _check_columns(path: Path, rows: list[Row], columns: Iterable[str]) -> None:
    """UsageError unless all rows have what the first has, and a gold choice is one of the choices."""
    for number, row in enumerate(rows, 1):
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            raise UsageError(f"{path}, row {number} lacks {missing[0]}; repair it.")
        choices, gold = row.get("choices", row.get("context_options")), row.get("gold")
        if "gold" in row and isinstance(choices, list) and not (isinstance(gold, int) and 0 <= gold < len(choices)):
            raise UsageError(f"{path}, row {number} has gold {gold!r}, which is none of its {len(choices)} choices.")
