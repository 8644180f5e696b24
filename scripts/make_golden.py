"""Golden records of about thirty small runs on each of three families: what they write must not change unnoticed.

    python scripts/make_golden.py --check [--only NAME ...]        compare with tests/golden.json
    python scripts/make_golden.py --against REV [--only NAME ...]  compare with the code of a git revision
    python scripts/make_golden.py --write                          record tests/golden.json anew

NAME is a run (llama/svd), or a part of that path (llama, svd). Exit status 1 if something differs.

The structure of a run (names, shapes and dtypes of tensors, manifests with their ranks, keys of reports) is the same on
every machine and is always compared. Bytes depend on the processor and on the libraries: --check compares them only
where the fingerprint in golden.json is that of this machine. --against runs both versions here, so it compares bytes on
any machine, and says by how much they differ. Structure holds the outcome of comparing numbers too (the ranks that
loss_weighted chooses), so a machine that rounds otherwise could choose another rank where two are as good.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden.json"
FAMILIES = ("llama", "gpt2", "bert")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "datasets", "numpy")
# What legitimately differs between two runs of the same command
VARYING = re.compile(r"versions|(.*_)?(seconds|runtime|memory)|.*(peak|rss).*|held_bytes|scratch_bytes|phases")
LIBRARY_FILES = ("config.json", "adapter_config.json")  # their keys are those of the libraries' versions
ROOT_WORD = "<root>"  # stands for the folder of the runs

Record = dict[str, Any]

_TEXT = {"calibration_tokens": 512, "context_length": 64}
_WEIGHTED = _TEXT | {"kept_fraction": 0.8, "allocation": "loss_weighted", "sensitivity_tokens": 128}
_PLAIN = {"form": "plain"}
_UNIFORM = {"kept_fraction": 0.8, "allocation": "uniform"}
# The slow ones run on some layers only, of each shape: out = in, out > in, out < in
_SOME = {"targets": r".*(q_proj|down_proj|up_proj|c_attn|mlp\.c_proj|query|intermediate\.dense|output\.dense)"}
_FEEDBACK = _TEXT | _SOME | {"method": "caldera"}
_CALDERA = _FEEDBACK | {"iterations": 1}

DECOMPOSE: dict[str, dict[str, Any]] = {
    "svd": _PLAIN | {"method": "svd", "rank": 8},
    "svd-uniform-bf16": _PLAIN | _UNIFORM | {"method": "svd", "factor_format": "bf16"},
    "svd-bfloat16-model": {"method": "svd", "rank": 8, "dtype": "bfloat16", "backbone": "int4"},
    "whitened-rank": _PLAIN | _TEXT | {"rank": 12},
    "whitened-uniform-sequential": _PLAIN | _TEXT | _UNIFORM | {"propagate": "sequential"},
    "whitened-loss-weighted": _PLAIN | _WEIGHTED,
    "whitened-shrinkage-auto": _PLAIN | _TEXT | {"rank": 8, "shrinkage": "auto", "factor_format": "nf4"},
    "whitened-recovered": _TEXT | {"rank": 8, "backbone": "nf4", "double_quant": True, "recover_epochs": 1},
    "whitened-bits": _TEXT | {"bits_per_weight": 9.0, "factor_format": "bf16"},
    "afm-loss-weighted": _PLAIN | _WEIGHTED | {"method": "afm", "centred": False},
    "afm-centred-e8": _PLAIN | _TEXT | {"method": "afm", "rank": 12, "factor_format": "e8-3"},
    "loftq-nf4-bf16": {"method": "loftq", "rank": 8, "backbone": "nf4", "double_quant": True, "factor_format": "bf16"},
    "int4": _TEXT | {"rank": 8, "backbone": "int4", "factor_format": "int3", "top_rank": 3, "top_format": "int8"},
    "int4-symmetric": {"method": "svd", "rank": 8, "backbone": "int4", "symmetric": True, "group_size": 24},
    "lloyd3-top": _TEXT | {"rank": 8, "backbone": "lloyd3", "factor_format": "lloyd4", "top_rank": 2},
    "spqr": _TEXT | _SOME | {"rank": 4, "backbone": "spqr", "outliers": 0.02, "factor_format": "spqr"},
    "e8-3-sequential": _TEXT | {"rank": 4, "backbone": "e8-3", "propagate": "sequential"},
    "nf4-incoherent": {"method": "svd", "rank": 8, "backbone": "nf4", "incoherence": True, "seed": 3},
    "caldera-e8-2": _CALDERA | {"rank": 8, "backbone": "e8-2", "iterations": 2},
    "caldera-packed-factors": _CALDERA
    | {"rank": 8, "backbone": "e8-2", "factor_format": "lloyd4", "top_rank": 2, "downdate": "on", "order": "lr"},
    "caldera-fisher": _CALDERA | {"rank": 8, "backbone": "lloyd2", "weighting": "fisher", "sensitivity_tokens": 128},
    "caldera-bits": _CALDERA | {"bits_per_weight": 4.0, "backbone": "e8-2", "order": "q", "downdate": "off"},
    "caldera-feedback-alone": _FEEDBACK | {"rank": 0, "backbone": "e8-2"},
    "two-sided-loss-weighted": _WEIGHTED | {"method": "two_sided"},
    "pivoted-nf4": _TEXT | _UNIFORM | {"factor_format": "nf4"},
    "mixed": _WEIGHTED | {"kept_fraction": 0.2, "allocation": "mixed", "mix": ["int2", "nf4", "int8"]},
}
# name -> the run that it continues, options
TRAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "train-factors": ("int4-symmetric", {}),
    "train-split": ("lloyd3-top", {"mode": "split"}),
    "train-lora": ("loftq-nf4-bf16", {"mode": "lora", "lora_r": 4}),
    "train-scales": ("whitened-rank", {"mode": "scales", "scales_on": "components_and_outputs"}),
}
EXPORT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "export-dense": ("train-factors", "dense", {}),
    "export-dense-bf16": ("train-split", "dense", {"dtype": "bfloat16"}),
    "export-factored": ("train-lora", "factored", {}),
}
PLAN: dict[str, dict[str, Any]] = {
    "plan-bits": {"bits_per_weight": 9.0, "factor_format": "bf16"},
    "plan-rank": {"rank": 8, "backbone": "nf4", "double_quant": True},
}
KINDS = (*DECOMPOSE, *TRAIN, *EXPORT, *PLAN)
RUNS = tuple(f"{family}/{kind}" for family in FAMILIES for kind in KINDS)


def continued(kind: str) -> str:
    """The decomposition at the start of a chain of runs."""
    while kind in TRAIN or kind in EXPORT:
        kind = TRAIN[kind][0] if kind in TRAIN else EXPORT[kind][0]
    return kind


# every second kind of run on one family, and the families in turn: for every test run
QUICK = tuple(f"{FAMILIES[KINDS.index(continued(kind)) % len(FAMILIES)]}/{kind}" for kind in KINDS[::2])


class Workbench:
    """Runs in one folder, each made once; its records do not depend on where the folder is."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made: set[Path] = set()
        self._failed: dict[str, Exception] = {}

    def record(self, run: str) -> Record:
        """The structure and the bytes of what a run wrote."""
        folder = self._run_once(run)
        files = sorted(folder.glob("*.safetensors"))
        base = _header(self._base(run.split("/")[0]) / "model.safetensors")
        tensors = {name: text for path in files for name, text in _header(path).items()}
        reports = self.reports(folder)
        structure: Record = {
            "shards": {path.name: len(_header(path)) for path in files},
            "tensors": _by_module(dict(tensors.items() - base.items())),
            "tensors as in the base": len(tensors.items() & base.items()),
            "keys": {name: key_sets(report) for name, report in reports.items() if name not in LIBRARY_FILES},
        }
        content: Record = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        for name, report in reports.items():
            parts = name == "decomposition.json"  # says which part of the largest report differs
            content[name] = {key: digest(value) for key, value in report.items()} if parts else digest(report)
        manifest = reports.get("config.json", {}).get("quantization_config")
        if manifest is not None:
            structure["manifest"] = {key: value for key, value in manifest.items() if key != "layers"}
            plans = manifest["layers"].values()
            first = next(iter(plans))
            shared = {k: v for k, v in first.items() if all(plan.get(k, ...) == v for plan in plans)}
            structure["manifest"]["all layers"] = shared
            own = {n: {k: v for k, v in p.items() if k not in shared} for n, p in manifest["layers"].items()}
            structure["layers"] = _by_block({name: canonical(plan) for name, plan in own.items()})
        if "estimate.json" in reports:
            structure["plan"] = reports["estimate.json"] | {"ranks": _by_block(reports["estimate.json"]["ranks"] or {})}
        return {"structure": structure, "bytes": content}

    def reports(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The JSON files that lord_tune writes into a run's folder, without what legitimately varies."""
        names = ("config.json", "decomposition.json", "train_results.json", "adapter_config.json", "export.json")
        found = [path for name in (*names, "estimate.json") if (path := folder / name).is_file()]
        return {path.name: steady(json.loads(path.read_text().replace(str(self.folder), ROOT_WORD))) for path in found}

    def _run_once(self, run: str) -> Path:
        """The folder of a run, which is made if it is not there. A run that failed fails again, with the same error."""
        if run in self._failed:
            raise self._failed[run]
        try:
            return self._run(run)
        except Exception as error:
            self._failed[run] = error
            raise

    def _run(self, run: str) -> Path:
        import lord_tune

        family, kind = run.split("/")
        out = self.folder / family / kind
        if out in self._made:
            return out
        if kind in TRAIN or kind in EXPORT:
            source = str(self._run_once(f"{family}/{TRAIN[kind][0] if kind in TRAIN else EXPORT[kind][0]}"))
        else:
            source = str(self._base(family))
        text = str(self._text())
        with _quietly():
            if kind in DECOMPOSE:
                options = DECOMPOSE[kind] | ({"calibration": [text]} if "context_length" in DECOMPOSE[kind] else {})
                lord_tune.decompose(source, str(out), **options)
            elif kind in TRAIN:
                steps: dict[str, Any] = {"max_steps": 3, "max_length": 48, "per_device_train_batch_size": 2}
                steps |= {"logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none"}
                paths = {"model_name_or_path": source, "dataset_name": text, "output_dir": str(out)}
                lord_tune.train(**paths, **steps, **TRAIN[kind][1])
            elif kind in EXPORT:
                lord_tune.export(source, str(out), EXPORT[kind][1], **EXPORT[kind][2])
            else:
                lord_tune.plan(source, json=str(out / "estimate.json"), **PLAN[kind])
        self._made.add(out)
        return out

    def _base(self, family: str) -> Path:
        from tiny import save_tiny, tiny_family

        folder = self.folder / family / "base"
        if folder not in self._made:
            with _quietly():
                save_tiny(tiny_family(family), folder)
            self._made.add(folder)
        return folder

    def _text(self) -> Path:
        from tiny import write_code_rows

        path = self.folder / "rows.jsonl"
        return path if path.exists() else write_code_rows(path)


def records_of(bench: Workbench, runs: tuple[str, ...] | list[str], tell: bool = True) -> dict[str, Record]:
    """A run that fails has a record that says so, and the others go on."""
    records: dict[str, Record] = {}
    for run in runs:
        try:
            records[run] = bench.record(run)
        except Exception as error:
            records[run] = {"failed": f"{type(error).__name__}: {error}".replace(str(bench.folder), ROOT_WORD)}
        if tell and sys.stderr.isatty():
            print(f"\r{len(records)}/{len(runs)} {run:40}", end="", file=sys.stderr)
    if tell and sys.stderr.isatty():
        print(f"\r{'':60}\r", end="", file=sys.stderr)
    return records


# ---- what is recorded --------------------------------------------------------------------------------------------


def canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def digest(content: Any) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def steady(content: Any) -> Any:
    """A report without the keys that vary, at any depth."""
    if isinstance(content, dict):
        return {key: steady(value) for key, value in content.items() if not VARYING.fullmatch(key)}
    return [steady(value) for value in content] if isinstance(content, list) else content


def key_sets(content: Any, path: str = "") -> list[str]:
    """A line per set of keys of a report; layers, and other entries named by the data, share a line."""
    lines: set[str] = set()
    if isinstance(content, dict):
        named = any("." in key or key.isdigit() for key in content)
        if content and not named:
            lines.add(f"{path or 'top'}: {', '.join(sorted(content))}")
        for key, value in content.items():
            if key != "history":  # trl's
                lines.update(key_sets(value, f"{path}.{'*' if named else key}".lstrip(".")))
    elif isinstance(content, list):
        for value in content:
            lines.update(key_sets(value, f"{path}[]"))
    return sorted(lines)


def _header(path: Path) -> dict[str, str]:
    """tensor -> dtype and shape, of a safetensors file."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: f"{e['dtype']} {'x'.join(map(str, e['shape'])) or 'scalar'}" for name, e in entries.items()}


def _by_module(tensors: dict[str, str]) -> dict[str, list[str]]:
    """module (blocks together) -> its tensors in each block; equal blocks once."""
    modules: dict[str, list[str]] = {}
    for name, text in sorted(tensors.items()):
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(f"{leaf} {text}")
    return _by_block({name: ", ".join(leaves) for name, leaves in modules.items()})


def _by_block(entries: dict[str, Any]) -> dict[str, list[Any]]:
    """Entries of layers whose names differ in numbers only, under one name with the numbers of entries; one value if
    all have the same."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in entries.items():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append((name, value))
    result = {}
    for pattern, members in groups.items():
        values = [value for _, value in sorted(members, key=lambda m: [int(n) for n in re.findall(r"\d+", m[0])])]
        same = all(value == values[0] for value in values)
        result[f"{pattern} ({len(values)})" if "*" in pattern else pattern] = values[:1] if same else values
    return result


@cache
def fingerprint() -> dict[str, Any]:
    """What the last bits of a result depend on, beside the code. `probe` is a sha256 of some results."""
    import torch

    return {
        **{name: version(name) for name in LIBRARIES},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "probe": _probe(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _probe() -> str:
    """Of the operations that the results rest on, on a fixed matrix of exact numbers."""
    import torch

    exact = ((torch.arange(96 * 96, dtype=torch.float64) * 7919 % 1009) - 504).reshape(96, 96) / 128
    single = exact.float()
    query = single.reshape(1, 4, 24, 96)
    generator = torch.Generator().manual_seed(0)
    results = [
        *torch.linalg.eigh(exact @ exact.T),
        *torch.linalg.svd(exact),
        *torch.linalg.svd(single),
        *torch.linalg.qr(exact),
        torch.linalg.cholesky(exact @ exact.T + 96 * torch.eye(96, dtype=torch.float64)),
        single @ single.T,
        single.bfloat16() @ single.bfloat16().T,
        single.softmax(-1),
        torch.nn.functional.gelu(single),
        torch.nn.functional.layer_norm(single, (96,)),
        torch.nn.functional.scaled_dot_product_attention(query, query, query),
        torch.randn(96, 96, generator=generator),
    ]
    return hashlib.sha256(b"".join(map(_tensor_bytes, results))).hexdigest()


# ---- comparing ---------------------------------------------------------------------------------------------------


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """A line for each place where two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            here = f"{path}: {key}" if path else key
            if key not in now:
                yield f"{here} is missing"
            elif key not in before:
                yield f"{here} is new"
            else:
                yield from differences(before[key], now[key], here)
    elif before != now:
        hashed = all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (before, now))
        if path.startswith("keys: ") and isinstance(before, list) and isinstance(now, list):  # the lines that differ
            before, now = [line for line in before if line not in now], [line for line in now if line not in before]
        yield f"{path} has other content" if hashed else f"{path}: got {now}, expected {before}"


def compare(
    before: dict[str, Record], now: dict[str, Record], parts: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    """(run, part, line) for each difference between the records of the same runs."""
    for run, record in now.items():
        if run not in before:
            yield run, "", "is not recorded; use --write"
        elif "failed" in record or "failed" in before[run]:
            if record != before[run]:
                failed = record.get("failed", "the run succeeds")
                yield run, "", f"got {failed}, expected {before[run].get('failed', 'the run to succeed')}"
        else:
            for part in parts:
                yield from ((run, part, line) for line in differences(before[run][part], record[part]))


def read_golden() -> dict[str, Any]:
    """The content of tests/golden.json."""
    golden = json.loads(GOLDEN.read_text())
    for record in golden["runs"].values():
        record["structure"]["keys"] = {k: golden["key_sets"][v] for k, v in record["structure"]["keys"].items()}
    return golden


def write_golden(records: dict[str, Record]) -> None:
    sets: dict[str, list[str]] = {}
    for record in records.values():
        keys = record["structure"]["keys"]  # the same in most runs, so stored once
        for name, lines in keys.items():
            short = digest(lines)[:16]
            sets[short] = lines
            keys[name] = short
    golden = {"fingerprint": fingerprint(), "key_sets": sets, "runs": records}
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


def explain(before: Workbench, now: Workbench, run: str, file: str) -> Iterator[str]:
    """Which tensors of a file, or which values of a report, differ, and by how much."""
    from safetensors.torch import load_file

    paths = [bench.folder / run / file for bench in (before, now)]
    if file.endswith(".safetensors"):
        old, new = (load_file(path) if path.exists() else {} for path in paths)
        for name in sorted(old.keys() ^ new.keys()):
            yield f"{name} is {'missing' if name in old else 'new'}"
        for name in sorted(old.keys() & new.keys()):
            a, b = old[name], new[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                yield f"{name}: {b.dtype} {tuple(b.shape)}, was {a.dtype} {tuple(a.shape)}"
            elif _tensor_bytes(a) != _tensor_bytes(b):
                changed = int((a != b).sum())
                size = float((a.double() - b.double()).abs().max())
                yield f"{name}: {changed} of {a.numel()} numbers differ, by at most {size:.3g}"
    else:
        old, new = (bench.reports(bench.folder / run).get(file, {}) for bench in (before, now))
        yield from differences(old, new)


def _tensor_bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


# ---- the command -------------------------------------------------------------------------------------------------


def check(runs: list[str]) -> int:
    golden = read_golden()
    unlike = {key for key, value in fingerprint().items() if golden["fingerprint"].get(key) != value}
    with _scratch() as folder:
        found = list(
            compare(
                golden["runs"],
                records_of(Workbench(folder), runs),
                ("structure",) if unlike else ("structure", "bytes"),
            )
        )
    for run, _, line in found:
        print(f"{run}: {line}")
    if unlike:
        print(f"Bytes were not compared: golden.json is of another {', '.join(sorted(unlike))}. Use --against REV.")
    gone = {run for run in golden["runs"] if run not in RUNS}
    for run in sorted(gone):
        print(f"{run}: is recorded and is no run any more; use --write")
    return _conclude(runs, {run for run, _, _ in found} | gone)


def against(revision: str, runs: list[str]) -> int:
    """Compare with the code of a revision, in this checkout's runs: tests/tiny.py and the options are ours."""
    with _scratch() as folder:
        tree = folder / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            before, old = _in_process(tree, folder / "before", runs)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        now, new = _in_process(ROOT, folder / "now", runs)
        found = list(compare(old, new, ("structure", "bytes")))
        explained: set[tuple[str, str]] = set()
        for run, part, line in found:
            print(f"{run}: {line}")
            file = re.match(r"(\S+?\.(?:json|safetensors))(?=: | has other content)", line)
            if part == "bytes" and file and (run, file[1]) not in explained:
                explained.add((run, file[1]))
                for detail in explain(before, now, run, file[1]):
                    print(f"    {detail}")
        return _conclude(runs, {run for run, _, _ in found})


def _in_process(tree: Path, folder: Path, runs: list[str]) -> tuple[Workbench, dict[str, Record]]:
    """The runs by the code of another tree, in a process of its own."""
    words = [sys.executable, __file__, "--tree", str(tree), "--into", str(folder), "--only", *runs]
    subprocess.run(words, check=True, env=os.environ | {"PYTHONPATH": str(tree)})
    return Workbench(folder), json.loads((folder / "records.json").read_text())


def _conclude(runs: list[str], wrong: set[str]) -> int:
    print(f"{len(wrong)} of {len(runs)} runs differ." if wrong else f"{len(runs)} runs are the same.")
    return 1 if wrong else 0


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="golden-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the verbs' tables and warnings. Log handlers keep the streams they first see, so these stay open."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _chosen(names: list[str] | None) -> list[str]:
    """The runs that --only names."""
    if names is None:
        return list(RUNS)
    for name in names:
        if not any(_named(name, run) for run in RUNS):
            raise SystemExit(f"--only {name} names no run; use a family ({', '.join(FAMILIES)}) or a run as llama/svd.")
    return [run for run in RUNS if any(_named(name, run) for name in names)]


def _named(name: str, run: str) -> bool:
    return name == run or name in run.split("/")


def _use(tree: Path) -> None:
    """Import lord_tune from this tree, whatever is installed, and compute in one thread."""
    sys.path[:0] = [str(tree), str(ROOT / "tests")]
    import torch
    import transformers

    import lord_tune

    transformers.logging.set_verbosity_error()
    came = Path(lord_tune.__file__).resolve().parent.parent
    if came != tree.resolve():
        raise SystemExit(f"lord_tune came from {came}, expected it from {tree}.")
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--check", action="store_true", help="compare with tests/golden.json")
    verb.add_argument("--against", metavar="REV", help="compare with the code of a git revision")
    verb.add_argument("--write", action="store_true", help="record tests/golden.json anew")
    verb.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # leave the runs and records.json here
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs: llama/svd, or all of llama, or of svd")
    parser.add_argument("--tree", type=Path, default=ROOT, help=argparse.SUPPRESS)  # whose lord_tune runs
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("--write records all runs; remove --only")
    runs = _chosen(given.only)
    if given.against:
        return against(given.against, runs)
    _use(given.tree)
    if given.check:
        return check(runs)
    if given.into:
        records = records_of(Workbench(given.into), runs)
        (given.into / "records.json").write_text(json.dumps(records))
        return 0
    with _scratch() as folder:
        records = records_of(Workbench(folder), runs)
    failed = {run: record["failed"] for run, record in records.items() if "failed" in record}
    for run, why in failed.items():
        print(f"{run}: {why}")
    if failed:
        print("golden.json is unchanged: every run must succeed.")
        return 1
    write_golden(records)
    print(f"{len(records)} runs are recorded in {GOLDEN.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
