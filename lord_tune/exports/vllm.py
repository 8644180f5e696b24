"""Export of low rank as ordinary nn.Linear layers and a small modelling file, for vLLM and stock transformers.

vLLM's Transformers backend takes any model of a `modeling_*.py` beside the weights and puts its own layer in place of
each nn.Linear, also in a pair; so a rank per layer needs no plugin there. R is NAME.0.weight (rank, in) and L is
NAME.1.weight (out, rank); of the pivoted form B is NAME.chosen.weight (rank, in), C is NAME.others.weight
(out - rank, rank), and NAME.places int32 (out,), the entry of [z; C z], z = B x, that each output is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..declared import PIVOTED, PLAIN
from ..errors import UsageError
from ..integrations.models import DTYPE_NAMES
from ..integrations.shards import Piece
from ..layers import FactoredLinear, factored_layers, unfused_parameters
from ..layers.factored_linear import dense_factor
from ..layers.pivoted_linear import PivotedLinear
from ..quantizers import DTYPES
from .base import Job
from .parts import Parts
from .stock import base_pieces, empty, factors_of, stock_outputs, write_base

FILE = "modeling_low_rank.py"
_CODE = '''"""{what} of transformers with low-rank layers. Written by lord_tune; needs torch and transformers alone.

config.json lists the layers under `low_rank`. vLLM runs this file in its Transformers backend, where layers of its
own take the place of each nn.Linear.
"""

import torch
from torch import nn
{imports}

class Pivoted(nn.Module):
    """x -> L R x: `chosen` computes as many outputs as the rank is, `others` the rest out of these, and `places` puts
    them in order."""

    def __init__(self, inputs, outputs, rank, bias):
        super().__init__()
        self.chosen = nn.Linear(inputs, rank, bias=False)
        self.others = nn.Linear(rank, outputs - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("places", torch.arange(outputs, dtype=torch.int32))

    def forward(self, x):
        z = self.chosen(x)
        y = torch.cat([z, self.others(z)], -1).index_select(-1, self.places)
        return y if self.bias is None else y + self.bias


def put_low_rank(model, prefix=""):
    """Put low-rank layers in place of those that config.json names."""
    for name, layer in model.config.low_rank.items():
        outputs, inputs = layer["shape"]
        rank, bias = layer["rank"], layer["bias"]
        if layer["form"] == "pivoted":
            new = Pivoted(inputs, outputs, rank, bias)
        else:
            new = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
        parent, _, child = (prefix + name).rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model._tp_plan = {{}}  # the layers of this file are not split over devices
'''
_CLASS = """

class {new}({old}):
    def __init__(self, config, *args, **options):
        super().__init__(config, *args, **options)
        put_low_rank(self{prefix})
"""


@dataclass(frozen=True)
class VLLMExport:
    """Low-rank layers as pairs of linear layers, and the code that they need."""

    name: ClassVar[str] = "vllm"
    model_folder: ClassVar[str] = "."

    def check(self, model: PreTrainedModel) -> None:
        experts = unfused_parameters(model)
        if experts:
            raise UsageError(
                f"The experts '{experts[0]}' are decomposed, and a stock model holds them in one tensor; export with "
                "`format` factored or dense."
            )
        body = model.base_model
        for cls in {type(model), type(body)}:
            if not cls.__module__.startswith("transformers."):
                raise UsageError(
                    f"{cls.__name__} comes from remote code, which the exported modelling file cannot build on; export "
                    "with `format` factored or dense."
                )
        if body is not model and not _auto_classes(model):
            raise UsageError(
                f"No Auto class of transformers loads a {type(model).__name__}, so that no engine would find the "
                "exported one; export with `format` factored or dense."
            )
        for name, layer in factored_layers(model).items():
            if layer.plan.backbone != "none":
                raise UsageError(
                    f"'{name}' has backbone {layer.plan.backbone} beside L and R, and `format` vllm holds L R alone; "
                    "export with `format` compressed-tensors (backbones w2a16, w4a16, w8a16), or decompose without "
                    "`backbone`."
                )
            if not name.startswith(_prefix(model)):
                raise UsageError(
                    f"'{name}' is outside {type(body).__name__}, which is all that vLLM builds; decompose with "
                    "`exclude` for this layer."
                )

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        layers, dtype, prefix = factored_layers(model), DTYPE_NAMES[job.dtype], _prefix(model)
        parts, described = Parts(model, job.store), {}
        biased = [name for name, layer in layers.items() if layer.bias is not None and _form(layer) == PLAIN]
        called = {f"{name}.bias": f"{name}.1.bias" for name in biased}
        pieces = base_pieces(model, layers, parts, dtype, called)
        for name, layer in layers.items():
            pieces.append(_pair(name, layer, dtype, parts))
            described[name.removeprefix(prefix)] = {
                "shape": list(layer.plan.shape),
                "rank": layer.rank,
                "form": _form(layer),
                "bias": layer.bias is not None,
            }
        packed = sorted({f for layer in layers.values() for f in _formats(layer)} - set(DTYPES))
        if packed:
            job.notes.append(f"L and R are stored in {' and '.join(packed)}, and were decoded into {job.dtype}")
        config = {"low_rank": described, "dtype": job.dtype, "architectures": [_new(type(model))]}
        config["auto_map"] = {auto: f"{FILE.removesuffix('.py')}.{name}" for auto, name in _loaded_by(model).items()}
        write_base(model, job.tokenizer, job.folder, pieces, config)
        (job.folder / FILE).write_text(_code(model))
        return stock_outputs(job.folder, job.ids, model, remote=list(_loaded_by(model))[-1])

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch."), job.dtype]


def _form(layer: FactoredLinear) -> str:
    return PIVOTED if isinstance(layer.left, PivotedLinear) else PLAIN


def _pair(name: str, layer: FactoredLinear, dtype: torch.dtype, parts: Parts) -> Piece:
    """The tensors of a layer, L and R in `dtype`."""
    (rows, columns), rank = layer.plan.shape, layer.rank
    shapes = {"0.weight": empty((rank, columns), dtype), "1.weight": empty((rows, rank), dtype)}
    if _form(layer) == PIVOTED:
        shapes = {"chosen.weight": empty((rank, columns), dtype), "others.weight": empty((rows - rank, rank), dtype)}
        shapes["places"] = empty((rows,), torch.int32)

    def make() -> dict[str, Tensor]:
        with parts.held(*factors_of(name, layer)):
            stored = _stored(layer)
            return {f"{name}.{key}": v.to(dtype) if v.is_floating_point() else v for key, v in stored.items()}

    return Piece({f"{name}.{key}": shape for key, shape in shapes.items()}, make)


def _stored(layer: FactoredLinear) -> dict[str, Tensor]:
    """L and R as wide as they can be decoded."""
    if isinstance(layer.left, PivotedLinear):
        rest = dense_factor(layer.left.rest)
        places = layer.left.places().to(torch.int32)
        parts = {"chosen.weight": dense_factor(layer.right), "others.weight": rest, "places": places}
        return {key: value.cpu() for key, value in parts.items()}
    left, right = layer.dense_factors()
    return {"0.weight": right.cpu(), "1.weight": left.cpu()}


def _formats(layer: FactoredLinear) -> list[str]:
    plan = layer.plan
    return [plan.left_format, plan.right_format, *([plan.top_format] if plan.top_rank else [])]


def _prefix(model: PreTrainedModel) -> str:
    """Of the names of what vLLM builds, the model without its head."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _loaded_by(model: PreTrainedModel) -> dict[str, str]:
    """Auto class -> class of the modelling file, the model's own last."""
    found = {"AutoModel": _new(type(model.base_model))}
    return found | {auto: _new(type(model)) for auto in _auto_classes(model) if auto not in found}


def _auto_classes(model: PreTrainedModel) -> list[str]:
    """Auto classes of transformers that load this model with its head."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and type(model.config) in mapping:
            named = mapping[type(model.config)]
            if type(model) in (named if isinstance(named, tuple) else (named,)):
                found.append(name)
    return found


def _new(cls: type) -> str:
    return f"LowRank{cls.__name__}"


def _code(model: PreTrainedModel) -> str:
    """The modelling file."""
    classes = {type(model.base_model): ""} | {type(model): f', "{_prefix(model)}"' if _prefix(model) else ""}
    imports = "".join(f"from {cls.__module__} import {cls.__name__}\n" for cls in classes)
    code = _CODE.format(what=type(model).__name__, imports=imports)
    return code + "".join(_CLASS.format(new=_new(cls), old=cls.__name__, prefix=p) for cls, p in classes.items())
