"""Rows of a dataset in trl's columns, the chat template they are rendered with, and what of them the loss counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import numpy as np

from ..data.files import load_rows, local_paths
from ..data.rows import Row, RowFormat, Unusable, in_trl_columns, recognise, usable
from ..data.texts import as_chats, renderer
from ..errors import LordError, LordWarning, UsageError
from ..integrations.files import first_line
from ..integrations.models import load_tokenizer
from ..integrations.vocabulary import check_vocabulary, embedding_rows
from ..storage import sha256_files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..protocols import Tokenizer, TrainerLike

_CHECKED_ROWS = 64
# ChatML, as SmolLM2, Qwen2.5 and many others speak it, with the marks that trl's assistant_only_loss needs. The end of
# a turn is inside them: the model shall learn to stop.
_CHATML = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}SYSTEM{% endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' + '\\n' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_TURNS = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user", "assistant")]


def prepare_rows(
    source: str,
    split: str,
    config: str | None,
    tokenizer: Tokenizer,
    text: str = "text",
    template: str | None = None,
    assistant_only: bool = False,
    plain: bool = False,
) -> tuple[Dataset, RowFormat]:
    """A dataset in trl's columns (text; messages; prompt + completion; tools) and what was recognised.

    text: trl's dataset_text_field. template: a chat template other than the tokenizer's. assistant_only: leave out
    chats in which no assistant speaks. plain: keep prompts and answers that are text as they are where there is a chat
    template. Raises UsageError for rows that trl could not train on.
    """
    rows = load_rows(source, split, config)
    form = as_chats(recognise(rows.column_names, text), tokenizer, template, plain)
    if plain and form.kind != "prompt_completion":
        raise UsageError(f"`plain_prompts` has no effect: '{source}' holds {form} and no prompts; remove it.")
    if form.kind == "pairs":
        raise UsageError(f"'{source}' holds pairs of answers, {form}; set objective: dpo, or give other rows.")
    text_of = renderer(tokenizer, template, form, source)

    def check(row: Row, chat: bool) -> str:
        if assistant_only and not chat:
            raise UsageError(f"assistant_only_loss needs chats, and '{source}' holds {form} as text; remove it.")
        turns = [turn for name in form.columns for turn in row[name]] if chat else []
        if assistant_only and not any(turn["role"] == "assistant" for turn in turns):
            raise Unusable(f"no message of '{form.columns[-1]}' is an assistant's")
        return text_of(row, chat)

    kept = [index for index, _, _ in usable(rows, form, source, check)]
    return in_trl_columns(rows, form, kept), form


def other_template(path: str | None) -> str | None:
    """The chat template of trl's chat_template_path: a .jinja file, or a model whose template is taken over."""
    if path is None:
        return None
    if not path.endswith((".jinja", ".j2")):
        return load_tokenizer(path).chat_template
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template_path {path} could not be read: {first_line(error)}") from error


class _Rendering(TypedDict, total=False):
    add_generation_prompt: bool
    chat_template: str


def marked_template(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat template with {% generation %} marks around what the assistant says; None if it has them, or
    if trl knows a marked variant of it. Raises UsageError for a template that is neither of these nor plain ChatML."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.chat_template is None or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        get_training_chat_template(cast("PreTrainedTokenizerBase", tokenizer))
        return None
    except ValueError:
        pass

    def render(turns: list[dict[str, str]], **options: Unpack[_Rendering]) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    opening = render(_TURNS[1:2])
    system = opening.split("<|im_start|>user")[0]  # many templates begin with a system turn of their own
    candidate = _CHATML.replace("SYSTEM", "{{- " + repr(system) + " }}" if system else "")
    probes: list[tuple[list[dict[str, str]], bool]] = [(_TURNS, False), (_TURNS[1:], False), (_TURNS[:2], True)]
    for turns, prompt in probes:
        own = render(turns, add_generation_prompt=prompt)
        if own != render(turns, add_generation_prompt=prompt, chat_template=candidate):
            raise UsageError(
                "assistant_only_loss: true needs {% generation %} marks in the chat template, and this model's is not "
                "ChatML, so they cannot be set; give a marked template as chat_template_path: FILE.jinja."
            )
    return candidate


@contextmanager
def chat_template(tokenizer: Tokenizer, marked: bool) -> Iterator[None]:
    """Within: the tokenizer with a marked template. The one that is saved with the adapter is the model's own, which
    other programs can read."""
    own = tokenizer.chat_template
    template = marked_template(tokenizer) if marked and own else None
    tokenizer.chat_template = template or own
    try:
        yield
    finally:
        if template is not None:
            tokenizer.chat_template = own


def check_tokenized(trainer: TrainerLike, tokenizer: Tokenizer, given: int, chats: bool) -> None:
    """Warn of rows that max_length cuts: those left out as nothing of them is trained, those whose end is lost.

    given: rows of the dataset. Ends are looked up in the labels; chats do not end in the end-of-text token, so of these
    the rows as long as max_length are counted. Not for packing_strategy wrapped. Raises LordError if no row is left.
    """
    dataset, limit = trainer.train_dataset, trainer.args.max_length
    packed = "seq_lengths" in dataset.column_names
    if len(dataset) == 0:
        raise LordError(
            f"None of the {given:,} rows has a token that is trained within max_length {limit}; raise max_length or "
            "check the columns."
        )
    if not packed and len(dataset) < given:
        _warn(f"{given - len(dataset):,} of {given:,} rows have no trained token within max_length {limit}: left out.")
    if "labels" not in dataset.column_names:
        return
    if chats:
        cut = 0 if limit is None else int((_lengths(dataset, packed) >= limit).sum())
        ends = f"are cut at max_length {limit} (or just as long)"
    else:
        cut = int((_last_labels(dataset, packed) != tokenizer.eos_token_id).sum())
        ends = f"are cut at max_length {limit} and do not end with the end-of-text token"
    if cut:
        total = len(_lengths(dataset, packed))
        way = "raise max_length" + (", or set packing_strategy: bfd_split," if packed else "")
        _warn(f"{cut:,} of {total:,} training sequences {ends}; {way} to train on all of them.")


def check_embedded(trainer: TrainerLike, tokenizer: Tokenizer) -> None:
    """CheckpointError if a row has an id for which the model has no embedding; UsageError if padding has."""
    ids: list[np.ndarray] = []
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for name in [] if dataset is None else dataset.column_names:
            if dataset is not None and name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"):
                ids.append(dataset.with_format("arrow")[:][name].combine_chunks().flatten().to_numpy())
    check_vocabulary(trainer.model, tokenizer, ids)
    rows, padding, given = embedding_rows(trainer.model), getattr(tokenizer, "pad_token_id", None), trainer.args
    packed = getattr(given, "packing", False) or getattr(given, "padding_free", False)
    alone = max(given.per_device_train_batch_size, getattr(given, "per_device_eval_batch_size", 1)) == 1
    if rows is not None and padding is not None and padding >= rows and not packed and not alone:
        name = getattr(tokenizer, "pad_token", None)
        raise UsageError(
            f"Batches are filled up with the token {name!r}, id {padding}, and the embedding has rows for the ids 0 "
            f"to {rows - 1} only; set packing: true, or another pad_token in tokenizer_config.json."
        )


def _warn(message: str) -> None:
    warnings.warn(message, LordWarning, stacklevel=3)


def _lengths(dataset: Dataset, packed: bool) -> np.ndarray:
    """Tokens of every document."""
    column = dataset.with_format("arrow")[:]["seq_lengths" if packed else "input_ids"].combine_chunks()
    return column.flatten().to_numpy() if packed else np.diff(column.offsets.to_numpy())


def _last_labels(dataset: Dataset, packed: bool) -> np.ndarray:
    """The label of the last token of every document."""
    labels = dataset.with_format("arrow")[:]["labels"].combine_chunks().flatten().to_numpy()
    return labels[np.cumsum(_lengths(dataset, packed)) - 1]


def sample_spans(trainer: TrainerLike, tokenizer: Tokenizer, require_eos: bool) -> list[tuple[str, bool]]:
    """The first training sequence as text pieces, each with whether the loss counts it.

    Raises LordError if none of the first rows has a trained token, or no completion teaches the end of the text.
    """
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if "labels" in trainer.train_dataset.column_names:
        heads = trainer.train_dataset.select(range(min(_CHECKED_ROWS, len(trainer.train_dataset))))["labels"]
        if not any(label != -100 for row in heads for label in row):
            raise LordError(
                "No token of the first rows is trained on (all are masked); check the columns and max_length."
            )
        if require_eos and not any(row[-1] == tokenizer.eos_token_id for row in heads):
            raise LordError(
                "No completion ends with the end-of-text token, so the model would not learn to stop; raise max_length "
                f"(the first {len(heads)} rows are all truncated) or check the tokenizer's eos_token."
            )
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        marked = label != -100
        if not spans or spans[-1][1] != marked:
            spans.append(([], marked))
        spans[-1][0].append(token)
    return [(tokenizer.decode(tokens), marked) for tokens, marked in spans]


def rows_sha256(source: str | None) -> str | None:
    """Of the bytes of a local data file, or of all files of a folder or pattern; None for a Hub dataset."""
    if source is None:
        return None
    paths = local_paths(source)
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in files if file.is_file()]
    return sha256_files(files) if files else None
