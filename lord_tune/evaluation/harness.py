"""Tasks through lm-eval, the only file that imports it, on rows of local files.

The task is lm-eval's own: its prompt, choices, metrics and filters are read from the installed package, and only its
data set is replaced, so that nothing is fetched and a figure is the one that lm-eval computes. No examples stand before
the question (zero-shot), also where lm-eval's task has some by default (gsm8k).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LordWarning, UsageError
from ..integrations.running import kind_of, max_length
from ..layers import plain_model
from ..protocols import CausalModel, Tokenizer
from .task_rows import FORMS, Rows

_GENERATED = 256  # tokens that lm-eval gives an answer (gsm8k) which is generated
_BOOTSTRAPS = 1000  # of the standard error of a perplexity (lambada)
GENERATED = ("gsm8k",)  # tasks whose answers are written, not chosen
_AS_GIVEN: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def check_harness() -> None:
    """UsageError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("`tasks` are run by lm-eval, which is not installed; run: pip install 'lord-tune[eval]'.")


def run_tasks(
    model: CausalModel,
    tokenizer: Tokenizer,
    tasks: list[Rows],
    batch_size: int,
    chat: bool = False,  # whether prompts go through the chat template
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """lm-eval's record of an evaluation: `results` by task, and `samples` with what was asked and answered."""
    if kind_of(model) != "causal":
        raise UsageError(f"{type(plain_model(model)).__name__} does not continue text, so it has no tasks.")
    if max_length(model) <= _GENERATED and any(entry.task in GENERATED for entry in tasks):
        raise UsageError(
            f"Answers of {', '.join(GENERATED)} take {_GENERATED} tokens, which this model has no room for."
        )
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # a copy, as lm-eval gives a tokenizer without a token for padding one
        wrapped: Any = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        total = sum(_requests(entry) for entry in tasks)
        wrapped.cache_hook = _Counter(lambda done: progress("running tasks", min(done, total), total))
        found: dict[str, Any] = lm_eval.evaluate(
            lm=wrapped,
            task_dict=_built(tasks),
            bootstrap_iters=_BOOTSTRAPS,
            apply_chat_template=chat,
        )
    return found


def scores(result: dict[str, Any], entry: Rows, tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """The figures of one task, with lm-eval's names and standard errors, and what they are of. longest: the tokens
    that the model takes; lm-eval cuts longer questions at their beginning, and here they are counted."""
    found: dict[str, Any] = {}
    samples = {sample["doc_id"]: sample["arguments"] for sample in result["samples"][entry.task]}
    for key, value in result["results"][entry.task].items():
        name, _, filtered = key.partition(",")
        if isinstance(value, int | float) and filtered:
            found[name if filtered == "none" else f"{name}.{filtered}"] = value
    cut = sum(any(_tokens(words, tokenizer) > longest for words in asked) for asked in samples.values())
    if cut:
        text = (
            f"{cut} of {len(samples)} questions of '{entry.task}' are longer than the {longest} tokens that the model"
        )
        warnings.warn(f"{text} takes, and were cut at their beginning.", LordWarning, stacklevel=3)
    return found | {
        "items": len(entry.rows),
        "cut_items": cut,
        "rows": str(entry.path),
        "rows_are": entry.columns,
        "first_prompt": samples[0][0][0],
    }


def _tokens(words: tuple[Any, ...], tokenizer: Tokenizer) -> int:
    """Of a question and its answer, or the room for one; the last token of an answer is not read."""
    question, answer = words
    if isinstance(answer, str):
        return len(tokenizer(question + answer, verbose=False)["input_ids"]) - 1
    return len(tokenizer(question, verbose=False)["input_ids"]) + _GENERATED


class _Counter:
    """Stands where lm-eval keeps answers for later runs, and counts them."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell, self._done = tell, 0

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self._done += 1
        self._tell(self._done)


def _requests(entry: Rows) -> int:
    """How many answers lm-eval asks a model for."""
    if entry.task in ("lambada_openai", *GENERATED):
        return len(entry.rows)
    row = entry.rows[0]
    choices = row.get("choices", row.get("endings"))
    listed = choices["text"] if isinstance(choices, dict) else choices
    return len(entry.rows) * (len(listed) if listed else 2)


def _built(tasks: list[Rows]) -> Any:
    """lm-eval's task objects. Its own tasks are members of a group, the one place where it reads a task of this name
    and then what replaces parts of it; and only their folders are searched, since an index of all takes 8 seconds."""
    import lm_eval.tasks

    root = Path(str(lm_eval.tasks.__file__)).parent
    folders = sorted({str(root / FORMS[entry.task].folder) for entry in tasks if entry.task in FORMS})
    known = [_spec(entry) for entry in tasks if entry.task in FORMS]
    own = [_spec(entry) for entry in tasks if entry.task not in FORMS]
    manager = lm_eval.tasks.TaskManager(include_path=folders or None, include_defaults=False)
    return manager.load([*own, *([{"group": "lord_tune", "task": known}] if known else [])])


def _spec(entry: Rows) -> dict[str, Any]:
    """lm-eval's task of a name, on these rows."""
    import datasets

    splits = {"training_split": None, "validation_split": "rows", "test_split": None, "fewshot_split": None}
    held = {"rows": datasets.Dataset.from_list(entry.rows)}
    form = FORMS.get(entry.task)
    told: dict[str, Any] = {"task": entry.task, "num_fewshot": 0, "custom_dataset": lambda **_: held, **splits}
    if form is None:
        return told | _AS_GIVEN
    return told | ({"process_docs": None} if form.as_written and entry.columns == "prompt" else {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log, its own progress bars, which print over ours, and what it prints are left out."""
    import tqdm
    from tqdm.auto import tqdm as auto

    logger = logging.getLogger("lm_eval")
    level, init = logger.level, tqdm.std.tqdm.__init__

    def silent(self: Any, *given: Any, **options: Any) -> None:
        init(self, *given, **options | {"disable": True})

    logger.setLevel(logging.ERROR)
    classes = {tqdm.std.tqdm, auto}
    try:
        for kind in classes:
            kind.__init__ = silent
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        for kind in classes:
            kind.__init__ = init
