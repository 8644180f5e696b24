"""Find the input embedding and the output head of a model, put stored ones in their place, and dense ones back.

Which modules share one matrix is what transformers says of the model (`all_tied_weights_keys`); no family is named
here. Its lists of tied parameters are rewritten with the matrix: `lm_head.weight` tied to `embed_tokens.weight` becomes
`lm_head.table.PART` tied to `embed_tokens.table.PART`, so that its loader and writer treat them as they treat any.
Embeddings of positions and of token types are no input embeddings and stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import UsageError
from ..plans import TablePlan
from .quantized_embedding import QuantizedEmbedding, QuantizedHead, Table
from .surgery import is_linear, is_transposed, plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DENSE = "leave `embeddings` out (dense)"
_BEFORE = "_lord_tune_ties"  # attribute of a model: its own list of tied parameters, before it was rewritten


@dataclass(frozen=True)
class TokenTable:
    """A matrix with a row per token, (tokens, width)."""

    name: str  # of the module under whose name the checkpoint has it
    shape: tuple[int, int]
    dtype: torch.dtype
    shared: tuple[str, ...]  # the other modules that read it
    reads: frozenset[str]  # "embedding", "head"

    @property
    def dense_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def plan(self, form: str, options: Mapping[str, Any]) -> TablePlan:
        return TablePlan(self.shape, form, dict(options), self.shared)


def token_tables(model: PreTrainedModel) -> list[TokenTable]:
    """The input embedding, and the output head where it is not tied to it. UsageError for what cannot be stored."""
    embedding, head = _input_of(model), model.get_output_embeddings()
    if embedding is None:
        raise UsageError(f"{type(model).__name__} has no embedding of tokens that could be stored; {_DENSE}.")
    found: dict[str, TokenTable] = {}
    for module in (embedding, head):
        if module is not None:
            table = _table_of(model, module, embedding, head)
            found.setdefault(table.name, table)
    return list(found.values())


def _input_of(model: nn.Module) -> nn.Module | None:
    try:
        found: nn.Module | None = plain_model(model).get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def token_modules(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of all modules that read the matrix of the input embedding, and of the output head where it has its own."""
    plain = plain_model(model)
    if not hasattr(plain, "get_input_embeddings"):
        return set(), set()
    embedding, head = _input_of(plain), plain.get_output_embeddings()
    names = {id(module): name for name, module in plain.named_modules()}
    pairs = [pair for pair in _ties_of(plain).items() if all(key.endswith(".weight") for key in pair)]
    ties = {_module(target): _module(source) for target, source in pairs}
    first = names.get(id(embedding), "")
    group = {ties.get(first, first)} - {""}
    group |= {one for one, other in ties.items() if other in group}
    own = {names[id(head)]} - group if id(head) in names else set()
    return group, own


def _module(key: str) -> str:
    return key.removesuffix(".weight").removesuffix(".table")


def _table_of(model: PreTrainedModel, module: nn.Module, embedding: nn.Module, head: nn.Module | None) -> TokenTable:
    named = list(model.named_modules(remove_duplicate=False))
    own = [name for name, other in named if other is module]
    ties = _ties_of(model)
    origin = ties.get(f"{own[0]}.weight", f"{own[0]}.weight")
    keys = [origin, *(target for target, source in ties.items() if source == origin)]
    names = [key.removesuffix(".weight") for key in keys]
    _check_alone(model, module, own, names)
    modules = {name: model.get_submodule(name) for name in names}
    for name, reader in modules.items():
        _check_reader(name, reader)
    weight = module.get_parameter("weight")
    reads = {"embedding"} if embedding in modules.values() else set()
    reads |= {"head"} if head is not None and head in modules.values() else set()
    shape = weight.shape[0], weight.shape[1]
    return TokenTable(names[0], shape, weight.dtype, tuple(names[1:]), frozenset(reads))


def _ties_of(model: nn.Module) -> dict[str, str]:
    found: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return found


def _check_alone(model: nn.Module, module: nn.Module, own: list[str], names: list[str]) -> None:
    """UsageError where the matrix is shared in a way that transformers' list does not say."""
    if len(own) != 1:
        raise UsageError(f"The module '{own[0]}' is also '{own[1]}', which cannot be stored as one of two; {_DENSE}.")
    weight = module._parameters.get("weight")
    keys = [key for key, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    others = [key for key in keys if key.removesuffix(".weight") not in names]
    if others:
        raise UsageError(
            f"'{own[0]}' shares its weight with '{others[0]}', of which transformers' list of tied weights says "
            f"nothing; {_DENSE}."
        )


def _check_reader(name: str, module: nn.Module) -> None:
    if is_linear(module) and not is_transposed(module):
        return
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    if not plain or type(module).__call__ is not nn.Module.__call__ or module.max_norm is not None:
        raise UsageError(
            f"'{name}' is a {type(module).__name__}, which does more than to look rows up or to multiply by them (it "
            f"may scale them), and that would be lost; {_DENSE}."
        )


# --- surgery ---


def put_table(
    model: PreTrainedModel,
    name: str,
    plan: TablePlan,
    found_as: Callable[[str], str | None] = lambda name: name,  # the name that this model has for a module
) -> None:
    """Put stored modules, on the meta device, in place of the dense ones. A head that the model lacks is passed over.
    UsageError if the model has no such modules."""
    readers = {known: root for n, root in ((name, True), *((n, False) for n in plan.shared)) if (known := found_as(n))}
    kinds = {known: model.get_submodule(known) for known in readers}
    for known, module in kinds.items():
        _check_reader(known, module)
        shape = tuple(module.get_parameter("weight").shape)
        if shape != plan.shape:
            raise UsageError(
                f"'{known}' is {plan.shape} in the manifest and {shape} in the model; config.json and the manifest do "
                "not belong together."
            )
    if found_as(name) is None and readers:
        raise UsageError(
            f"The checkpoint holds its embedding under the name '{name}', which {type(model).__name__} lacks; load it "
            "with the model class it was made from."
        )
    quantizer = plan.quantizer()
    _retie(model, set(readers), list(quantizer.empty(plan.shape, "meta")))
    table = Table(plan.shape[1], plan.shape[0], quantizer, "meta")
    for known, module in kinds.items():
        dtype, root = module.get_parameter("weight").dtype, readers[known]
        if isinstance(module, nn.Embedding):
            model.set_submodule(known, QuantizedEmbedding(table, dtype, module.padding_idx, root))
        else:
            model.set_submodule(known, QuantizedHead(table, dtype, module._parameters["bias"], root))
    if readers:
        model.__dict__["resize_token_embeddings"] = types.MethodType(_refuse_resizing, model)


def _refuse_resizing(model: Any, new_num_tokens: int | None = None, *rest: Any, **options: Any) -> nn.Module:
    """In place of `resize_token_embeddings`."""
    embedding: nn.Module = model.get_input_embeddings()
    if new_num_tokens is None or new_num_tokens == getattr(embedding, "num_embeddings", None):
        return embedding
    _no_resizing()


def _no_resizing() -> NoReturn:
    raise UsageError(
        "The embedding is stored in low precision and cannot get other rows; resize the original model and decompose "
        "that, or export with `format` dense first."
    )


def _retie(model: PreTrainedModel, names: set[str], parts: list[str]) -> None:
    """Rewrite the lists of tied parameters for these modules, of the model and of the models in it."""
    for prefix, inner in _models_in(model):
        here = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

        def rewritten(ties: Mapping[str, str], here: set[str] = here) -> dict[str, str]:
            found: dict[str, str] = {}
            for target, source in ties.items():
                one, other = target.removesuffix(".weight"), source.removesuffix(".weight")
                if one in here and other in here and target.endswith(".weight"):
                    found |= {f"{one}.table.{part}": f"{other}.table.{part}" for part in parts}
                else:
                    found[target] = source
            return found

        own = inner.get_expanded_tied_weights_keys(all_submodels=False)
        if (changed := rewritten(own)) != own:
            inner.__dict__.setdefault(_BEFORE, inner.__dict__.get("_tied_weights_keys"))
            inner.__dict__["_tied_weights_keys"] = changed
        if known := inner.__dict__.get("all_tied_weights_keys"):
            inner.all_tied_weights_keys = rewritten(known)


def _models_in(model: nn.Module) -> list[tuple[str, Any]]:
    """(prefix of its names, model), the outermost first."""
    named = model.named_modules(remove_duplicate=False)
    return [(f"{name}." if name else "", inner) for name, inner in named if hasattr(inner, "all_tied_weights_keys")]


def stored_tables(model: nn.Module) -> dict[str, TablePlan]:
    """Module -> how its matrix is stored, as the manifest says it."""
    readers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding | QuantizedHead)}
    found: dict[str, TablePlan] = {}
    for name, module in readers.items():
        if module.root:
            form, table = module.table.quantizer, module.table
            shared = tuple(n for n, other in readers.items() if other is not module and other.table is table)
            found[name] = TablePlan(table.shape, form.name, form.options(), shared)
    return found


def dense_tables(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Put dense modules back, tied as they were, in place; how many numbers they have. dtype: default that of each."""
    readers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding | QuantizedHead)}
    made: dict[int, nn.Parameter] = {}
    for name, module in readers.items():
        if id(module.table) not in made:
            made[id(module.table)] = nn.Parameter(module.table.whole(dtype or module.dtype), requires_grad=False)
        weight = made[id(module.table)]
        if isinstance(module, QuantizedEmbedding):
            new: nn.Module = nn.Embedding(*module.table.shape, padding_idx=module.padding_idx, device="meta")
        else:
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            if module.bias is not None:
                new.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
        new.weight = weight
        model.set_submodule(name, new.train(module.training))
    if readers:
        _tie_as_before(model)
    return sum(weight.numel() for weight in made.values())


def _tie_as_before(model: nn.Module) -> None:
    inner_models = _models_in(model) if hasattr(model, "all_tied_weights_keys") else []
    for _, inner in inner_models:
        before = inner.__dict__.pop(_BEFORE, None)
        inner.__dict__.pop("_tied_weights_keys", None)
        if before is not None:
            inner.__dict__["_tied_weights_keys"] = before
        inner.__dict__.pop("resize_token_embeddings", None)
    for _, inner in inner_models:
        inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=True)
    for _, inner in inner_models[:1]:
        inner.tie_weights()
