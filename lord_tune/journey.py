"""`plan --gpu-memory`: whether a decomposition, its training and its exports fit, before any of them is begun.

The plan is written as the config.json that `decompose` would write, without tensors. From it the forecast of a training
step (training/forecast.py) and the exports' own checks take what they need: shapes. The decomposition and a training
step are held against the memory of the GPU, exports against this machine's memory and disk, since they run on the CPU.

An export holds what Python and the libraries do and, dense or factored, the model as it is stored or what stands
outside its blocks, and the layer or block at hand (exports/streamed.py). Other forms hold the model, what they write,
and what they read again to compare: the model as it is stored and twice what is written, or for gguf the model in
float32 twice. These are bounds and no forecasts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from .config import PlanConfig
from .console import human_bytes, say, show_table
from .decomposition import Estimate, Request, Survey, TextSize, estimate_run, trace
from .decomposition.decide import decide
from .errors import LordError, UsageError
from .exports.foreseen import foreseen_bytes
from .exports.run import EXPORTS
from .integrations.checkpoint import write_index
from .integrations.files import first_line
from .integrations.running import max_length, run_on_meta
from .integrations.space import apart_bytes, dense_bytes
from .layers import factored_layers
from .layers.sizes import sizes
from .plans import Plan
from .quantizers import QUANTIZERS
from .quantizers.engines import Block
from .resolve import request_of

CONTEXT_BYTES = 6 * 10**8  # of a GPU, that a process of torch holds beside tensors: context and kernels
BATCHES = (8, 4, 2, 1)  # sequences at once that are tried; trl's default is 8
_WRITES = {
    "dense": "model.safetensors",
    "factored": "model.safetensors",
    "peft": "base/, adapter/",
    "compressed-tensors": "base/, adapter/",
    "gguf": "model.gguf, adapter.gguf",
    "vllm": "model.safetensors, modelling file",
}


@dataclass(frozen=True)
class Leg:
    """One step of the journey: what it needs, and whether that is there."""

    step: str
    device: str  # whose memory: gpu or cpu
    memory: int | None  # bytes; None: not foreseen
    disk: int  # bytes written
    fits: bool | None  # None: not foreseen, or no step of this plan
    told: str  # in words: files, batch, or why not


def journey(
    config: PlanConfig,
    shape: PreTrainedModel,
    found: Survey,
    request: Request,
    chosen: Plan | None,
    text: TextSize | None,
    foreseen: Estimate,
    rest: int,  # bytes outside the layers to decompose
) -> list[Leg]:
    """All legs, for a GPU of `config.gpu_memory`."""
    memory = config.gpu_bytes()
    assert memory is not None, "asked for by the caller"
    plan = chosen or _alike(config, found, rest)
    legs = [_decomposition(config, shape, found, request, chosen, text, foreseen, memory)]
    if plan is None:  # a silent end would read as if everything fitted
        return [*legs, Leg("train", "gpu", None, 0, None, "not foreseen: the calibration decides more than ranks")]
    with _written(shape, found, plan) as folder:
        legs.append(_training(config, folder, memory))
        legs += _exports(folder, foreseen.held_bytes)
    return legs


def _alike(config: PlanConfig, found: Survey, rest: int) -> Plan | None:
    """A plan of the same size, every layer alike, where the calibration decides the ranks."""
    try:
        return decide(found.layers, request_of(config.model_copy(update={"allocation": "uniform"})), rest)
    except LordError:
        return None


@contextmanager
def _written(shape: PreTrainedModel, found: Survey, plan: Plan) -> Iterator[str]:
    """A folder with the config.json of the decomposed model."""
    plans = {
        name: choice.on(site.shape, site.dtype, site.bias, site.conv1d)
        for name, choice in plan.layers.items()
        if choice.rank is not None and (site := found.layers[name]) is not None
    }
    with tempfile.TemporaryDirectory(prefix="lord_tune_plan_") as place:
        write_index(Path(place), shape, None, plans, {})
        yield place


def _decomposition(
    config: PlanConfig,
    shape: PreTrainedModel,
    found: Survey,
    request: Request,
    chosen: Plan | None,
    text: TextSize | None,
    foreseen: Estimate,
    memory: int,
) -> Leg:
    length = text.length if text is not None else min(64, max_length(shape))
    groups, flops = trace(shape, found, run_on_meta, length)
    gpu = torch.device("cuda")
    held = estimate_run(shape, found, request, chosen, text, groups, flops, 0, None, config.processes, gpu)
    disk = foreseen.scratch_bytes + (foreseen.model_bytes_after or foreseen.model_bytes)
    return Leg("decompose", "gpu", held.peak_bytes, disk, _fits(held.peak_bytes, memory, disk), "with scratch files")


def _fits(needed: int, memory: int, disk: int) -> bool:
    return needed + CONTEXT_BYTES <= memory and disk <= _free_disk()


def _free_disk() -> int:
    return shutil.disk_usage(Path.cwd()).free


def _training(config: PlanConfig, folder: str, memory: int) -> Leg:
    """A step with as many sequences of trl's default length at once as fit, at most trl's default."""
    from .training import TrainOptions, predict_memory, trainer_arguments  # imports trl

    options = TrainOptions(folder, "rows")
    given: dict[str, Any] = {"output_dir": "out", "gradient_checkpointing": True, "report_to": "none"}
    last = None
    for batch in BATCHES:
        arguments = trainer_arguments(given | {"per_device_train_batch_size": batch}, "factors", True, [])
        vars(arguments)["bf16"] = True  # what a run on a GPU takes, and a CPU's arguments refuse
        try:
            step = predict_memory(folder, options, arguments, accelerator=True)
        except (LordError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            return Leg("train", "gpu", None, 0, None, f"not foreseen: {first_line(error)}")
        last = step
        if step.peak + CONTEXT_BYTES <= memory:
            break
    assert last is not None, "there are batches"
    disk = last.adapters + 3 * (last.adapters + (last.optimizer or 0))
    told = f"{batch} {'sequence' if batch == 1 else 'sequences'} at once, {last.tokens:,} tokens"
    return Leg("train", "gpu", last.peak, disk, _fits(last.peak, memory, disk), told)


def _exports(folder: str, held: int) -> list[Leg]:
    from .training.forecast import factored_skeleton

    available, legs = psutil.virtual_memory().total, []
    for form, export in EXPORTS.items():
        model = factored_skeleton(folder)
        try:
            export.check(model)
        except UsageError as error:
            legs.append(Leg(f"export {form}", "cpu", None, 0, None, f"no: {first_line(error).partition(';')[0]}"))
            continue
        element = model.dtype.itemsize
        stored = int(sizes(model)["model_bytes"])
        written = {
            "dense": dense_bytes(model, element),
            "factored": stored,
            "peft": apart_bytes(model, element, 4),
            "gguf": _gguf_bytes(model),
        }.get(form, apart_bytes(model, element, element))
        own = foreseen_bytes(model, form, adapted=True)
        memory = held + max(own, _engine_bytes(form, model, written, held))
        fits = memory <= available and written <= _free_disk()
        legs.append(Leg(f"export {form}", "cpu", memory, written, fits, _WRITES.get(form, "")))
    return legs


def _engine_bytes(form: str, model: PreTrainedModel, written: int, held: int) -> int:
    """Of the process of its own that loads what was written; `export` holds next to nothing by then."""
    if form in ("dense", "factored"):
        return 0  # read here, block by block
    if form == "gguf":
        return written  # mapped by llama.cpp, where it is installed
    decoded = dense_bytes(model, model.dtype.itemsize) if form == "compressed-tensors" else 0
    return held + 2 * written + decoded


def _gguf_bytes(model: PreTrainedModel) -> int:
    """Of base and adapter; layers whose Q has no type there are multiplied out into 16 bits."""
    backbones = {layer.plan.backbone for layer in factored_layers(model).values()}
    typed = all(name in QUANTIZERS and issubclass(QUANTIZERS[name], Block) for name in backbones)
    return apart_bytes(model, model.dtype.itemsize, 2) if typed else dense_bytes(model, 2)


def show_journey(legs: list[Leg], config: PlanConfig, decided: bool) -> None:
    """The verdicts. decided: whether the ranks are known."""
    words = {True: "fits", False: "does not fit", None: "-"}
    rows = [
        [
            leg.step,
            words[leg.fits],
            "-" if leg.memory is None else human_bytes(leg.memory),
            leg.device.upper(),
            human_bytes(leg.disk) if leg.disk else "-",
            leg.told,
        ]
        for leg in legs
    ]
    columns = ["step", "verdict", "memory", "on", "disk", "with"]
    show_table(f"the whole way, on a GPU of {human_bytes(config.gpu_bytes() or 0)}", columns, rows)
    say(
        f"A GPU needs {human_bytes(CONTEXT_BYTES)} more for its context, which the verdict counts. Exports run on the "
        f"CPU: this machine has {human_bytes(psutil.virtual_memory().total)} of memory and "
        f"{human_bytes(_free_disk())} of free disk. Training is that of the defaults, 8 sequences at once or fewer."
    )
    if not decided:
        say("The calibration decides the ranks; training and exports are foreseen for every layer alike, same size.")


def _verdict(legs: list[Leg]) -> bool | None:
    """Of the whole way; None where nothing is known to be too large, and the memory of training is not foreseen."""
    if any(leg.fits is False for leg in legs):
        return False
    return None if any(leg.step == "train" and leg.fits is None for leg in legs) else True


def described(legs: list[Leg], config: PlanConfig) -> dict[str, Any]:
    """The keys of `--json`."""
    return {
        "gpu_bytes": config.gpu_bytes(),
        "gpu_context_bytes": CONTEXT_BYTES,
        "memory_bytes": psutil.virtual_memory().total,
        "free_disk_bytes": _free_disk(),
        "fits": _verdict(legs),
        "steps": {leg.step: {key: value for key, value in asdict(leg).items() if key != "step"} for leg in legs},
    }
