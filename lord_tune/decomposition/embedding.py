"""The input embedding and the output head in low precision: what is planned of them, their bytes, and the writing.

They are sites beside the layers: a run's plan and the manifest say of each module how its matrix is stored (TablePlan).
The path of a choice: the option becomes `Request.embeddings`; `planned_tables` looks at the model's structure and makes
the TablePlans or refuses; `saved_bytes` lowers what a budget of the whole checkpoint counts outside the layers;
`table_tensors` rounds each matrix when the shard of everything outside the blocks is written, after all layers, which
are calibrated on the embedding as it was: with error feedback where the output head reads it and there is calibration
text (head_inputs.py), else to the nearest in searched scales; `show_tables` puts the stored modules into the skeleton,
from which the manifest and all sizes are taken. A loader builds the modules from the manifest (layers/embeddings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import QuantizedEmbedding, QuantizedHead, put_table, sentinel, token_tables
from ..layers.sizes import bytes_by_part
from ..memory import give_back
from ..plans import Plan, TablePlan
from ..quantizers import Quantizer, make_quantizer
from ..quantizers.ldlq import STACKED, STRETCHES, fitted
from ..quantizers.lookup import AT_ONCE, check_lookup, round_rows, take_rows
from .base import Source
from .decide import Given, Request
from .shards import Loaded
from .sizes import added_bias_bytes, split_bytes
from .survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ROWS = 4096  # of a matrix, rounded together; a multiple of what starts on a stored boundary in any format
_DAMPING = (0.1,)  # of the Gram matrix; the rows are looked up as well, where feedback alone would move them too far


def planned_tables(model: PreTrainedModel, survey: Survey, request: Request) -> dict[str, TablePlan]:
    """What is stored in another format than the checkpoint has it; of a plan that says so, that."""
    given = request.budget.plan.embeddings if isinstance(request.budget, Given) else {}
    if given and request.embeddings is not None:
        raise UsageError("`embeddings` has no effect beside this `plan`, which says how they are stored; remove it.")
    if not given and request.embeddings is None:
        return {}
    found = {table.name: table for table in token_tables(model)}
    for table in found.values():
        names = [f"{name}.weight" for name in (table.name, *table.shared)]
        if any(survey.blocks.holds(index, key) for key in names for index in range(len(survey.blocks.modules))):
            raise UsageError(
                f"The embedding '{table.name}' is not stored outside the blocks of {type(model).__name__}; leave "
                "`embeddings` out (dense)."
            )
    if request.embeddings is not None:
        form, options = request.embeddings
        quantizer = make_quantizer(form, options)
        for table in found.values():
            check_lookup(quantizer, table.shape)
        return {name: table.plan(form, quantizer.options()) for name, table in found.items()}
    for name, plan in given.items():
        own = found.get(name)
        if own is None or own.shape != plan.shape or set(own.shared) != set(plan.shared):
            raise UsageError(
                f"The plan stores an embedding '{name}' of {plan.shape[0]}x{plan.shape[1]}, shared with "
                f"{', '.join(plan.shared) or 'nothing'}, which the model does not have so; use a model of the "
                "architecture that the plan was made for."
            )
        check_lookup(plan.quantizer(), plan.shape)
    return given


def saved_bytes(model: nn.Module, tables: Mapping[str, TablePlan]) -> int:
    """How many bytes fewer the checkpoint has with these tables than with the matrices as they are."""
    dense = sum(model.get_submodule(name).get_parameter("weight").nbytes for name in tables)
    return dense - sum(plan.stored_bytes + _units(model, name, plan) for name, plan in tables.items())


def _units(model: nn.Module, name: str, plan: TablePlan) -> int:
    """Bytes of the numbers that say the dtype of rows, one of each embedding."""
    readers = [model.get_submodule(n) for n in (name, *plan.shared)]
    return sum(m.weight.dtype.itemsize for m in readers if isinstance(m, nn.Embedding))


def parts_after(
    model: PreTrainedModel, survey: Survey, plan: Plan | None, tables: Mapping[str, TablePlan]
) -> dict[str, int]:
    """`bytes_by_part` of the checkpoint that a plan makes of a skeleton; without a plan of the layers as they are."""
    parts = bytes_by_part(model)
    for number, (name, table) in enumerate(tables.items()):
        parts["head" if number else "embeddings"] -= saved_bytes(model, {name: table})
    for name, site in survey.layers.items():
        choice = None if plan is None else plan.layers[name]
        if choice is None or choice.rank is None:
            continue
        backbone, factors = split_bytes(site, choice)
        parts["dense_layers"] -= site.dense_bytes
        parts["backbones"] += backbone
        parts["factors"] += factors
        parts["other"] += added_bias_bytes(site, choice)
    return parts


class RoundedTable(TypedDict):
    """What a report says of a stored embedding or output head."""

    format: str
    rounding: str  # "feedback" on the inputs of the output head, or "nearest" in searched scales
    error: float  # of the matrix, relative


def table_tensors(
    source: Source,
    name: str,
    plan: TablePlan,
    gram: Tensor | None,  # (width, width) float64, of the inputs of the output head, where it reads this matrix
) -> tuple[dict[str, Tensor], RoundedTable]:
    """What the checkpoint holds in place of a dense matrix."""
    key, form = f"{name}.weight", plan.quantizer()
    with Loaded(source, [key], source.model):
        weight = source.model.get_submodule(name).get_parameter("weight").detach()
        parts = round_rows(form, weight) if gram is None else round_with(form, weight, gram)
        found = {f"{name}.table.{part}": value for part, value in parts.items()}
        square = total = 0.0
        for start in range(0, plan.shape[0], _ROWS):
            rows = weight[start : start + _ROWS].float()
            ids = torch.arange(start, start + len(rows), device=rows.device)
            square += float((take_rows(form, parts, plan.shape, ids) - rows).square().sum(dtype=torch.float64))
            total += float(rows.square().sum(dtype=torch.float64))
    found[key] = sentinel()
    for reader in (name, *plan.shared):
        module = source.model.get_submodule(reader)
        if isinstance(module, nn.Embedding):
            found[f"{reader}.unit"] = torch.ones(1, dtype=module.weight.dtype)
    error = (square / max(total, 1e-300)) ** 0.5
    how = "nearest" if gram is None else "feedback"
    return found, {"format": plan.format, "rounding": how, "error": error}


def round_with(form: Quantizer, weight: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """The stored parts of a matrix, rounded with feedback (quantizers/ldlq.py): each row with the stretch of its scales
    that errs least on the head's inputs."""
    check_lookup(form, (weight.shape[0], weight.shape[1]))
    pieces = []
    for rows in weight.split(_ROWS):
        pieces.append(fitted(form, rows, gram, dampings=_DAMPING, shared=gram).parts)
        give_back()
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


_LOOSE = 32 << 20  # bytes of a matrix below which glibc keeps what was freed, in pieces that the next do not fit in


def rounding_bytes(plan: TablePlan, feedback: bool, keeps: bool = True) -> int:
    """Memory of rounding a matrix beside it, the Gram matrix and the stored parts. keeps: the CPU's, see _LOOSE.

    Float32 matrices of the size of what is rounded side by side, as measured on 16,384 x 576 and 8,192 x 2,048 in int4,
    int8, nf4 and e8-4: 137 to 241 MiB and 303 to 465 MiB with feedback, 33 to 173 and 37 to 184 to the nearest.
    """
    width, blocks = plan.shape[1], plan.quantizer().block > 1
    if not feedback:
        together = min(AT_ONCE, plan.shape[0] * width)
        return int((2.2 if blocks else 10.5) * 4 * together)
    rows = min(_ROWS, plan.shape[0])
    stacked = 4 * min(len(STRETCHES) * rows * width, STACKED)
    copies = 4.6 + (2.0 if blocks else 0.0) + (2.0 if keeps and stacked < _LOOSE else 0.0)
    weight, gram = 4 * rows * width, 8 * width**2
    return int(max(copies * stacked + weight + gram / 2, weight + 2.5 * gram))  # L of H; before, H damped and its root


def show_tables(model: PreTrainedModel, tables: Mapping[str, TablePlan]) -> None:
    """Give the skeleton the stored modules."""
    for name, plan in tables.items():
        if not isinstance(model.get_submodule(name), QuantizedEmbedding | QuantizedHead):
            put_table(model, name, plan)
