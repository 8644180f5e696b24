"""HumanEval and problems like MBPP's: samples are generated, kept in a file, run, and counted.

The file has a line for each finished sample, with a key of all that decides it: the weights of the model, the prompt
and how text is generated. A run that was stopped, or is repeated with more samples, generates only what is missing. Two
machines, or two batch sizes, may round differently and so write differently at the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LordError
from ..protocols import CausalModel, Tokenizer
from ..storage import write_text
from .execution import Outcome, run_programs
from .generation import Decoding, continued
from .problems import Problem, stops_of
from .statistics import mean_interval, pass_at_k, wilson

_KS = (1, 10, 100)  # of pass@k, those that there are samples for
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """The problems of one task, and how they are put to a model."""

    kind: str
    path: Path
    problems: list[Problem]
    samples: int  # of each problem
    decoding: Decoding

    def prompt(self, problem: Problem) -> str:
        return problem.request if self.decoding.chat else problem.prompt


@dataclass(frozen=True)
class Sample:
    """One that is to be there."""

    problem: Problem
    number: int
    key: str


def run_code_task(
    model: CausalModel,
    tokenizer: Tokenizer,
    asked: Asked,
    identity: str,  # of the weights and how they are computed with
    file: Path | None,
    batch_size: int,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """The figures of one task, as in `evaluate --json`."""
    chat = asked.decoding.chat
    stops = () if chat else stops_of(asked.kind)
    asked = replace(asked, decoding=replace(asked.decoding, stops=stops))
    wanted = samples_of(asked, identity)
    written = _read(file)
    reused = sum(sample.key in written for sample in wanted)
    _generate(model, tokenizer, asked, wanted, written, file, batch_size, progress)
    programs = [sample.problem.program(written[sample.key], chat) for sample in wanted]
    outcomes = run_programs(programs, progress)
    return counted(asked, wanted, outcomes) | {"reused_samples": reused}


def samples_of(asked: Asked, identity: str) -> list[Sample]:
    """All that are to be there. The key of greedy text does not name the seed, which it does not depend on."""
    told = asdict(asked.decoding) | ({"seed": 0} if asked.decoding.temperature == 0 else {})
    found: list[Sample] = []
    for problem in asked.problems:
        for number in range(asked.samples):
            parts = json.dumps([identity, problem.name, asked.prompt(problem), told, number], sort_keys=True)
            found.append(Sample(problem, number, hashlib.sha256(parts.encode()).hexdigest()[:24]))
    return found


def _read(file: Path | None) -> dict[str, str]:
    """key -> what the model wrote. A last line that was cut is dropped; any other that is no sample is an error."""
    if file is None or not file.is_file():
        return {}
    lines = file.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
        write_text(file, "".join(lines))
    try:
        rows = [json.loads(line) for line in lines]
        return {row["key"]: row["completion"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise LordError(f"{file} is no file of samples; remove it, or name another `json` file.") from error


def _generate(
    model: CausalModel,
    tokenizer: Tokenizer,
    asked: Asked,
    wanted: list[Sample],
    written: dict[str, str],  # what is there; what is generated is put in
    file: Path | None,
    batch_size: int,
    progress: Progress,
) -> None:
    missing = [sample for sample in wanted if sample.key not in written]
    if not missing:
        return
    digest = hashlib.sha256("".join(sample.key for sample in missing).encode()).digest()
    seed = (asked.decoding.seed + int.from_bytes(digest[:4], "big")) % 2**32  # after a stop not the same ones again
    prompts = [asked.prompt(sample.problem) for sample in missing]
    texts = continued(
        model,
        tokenizer,
        prompts,
        replace(asked.decoding, seed=seed),
        batch_size,
        lambda done: progress(f"generating {asked.kind}", done, len(missing)),
    )
    stream = None if file is None else file.open("a")
    try:
        for index, text in texts:
            sample = missing[index]
            written[sample.key] = text
            if stream is not None:
                row = {"key": sample.key, "task_id": sample.problem.name, "sample": sample.number, "completion": text}
                stream.write(json.dumps(row) + "\n")
                stream.flush()
    finally:
        if stream is not None:
            stream.close()


def counted(asked: Asked, wanted: list[Sample], outcomes: list[Outcome]) -> dict[str, Any]:
    """pass@k with intervals of 95 %: Wilson's of the exact counts where each problem has one sample, else of the mean
    over problems."""
    passed: dict[str, int] = {problem.name: 0 for problem in asked.problems}
    reasons: dict[str, str] = {}
    for sample, outcome in zip(wanted, outcomes, strict=True):
        passed[sample.problem.name] += outcome.passed
        if sample.number == 0:
            reasons[sample.problem.name] = outcome.reason
    solved, problems, n = sum(count > 0 for count in passed.values()), len(passed), asked.samples
    found: dict[str, Any] = {
        "problems": problems,
        "samples_per_problem": n,
        "passed_samples": sum(passed.values()),
        "solved_problems": solved,
    }
    for k in sorted({k for k in (*_KS, n) if k <= n}):
        values = [pass_at_k(n, count, k) for count in passed.values()]
        interval = wilson(solved, problems) if n == 1 else mean_interval(values)
        found |= {f"pass@{k}": sum(values) / problems, f"pass@{k}_interval": list(interval)}
    how = {key: value for key, value in asdict(asked.decoding).items() if key != "stops"}
    return found | {"rows": str(asked.path), **how, "first_outcomes": reasons, "passed": passed}
