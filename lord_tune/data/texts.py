"""Rows as text and as tokens, exactly as trl makes them: chats through the model's chat template, with their tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from ..errors import UsageError
from ..protocols import Tokenizer
from .files import load_rows
from .rows import Row, RowFormat, Unusable, recognise, usable

_OPTION = "chat_template_kwargs"
_SHOWN = 72  # characters of the row that is shown


class Rendered(str):
    """Text that a chat template wrote: it holds its special tokens, and none are added to it."""

    __slots__ = ()


def render(row: Row, turns: list[Row], tokenizer: Tokenizer, template: str | None, prompt: bool = False) -> Rendered:
    """Turns of a row as one text, with the row's tools; Unusable where the template refuses them.

    template: None for the tokenizer's own. prompt: whether an answer shall follow.
    """
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    options = {"chat_template": template, "tools": tools, "add_generation_prompt": prompt} | (row.get(_OPTION) or {})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unusable(f"the chat template does not take it: {reason[:200]}") from error
    if any(isinstance(turn.get("content"), list) and str(turn["content"]) in text for turn in turns):
        raise Unusable("the chat template prints lists of parts as they are; give content as text")
    return Rendered(text)


def as_chats(form: RowFormat, tokenizer: Tokenizer | None, template: str | None, plain: bool) -> RowFormat:
    """The same format, with prompts and answers that are text as turns where the model has a chat template."""
    templated = tokenizer is not None and bool(template or getattr(tokenizer, "chat_template", None))
    return replace(form, chat=form.kind == "prompt_completion" and templated and not plain)


def described(form: RowFormat, rows: int, plain: bool) -> str:
    """What was recognised, and how prompts are rendered."""
    how = ""
    if form.chat:
        how = ", by the model's chat template (`plain_prompts` keeps text plain)"
    elif form.kind == "prompt_completion":
        how = ", text among them as it is" + ("" if plain else " (the model has no chat template)")
    return f"{rows:,} row{'s' * (rows != 1)}, recognised as {form}{how}"


def beginning(text: str) -> str:
    """As it is shown, in one line."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def renderer(tokenizer: Tokenizer | None, template: str | None, form: RowFormat, source: str) -> Callable[..., str]:
    """What `usable` checks rows with: (row in trl's columns, whether it is a chat) -> its text. Of a pair, that with
    the chosen answer. UsageError for chats of a model that has no chat template."""

    def text_of(row: Row, chat: bool) -> str:
        last = "chosen" if form.kind == "pairs" else form.columns[-1]
        if not chat:
            return str(row.get("prompt", "") + row[last])
        if tokenizer is None or not (template or getattr(tokenizer, "chat_template", None)):
            raise UsageError(f"'{source}' holds chat messages and the model has no chat template; give plain text.")
        start = row.get("prompt", [])
        if start:
            render(row, start, tokenizer, template, prompt=True)
        if form.kind == "pairs":
            render(row, start + row["rejected"], tokenizer, template)
        return render(row, start + row[last], tokenizer, template)

    return text_of


def texts_of(
    sources: list[str],
    tokenizer: Tokenizer | None = None,
    plain: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[list[str]]:
    """The texts of each source: text files are one document each, rows of data files one document each.

    plain: keep prompts and answers as plain text where the tokenizer has a chat template; UsageError where no source
    has any. tell: gets one line for each source, see `described`.
    """
    found: list[list[str]] = []
    prompts = False
    for source in sources:
        rows = load_rows(source)
        form = as_chats(recognise(rows.column_names), tokenizer, None, plain)
        prompts = prompts or form.kind == "prompt_completion"
        found.append([text for _, _, text in usable(rows, form, source, renderer(tokenizer, None, form, source))])
        tell(f"{source}: {described(form, len(rows), plain)}; the first: {beginning(found[-1][0])}")
    if plain and not prompts:
        raise UsageError(f"`plain_prompts` has no effect on {' and '.join(sources)}, without prompts; remove it.")
    return found


def documents(
    sources: list[str],
    tokenizer: Tokenizer | None = None,
    plain: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """The texts of all sources, see `texts_of`."""
    return [text for found in texts_of(sources, tokenizer, plain, tell) for text in found]


def token_ids(text: str, tokenizer: Tokenizer, limit: int | None = None) -> list[int]:
    """The tokens of a document, at most `limit`, and the end of text, which trl adds as well: not to chats, whose
    template decides, and not where the text ends with it already."""
    # a token is at least one character and rarely more than 8: cut before tokenizing megabytes for 2k tokens
    piece = text if limit is None else text[: 8 * limit]
    if isinstance(text, Rendered):
        return tokenizer(piece, verbose=False, add_special_tokens=False)["input_ids"][:limit]
    ids, end = tokenizer(piece, verbose=False)["input_ids"][:limit], tokenizer.eos_token_id
    if end is None or piece.endswith(getattr(tokenizer, "eos_token", None) or "\0"):
        return ids
    return [*ids, end]


def text_sha256(texts: list[str]) -> str:
    """sha256 over the documents, in order."""
    import hashlib

    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
