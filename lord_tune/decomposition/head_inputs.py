"""What the output head reads on the calibration text, for rounding it with error feedback.

The head is most of what rounding an embedding costs: its inputs have few directions with nearly all of their energy (on
SmolLM2-135M and code the largest mean square of an input is 257 times the mean). H = E[x x^T] of the original model's
last hidden states is summed in a pass of its own over the blocks, before any layer is replaced, on as many windows as
hold TOKENS_PER_INPUT tokens for each of the head's inputs. The product with the head itself is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..calibration.moments import MomentAccumulator
from ..layers import token_modules
from ..plans import TablePlan
from ..storage import write_tensors
from .passes import Passes
from .steps import HEAD, Phase, of_block

TOKENS_PER_INPUT = 8
_STREAM, _FILE = "head", "head.safetensors"


def measure_head(run: Passes, tables: Mapping[str, TablePlan]) -> None:
    """Sum H, where there is text and a stored head."""
    if run.windows is None or head_table(run.model, tables) is None or run.journal.has(HEAD):
        return
    windows = run.text.calibration
    width = next(iter(tables.values())).shape[1]
    windows = windows[: windows_read(width, windows.shape[1])]
    walk = run.walk({_STREAM: windows}, Phase.HEAD)
    for index in range(run.count):
        step = of_block(Phase.HEAD, index)
        if run.journal.has(step):
            continue
        with run.loaded(index):
            run.compare(walk, index)
            walk.advance(index, _STREAM)
        run.journal.commit(step)
        run.clock.report(Phase.HEAD, index)
        walk.forget(index - 1, list(walk.windows))
    run.compare_result(walk)
    head: nn.Module | None = run.model.get_output_embeddings()
    assert head is not None, "a table says that it is stored"
    with run.outside_loaded():
        sums = MomentAccumulator(width, next(head.parameters()).device)
        seen: list[int] = []

        def read(x: Tensor) -> Tensor:
            sums.update(x)
            seen.append(x.shape[-1])
            return x.new_zeros(*x.shape[:-1], 1)

        head.__dict__["forward"] = read
        try:
            for _ in walk.answers(_STREAM, run.task.forward):
                pass
        finally:
            del head.__dict__["forward"]
    ran = any(run.workers.gather(bool(seen)))
    tensors = {"gram": sums.result(_STREAM, run.workers).gram} if ran else {}
    path = run.journal.work / _FILE
    digest = write_tensors(path, tensors) if run.journal.writes and ran else None
    run.journal.commit(HEAD, path if ran else None, digest, ran=ran)


def windows_read(width: int, length: int) -> int:
    """How many windows of `length` tokens H is summed over, where there are so many."""
    return max(1, -(-TOKENS_PER_INPUT * width // length))


def head_gram(run: Passes) -> Tensor | None:
    """H, (width, width) float64, in the process that writes; None where nothing was summed."""
    if not run.journal.has(HEAD) or not run.journal.steps[HEAD]["ran"]:
        return None
    return run.read(_FILE)["gram"]


def head_table(model: nn.Module, tables: Mapping[str, TablePlan]) -> str | None:
    """The table that the output head reads."""
    shared, own = token_modules(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = {name for name, module in model.named_modules() if module is head} if head is not None else set()
    for name, plan in tables.items():
        if names & {name, *plan.shared}:
            return name
    return None
