"""The plan: what becomes of each layer, decided before anything is factorized.

`Plan` maps layer names to `LayerChoice`s and is a JSON file of its own: allocators and budgets produce it, the writing
pass of a decomposition reads nothing else, and it can be carried to another run or another model of one architecture.
`LayerPlan` is a choice with the facts of the layer it is carried out on (shape, dtype, bias, orientation): how the
layer is stored. Serialised, the LayerPlans are the manifest inside `config.json`, from which a loader builds the
modules. What was measured on the way (errors, seconds) is in `decomposition.json`. `TablePlan` says the same of the
input embedding and the output head; plan and manifest have none where these are stored as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .declared import FORMS, PIVOTED, PLAIN, Options
from .errors import CheckpointError, UsageError, unknown_name
from .factorizations import METHODS, FactorForm, Factorization
from .quantizers import DTYPES, Quantizer, make_quantizer
from .storage import read_json, write_json

FORMAT_VERSION = 1  # of a factored checkpoint
EMBEDDINGS_VERSION = 2  # of one whose embeddings are stored in another format, which older versions cannot read
PLAN_VERSION = 1
Record = TypeVar("Record")


@dataclass(frozen=True)
class LayerChoice:
    """What is to become of one layer, in names and numbers only."""

    method: str  # a key of METHODS
    rank: int | None  # None: the layer stays dense
    method_options: Options = field(default_factory=dict)
    backbone: str = "none"  # "none" or a format's name
    backbone_options: Options = field(default_factory=dict)
    factor_format: str | None = None  # of L and R: a key of DTYPES, a format's name, or None: the dtype of the weight
    factor_options: Options = field(default_factory=dict)
    top_rank: int = 0  # of the rank: the first components, stored apart
    top_format: str = "fp32"
    top_options: Options = field(default_factory=dict)
    form: str = PLAIN  # of storing the factors: L and R, or pivoted
    reason: str | None = None  # why a layer stays dense
    shape: tuple[int, int] | None = None  # (out, in) of the layer that it was made for
    predicted_loss: float | None = None  # increase, nats per token, where the calibration text said so

    def factorization(self) -> Factorization:
        """The method with its hyperparameters; UsageError if there is no such method or option."""
        if self.method not in METHODS:
            raise unknown_name("method", self.method, list(METHODS))
        try:
            method: Factorization = METHODS[self.method](**self.method_options)
            return method
        except TypeError as error:
            raise UsageError(f"Method '{self.method}' got options it does not have ({error}); correct them.") from error

    def quantizer(self) -> Quantizer | None:
        """The backbone's format."""
        return None if self.backbone == "none" else _made(self.backbone, self.backbone_options)

    @property
    def rounds_factors(self) -> bool:
        """Whether L and R are stored in a quantized format, and so rounded with feedback."""
        return self.factor_format is not None and self.factor_format not in DTYPES

    def factor_form(self) -> FactorForm | None:
        """How L and R are stored, if in a quantized format."""
        if not self.rounds_factors or not self.rank:
            return None
        assert self.factor_format is not None
        top_form = DTYPES.get(self.top_format) or _made(self.top_format, self.top_options)
        quantizer = _made(self.factor_format, self.factor_options)
        return FactorForm(quantizer, self.stored_apart, top_form, self.form == PIVOTED)

    @property
    def stored_apart(self) -> int:
        """How many components are: all but one at most."""
        return max(0, min(self.top_rank, (self.rank or 0) - 1)) if self.rounds_factors else 0

    def at(self, rank: int | None, reason: str | None = None) -> LayerChoice:
        """The same choice with another rank; None leaves the layer dense."""
        return dataclasses.replace(self, rank=rank, reason=reason)

    def on(
        self,
        shape: tuple[int, int],  # (out, in)
        dtype: torch.dtype,  # of the original weight
        bias: bool,  # whether the original has one
        conv1d: bool,
    ) -> LayerPlan:
        """The choice for a layer of this shape."""
        assert self.rank is not None, "a dense layer has no plan"
        own = next((name for name, kind in DTYPES.items() if kind == dtype), "fp32")
        form = self.factor_format if self.factor_format and self.rank else own  # no format packs no numbers, nor
        packed = form not in DTYPES  # the C of as many components as outputs
        top = self.stored_apart
        return LayerPlan(
            shape=shape,
            rank=self.rank,
            method=self.method,
            backbone=self.backbone,
            backbone_options=self.backbone_options,
            left_format=form,
            right_format=form,
            factor_options=self.factor_options if packed else {},
            top_rank=top,
            top_format=self.top_format if top else "fp32",
            top_options=self.top_options if top else {},
            form=PLAIN if not self.rank or (packed and self.rank == shape[0]) else self.form,
            bias=bias or (self.rank > 0 and self.factorization().shifts_bias),
            conv1d=conv1d,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, name: str, content: Mapping[str, object]) -> LayerChoice:
        """UsageError, naming the layer, for anything that a decomposition could not carry out."""
        try:
            shape = content.get("shape")
            choice = _filled(cls, {**content, "shape": tuple(shape) if isinstance(shape, list) else shape})
        except (TypeError, AttributeError) as error:
            raise UsageError(
                f"The plan's entry of layer '{name}' is not readable ({error}); it may come from a newer lord_tune."
            ) from error
        if choice.rank is not None and (not isinstance(choice.rank, int) or choice.rank < 0):
            raise UsageError(f"The plan gives layer '{name}' rank {choice.rank!r}; expected a number from 0 or null.")
        if choice.rank == 0 and choice.backbone == "none":
            raise UsageError(f"The plan gives layer '{name}' rank 0 without a backbone; nothing would be left of it.")
        if choice.form not in FORMS:
            raise unknown_name("form", str(choice.form), list(FORMS))
        if choice.form == PIVOTED and choice.top_rank:
            raise UsageError(
                f"The plan gives layer '{name}' pivoted factors and top_rank {choice.top_rank}; pivoted ones are "
                "stored in one piece. Choose the form plain, or top_rank 0."
            )
        choice.factorization()
        choice.quantizer()
        choice.factor_form()
        return choice


@dataclass(frozen=True)
class TablePlan:
    """How the input embedding, or an output head that is not tied to it, is stored: an entry of plan and manifest."""

    shape: tuple[int, int]  # (tokens, width)
    format: str  # a quantizer's name
    options: Options = field(default_factory=dict)
    shared: tuple[str, ...] = ()  # the other modules that read the same parts: a tied output head

    def quantizer(self) -> Quantizer:
        return _made(self.format, self.options)

    @property
    def stored_bytes(self) -> int:
        """Of the parts, without the few numbers of `unit`."""
        return sum(p.numel() * p.element_size() for p in self.quantizer().empty(self.shape, "meta").values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape), "shared": list(self.shared)}

    @classmethod
    def from_dict(cls, name: str, content: object) -> TablePlan:
        """UsageError, naming the module, for anything that cannot be read or decoded."""
        try:
            if not isinstance(content, Mapping):
                raise TypeError(f"{content!r} came")
            shape, shared = content["shape"], content.get("shared", ())
            if not isinstance(shape, list | tuple) or len(shape) != 2 or not isinstance(shared, list | tuple):
                raise TypeError(f"shape is {shape!r}, shared {shared!r}")
            found = _filled(cls, {**content, "shape": tuple(shape), "shared": tuple(shared)})
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"What is said of the embedding '{name}' is not readable ({error}); it may come from a newer lord_tune."
            ) from error
        found.quantizer()
        return found


@dataclass(frozen=True)
class Plan:
    """Layer name -> choice, for every layer that a run may touch."""

    layers: dict[str, LayerChoice]
    made: dict[str, Any] = field(default_factory=dict)  # base, calibration text and options that it came from
    embeddings: dict[str, TablePlan] = field(default_factory=dict)  # what is not stored as it is, by module

    def needs(self) -> frozenset[str]:
        """The statistics that carrying it out takes."""
        return frozenset().union(*(c.factorization().needs for c in self.factored().values()))

    def factored(self) -> dict[str, LayerChoice]:
        """The layers that do not stay dense."""
        return {name: choice for name, choice in self.layers.items() if choice.rank is not None}

    def choices(self) -> list[LayerChoice]:
        """Without what is predicted of them, to be compared."""
        return [dataclasses.replace(choice, predicted_loss=None) for choice in self.layers.values()]

    def kinds(self) -> dict[str, int]:
        """How many layers are dense, L R, a format alone, a format + L R; the most frequent first."""
        counts: dict[str, int] = {}
        for choice in self.layers.values():
            kind = "dense" if choice.rank is None else "L R" if choice.backbone == "none" else choice.backbone
            kind += " + L R" if choice.rank and choice.backbone != "none" else ""
            counts[kind] = counts.get(kind, 0) + 1
        return dict(sorted(counts.items(), key=lambda entry: -entry[1]))

    def dense(self) -> Plan:
        """The model as it is."""
        return Plan({name: choice.at(None) for name, choice in self.layers.items()})

    def changes(self) -> bool:
        """Whether anything of the model is stored in another way."""
        return bool(self.factored() or self.embeddings)

    def predicted_loss(self) -> float | None:
        """Increase of the loss, nats per token: the sum over the layers, where all have one."""
        losses = [choice.predicted_loss for choice in self.factored().values()]
        return None if None in losses else sum(loss for loss in losses if loss is not None)

    def ranks(self) -> dict[str, int | None]:
        """Layer name -> rank, None for dense."""
        return {name: choice.rank for name, choice in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        layers = {name: choice.to_dict() for name, choice in self.layers.items()}
        plan: dict[str, Any] = {"plan_version": PLAN_VERSION, "made": self.made, "layers": layers}
        if self.embeddings:
            plan["embeddings"] = {name: table.to_dict() for name, table in self.embeddings.items()}
        return plan

    @classmethod
    def from_dict(cls, content: Mapping[str, object]) -> Plan:
        version, layers = content.get("plan_version"), content.get("layers")
        if version != PLAN_VERSION or not isinstance(layers, dict):
            raise UsageError(
                f"This is not a plan of version {PLAN_VERSION} (plan_version is {version!r}); write one with lord-tune "
                "plan MODEL --save FILE."
            )
        made = content.get("made", {})
        if not isinstance(made, dict):
            raise UsageError(f"The plan says {made!r} of where it comes from (made); expected a mapping.")
        embeddings = content.get("embeddings", {})
        if not isinstance(embeddings, dict):
            raise UsageError(f"The plan says {embeddings!r} of the embeddings; expected a mapping.")
        choices = {name: LayerChoice.from_dict(name, entry) for name, entry in layers.items()}
        return cls(choices, made, {name: TablePlan.from_dict(name, entry) for name, entry in embeddings.items()})

    def save(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """UsageError if the file is not a plan."""
        if not path.is_file():
            raise UsageError(f"The plan {path} does not exist; write one with lord-tune plan MODEL --save FILE.")
        content = read_json(path)
        if not isinstance(content, dict):
            raise UsageError(f"{path} is not a plan; write one with lord-tune plan MODEL --save FILE.")
        return cls.from_dict(content)


@dataclass(frozen=True)
class LayerPlan:
    """How one decomposed layer is stored: an entry of the manifest."""

    shape: tuple[int, int]  # (out, in)
    rank: int
    method: str
    backbone: str = "none"  # "none" or a quantizer's name
    backbone_options: Options = field(default_factory=dict)
    left_format: str = "fp32"  # a key of DTYPES or a quantizer's name
    right_format: str = "fp32"
    factor_options: Options = field(default_factory=dict)
    top_rank: int = 0  # of the rank: the first components, stored apart
    top_format: str = "fp32"
    top_options: Options = field(default_factory=dict)
    form: str = PLAIN  # pivoted: `left` holds C and the rows of B, `right` is B (factorizations/pivoting.py)
    bias: bool = False
    conv1d: bool = False  # the original was a transformers Conv1D, whose weight is (in, out)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, name: str, content: Mapping[str, object]) -> LayerPlan:
        try:
            shape = content["shape"]
            if not isinstance(shape, list | tuple):
                raise TypeError(f"shape is {shape!r}")
            return _filled(cls, {**content, "shape": tuple(shape)})
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"The manifest entry of layer '{name}' is not readable ({error}); it may come from a newer lord_tune."
            ) from error


def _filled(record: Callable[..., Record], content: Mapping[str, object]) -> Record:
    """A record from JSON; TypeError for a key that it does not have."""
    return record(**content)


def _made(name: str, options: Options) -> Quantizer:
    try:
        return make_quantizer(name, options)
    except TypeError as error:
        raise UsageError(f"Format '{name}' got options it does not have ({error}); correct them.") from error
