"""Every option does something: setting it changes what is written, or is an error.

`DECOMPOSE`, `PLAN`, `TRAIN`, `EVALUATE` and `EXPORT` name the case of every field; a field without a case fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import gguf
import pytest
import torch
from gguf_files import write_like
from safetensors.torch import load_file
from tiny import HIDDEN, INTERMEDIATE, LAYERS, gpt2_config, read_tensors, save_tiny, tiny_llama, write_code_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from trl import SFTConfig

import lord_tune
import lord_tune.exports.gguf
import lord_tune.merges
from lord_tune import commands, decomposing
from lord_tune.allocation import ALIGNMENT
from lord_tune.cli import main
from lord_tune.config import (
    FACTOR_FORMATS,
    FORMATS,
    ChatConfig,
    CorrectConfig,
    DecomposeConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    MethodConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
)
from lord_tune.data.texts import documents
from lord_tune.decomposition import Rates
from lord_tune.errors import ExportMismatch, LordError, LordWarning, UsageError
from lord_tune.factorizations import METHODS, pivoted_left
from lord_tune.factorizations.whitened import SHRINKAGES
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers
from lord_tune.plans import Plan
from lord_tune.quantizers import QUANTIZERS
from lord_tune.training import trainer_arguments

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
Q1 = "model.layers.1.self_attn.q_proj"
SHORT = {"context_length": 64, "calibration_tokens": 1024}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """What one `decompose` returned and wrote."""

    report: dict[str, Any]
    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.folder)

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())["quantization_config"]["layers"]

    @property
    def ranks(self) -> dict[str, int | str]:
        return {name: entry["rank"] for name, entry in self.report["layers"].items()}

    def mean(self, key: str) -> float:
        values = [entry[key] for entry in self.report["layers"].values() if entry["rank"] != "dense"]
        return sum(values) / len(values)

    def product(self, layer: str = Q) -> Tensor:
        """L R, which does not depend on how the two are balanced."""
        return self.tensors[f"{layer}.left.weight"].double() @ self.tensors[f"{layer}.right.weight"].double()


def _plain(options: dict[str, Any]) -> dict[str, str]:
    """The form that is the default beside a backbone, where it is not."""
    return {} if options.get("backbone", "none") != "none" or "bits_per_weight" in options else {"form": "plain"}


@dataclass
class Bench:
    """Runs each decomposition once per module; a case compares two of them."""

    model: Path
    other_model: Path
    rows: Path
    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def decompose(self, calibrated: bool = True, **options: Any) -> Run:
        """Whitened, rank 8 as L and R, short windows, unless `options` say otherwise."""
        sizes = {"kept_fraction", "bits_per_weight", "max_bytes", "average_rank", "full_rank"}
        budget = {} if sizes & set(options) else {"rank": 8}
        text = {"calibration": [str(self.rows)], **SHORT} if calibrated else {}
        options = _plain(options) | budget | text | options
        key = json.dumps(options, sort_keys=True)
        if key not in self.runs:
            out = self.folder / f"run{len(self.runs)}"
            model = options.pop("model", str(self.model))
            self.runs[key] = Run(lord_tune.decompose(model, str(out), **options), out)
        return self.runs[key]

    def plan(self, **options: Any) -> dict[str, Any]:
        """Whitened, rank 8 as L and R, on a machine of fixed speed, so that equal plans are equal."""
        sizes = {"kept_fraction", "rank", "average_rank", "bits_per_weight", "max_bytes", "full_rank", "sweep"}
        budget = {} if sizes & set(options) else {"rank": 8}
        short = {} if options.get("method") == "svd" else {"context_length": 64, "calibration_tokens": 4096}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rates, "measure", lambda *probe: Rates(1e10, 1e10, 1e10, 1e10))
            found = lord_tune.plan(
                options.pop("model", str(self.model)), **(_plain(options) | budget | short | options)
            )
        # the memory of this very process, which grows from test to test
        return {key: value for key, value in found.items() if key not in ("held_bytes", "peak_bytes")}

    def fresh(self, name: str) -> Path:
        """A folder that does not exist yet."""
        path = self.folder / f"{name}{len(list(self.folder.iterdir()))}"
        assert not path.exists()
        return path

    def train(self, **options: Any) -> tuple[dict[str, Any], Path]:
        """Two steps on short sequences of the whitened rank 8 checkpoint."""
        out = self.fresh("trained")
        fixed = {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2, "logging_steps": 1}
        # without warmup, whose first step has learning rate 0
        fixed |= {"save_strategy": "no", "learning_rate": 1e-2, "warmup_steps": 0, "disable_tqdm": True}
        own = {"model_name_or_path": str(self.decompose().folder), "dataset_name": str(self.rows)}
        return lord_tune.train(**(fixed | own | {"output_dir": str(out)} | options)), out

    def small(self, **options: Any) -> Run:
        """Four layers at Lloyd-Max's 2 bits, for what is slow or needs no more."""
        return self.decompose(**({"targets": "layers.1.self_attn", "backbone": "lloyd2"} | options))

    def adapter(self) -> Path:
        """The output of a factors training, shared by the export cases."""
        if "adapter" not in self.runs:
            self.runs["adapter"] = Run({}, self.train()[1])
        return self.runs["adapter"].folder


@pytest.fixture(scope="module")
def bench(llama_dir, gpt2_dir, rows_file, tmp_path_factory) -> Bench:
    return Bench(llama_dir, gpt2_dir, rows_file, tmp_path_factory.mktemp("options"))


Case = Callable[[Bench], None]


# ---- decompose -----------------------------------------------------------------------------------------------------


def case_model(b: Bench) -> None:
    run = b.decompose(model=str(b.other_model))
    assert run.report["base"]["name"] == str(b.other_model) and run.report["base"] != b.decompose().report["base"]
    assert "transformer.h.0.attn.c_attn" in run.manifest and run.manifest["transformer.h.0.attn.c_attn"]["conv1d"]


def case_out(b: Bench) -> None:
    out = b.folder / "deep" / "below" / "out"
    lord_tune.decompose(str(b.model), str(out), method="svd", rank=8)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "decomposition.json", "README.md"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def case_method(b: Bench) -> None:
    whitened, afm = b.decompose(), b.decompose(method="afm")
    svd, loftq = b.decompose(method="svd"), b.decompose(method="loftq", backbone="nf4")
    two_sided = b.decompose(method="two_sided")
    assert svd.mean("error_calibrated") > two_sided.mean("error_calibrated") > whitened.mean("error_calibrated")
    runs = (whitened, "whitened"), (afm, "afm"), (svd, "svd"), (loftq, "loftq"), (two_sided, "two_sided")
    for run, name in runs:
        assert {plan["method"] for plan in run.manifest.values()} == {name}
    assert whitened.mean("error_calibrated") < 0.9 * svd.mean("error_calibrated")
    # the plain SVD that is reported beside every method is computed in float32
    assert svd.mean("error_calibrated") == pytest.approx(svd.mean("error_plain"), rel=1e-4)
    assert f"{Q}.bias" in afm.tensors and f"{Q}.bias" not in whitened.tensors


def case_backbone(b: Bench) -> None:
    alone, beside = b.decompose(), b.decompose(backbone="nf4")
    assert f"{Q}.backbone.weight" not in alone.tensors
    assert beside.tensors[f"{Q}.backbone.weight"].dtype == torch.uint8
    assert beside.manifest[Q]["backbone"] == "nf4" and alone.manifest[Q]["backbone"] == "none"
    assert beside.report["layers"][Q]["error_calibrated"] < beside.report["layers"][Q]["error_backbone"]


def case_factor_format(b: Bench) -> None:
    for name, dtype in DTYPES.items():
        run = b.decompose(factor_format=name)
        assert run.manifest[Q]["left_format"] == run.manifest[Q]["right_format"] == name
        assert run.tensors[f"{Q}.left.weight"].dtype == run.tensors[f"{Q}.right.weight"].dtype == dtype
    packed = b.decompose(factor_format="nf4")
    assert packed.manifest[Q]["left_format"] == "nf4" and packed.tensors[f"{Q}.left.weight"].dtype == torch.uint8
    bits = [b.decompose(factor_format=form).report["totals"]["linear_bits_per_weight"] for form in ("fp32", "fp16")]
    assert bits[1] == bits[0] / 2


def case_form(b: Bench) -> None:
    plain, pivoted = b.decompose(form="plain"), b.decompose(form="pivoted")
    assert pivoted.manifest == b.decompose(form=None).manifest and plain.manifest[Q]["form"] == "plain"
    assert b.decompose(backbone="nf4").manifest[Q]["form"] == "plain"
    assert pivoted.manifest[Q]["form"] == pivoted.report["layers"][Q]["form"] == "pivoted"
    shapes = {name: tuple(pivoted.tensors[f"{Q}.{name}"].shape) for name in ("left.rest.weight", "left.rows")}
    assert shapes == {"left.rest.weight": (56, 8), "left.rows": (8,)}
    rest, rows = pivoted.tensors[f"{Q}.left.rest.weight"], pivoted.tensors[f"{Q}.left.rows"]
    product = pivoted_left(rest.double(), rows) @ pivoted.tensors[f"{Q}.right.weight"].double()
    torch.testing.assert_close(product, plain.product(), rtol=0, atol=1e-6)


def case_top_rank(b: Bench) -> None:
    factors = {"factor_format": "lloyd2", "top_format": "fp16"}
    without, apart = b.small(factor_format="lloyd2"), b.small(**factors, top_rank=2)
    assert without.manifest[Q1]["top_rank"] == 0 and f"{Q1}.top_left.weight" not in without.tensors
    assert apart.manifest[Q1]["top_rank"] == 2 and apart.manifest[Q1]["rank"] == 8
    assert apart.tensors[f"{Q1}.top_left.weight"].shape == (64, 2)
    assert apart.tensors[f"{Q1}.top_right.weight"].shape == (2, 64)
    assert apart.mean("error_calibrated") < without.mean("error_calibrated")
    assert apart.mean("bits_per_weight") > without.mean("bits_per_weight")


def case_top_format(b: Bench) -> None:
    for name, dtype in (DTYPES | {"int8": torch.uint8}).items():
        run = b.small(factor_format="lloyd2", top_rank=2, top_format=name)
        assert run.manifest[Q1]["top_format"] == name and run.manifest[Q1]["left_format"] == "lloyd2"
        assert run.tensors[f"{Q1}.top_right.weight"].dtype == dtype
    assert run.manifest[Q1]["top_options"] == {"group_size": 64}
    default = b.small(factor_format="lloyd2", top_rank=2)
    assert default.manifest[Q1]["top_format"] == "fp16"


def case_rank(b: Bench) -> None:
    for rank in (4, 12):
        run = b.decompose(rank=rank)
        assert run.tensors[f"{Q}.left.weight"].shape == (64, rank)
        assert run.tensors[f"{Q}.right.weight"].shape == (rank, 64)
        assert set(run.ranks.values()) == {rank}
    assert b.decompose(rank=12).mean("error_calibrated") < b.decompose(rank=4).mean("error_calibrated")
    plain = b.decompose(rank=0, backbone="nf4")
    assert plain.report["layers"][Q]["error_calibrated"] == pytest.approx(plain.report["layers"][Q]["error_backbone"])


def case_full_rank(b: Bench) -> None:
    """Every singular value of every layer; pivoted, that is about as many numbers as before."""
    run = b.decompose(calibrated=False, method="svd", full_rank=True, form="pivoted")
    assert {name: min(plan["shape"]) for name, plan in run.manifest.items()} == run.ranks
    assert 1 < run.report["totals"]["kept_fraction"] < 1.02
    model, original = (load_dense_or_factored(str(folder)) for folder in (run.folder, b.model))
    # in float32 the product of C and B is off by a few of its last bits
    assert torch.allclose(factored_layers(model)[Q].dense_weight(), original.get_submodule(Q).weight, atol=1e-5)
    with pytest.raises(UsageError, match="`rank` and `full_rank`"):
        b.decompose(rank=4, full_rank=True)


def case_kept_fraction(b: Bench) -> None:
    totals = {kept: b.decompose(kept_fraction=kept).report["totals"] for kept in (0.9, 0.6)}
    for kept, total in totals.items():
        # a step of the aligned rank costs at most 8 (64 + 160) of the 70,000 to 122,880 numbers
        assert kept - 0.03 < total["kept_fraction"] <= kept
    assert totals[0.6]["parameters"] < totals[0.9]["parameters"] < totals[0.9]["parameters_before"]


def case_bits_per_weight(b: Bench) -> None:
    """The budget is kept by every layer, and one more step of the rank would break it."""
    for bits in (5.0, 8.0):
        run = b.small(bits_per_weight=bits)
        for name, entry in run.report["layers"].items():
            step = ALIGNMENT * sum(entry["shape"]) * 32 / (entry["shape"][0] * entry["shape"][1])  # of float32 factors
            assert entry["bits_per_weight"] <= bits < entry["bits_per_weight"] + step
            assert run.manifest[name]["rank"] == entry["rank"] and entry["rank"] % ALIGNMENT == 0
    # 4 bits of rank 8 at 64 x 64, and 6 at 32 x 64, which alone would leave no place for lloyd4 (4.25 and rotations)
    chosen = b.small(bits_per_weight=9.0, backbone="none", factor_format="fp16")
    assert chosen.manifest[Q1]["backbone"] == "lloyd4" and chosen.manifest[Q1]["backbone_options"]["incoherence"]
    spent = [(e["bits_per_weight"], e["shape"][0] * e["shape"][1]) for e in chosen.report["layers"].values()]
    assert sum(bits * count for bits, count in spent) <= 9.0 * sum(count for _, count in spent)


def case_allocation(b: Bench) -> None:
    uniform = b.decompose(kept_fraction=0.8, allocation="uniform")
    expected = int(0.8 * 64 * INTERMEDIATE / (64 + INTERMEDIATE)) // ALIGNMENT * ALIGNMENT
    assert {rank for name, rank in uniform.ranks.items() if "mlp" in name} == {expected}
    assert len({rank for name, rank in b.decompose(kept_fraction=0.8).ranks.items() if "mlp" in name}) > 1


def case_max_bytes(b: Bench) -> None:
    for size, limit in (("600kB", 600_000), (450_000, 450_000)):
        assert 0.9 * limit < b.decompose(max_bytes=size).report["totals"]["model_bytes"] <= limit


MIXED = {"targets": "layers.1.self_attn", "bits_per_weight": 5, "allocation": "mixed", "mix": ["int2", "int8"]}


def case_mix(b: Bench) -> None:
    backbones = {plan["backbone"] for plan in b.decompose(**MIXED).manifest.values()}
    assert backbones <= {"none", "int2", "int8"}
    other = {plan["backbone"] for plan in b.decompose(**MIXED | {"mix": ["int4", "nf4"]}).manifest.values()}
    assert other <= {"none", "int4", "nf4"} and other != backbones


def case_refine(b: Bench) -> None:
    report = b.decompose(kept_fraction=0.6, refine=2).report
    assert "heldout_losses" not in b.decompose(kept_fraction=0.6).report
    assert report["heldout_losses"][report["refined"]] == min(report["heldout_losses"].values())


def case_measure_control(b: Bench) -> None:
    without, measured = b.decompose(**MIXED), b.decompose(**MIXED, measure_control=True)
    assert without.report["control"] == measured.report["control"] and "heldout_losses" not in without.report
    assert measured.report["heldout_losses"].keys() == {"solution", "control", "dense"}


def case_calibration(b: Bench) -> None:
    prose = b.folder / "prose.txt"
    prose.write_text("The lighthouse keeper climbed the stairs, counting the steps aloud. " * 60)
    one, other = b.decompose(), b.decompose(calibration=[str(prose)])
    both = b.decompose(calibration=[str(b.rows), str(prose)])
    assert len({run.report["calibration"]["sha256"] for run in (one, other, both)}) == 3
    assert both.report["calibration"]["source"] == [str(b.rows), str(prose)]
    assert not torch.allclose(one.product(), other.product())
    assert b.decompose(calibrated=False, method="svd").report["calibration"]["sha256"] is None


def case_calibration_tokens(b: Bench) -> None:
    few, many = b.decompose(), b.decompose(calibration_tokens=2048)
    assert few.report["calibration"]["tokens"] == 1024 and many.report["calibration"]["tokens"] == 2048
    assert 0 < few.report["calibration"]["heldout_tokens"] < many.report["calibration"]["heldout_tokens"]
    assert not torch.allclose(few.product(), many.product())


def case_context_length(b: Bench) -> None:
    long, short = b.decompose(), b.decompose(context_length=32)
    assert long.report["calibration"]["context_length"] == 64 and short.report["calibration"]["context_length"] == 32
    assert not torch.allclose(long.product(), short.product())


def prompts(b: Bench) -> tuple[Path, Path]:
    """A model with a chat template, and rows of prompts."""
    model, rows = b.folder / "templated", b.folder / "prompts.jsonl"
    if not model.exists():
        save_tiny(tiny_llama(layers=1), model)
        turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": turns}))
        pairs = [{"prompt": f"Count to {n}, please.", "completion": " ".join(map(str, range(n)))} for n in range(9, 60)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return model, rows


def case_plain_prompts(b: Bench) -> None:
    model, rows = prompts(b)
    given: dict[str, Any] = {"model": str(model), "calibration": [str(rows)]}
    chats, plain = b.decompose(**given), b.decompose(plain_prompts=True, **given)
    assert chats.report["calibration"]["sha256"] != plain.report["calibration"]["sha256"]
    assert not torch.allclose(chats.product(), plain.product())
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        b.decompose(plain_prompts=True)
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        b.decompose(plain_prompts=True, calibrated=False, method="svd")


def case_sensitivity_tokens(b: Bench) -> None:
    """One window or all sixteen: the estimated sensitivities differ by far more than a rank step is worth."""
    one = b.decompose(kept_fraction=0.8, sensitivity_tokens=64)
    assert one.ranks != b.decompose(kept_fraction=0.8, sensitivity_tokens=1024).ranks
    assert b.decompose(kept_fraction=0.8).ranks == b.decompose(kept_fraction=0.8, sensitivity_tokens=1024).ranks


def case_sink_weight(b: Bench) -> None:
    none, default, heavy = b.decompose(sink_weight=0.0), b.decompose(), b.decompose(sink_weight=50.0)
    # without it the calibrated error is the optimum, and more weight on position 0 moves away from it
    assert none.mean("error_calibrated") <= default.mean("error_calibrated") < heavy.mean("error_calibrated")
    assert not torch.allclose(none.product(), default.product())


def case_centred(b: Bench) -> None:
    centred, plain = b.decompose(method="afm"), b.decompose(method="afm", centred=False)
    assert centred.manifest[Q]["bias"] and not plain.manifest[Q]["bias"]
    assert torch.allclose(plain.product(), b.decompose(sink_weight=0.0).product(), atol=1e-5)  # the uncentred optimum


def case_covariance_groups(b: Bench) -> None:
    """tests/test_bolaco.py compares it with the averaged covariances."""
    one, many = (b.decompose(method="afm", covariance_groups=groups) for groups in (1, 8))
    assert torch.equal(one.product(), b.decompose(method="afm").product())
    assert not torch.allclose(one.product(), many.product())


BOLACO = {"kept_fraction": 0.8, "allocation": "bolaco", "probes": 2, "trials": 2, "validation_tokens": 128}


def case_trials(b: Bench) -> None:
    assert [len(b.decompose(**BOLACO | {"trials": n}).report["search"]["trials"]) for n in (2, 3)] == [2, 3]


def case_probes(b: Bench) -> None:
    """They choose the windows, and what the process knows."""
    few, more = (b.decompose(**BOLACO | {"trials": 3, "probes": n}).report["search"]["trials"] for n in (2, 5))
    assert few[0]["point"] == more[0]["point"] and few[2]["point"] != more[2]["point"]


def case_validation_tokens(b: Bench) -> None:
    few, more = (b.decompose(**BOLACO | {"validation_tokens": n}).report for n in (128, 256))
    assert [len(report["search"]["windows"]) for report in (few, more)] == [2, 4]
    assert [report["calibration"]["validation_tokens"] for report in (few, more)] == [256, 512]


def case_kl_weight(b: Bench) -> None:
    for weight in (0.0, 4.0):
        for trial in b.decompose(**BOLACO | {"kl_weight": weight}).report["search"]["trials"]:
            assert trial["objective"] == pytest.approx(trial["perplexity"] + weight * trial["kl"])


def case_searched(b: Bench) -> None:
    run = b.decompose(**BOLACO, searched="gate+up,down")
    assert {name.rpartition(".")[2] for name in run.manifest} <= {"gate_proj", "up_proj", "down_proj"}
    assert set(run.report["search"]["trials"][0]["point"]) == {"gate+up", "down"}


def case_iterations(b: Bench) -> None:
    dense = load_file(b.model / "model.safetensors")[f"{Q}.weight"].double()
    errors = []
    for iterations in (1, 5):
        run = b.decompose(calibrated=False, method="loftq", backbone="nf4", iterations=iterations)
        model = lord_tune.load(str(run.folder))[0]
        errors.append(float((model.get_submodule(Q).dense_weight(torch.float64) - dense).norm()))
    assert errors[1] < errors[0]
    default = b.decompose(calibrated=False, method="loftq", backbone="nf4")  # 5
    assert torch.equal(default.tensors[f"{Q}.left.weight"], run.tensors[f"{Q}.left.weight"])
    caldera = {count: b.small(method="caldera", iterations=count) for count in (1, 6)}
    assert caldera[6].mean("error_calibrated") < caldera[1].mean("error_calibrated")
    default = b.small(method="caldera")
    assert torch.equal(default.tensors[f"{Q1}.left.weight"], caldera[6].tensors[f"{Q1}.left.weight"])


def case_downdate(b: Bench) -> None:
    runs = {mode: b.decompose(method="caldera", backbone="lloyd2", downdate=mode) for mode in ("on", "off", "auto")}
    errors = {mode: run.report["layers"][Q]["error_calibrated"] for mode, run in runs.items()}
    # float32 factors are rounded once more when they are stored
    assert errors["auto"] <= min(errors["on"], errors["off"]) * (1 + 1e-4) and errors["on"] != errors["off"]


def case_order(b: Bench) -> None:
    runs = {order: b.small(method="caldera", iterations=1, order=order) for order in ("q", "lr", "outliers", "auto")}
    errors = {order: run.report["layers"][Q1]["error_calibrated"] for order, run in runs.items()}
    assert errors["auto"] <= min(errors["q"], errors["lr"]) * (1 + 1e-4) and errors["q"] != errors["lr"]
    assert errors["outliers"] not in (errors["q"], errors["lr"])


def case_incoherence(b: Bench) -> None:
    """On by default for the formats without a scale per few weights, and stored as signs."""
    turned = b.decompose(calibrated=False, method="svd", backbone="int2", incoherence=True)
    plain = b.decompose(calibrated=False, method="svd", backbone="int2")
    assert (
        turned.manifest[Q]["backbone_options"]["incoherence"]
        and "incoherence" not in (plain.manifest[Q]["backbone_options"])
    )
    assert f"{Q}.backbone.in_signs" in turned.tensors and f"{Q}.backbone.in_signs" not in plain.tensors
    default = b.decompose(calibrated=False, method="svd", backbone="e8-2")
    assert default.manifest[Q]["backbone_options"] == {"incoherence": True, "seed": 0}
    # of L and R too
    for form, on in (("int3", False), ("lloyd2", True)):
        factors = {"calibrated": False, "method": "svd", "factor_format": form, "targets": "layers.1.self_attn"}
        default, turned = b.decompose(**factors), b.decompose(**factors, incoherence=not on)
        assert (f"{Q1}.left.in_signs" in default.tensors) == on == (f"{Q1}.right.out_signs" in default.tensors)
        assert (f"{Q1}.left.in_signs" in turned.tensors) != on


def case_group_size(b: Bench) -> None:
    for size in (16, 64):
        run = b.decompose(calibrated=False, method="svd", backbone="int4", group_size=size)
        assert run.tensors[f"{Q}.backbone.scales"].shape == (64, 64 // size)
        run = b.small(calibrated=False, method="svd", group_size=size)
        assert run.tensors[f"{Q1}.backbone.scales"].shape == (64, 64 // size)
        factors = b.small(calibrated=False, method="svd", backbone="none", factor_format="lloyd3", group_size=size)
        assert factors.tensors[f"{Q1}.right.scales"].shape == (8, 64 // size)
        assert factors.manifest[Q1]["factor_options"]["group_size"] == size
    default = b.small(calibrated=False, method="svd", backbone="int4")
    assert default.manifest[Q1]["backbone_options"]["group_size"] == 64
    assert b.small(calibrated=False, method="svd", backbone="spqr").manifest[Q1]["backbone_options"]["group_size"] == 16


def case_weighting(b: Bench) -> None:
    """Another norm gives another split, and the record of one is in the terms of the other: outputs."""
    plain, weighed = b.small(method="caldera"), b.small(method="caldera", weighting="fisher")
    assert not torch.equal(plain.tensors[f"{Q1}.backbone.weight"], weighed.tensors[f"{Q1}.backbone.weight"])
    assert plain.mean("error_calibrated") < weighed.mean("error_calibrated") < 1


def case_damping(b: Bench) -> None:
    """More of it comes closer to the best output error, which weighs all outputs alike."""
    found = [b.decompose(method="two_sided", damping=d).mean("error_calibrated") for d in (1e-3, 0.1, 1.0)]
    assert found[0] > found[1] > found[2] == pytest.approx(b.decompose().mean("error_calibrated"), rel=1e-9)
    assert b.decompose(method="two_sided").mean("error_calibrated") == found[1]


def case_spqr_bits(b: Bench) -> None:
    runs = {bits: b.small(calibrated=False, method="svd", backbone="spqr", spqr_bits=bits) for bits in (2, 3, 4)}
    found = [run.mean("bits_per_weight") for run in runs.values()]
    assert found[1] - found[0] == pytest.approx(1) and found[2] - found[1] == pytest.approx(1)
    assert {run.manifest[Q1]["backbone_options"]["bits"] for run in runs.values()} == set(runs)
    default = b.small(calibrated=False, method="svd", backbone="spqr")
    assert torch.equal(default.tensors[f"{Q1}.backbone.weight"], runs[3].tensors[f"{Q1}.backbone.weight"])


def case_outliers(b: Bench) -> None:
    """A 16-bit value for each; where, is part of the format."""
    runs = {share: b.small(calibrated=False, method="svd", backbone="spqr", outliers=share) for share in (0.0, 0.05)}
    for share, run in runs.items():
        assert run.manifest[Q1]["backbone_options"]["outlier_fraction"] == share
    more = runs[0.05].mean("bits_per_weight") - runs[0.0].mean("bits_per_weight")
    assert more > 0.05 * 16 * 0.99
    dense = load_file(b.model / "model.safetensors")[f"{Q1}.weight"]
    errors = []
    for run in runs.values():
        layer = lord_tune.load(str(run.folder))[0].get_submodule(Q1)
        errors.append(float((layer.backbone.dequantize() - dense).norm()))
    assert errors[1] < errors[0]


def case_symmetric(b: Bench) -> None:
    run = b.decompose(calibrated=False, method="svd", backbone="int4", symmetric=True)
    assert f"{Q}.backbone.minimum" not in run.tensors
    assert f"{Q}.backbone.minimum" in b.decompose(calibrated=False, method="svd", backbone="int4").tensors


def case_block_size(b: Bench) -> None:
    for size in (32, 128):
        run = b.decompose(calibrated=False, method="svd", backbone="nf4", block_size=size)
        assert run.manifest[Q]["backbone_options"]["block_size"] == size
        assert run.tensors[f"{Q}.backbone.absmax"].numel() == 64 * 64 // size
    factors = b.decompose(calibrated=False, method="svd", factor_format="nf4", block_size=32)
    assert factors.tensors[f"{Q}.left.absmax"].numel() == 64 * 8 // 32


def case_double_quant(b: Bench) -> None:
    plain, double = (
        b.decompose(calibrated=False, method="svd", backbone="nf4", double_quant=on) for on in (False, True)
    )
    assert double.tensors[f"{Q}.backbone.absmax"].dtype == torch.uint8
    assert plain.tensors[f"{Q}.backbone.absmax"].dtype == torch.float32
    assert double.report["layers"][Q]["bits_per_weight"] < plain.report["layers"][Q]["bits_per_weight"]


def case_targets(b: Bench) -> None:
    run = b.decompose(targets="q_proj$")
    assert list(run.manifest) == [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    assert run.report["skipped"][DOWN] == "not in targets" and f"{DOWN}.weight" in run.tensors


def case_exclude(b: Bench) -> None:
    run = b.decompose(exclude=r"layers\.2\.mlp\.down_proj")
    assert DOWN not in run.manifest and set(run.manifest) | {DOWN} == set(b.decompose().manifest)
    assert run.report["skipped"][DOWN] == "in exclude"


def case_seed(b: Bench) -> None:
    first, other = b.decompose(seed=1), b.decompose(seed=2)
    assert first.report["seed"] == 1 and not torch.allclose(first.product(), other.product())
    again = lord_tune.decompose(str(b.model), str(b.fresh("again")), rank=8, seed=1, calibration=[str(b.rows)], **SHORT)
    assert again["layers"][Q]["error_calibrated"] == first.report["layers"][Q]["error_calibrated"]


def case_dtype(b: Bench) -> None:
    run = b.decompose(dtype="bfloat16")
    assert {t.dtype for t in run.tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert run.manifest[Q]["left_format"] == "bf16"
    assert b.decompose().tensors["model.embed_tokens.weight"].dtype == torch.float32


def case_propagate(b: Bench) -> None:
    dense, sequential = b.decompose(), b.decompose(propagate="sequential")
    assert torch.equal(dense.product(), sequential.product())  # nothing in front of block 0 is decomposed
    assert not torch.allclose(dense.product(DOWN), sequential.product(DOWN))
    chosen = b.decompose(kept_fraction=0.8, propagate="sequential")  # the ranks are those of the dense walk
    assert chosen.ranks == b.decompose(kept_fraction=0.8).ranks
    assert not torch.allclose(chosen.product(DOWN), b.decompose(kept_fraction=0.8).product(DOWN))


def case_shrinkage(b: Bench) -> None:
    none, fixed, auto = b.decompose(), b.decompose(shrinkage=0.3), b.decompose(shrinkage="auto")
    assert not torch.allclose(none.product(), fixed.product())
    for run, allowed in ((none, {0.0}), (fixed, {0.3}), (auto, set(SHRINKAGES))):
        assert {entry["shrinkage"] for entry in run.report["layers"].values()} <= allowed
    # 1,024 tokens for up to 160 inputs are so few that not every layer is best off without
    assert len({entry["shrinkage"] for entry in auto.report["layers"].values()}) > 1
    for name, entry in auto.report["layers"].items():
        # 0 is among the candidates
        assert entry["error_heldout"] <= none.report["layers"][name]["error_heldout"]


def case_resume(b: Bench) -> None:
    def fail(*rest: Any) -> None:
        raise ZeroDivisionError

    out = b.fresh("resumed")
    command = {"rank": 8, "form": "plain", "calibration": [str(b.rows)], **SHORT}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(decomposing, "write_index", fail)
        lord_tune.decompose(str(b.model), str(out), **command)
    with pytest.raises(UsageError, match="`resume`"):
        lord_tune.decompose(str(b.model), str(out), **command)
    report = lord_tune.decompose(str(b.model), str(out), **command, resume=True)
    whole = b.decompose()
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in Run(report, out).tensors.items())
    again = lord_tune.decompose(str(b.model), str(out), **command, resume=True)
    assert again == json.loads(json.dumps(report))  # nothing is left to do


def case_overwrite(b: Bench) -> None:
    out = b.fresh("replaced")
    lord_tune.decompose(str(b.model), str(out), method="svd", rank=8)
    (out / "stale.txt").write_text("of the earlier run")
    with pytest.raises(UsageError, match="`overwrite`"):
        lord_tune.decompose(str(b.model), str(out), method="svd", rank=4)
    assert Run({}, out).manifest[Q]["rank"] == 8
    lord_tune.decompose(str(b.model), str(out), method="svd", rank=4, overwrite=True)
    assert Run({}, out).manifest[Q]["rank"] == 4 and not (out / "stale.txt").exists()


def case_dry_run(b: Bench) -> None:
    before, out = sorted(b.folder.iterdir()), b.fresh("dry")
    plan = lord_tune.decompose("model/that_is_not_there", str(out), method="svd", rank=8, dry_run=True)
    assert plan["rank"] == 8 and plan["backbone"] == "none"
    assert sorted(b.folder.iterdir()) == before


@contextlib.contextmanager
def uploads() -> Iterator[list[tuple[Any, ...]]]:
    """What would be uploaded where, with a Hub that takes everything (tests/test_hub.py has one that answers)."""
    seen: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "check_push", lambda repo: None)
        patch.setattr(commands, "push", lambda *given: seen.append(given))
        yield seen


def case_push_to_hub(b: Bench) -> None:
    out = b.fresh("pushed")
    with uploads() as seen:
        lord_tune.decompose(str(b.model), str(out), method="svd", rank=8, push_to_hub="me/it")
    assert seen == [(out, "me/it", False)] and (out / "config.json").is_file()


def case_private(b: Bench) -> None:
    out = b.fresh("pushed")
    with uploads() as seen:
        lord_tune.decompose(str(b.model), str(out), method="svd", rank=8, push_to_hub="me/it", private=True)
    assert seen == [(out, "me/it", True)]
    with pytest.raises(UsageError, match="`private` has no effect"):
        lord_tune.decompose(str(b.model), str(b.fresh("private")), method="svd", rank=8, private=True)


def recovered(b: Bench, **options: Any) -> dict[str, Any]:
    return b.decompose(recover_epochs=2, **options).report["recovery"]


def case_recover_epochs(b: Bench) -> None:
    """More passes come nearer to what the blocks did; tests/test_block_recovery.py looks closely."""
    assert b.decompose().report["recovery"] == {}
    one = b.decompose(recover_epochs=1).report["recovery"]
    assert recovered(b)["0"]["after"] < one["0"]["after"] < one["0"]["before"]


def case_recover_learning_rate(b: Bench) -> None:
    slow = recovered(b, recover_learning_rate=1e-5)["0"]
    assert recovered(b)["0"]["after"] < slow["after"] < slow["before"]
    with pytest.raises(UsageError, match="`recover_learning_rate` has no effect"):
        b.decompose(recover_learning_rate=1e-3)


def case_embeddings(b: Bench) -> None:
    """tests/test_embeddings.py looks closely."""
    dense, packed = b.decompose(), b.decompose(embeddings="int8")
    key = "model.embed_tokens"
    assert f"{key}.table.weight" in packed.tensors and f"{key}.table.weight" not in dense.tensors
    assert packed.ranks == dense.ranks
    sizes = [run.report["totals"]["bytes_by_part"]["embeddings"] for run in (dense, packed)]
    assert sizes[1] < 0.3 * sizes[0]


def case_average_rank(b: Bench) -> None:
    """The bytes of the rank, shared out."""
    same, shared = b.decompose(rank=16, backbone="int4"), b.decompose(average_rank=16, backbone="int4")
    sizes = [run.report["totals"]["model_bytes"] for run in (same, shared)]
    assert 0.98 * sizes[0] < sizes[1] <= sizes[0]
    assert len(set(shared.ranks.values())) > 1 == len(set(same.ranks.values()))


def case_rounding(b: Bench) -> None:
    for method in ("whitened", "two_sided", "afm"):
        fed, near = (b.small(method=method, backbone="int3", rounding=how, rank=0) for how in ("feedback", "nearest"))
        assert fed.mean("error_calibrated") < 0.9 * near.mean("error_calibrated")
        plain = b.small(calibrated=False, method="svd", backbone="int3", rank=0)
        assert torch.equal(near.tensors[f"{Q1}.backbone.weight"], plain.tensors[f"{Q1}.backbone.weight"])
    assert b.small(backbone="int3").mean("error_heldout") < b.small(backbone="int3", rounding="nearest").mean(
        "error_heldout"
    )


def case_plan_file(b: Bench) -> None:
    """tests/test_plan_files.py looks closely."""
    plan = b.folder / "decomposed.plan"
    b.plan(rank=4, method="svd", save=str(plan))
    report = lord_tune.decompose(str(b.model), str(b.folder / "planned"), plan=str(plan))
    assert {entry["rank"] for entry in report["layers"].values()} == {4}


DECOMPOSE: dict[str, Case] = {
    "model": case_model,
    "out": case_out,
    "method": case_method,
    "backbone": case_backbone,
    "factor_format": case_factor_format,
    "form": case_form,
    "top_rank": case_top_rank,
    "top_format": case_top_format,
    "rank": case_rank,
    "full_rank": case_full_rank,
    "kept_fraction": case_kept_fraction,
    "average_rank": case_average_rank,
    "embeddings": case_embeddings,
    "rounding": case_rounding,
    "bits_per_weight": case_bits_per_weight,
    "plan_file": case_plan_file,
    "allocation": case_allocation,
    "max_bytes": case_max_bytes,
    "mix": case_mix,
    "refine": case_refine,
    "measure_control": case_measure_control,
    "calibration": case_calibration,
    "calibration_tokens": case_calibration_tokens,
    "context_length": case_context_length,
    "sensitivity_tokens": case_sensitivity_tokens,
    "plain_prompts": case_plain_prompts,
    "sink_weight": case_sink_weight,
    "centred": case_centred,
    "covariance_groups": case_covariance_groups,
    "trials": case_trials,
    "probes": case_probes,
    "validation_tokens": case_validation_tokens,
    "kl_weight": case_kl_weight,
    "searched": case_searched,
    "iterations": case_iterations,
    "downdate": case_downdate,
    "order": case_order,
    "weighting": case_weighting,
    "incoherence": case_incoherence,
    "group_size": case_group_size,
    "spqr_bits": case_spqr_bits,
    "outliers": case_outliers,
    "symmetric": case_symmetric,
    "block_size": case_block_size,
    "double_quant": case_double_quant,
    "targets": case_targets,
    "exclude": case_exclude,
    "seed": case_seed,
    "dtype": case_dtype,
    "propagate": case_propagate,
    "recover_epochs": case_recover_epochs,
    "recover_learning_rate": case_recover_learning_rate,
    "shrinkage": case_shrinkage,
    "damping": case_damping,
    "resume": case_resume,
    "overwrite": case_overwrite,
    "dry_run": case_dry_run,
    "push_to_hub": case_push_to_hub,
    "private": case_private,
}


LONG = ("downdate", "order", "iterations", "group_size")  # CALDERA, several times


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in DECOMPOSE])
def test_decompose(name, bench):
    DECOMPOSE[name](bench)


# ---- plan ----------------------------------------------------------------------------------------------------------


def case_plan_model(b: Bench) -> None:
    llama, gpt2 = b.plan(), b.plan(model=str(b.other_model))
    assert llama["layers"] == 7 * LAYERS and gpt2["layers"] == 4 * LAYERS
    assert "transformer.h.0.attn.c_attn" in gpt2["ranks"] and llama["parameters"] != gpt2["parameters"]


def case_plan_method(b: Bench) -> None:
    """A data-free method runs no text; AFM and the whitened SVD do the same work."""
    whitened, plain = b.plan(), b.plan(method="svd")
    assert whitened["scratch_bytes"] > 0 == plain["scratch_bytes"] and plain["seconds"] < whitened["seconds"]
    biased, sizes = b.plan(method="afm"), ("model_bytes_after", "bytes_by_part")
    parts = biased["bytes_by_part"]
    more = biased["model_bytes_after"] - whitened["model_bytes_after"]
    assert more > 0 and more == sum(parts.values()) - sum(whitened["bytes_by_part"].values())
    assert biased | {key: whitened[key] for key in sizes} == whitened


def case_plan_backbone(b: Bench) -> None:
    alone, beside = b.plan(), b.plan(backbone="nf4")
    # 4 bits and a float32 scale per 64 weights
    assert beside["linear_bits_per_weight"] == pytest.approx(alone["linear_bits_per_weight"] + 4.5)


def case_plan_factor_format(b: Bench) -> None:
    found = {form: b.plan(factor_format=form) for form in ("fp32", "fp16", "nf4")}
    assert found["fp32"]["linear_bits_per_weight"] == 2 * found["fp16"]["linear_bits_per_weight"]
    assert found["nf4"]["model_bytes_after"] < found["fp16"]["model_bytes_after"] < found["fp32"]["model_bytes_after"]


def case_plan_form(b: Bench) -> None:
    plain, pivoted = b.plan(form="plain"), b.plan(form="pivoted")
    assert pivoted == b.plan(form=None) and plain["ranks"] == pivoted["ranks"]
    # 8 x 8 numbers fewer in each of 21 layers, and 8 indices more, 4 bytes each
    assert plain["model_bytes_after"] - pivoted["model_bytes_after"] == 21 * 4 * (8 * 8 - 8)


def case_plan_top_rank(b: Bench) -> None:
    found = [b.plan(factor_format="lloyd2", top_rank=count)["linear_bits_per_weight"] for count in (0, 1, 4)]
    assert found[0] < found[1] < found[2]


def case_plan_top_format(b: Bench) -> None:
    """Half the bytes for half the bits; 8-bit ones have scales."""
    forms = {form: b.plan(factor_format="lloyd2", top_rank=4, top_format=form) for form in (*DTYPES, "int8")}
    bits = {form: found["linear_bits_per_weight"] for form, found in forms.items()}
    assert bits["int8"] < bits["bf16"] == bits["fp16"] < bits["fp32"]


def case_plan_rank(b: Bench) -> None:
    assert set(b.plan(rank=4)["ranks"].values()) == {4} and set(b.plan(rank=12)["ranks"].values()) == {12}
    # L and R of a 32 x 64 layer hold 24 (32 + 64) numbers, more than its 2,048
    assert b.plan(rank=24)["ranks"]["model.layers.0.self_attn.k_proj"] is None


def case_plan_full_rank(b: Bench) -> None:
    found = b.plan(method="svd", full_rank=True)
    assert found["ranks"].keys() == b.decompose().ranks.keys() and found["ranks"][Q] == 64


def case_plan_kept_fraction(b: Bench) -> None:
    some, less = (b.plan(kept_fraction=kept, allocation="uniform") for kept in (0.9, 0.6))
    assert less["model_bytes_after"] < some["model_bytes_after"] < some["model_bytes"]


def case_plan_bits_per_weight(b: Bench) -> None:
    few, many = (b.plan(backbone="lloyd2", bits_per_weight=bits, factor_format="fp16") for bits in (4.5, 7.0))
    assert few["linear_bits_per_weight"] <= 4.5 < many["linear_bits_per_weight"] <= 7.0
    assert all(few["ranks"][name] <= many["ranks"][name] for name in few["ranks"])


def case_plan_allocation(b: Bench) -> None:
    uniform, weighted = b.plan(kept_fraction=0.8, allocation="uniform"), b.plan(kept_fraction=0.8)
    assert len(uniform["ranks"]) == uniform["layers"] and "sensitivity" not in uniform["phases"]
    assert weighted["ranks"] is None and weighted["model_bytes_after"] is None  # the text decides
    assert weighted["phases"]["sensitivity"] > 0 and weighted["seconds"] > uniform["seconds"]


def case_plan_average_rank(b: Bench) -> None:
    rank, shared = b.plan(rank=16, backbone="int4"), b.plan(average_rank=16, backbone="int4")
    assert shared["ranks"] is None and shared["seconds"] > rank["seconds"]  # the text decides
    uniform = b.plan(average_rank=16, backbone="int4", allocation="uniform")
    assert 0.9 * rank["model_bytes_after"] < uniform["model_bytes_after"] <= rank["model_bytes_after"]


def case_plan_rounding(b: Bench) -> None:
    fed, near = (b.plan(backbone="nf4", rounding=how) for how in ("feedback", "nearest"))
    assert fed["seconds"] > near["seconds"] and fed["model_bytes_after"] == near["model_bytes_after"]


def case_plan_max_bytes(b: Bench) -> None:
    small, large = (b.plan(max_bytes=size, allocation="uniform") for size in ("450kB", "600kB"))
    assert 300_000 < small["model_bytes_after"] <= 450_000 < large["model_bytes_after"] <= 600_000


def case_plan_mix(b: Bench) -> None:
    """Every format is looked at in every layer."""
    few, many = (b.plan(**MIXED | {"mix": mix}) for mix in (["int2"], ["int2", "int4", "int8"]))
    assert few["seconds"] < many["seconds"] and few["ranks"] is None


def case_plan_embeddings(b: Bench) -> None:
    dense, packed = b.plan(rank=8), b.plan(rank=8, embeddings="int4")
    saved = dense["bytes_by_part"]["embeddings"] - packed["bytes_by_part"]["embeddings"]
    head = dense["bytes_by_part"]["head"] - packed["bytes_by_part"]["head"]
    assert dense["model_bytes_after"] - packed["model_bytes_after"] == saved + head > 0


def case_plan_refine(b: Bench) -> None:
    none, some = (b.plan(kept_fraction=0.6, refine=count)["seconds"] for count in (0, 5))
    assert none < some


def case_plan_measure_control(b: Bench) -> None:
    without, measured = (b.plan(**MIXED, measure_control=on)["seconds"] for on in (False, True))
    assert without < measured


def case_plan_sweep(b: Bench) -> None:
    """Its files are in test_budgets.py."""
    where = {"targets": "layers.1.self_attn", "mix": ["int4"], "calibration": [str(b.rows)], "calibration_tokens": 512}
    result = b.plan(sweep=str(b.fresh("sweep")), **where)
    assert {point["series"] for point in result["points"]} >= {"mixed", "L R, uniform"}
    assert all(point["loss"] is None for point in result["points"])


def case_plan_measure(b: Bench) -> None:
    where = {
        "targets": "layers.1.self_attn.q",
        "mix": ["int4"],
        "calibration": [str(b.rows)],
        "calibration_tokens": 512,
    }
    result = b.plan(sweep=str(b.fresh("sweep")), measure=True, **where)
    assert all(point["loss"] > 0 for point in result["points"])


def case_plan_calibration(b: Bench) -> None:
    """The files are not opened; that there is text makes even a data-free method walk the blocks."""
    without, with_text = b.plan(method="svd"), b.plan(method="svd", calibration=["not/read.txt"])
    assert without["scratch_bytes"] == 0 < with_text["scratch_bytes"]
    assert b.plan(calibration=["not/read.txt"]) == b.plan()


def case_plan_calibration_tokens(b: Bench) -> None:
    few, many, most = b.plan(), b.plan(calibration_tokens=8192), b.plan(calibration_tokens=16384)
    per_token = (many["scratch_bytes"] - few["scratch_bytes"]) / 4096
    assert per_token > 0 and most["scratch_bytes"] - many["scratch_bytes"] == 8192 * per_token
    assert 0 < few["scratch_bytes"] - 4096 * per_token <= 2 * 128 * per_token  # the tokens that are only compared
    assert most["seconds"] > few["seconds"]
    assert most["phases"]["start"] == few["phases"]["start"]  # memory does not grow with the text


def case_plan_context_length(b: Bench) -> None:
    assert b.plan(context_length=128)["phases"]["start"] > b.plan()["phases"]["start"]


def case_plan_sensitivity_tokens(b: Bench) -> None:
    few, many = (b.plan(kept_fraction=0.8, sensitivity_tokens=count) for count in (1024, 4096))
    assert few["scratch_bytes"] < many["scratch_bytes"] and few["seconds"] < many["seconds"]


def case_plan_propagate(b: Bench) -> None:
    """Each block runs once more, on the outputs of the decomposed ones."""
    assert b.plan(propagate="sequential")["seconds"] > b.plan()["seconds"]
    both = [b.plan(kept_fraction=0.8, propagate=how)["seconds"] for how in ("dense", "sequential")]
    assert both[0] < both[1]


def case_plan_recover_epochs(b: Bench) -> None:
    """Time for every pass, a second stream of states in files, whatever the rate."""
    once, twice, none = (b.plan(recover_epochs=n) if n else b.plan() for n in (1, 2, 0))
    assert none["seconds"] < once["seconds"] < twice["seconds"]
    assert none["scratch_bytes"] < once["scratch_bytes"] == twice["scratch_bytes"]


def case_plan_recover_learning_rate(b: Bench) -> None:
    assert b.plan(recover_epochs=1, recover_learning_rate=0.1) == b.plan(recover_epochs=1)


def case_plan_shrinkage(b: Bench) -> None:
    """Every candidate costs a factorization; which number is given costs nothing."""
    assert b.plan(shrinkage="auto")["seconds"] > b.plan()["seconds"]
    assert b.plan(shrinkage=0.3) == b.plan()


def case_plan_iterations(b: Bench) -> None:
    loftq = [b.plan(method="loftq", backbone="nf4", iterations=count) for count in (1, 5)]
    assert loftq[0]["seconds"] < loftq[1]["seconds"]


def case_plan_block_size(b: Bench) -> None:
    small, large = (b.plan(backbone="nf4", block_size=size)["linear_bits_per_weight"] for size in (32, 128))
    assert small == pytest.approx(large + 32 / 32 - 32 / 128)


def case_plan_double_quant(b: Bench) -> None:
    plain, double = (b.plan(backbone="nf4", double_quant=on)["model_bytes_after"] for on in (False, True))
    assert double < plain


def case_plan_targets(b: Bench) -> None:
    found = b.plan(targets="q_proj$")
    assert list(found["ranks"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    assert found["linear_parameters"] == LAYERS * HIDDEN * HIDDEN


def case_plan_exclude(b: Bench) -> None:
    assert set(b.plan()["ranks"]) - set(b.plan(exclude=r"layers\.2\.mlp\.down_proj")["ranks"]) == {DOWN}


def case_plan_dtype(b: Bench) -> None:
    assert b.plan(dtype="bfloat16")["model_bytes"] * 2 == b.plan()["model_bytes"]


def case_plan_processes(b: Bench) -> None:
    assert b.plan(processes=4)["seconds"] < b.plan()["seconds"]


def case_plan_plan_file(b: Bench) -> None:
    plan = b.folder / "estimated.plan"
    saved = b.plan(rank=4, method="svd", save=str(plan))
    planned = lord_tune.plan(str(b.model), plan=str(plan), json=str(b.folder / "planned.json"))
    assert planned["ranks"] == saved["ranks"] and planned["model_bytes_after"] == saved["model_bytes_after"]


def case_plan_save(b: Bench) -> None:
    plan = b.folder / "saved.plan"
    b.plan(rank=4, method="svd", save=str(plan))
    assert set(Plan.read(plan).ranks().values()) == {4}


def case_plan_json(b: Bench) -> None:
    file = b.folder / "plans" / "first.json"
    found = b.plan(json=str(file))
    assert found == {key: value for key, value in json.loads(file.read_text()).items() if key in found}


def unchanged(**options: Any) -> Case:
    """Options of the method that no shape and no byte depends on: taken, because a command line of `decompose` is
    planned as it stands, and without effect."""

    def case(b: Bench) -> None:
        (name, value), *rest = options.items()
        assert b.plan(**dict(rest), **{name: value}) == b.plan(**dict(rest))

    return case


def case_plan_centred(b: Bench) -> None:
    """A centred layer gets a bias of as many numbers as it has outputs."""
    centred, plain = (b.plan(method="afm", centred=on) for on in (True, False))
    outputs = sum(entry["shape"][0] for entry in b.decompose(method="afm").report["layers"].values())
    assert centred["model_bytes_after"] - plain["model_bytes_after"] == 4 * outputs


def case_plan_trials(b: Bench) -> None:
    few, many = (b.plan(**BOLACO | {"trials": n})["seconds"] for n in (2, 50))
    assert few < many


def case_plan_probes(b: Bench) -> None:
    few, many = (b.plan(**BOLACO | {"probes": n})["seconds"] for n in (2, 50))
    assert few < many


def case_plan_validation_tokens(b: Bench) -> None:
    few, many = (b.plan(**BOLACO | {"validation_tokens": n}) for n in (128, 4096))
    assert few["seconds"] < many["seconds"] and few["scratch_bytes"] < many["scratch_bytes"]


def case_plan_searched(b: Bench) -> None:
    with pytest.raises(UsageError, match="role of `searched`"):
        b.plan(**BOLACO, searched="upp")


def case_plan_incoherence(b: Bench) -> None:
    bits = [b.plan(backbone="int2", incoherence=on)["linear_bits_per_weight"] for on in (True, False)]
    assert bits[0] > bits[1]  # one bit for each input and output


def case_plan_group_size(b: Bench) -> None:
    bits = [b.plan(backbone="int4", group_size=size)["linear_bits_per_weight"] for size in (16, 64)]
    assert bits[0] > bits[1]


def case_plan_weighting(b: Bench) -> None:
    """Nothing that is stored changes; see the test below for the pass."""
    plain, weighed = (b.plan(method="caldera", backbone="lloyd2", weighting=how) for how in ("activations", "fisher"))
    assert weighed["model_bytes_after"] == plain["model_bytes_after"]


def case_plan_spqr_bits(b: Bench) -> None:
    found = [b.plan(backbone="spqr", spqr_bits=bits)["linear_bits_per_weight"] for bits in (2, 3, 4)]
    assert found[1] - found[0] == pytest.approx(1) and found[2] - found[1] == pytest.approx(1)


def case_plan_outliers(b: Bench) -> None:
    found = [b.plan(backbone="spqr", outliers=share)["linear_bits_per_weight"] for share in (0.0, 0.05)]
    assert found[1] - found[0] > 0.05 * 16 * 0.99


def case_plan_symmetric(b: Bench) -> None:
    bits = [b.plan(backbone="int4", symmetric=on)["linear_bits_per_weight"] for on in (False, True)]
    assert bits[0] > bits[1]


def case_plan_gpu_memory(b: Bench) -> None:
    """tests/test_journey.py compares what is foreseen with what is written."""
    assert "journey" not in b.plan(backbone="nf4")
    found = {size: b.plan(backbone="nf4", gpu_memory=size)["journey"] for size in ("24GB", "700MB")}
    assert found["24GB"]["gpu_bytes"] == 24 * 10**9 and found["24GB"]["fits"]
    with pytest.raises(UsageError, match="expected a size like 24GB"):
        b.plan(backbone="nf4", gpu_memory="large")


def case_plan_plain_prompts(b: Bench) -> None:
    model, rows = prompts(b)
    given = {"kept_fraction": 0.8, "calibration": [str(rows)], "context_length": 64, "calibration_tokens": 1024}
    found = []
    for number, plain in enumerate((False, True)):
        file = b.folder / f"prompts{number}.json"
        lord_tune.plan(str(model), save=str(file), plain_prompts=plain, **given)
        found.append(json.loads(file.read_text())["made"]["calibration"]["sha256"])
    assert found[0] != found[1]
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        b.plan(plain_prompts=True)


PLAN: dict[str, Case] = {
    "gpu_memory": case_plan_gpu_memory,
    "plain_prompts": case_plan_plain_prompts,
    "plan_file": case_plan_plan_file,
    "save": case_plan_save,
    "model": case_plan_model,
    "method": case_plan_method,
    "backbone": case_plan_backbone,
    "factor_format": case_plan_factor_format,
    "form": case_plan_form,
    "top_rank": case_plan_top_rank,
    "top_format": case_plan_top_format,
    "rank": case_plan_rank,
    "full_rank": case_plan_full_rank,
    "kept_fraction": case_plan_kept_fraction,
    "average_rank": case_plan_average_rank,
    "rounding": case_plan_rounding,
    "bits_per_weight": case_plan_bits_per_weight,
    "allocation": case_plan_allocation,
    "max_bytes": case_plan_max_bytes,
    "mix": case_plan_mix,
    "embeddings": case_plan_embeddings,
    "refine": case_plan_refine,
    "measure_control": case_plan_measure_control,
    "sweep": case_plan_sweep,
    "measure": case_plan_measure,
    "calibration": case_plan_calibration,
    "calibration_tokens": case_plan_calibration_tokens,
    "context_length": case_plan_context_length,
    "sensitivity_tokens": case_plan_sensitivity_tokens,
    "propagate": case_plan_propagate,
    "recover_epochs": case_plan_recover_epochs,
    "recover_learning_rate": case_plan_recover_learning_rate,
    "sink_weight": unchanged(sink_weight=0.5),
    "shrinkage": case_plan_shrinkage,
    "damping": unchanged(damping=0.5, method="two_sided"),
    "centred": case_plan_centred,
    "covariance_groups": unchanged(covariance_groups=2, method="afm"),
    "trials": case_plan_trials,
    "probes": case_plan_probes,
    "validation_tokens": case_plan_validation_tokens,
    "kl_weight": unchanged(kl_weight=2.0, **BOLACO),
    "searched": case_plan_searched,
    "iterations": case_plan_iterations,
    "downdate": unchanged(downdate="on", method="caldera", backbone="e8-2"),
    "order": unchanged(order="lr", method="caldera", backbone="e8-2"),
    "weighting": case_plan_weighting,
    "incoherence": case_plan_incoherence,
    "group_size": case_plan_group_size,
    "spqr_bits": case_plan_spqr_bits,
    "outliers": case_plan_outliers,
    "symmetric": case_plan_symmetric,
    "block_size": case_plan_block_size,
    "double_quant": case_plan_double_quant,
    "targets": case_plan_targets,
    "exclude": case_plan_exclude,
    "seed": unchanged(seed=7),
    "dtype": case_plan_dtype,
    "processes": case_plan_processes,
    "json_file": case_plan_json,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", PLAN)
def test_plan(name, bench):
    PLAN[name](bench)


def test_plan_foresees_the_backward_pass_of_fisher(bench):
    """Its memory, its files, its time."""
    plain, weighed = (
        bench.plan(method="caldera", backbone="lloyd2", weighting=how) for how in ("activations", "fisher")
    )
    assert weighed["phases"].get("sensitivity", 0) > 0
    assert weighed["scratch_bytes"] > plain["scratch_bytes"] and weighed["seconds"] > plain["seconds"]


@pytest.mark.parametrize("budget", [{"rank": 8}, {"kept_fraction": 0.8}], ids=["rank", "loss weighted"])
def test_plan_foresees_the_backward_pass_of_two_sided(bench, budget):
    plain, weighed = (bench.plan(method=name, **budget) for name in ("whitened", "two_sided"))
    assert weighed["seconds"] > plain["seconds"] and weighed["scratch_bytes"] > plain["scratch_bytes"]
    where = "writing" if "rank" in budget else "calibrating"
    # the moments of one block's seven layers in float32 (out 64, 32, 32, 64, 96, 96, 64), beside more at hand
    assert weighed["phases"][where] - plain["phases"][where] > 4 * (3 * 64**2 + 2 * 32**2 + 2 * 96**2)
    assert weighed["phases"].get("sensitivity", 0) > 0


def test_plan_takes_every_option_of_the_method():
    """What is foreseen with one command line is run with the same one."""
    assert set(MethodConfig.model_fields) < set(PlanConfig.model_fields)


# ---- train ---------------------------------------------------------------------------------------------------------


def losses(metrics: dict[str, Any], key: str = "loss") -> list[float]:
    return [entry[key] for entry in metrics["history"] if key in entry]


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def trained_layers(folder: Path) -> set[str]:
    """The layers an adapter holds tensors for."""
    return {key.removeprefix("base_model.model.").split(".lora_")[0] for key in read_tensors(folder)}


def case_train_model(b: Bench) -> None:
    base = b.decompose(rank=4).folder
    _, out = b.train(model_name_or_path=str(base))
    assert adapter_config(out)["base_model_name_or_path"] == str(base)
    assert read_tensors(out)[f"base_model.model.{Q}.host.lora_A.weight"].shape == (4, 64)


def case_train_output(b: Bench) -> None:
    _, out = b.train()
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "train_config.json", "train_results.json"} <= names
    assert "README.md" in names and not [name for name in names if name.startswith("checkpoint")]


def case_train_dataset(b: Bench) -> None:
    pairs = b.folder / "pairs.jsonl"
    rows = [{"prompt": f"count {n}: ", "completion": "done"} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, other = b.train()[0], b.train(dataset_name=str(pairs))[0]
    assert losses(first) != losses(other)


def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """`datasets.load_dataset` for the id 'some/set', with rows that depend on configuration and split."""
    asked = []

    def load(name: str, config: Any = None, *, split: Any = None, **rest: Any) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": [f"{config} {split} {n} " * 8 for n in range(8)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def case_train_dataset_config(b: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = hub(patch)
        python, rust = (b.train(dataset_name="some/set", dataset_config=name)[0] for name in ("python", "rust"))
    assert asked == [("some/set", "python", "train"), ("some/set", "rust", "train")]
    assert losses(python) != losses(rust)


def case_train_split(b: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = hub(patch)
        train, other = (b.train(dataset_name="some/set", dataset_train_split=s)[0] for s in ("train", "validation"))
    assert [split for *_, split in asked] == ["train", "validation"] and losses(train) != losses(other)
    # a plain file has the split train and the parts of it that `datasets` can name
    both = b.train()[0], b.train(dataset_train_split="train[:2]")[0]
    assert losses(both[0]) != losses(both[1])


def case_test_split(b: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = hub(patch)
        metrics, _ = b.train(dataset_name="some/set", dataset_test_split="test", eval_strategy="steps", eval_steps=1)
    assert [split for *_, split in asked] == ["train", "test"] and len(losses(metrics, "eval_loss")) == 2


def case_eval_dataset(b: Bench) -> None:
    """Naming text to evaluate on is enough: no second key switches the evaluation on."""
    other = write_code_rows(b.folder / "held.jsonl", 4)
    metrics, _ = b.train(eval_dataset_name=str(other))
    assert losses(metrics, "eval_loss") and not losses(b.train()[0], "eval_loss")


def case_mode(b: Bench) -> None:
    factors, lora = b.train(mode="factors"), b.train(mode="lora")
    assert trained_layers(factors[1]) == {f"{name}.host" for name in b.decompose().manifest}
    pairs = {f"{name}.{side}" for name in b.decompose().manifest for side in ("left", "right")}
    assert trained_layers(lora[1]) == pairs
    assert factors[0]["trainable_parameters"] == sum(8 * sum(p["shape"]) for p in b.decompose().manifest.values())
    base = b.small(factor_format="lloyd2", top_rank=2, top_format="fp16")
    metrics, out = b.train(model_name_or_path=str(base.folder), mode="split")
    assert trained_layers(out) == {f"{name}.host" for name in base.manifest} and adapter_config(out)["r"] == 2
    assert metrics["trainable_parameters"] == sum(2 * sum(plan["shape"]) for plan in base.manifest.values())
    with pytest.raises(UsageError, match="mode: split"):
        b.train(model_name_or_path=str(base.folder), mode="factors")
    with pytest.raises(UsageError, match="`top_rank`"):
        b.train(mode="split")
    rights = {f"{name}.right.ia3_l" for name in b.decompose().manifest}
    assert trained_layers(b.train(mode="scales")[1]) == rights
    assert trained_layers(b.train(mode="basis", **BASIS)[1]) == trained_layers(factors[1])


def case_lora_r(b: Bench) -> None:
    for rank in (2, 4):
        metrics, out = b.train(mode="lora", lora_r=rank)
        key = f"base_model.model.{Q}.right.lora_A.weight"
        assert read_tensors(out)[key].shape == (rank, 64) and adapter_config(out)["r"] == rank
        # per layer: LoRA on R (rank 8, in) and on L (out, rank 8)
        expected = sum(rank * (sum(plan["shape"]) + 2 * 8) for plan in b.decompose().manifest.values())
        assert metrics["trainable_parameters"] == expected


def case_lora_alpha(b: Bench) -> None:
    default, given = b.train(mode="lora"), b.train(mode="lora", lora_alpha=64.0)
    assert adapter_config(default[1])["lora_alpha"] == 16 and adapter_config(given[1])["lora_alpha"] == 64
    assert losses(default[0])[0] == losses(given[0])[0] and losses(default[0])[1] != losses(given[0])[1]


def case_lora_dropout(b: Bench) -> None:
    """LoRA starts as zero, so dropout is seen from the second step on."""
    default, given = b.train(mode="lora"), b.train(mode="lora", lora_dropout=0.5)
    assert adapter_config(given[1])["lora_dropout"] == 0.5
    first, second = read_tensors(default[1]), read_tensors(given[1])
    assert any(not torch.equal(first[key], second[key]) for key in first)


def case_lora_on(b: Bench) -> None:
    """On the smaller one: R of layers with more outputs than inputs, L of the others (down_proj: 160 to 64)."""
    both, smaller = b.train(mode="lora", lora_r=2), b.train(mode="lora", lora_r=2, lora_on="smaller")
    sides = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in trained_layers(smaller[1])}
    assert sides == {n: "left" if p["shape"][0] < p["shape"][1] else "right" for n, p in b.decompose().manifest.items()}
    expected = sum(2 * (min(plan["shape"]) + 8) for plan in b.decompose().manifest.values())
    assert smaller[0]["trainable_parameters"] == expected < both[0]["trainable_parameters"]
    with pytest.raises(UsageError, match="mode: lora"):
        b.train(mode="factors", lora_on="left")


def case_scales_on(b: Bench) -> None:
    plans = b.decompose().manifest.values()
    for on, outputs in (("components", 0), ("components_and_outputs", sum(plan["shape"][0] for plan in plans))):
        metrics, out = b.train(mode="scales", scales_on=on)
        assert metrics["trainable_parameters"] == 8 * len(plans) + outputs
        assert adapter_config(out)["peft_type"] == "IA3"
        assert read_tensors(out)[f"base_model.model.{Q}.right.ia3_l"].shape == (8, 1)
        assert evaluate(b, model=str(out))["loss"] != evaluate(b, model=str(b.decompose().folder))["loss"]
    with pytest.raises(UsageError, match="mode: scales"):
        b.train(mode="lora", scales_on="components")


BASIS: dict[str, Any] = {"basis_share": 0.5, "basis_every": 1, "basis_new": 2}


def kept(b: Bench, **options: Any) -> dict[str, Any]:
    """What mode basis leaves after four steps."""
    metrics, _ = b.train(**({"mode": "basis", "max_steps": 4} | BASIS | options))
    return metrics["basis"]


def case_basis_share(b: Bench) -> None:
    small, large = (sum(kept(b, basis_share=share)["kept"].values()) for share in (0.3, 0.8))
    assert 0 < small < large < 8 * len(b.decompose().manifest)
    with pytest.raises(UsageError, match="one of basis_share, basis_kept_fraction and basis_max_bytes"):
        b.train(mode="basis")
    with pytest.raises(UsageError, match="mode: basis"):
        b.train(basis_share=0.5)


def case_basis_kept_fraction(b: Bench) -> None:
    dense = sum(plan["shape"][0] * plan["shape"][1] for plan in b.decompose().manifest.values())
    for fraction in (0.15, 0.2):
        found = kept(b, basis_share=None, basis_kept_fraction=fraction)
        assert found["limit"] == int(fraction * dense) and 0.8 * found["limit"] < found["numbers"] <= found["limit"]
    with pytest.raises(UsageError, match="of each take .* lower basis_new"):
        kept(b, basis_share=None, basis_kept_fraction=0.01)
    with pytest.warns(LordWarning, match="nothing to prune"):
        kept(b, basis_share=None, basis_kept_fraction=0.9)


def case_basis_max_bytes(b: Bench) -> None:
    """Of the checkpoint that is exported."""
    for size, limit in (("250kB", 250_000), (230_000, 230_000)):
        options = BASIS | {"basis_share": None, "basis_max_bytes": size}
        _, out = b.train(mode="basis", max_steps=4, **options)
        folder = b.fresh("pruned")
        lord_tune.export(str(out), str(folder), format="factored")
        assert 0.9 * limit < evaluate(b, model=str(folder))["model_bytes"] <= limit
    with pytest.raises(UsageError, match="a size like 80MB"):
        b.train(mode="basis", basis_max_bytes="small")


def case_basis_new(b: Bench) -> None:
    for new in (1, 3):
        metrics, out = b.train(mode="basis", **BASIS | {"basis_new": new})
        assert adapter_config(out)["r"] == new
        expected = sum(new * sum(plan["shape"]) + 8 for plan in b.decompose().manifest.values())
        assert metrics["trainable_parameters"] == expected


def case_basis_start(b: Bench) -> None:
    """The later, the fewer prunings there are; the end is about the same."""
    with pytest.raises(UsageError, match="prunes after none of the 4 steps"):
        kept(b, basis_start=0.9, basis_every=3)
    first, last = kept(b, basis_start=0.0), kept(b, basis_start=0.75)
    assert first["prunings"] == [1, 2, 3, 4] and last["prunings"] == [4]


def case_basis_every(b: Bench) -> None:
    assert kept(b, basis_every=2)["prunings"] == [2, 4] and kept(b, basis_every=3)["prunings"] == [3]


def case_train_targets(b: Bench) -> None:
    metrics, out = b.train(targets="q_proj$")
    assert trained_layers(out) == {f"model.layers.{i}.self_attn.q_proj.host" for i in range(LAYERS)}
    assert metrics["trainable_parameters"] == LAYERS * 8 * (64 + 64)


def case_train_dtype(b: Bench) -> None:
    wide, narrow = b.train()[0], b.train(dtype="bfloat16")[0]
    # a relative 2^-9 on every frozen weight moves the loss of 6 nats, but not by much
    assert losses(wide)[0] != losses(narrow)[0] and losses(wide)[0] == pytest.approx(losses(narrow)[0], rel=0.05)


def case_train_dequantize_once(b: Bench) -> None:
    """The same training up to float32 rounding, and the same file layout; nothing to decode is an error."""
    base = str(b.small(factor_format="fp32").folder)
    kept, decoded = (b.train(model_name_or_path=base, dequantize_once=once) for once in (True, False))
    assert losses(kept[0]) == pytest.approx(losses(decoded[0]), rel=1e-4)
    assert read_tensors(kept[1]).keys() == read_tensors(decoded[1]).keys()
    with pytest.raises(UsageError, match="no quantized layers"):
        b.train(dequantize_once=True)


def case_train_dry_run(b: Bench) -> None:
    out, before = b.fresh("dry"), sorted(b.folder.iterdir())
    own = {"model_name_or_path": "not/there", "dataset_name": str(b.rows), "output_dir": str(out)}
    asked = {"learning_rate": 1.0, "gradient_accumulation_steps": 3, "max_length": 64, "max_steps": 5}
    plan = lord_tune.train(**own, **asked, dry_run=True)  # a name of the Hub is not looked up
    assert plan["mode"] == "factors" and plan["learning_rate"] == 1.0
    step = {"sequences_per_step": 24, "tokens_per_step": 24 * 64, "processes": 1, "steps": 5, "epochs": None}
    assert plan["effective"] == step | {"learning_rate": 1.0}
    with pytest.raises(UsageError, match="data file none.jsonl does not exist"):
        lord_tune.train(**own | {"dataset_name": "none.jsonl"}, dry_run=True)
    assert sorted(b.folder.iterdir()) == before
    with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
        lord_tune.train(**own, learnin_rate=1.0, dry_run=True)


def distil(b: Bench, **options: Any) -> dict[str, Any]:
    return b.train(objective="distill", **options)[0]


def case_objective(b: Bench) -> None:
    """sft logs no KL; dpo starts where chosen and rejected are as likely as before."""
    assert not losses(b.train()[0], "kl") and losses(distil(b), "kl")
    pairs = b.folder / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert losses(b.train(objective="dpo", dataset_name=str(pairs))[0])[0] == pytest.approx(0.693147, abs=1e-4)
    with pytest.raises(UsageError, match="label_smoothing_factor has no effect with objective: distill"):
        distil(b, label_smoothing_factor=0.1)


def case_teacher(b: Bench) -> None:
    """The default is what was decomposed; a student that is its own teacher has nothing to learn."""
    original, same = distil(b), distil(b, teacher_model_name_or_path=str(b.decompose().folder))
    assert losses(original)[0] == losses(distil(b, teacher_model_name_or_path=str(b.model)))[0] > 1e-3
    assert losses(same)[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UsageError, match="teacher_model_name_or_path has no effect with objective: sft"):
        b.train(teacher_model_name_or_path=str(b.model))


def case_teacher_logits(b: Bench) -> None:
    folder = b.fresh("logits")
    found = distil(b, teacher_logits=str(folder), teacher_top_k=300)  # the vocabulary
    assert (folder / "index.json").is_file() and losses(found) == pytest.approx(losses(distil(b)), rel=1e-3)
    with pytest.raises(UsageError, match="teacher_logits has no effect"):
        b.train(teacher_logits=str(folder))


def case_teacher_top_k(b: Bench) -> None:
    few, many = (losses(distil(b, teacher_logits=str(b.fresh("top")), teacher_top_k=k))[0] for k in (2, 100))
    assert 0 < few < many <= losses(distil(b))[0]
    with pytest.raises(UsageError, match="no effect without teacher_logits"):
        distil(b, teacher_top_k=2)


def case_ce_weight(b: Bench) -> None:
    plain, half = distil(b), distil(b, distill_ce_weight=0.25)
    first = {key: losses(half, key)[0] for key in ("loss", "kl", "ce")}
    assert first["loss"] == pytest.approx(0.75 * first["kl"] + 0.25 * first["ce"], rel=1e-5)
    assert losses(plain)[0] == pytest.approx(first["kl"], rel=1e-5)
    assert losses(distil(b, distill_ce_weight=1))[0] == pytest.approx(losses(b.train()[0])[0], rel=1e-5)
    with pytest.raises(UsageError, match="distill_ce_weight"):
        distil(b, distill_ce_weight=1.5)


def case_temperature(b: Bench) -> None:
    hot = distil(b, distill_temperature=2)
    assert losses(hot)[0] == pytest.approx(4 * losses(hot, "kl")[0], rel=1e-5)
    assert losses(hot, "kl")[0] != pytest.approx(losses(distil(b), "kl")[0], rel=1e-2)
    with pytest.raises(UsageError, match="distill_temperature"):
        distil(b, distill_temperature=0)


def case_train_plain_prompts(b: Bench) -> None:
    model, rows = prompts(b)
    base = str(b.decompose(model=str(model), calibrated=False, method="svd").folder)
    given = {"model_name_or_path": base, "dataset_name": str(rows)}
    assert losses(b.train(**given)[0]) != losses(b.train(plain_prompts=True, **given)[0])
    with pytest.raises(UsageError, match="plain_prompts has no effect"):
        b.train(plain_prompts=True, objective="dpo")
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        b.train(plain_prompts=True)


TRAIN: dict[str, Case] = {
    "plain_prompts": case_train_plain_prompts,
    "model_name_or_path": case_train_model,
    "output_dir": case_train_output,
    "dataset_name": case_train_dataset,
    "dataset_config": case_train_dataset_config,
    "dataset_train_split": case_train_split,
    "dataset_test_split": case_test_split,
    "eval_dataset_name": case_eval_dataset,
    "mode": case_mode,
    "lora_r": case_lora_r,
    "lora_alpha": case_lora_alpha,
    "lora_dropout": case_lora_dropout,
    "lora_on": case_lora_on,
    "scales_on": case_scales_on,
    "basis_share": case_basis_share,
    "basis_kept_fraction": case_basis_kept_fraction,
    "basis_max_bytes": case_basis_max_bytes,
    "basis_new": case_basis_new,
    "basis_start": case_basis_start,
    "basis_every": case_basis_every,
    "targets": case_train_targets,
    "objective": case_objective,
    "teacher_model_name_or_path": case_teacher,
    "teacher_logits": case_teacher_logits,
    "teacher_top_k": case_teacher_top_k,
    "distill_ce_weight": case_ce_weight,
    "distill_temperature": case_temperature,
    "dtype": case_train_dtype,
    "dequantize_once": case_train_dequantize_once,
    "dry_run": case_train_dry_run,
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", TRAIN)
def test_train(name, bench):
    TRAIN[name](bench)


MODES = ("factors", "split", "lora", "scales", "basis")


def test_trl_keys_reach_trl(bench, tmp_path):
    """Keys that are not ours are trl's, typed as trl types them; ours have defaults of their own."""
    values = {"output_dir": str(tmp_path), "packing": "true", "max_steps": "7", "report_to": ["none"]}
    given = trainer_arguments(values | {"lr_scheduler_kwargs": {"num_cycles": 2}}, "factors", True, [])
    assert isinstance(given, SFTConfig) and given.packing is True and given.max_steps == 7
    assert given.lr_scheduler_kwargs == {"num_cycles": 2}
    rates = {mode: trainer_arguments({"output_dir": str(tmp_path)}, mode, True, []).learning_rate for mode in MODES}
    assert rates == {"factors": 1e-4, "split": 1e-4, "lora": 2e-4, "scales": 1e-2, "basis": 1e-3}
    metrics, _ = bench.train(max_steps=3)
    assert metrics["steps"] == 3 and len(losses(metrics)) == 3


def test_a_training_output_loads_from_another_working_directory(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(bench.decompose().folder.parent)
    _, out = bench.train(model_name_or_path=bench.decompose().folder.name)
    monkeypatch.chdir(tmp_path)
    assert evaluate(bench, model=str(out))["tokens"] == 4 * 63


# ---- evaluate ------------------------------------------------------------------------------------------------------


def evaluate(b: Bench, **options: Any) -> dict[str, Any]:
    settings = {"model": str(b.model), "text": [str(b.rows)], "context_length": 64, "max_tokens": 256} | options
    settings = {key: value for key, value in settings.items() if value is not None}
    return lord_tune.evaluate(**settings)


def case_evaluate_model(b: Bench) -> None:
    dense, factored = evaluate(b), evaluate(b, model=str(b.decompose().folder))
    assert factored["parameters"] < dense["parameters"] and factored["loss"] != dense["loss"]
    assert evaluate(b, model=str(b.adapter()))["loss"] < factored["loss"]  # two steps of training on this text


def case_evaluate_text(b: Bench) -> None:
    other = b.folder / "digits.txt"
    other.write_text("0123456789 " * 40)
    one, both = evaluate(b), evaluate(b, text=[str(b.rows), str(other)])
    assert list(both["texts"]) == [str(b.rows), str(other)] and both["texts"][str(b.rows)] == one["texts"][str(b.rows)]
    assert both["tokens"] == sum(entry["tokens"] for entry in both["texts"].values()) > one["tokens"]
    assert both["loss"] != one["loss"]


def case_evaluate_context(b: Bench) -> None:
    for length in (32, 64):
        result = evaluate(b, context_length=length)
        assert result["context_length"] == length
        assert result["tokens"] == 256 // length * (length - 1)  # the first token of a window is not predicted


def case_evaluate_max_tokens(b: Bench) -> None:
    assert evaluate(b, max_tokens=128)["tokens"] == 2 * 63 and evaluate(b, max_tokens=256)["tokens"] == 4 * 63


def case_evaluate_dtype(b: Bench) -> None:
    wide, narrow = evaluate(b), evaluate(b, dtype="bfloat16")
    assert narrow["model_bytes"] == wide["model_bytes"] / 2 and narrow["loss"] != wide["loss"]


def case_evaluate_dequantize_once(b: Bench) -> None:
    model = str(b.small(factor_format="fp32").folder)
    held, decode = [], commands.dequantize_once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "dequantize_once", lambda *given: held.append(decode(*given)) or held[-1])
        decoded, kept = (evaluate(b, model=model, dequantize_once=once) for once in (False, True))
    assert held == [4 * 64 * (64 + 32 + 32 + 64)]  # float32 copies of q, k, v and o
    # products in another order: 1e-6 of logits below 10
    assert kept["loss"] == pytest.approx(decoded["loss"], abs=1e-5)
    assert kept["model_bytes"] == decoded["model_bytes"]  # what is stored, not the copy
    with pytest.raises(UsageError, match="no quantized layers"):
        evaluate(b, dequantize_once=True)


def case_evaluate_json(b: Bench) -> None:
    file = b.folder / "results" / "first.json"  # its folder is made, as that of OUT is
    result = evaluate(b, json=str(file))
    assert json.loads(file.read_text()) == result
    assert {"perplexity", "loss", "tokens", "parameters", "model_bytes", "linear_bits_per_weight"} <= set(result)


def case_evaluate_dry_run(b: Bench) -> None:
    plan = evaluate(b, model="not/there", text=[str(b.rows)], dry_run=True, json=str(b.folder / "dry.json"))
    assert plan["context_length"] == 64 and not (b.folder / "dry.json").exists()


def case_evaluate_plain_prompts(b: Bench) -> None:
    model, rows = prompts(b)
    given = {"model": str(model), "text": [str(rows)]}
    assert evaluate(b, **given)["loss"] != evaluate(b, plain_prompts=True, **given)["loss"]
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        evaluate(b, plain_prompts=True)


QUESTIONS = [{"query": f"{n} and", "choices": ["on", "off"], "gold": n % 2} for n in range(4)]
# the code of a random model is the rest of a comment; it defines what is checked only where the prompt does
FUNCTIONS = [
    {
        "task_id": n,
        "prompt": f"def f():\n    return {n}\n#",
        "entry_point": "f",
        "test": "def check(f):\n    assert f()",
    }
    for n in range(2)
]


def questions(b: Bench, **options: Any) -> dict[str, Any]:
    for name, rows in (("mine", QUESTIONS), ("humaneval", FUNCTIONS)):
        (b.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(b, text=[], **{"context_length": None, "max_tokens": None, "tasks_dir": str(b.folder)} | options)


def programs(b: Bench, **options: Any) -> dict[str, Any]:
    given = {"tasks": ["humaneval"], "confirm_run_unsafe_code": True, "max_new_tokens": 6}
    return questions(b, **given | options)["tasks"]["humaneval"]


def case_evaluate_original(b: Bench) -> None:
    assert evaluate(b, original=str(b.model))["original"]["kl"] == 0 and "original" not in evaluate(b)
    with pytest.raises(UsageError, match="`original` has no effect without `text`"):
        questions(b, tasks=["mine"], original=str(b.model))


def case_evaluate_samples(b: Bench) -> None:
    rows = evaluate(b, samples=2)["samples"]
    assert [set(row) for row in rows] == [{"prompt", "model"}] * 2 and rows[0]["prompt"] != rows[1]["prompt"]


def case_evaluate_tasks(b: Bench) -> None:
    found = questions(b, tasks=["mine"])["tasks"]
    assert list(found) == ["mine"] and found["mine"]["items"] == 4


def case_evaluate_tasks_dir(b: Bench) -> None:
    with pytest.raises(UsageError, match=r"needs the file other\.jsonl"):
        questions(b, tasks=["other"])
    with pytest.raises(UsageError, match="does not exist"):
        questions(b, tasks=["mine"], tasks_dir=str(b.folder / "none"))


def case_evaluate_limit(b: Bench) -> None:
    assert questions(b, tasks=["mine"], limit=3)["tasks"]["mine"]["items"] == 3


def case_evaluate_chat(b: Bench) -> None:
    model, _ = prompts(b)
    plain, chat = (
        questions(b, model=str(model), tasks=["mine"], apply_chat_template=told)["tasks"]["mine"]["first_prompt"]
        for told in (False, True)
    )
    assert plain == "0 and" and chat != plain and "0 and" in chat
    with pytest.raises(UsageError, match="no chat template"):
        questions(b, tasks=["mine"], apply_chat_template=True)


def case_evaluate_confirm(b: Bench) -> None:
    with pytest.raises(UsageError, match="would run code that the model wrote"):
        programs(b, confirm_run_unsafe_code=False)
    assert programs(b)["problems"] == 2


def written(b: Bench, **options: Any) -> list[str]:
    """What the model writes for the programming task, of one sample after the other."""
    (b.folder / "s.samples.jsonl").unlink(missing_ok=True)
    programs(b, json=str(b.folder / "s.json"), **options)
    return [json.loads(line)["completion"] for line in (b.folder / "s.samples.jsonl").read_text().splitlines()]


def case_evaluate_max_new_tokens(b: Bench) -> None:
    short, long = written(b, max_new_tokens=2), written(b, max_new_tokens=6)
    assert all(other.startswith(one) for one, other in zip(short, long, strict=True)) and short != long


def case_evaluate_samples_per_problem(b: Bench) -> None:
    assert len(set(written(b, temperature=1.5, samples_per_problem=3))) > 2
    with pytest.raises(UsageError, match="all the same"):
        written(b, samples_per_problem=3)


def case_evaluate_temperature(b: Bench) -> None:
    assert written(b, temperature=1.5) != written(b) == written(b, temperature=1e-4)


def case_evaluate_seed(b: Bench) -> None:
    hot = {"temperature": 1.5}
    assert written(b, **hot) == written(b, **hot, seed=0) != written(b, **hot, seed=3)


def case_evaluate_speed(b: Bench) -> None:
    assert set(evaluate(b, speed=True)["speed"]["batches"]) == {"1", "8"} and "speed" not in evaluate(b)


def case_evaluate_batch_size(b: Bench) -> None:
    assert set(evaluate(b, speed=True, batch_size=2)["speed"]["batches"]) == {"1", "2"}
    with pytest.raises(UsageError, match="`batch_size` has no effect"):
        evaluate(b, batch_size=2)


EVALUATE: dict[str, Case] = {
    "original": case_evaluate_original,
    "samples": case_evaluate_samples,
    "tasks": case_evaluate_tasks,
    "tasks_dir": case_evaluate_tasks_dir,
    "limit": case_evaluate_limit,
    "apply_chat_template": case_evaluate_chat,
    "confirm_run_unsafe_code": case_evaluate_confirm,
    "max_new_tokens": case_evaluate_max_new_tokens,
    "samples_per_problem": case_evaluate_samples_per_problem,
    "temperature": case_evaluate_temperature,
    "seed": case_evaluate_seed,
    "speed": case_evaluate_speed,
    "batch_size": case_evaluate_batch_size,
    "plain_prompts": case_evaluate_plain_prompts,
    "model": case_evaluate_model,
    "text": case_evaluate_text,
    "context_length": case_evaluate_context,
    "max_tokens": case_evaluate_max_tokens,
    "dtype": case_evaluate_dtype,
    "dequantize_once": case_evaluate_dequantize_once,
    "json_file": case_evaluate_json,
    "dry_run": case_evaluate_dry_run,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate(name, bench):
    EVALUATE[name](bench)


# ---- export --------------------------------------------------------------------------------------------------------


def export(b: Bench, form: str, **options: Any) -> tuple[dict[str, Any], Path]:
    model = options.pop("model", None) or str(b.decompose().folder)
    out = b.fresh("exported")
    return lord_tune.export(model, str(out), form, **options), out


def case_export_model(b: Bench) -> None:
    plain, trained = export(b, "dense")[1], export(b, "dense", model=str(b.adapter()))[1]
    assert not torch.allclose(read_tensors(plain)[f"{Q}.weight"], read_tensors(trained)[f"{Q}.weight"])
    assert torch.allclose(read_tensors(plain)[f"{Q}.weight"].double(), b.decompose().product(), atol=1e-6)


def case_export_out(b: Bench) -> None:
    _, out = export(b, "dense")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "export.json", "README.md"} <= names


def case_export_format(b: Bench) -> None:
    dense, factored = export(b, "dense")[1], export(b, "factored")[1]
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert Run({}, factored).manifest == b.decompose().manifest
    # stock NF4 wants widths that are multiples of 64, which leaves down_proj out
    nf4 = b.decompose(calibrated=False, method="svd", backbone="nf4", targets="q_proj$").folder
    _, peft = export(b, "peft", model=str(nf4))
    assert (peft / "base" / "model.safetensors").is_file()
    assert adapter_config(peft / "adapter")["r"] == adapter_config(peft / "adapter")["lora_alpha"] == 8


def case_export_dtype(b: Bench) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        # 8 mantissa bits on every weight of a random model: far above the threshold meant for real ones
        result, out = export(b, "dense", dtype=name, threshold=10.0)
        assert {tensor.dtype for tensor in read_tensors(out).values()} == {dtype} and result["dtype"] == name
    _, out = export(b, "vllm", dtype="bfloat16", threshold=10.0)
    assert torch.bfloat16 in {tensor.dtype for tensor in read_tensors(out).values()}


def case_export_pad_ranks(b: Bench) -> None:
    options = {"backbone": "w4a16", "group_size": 32, "targets": "q_proj$", "rank": 5}
    packed = str(b.decompose(calibrated=False, method="svd", **options).folder)
    for padded, rank in ((False, 5), (True, 8)):
        _, out = export(b, "compressed-tensors", model=packed, pad_ranks=padded)
        assert adapter_config(out / "adapter")["r"] == rank
    with pytest.raises(UsageError, match="writes no adapter"):
        export(b, "dense", pad_ranks=True)


def merged(b: Bench, way: str, form: str, **options: Any) -> tuple[dict[str, Any], Path]:
    heldout = write_code_rows(b.folder / "heldout.jsonl", rows=30)
    source = b.decompose(calibrated=False, method="svd", backbone="int3", rank=8)
    given = {"text": str(heldout), "calibration": [str(b.rows)], "calibration_tokens": 512, "merge_limit": 9.0}
    return export(b, form, model=str(source.folder), **(given | {"merge": way} | options))


def case_export_merge(b: Bench) -> None:
    results = {way: merged(b, way, "factored") for way in ("nearest", "feedback")}
    for _, out in results.values():
        assert {layer["rank"] for layer in Run({}, out).manifest.values()} == {0}
    first, second = (read_tensors(out) for _, out in results.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UsageError, match="is no training output"):
        merged(b, "original", "dense")


def case_export_advise(b: Bench) -> None:
    result, out = merged(b, "nearest", "factored", merge=None, advise=True)
    assert {"unmerged", "decoded", "nearest", "feedback"} == set(result["merges"]) and result["advice"]
    assert {layer["rank"] for layer in Run({}, out).manifest.values()} == {8}


def case_export_merge_limit(b: Bench) -> None:
    losses = iter([1.0, 1.2] * 2)  # unmerged, merged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lord_tune.merges, "perplexity", lambda *of: (next(losses), 1))
        merged(b, "nearest", "factored", merge_limit=0.3)
        with pytest.raises(LordError, match=r"got a rise of the loss in nats per token of 0.2, expected at most 0.1"):
            merged(b, "nearest", "factored", merge_limit=0.1)


def case_export_calibration(b: Bench) -> None:
    first = read_tensors(merged(b, "feedback", "factored")[1])
    other = write_code_rows(b.folder / "other.jsonl", rows=12)
    second = read_tensors(merged(b, "feedback", "factored", calibration=[str(other)])[1])
    assert any(not torch.equal(first[name], second[name]) for name in first)


def case_export_calibration_tokens(b: Bench) -> None:
    first, second = (read_tensors(merged(b, "feedback", "factored", calibration_tokens=n)[1]) for n in (512, 1024))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def gguf_of(b: Bench, **options: Any) -> tuple[dict[str, Any], Path]:
    """Rank 32 beside q4_0, unless another `backbone` is named."""
    like = b.folder / "like.gguf"
    if not like.exists():
        write_like(AutoModelForCausalLM.from_pretrained(b.model), like, "llama")
    with pytest.MonkeyPatch.context() as patch:  # the file has no tokenizer, without which llama.cpp does not run it
        patch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
        model = b.decompose(calibrated=False, method="svd", backbone=options.pop("backbone", "q4_0"), rank=32)
        return export(b, "gguf", model=str(model.folder), like=str(like), threshold=0.1, **options)


def gguf_kinds(path: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def case_export_base(b: Bench) -> None:
    _, whole = gguf_of(b)
    _, alone = gguf_of(b, base=str(whole))
    assert not (alone / "model.gguf").exists() and (alone / "adapter.gguf").is_file()


def case_export_like(b: Bench) -> None:
    _, out = gguf_of(b)
    assert gguf_kinds(out / "model.gguf") == {"Q4_0", "F32"} and (out / "adapter.gguf").is_file()
    with pytest.raises(UsageError, match="pass `like` FILE.gguf"):
        export(b, "gguf")


def case_export_adapter_type(b: Bench) -> None:
    for name in ("f16", "q8_0", "f32"):
        assert name.upper() in gguf_kinds(gguf_of(b, adapter_type=name)[1] / "adapter.gguf")


def case_export_dense_type(b: Bench) -> None:
    for name in ("f16", "q8_0"):
        _, out = gguf_of(b, backbone="nf4", dense_type=name)
        assert gguf_kinds(out / "model.gguf") == {name.upper(), "F32"} and not (out / "adapter.gguf").exists()


def case_export_threshold(b: Bench) -> None:
    result, _ = export(b, "dense", dtype="bfloat16", threshold=10.0)
    kl, before = result["comparison"]["kl"], sorted(b.folder.iterdir())
    with pytest.raises(ExportMismatch, match="`threshold`"):
        export(b, "dense", dtype="bfloat16", threshold=kl / 2)
    assert sorted(b.folder.iterdir()) == before
    export(b, "dense", dtype="bfloat16", threshold=kl * 2)


def case_export_text(b: Bench) -> None:
    short = b.folder / "short.txt"
    short.write_text("x = 1\ny = 2\n")
    assert export(b, "dense", text=str(short))[0]["comparison"]["tokens"] == 12
    assert export(b, "dense")[0]["comparison"]["tokens"] == 256


def case_export_overwrite(b: Bench) -> None:
    _, out = export(b, "dense")
    with pytest.raises(UsageError, match="`overwrite`"):
        lord_tune.export(str(b.decompose().folder), str(out), "factored")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    lord_tune.export(str(b.decompose().folder), str(out), "factored", overwrite=True)
    assert "quantization_config" in json.loads((out / "config.json").read_text())


def case_export_dry_run(b: Bench) -> None:
    before = sorted(b.folder.iterdir())
    plan, _ = export(b, "dense", model="not/there", dry_run=True)
    assert plan["format"] == "dense" and sorted(b.folder.iterdir()) == before


def case_export_plain_prompts(b: Bench) -> None:
    model, rows = prompts(b)
    base = str(b.decompose(model=str(model), calibrated=False, method="svd").folder)
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "documents", lambda *given: seen.extend(found := documents(*given)) or found)
        for plain in (False, True):
            lord_tune.export(base, str(b.fresh("prompts")), "factored", text=str(rows), plain_prompts=plain)
    assert [text.startswith("<user>") for text in seen] == [True] * 51 + [False] * 51
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):
        lord_tune.export(base, str(b.fresh("prompts")), "factored", plain_prompts=True)


def case_export_push_to_hub(b: Bench) -> None:
    out, source = b.fresh("pushed"), str(b.decompose().folder)
    with uploads() as seen:
        lord_tune.export(source, str(out), "factored", push_to_hub="me/it")
    assert seen == [(out, "me/it", False)]


def case_export_private(b: Bench) -> None:
    out, source = b.fresh("pushed"), str(b.decompose().folder)
    with uploads() as seen:
        lord_tune.export(source, str(out), "factored", push_to_hub="me/it", private=True)
    assert seen == [(out, "me/it", True)]
    with pytest.raises(UsageError, match="`private` has no effect"):
        lord_tune.export(source, str(b.fresh("private")), "factored", private=True)


EXPORT: dict[str, Case] = {
    "plain_prompts": case_export_plain_prompts,
    "model": case_export_model,
    "out": case_export_out,
    "format": case_export_format,
    "dtype": case_export_dtype,
    "merge": case_export_merge,
    "advise": case_export_advise,
    "merge_limit": case_export_merge_limit,
    "calibration": case_export_calibration,
    "calibration_tokens": case_export_calibration_tokens,
    "pad_ranks": case_export_pad_ranks,
    "base": case_export_base,
    "like": case_export_like,
    "adapter_type": case_export_adapter_type,
    "dense_type": case_export_dense_type,
    "threshold": case_export_threshold,
    "text": case_export_text,
    "overwrite": case_export_overwrite,
    "dry_run": case_export_dry_run,
    "push_to_hub": case_export_push_to_hub,
    "private": case_export_private,
}


@pytest.mark.parametrize("name", EXPORT)
def test_export(name, bench):
    EXPORT[name](bench)


def test_export_compares_within_the_positions_of_the_model(tmp_path):
    """The comparison text is 256 tokens; a model of 64 learned positions cannot read so many."""
    config = gpt2_config()
    config.n_positions = 64
    model = save_tiny(GPT2LMHeadModel(config), tmp_path / "short")
    lord_tune.decompose(str(model), str(tmp_path / "lord"), method="svd", rank=8)
    result = lord_tune.export(str(tmp_path / "lord"), str(tmp_path / "dense"), "dense")
    assert result["comparison"]["tokens"] == 64


# ---- correct -------------------------------------------------------------------------------------------------------


def corrected(b: Bench, **options: Any) -> Run:
    """Of the model in q4_0."""
    like = b.folder / "like.gguf"
    if not like.exists():
        write_like(AutoModelForCausalLM.from_pretrained(b.model), like, "llama")
    file = b.folder / "q4_0.gguf"
    if not file.exists():
        whole = b.decompose(calibrated=False, method="svd", backbone="q4_0", rank=0).folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
            lord_tune.export(str(whole), str(b.folder / "q4_0"), "gguf", like=str(like))
        (b.folder / "q4_0" / "model.gguf").rename(file)
    given = {"calibration": [str(b.rows)], "rank": 8, "targets": "q_proj$|up_proj$", **SHORT} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
        out = b.fresh("corrected")
        return Run(lord_tune.correct(str(file), str(b.model), str(out), **given), out)


def differs(first: Run, second: Run) -> bool:
    return not torch.equal(first.product(), second.product())


def case_correct_quantized(b: Bench) -> None:
    run = corrected(b)
    assert run.manifest[Q]["backbone"] == "ggml" and run.manifest[Q]["backbone_options"] == {"type": "Q4_0"}


def case_correct_original(b: Bench) -> None:
    assert corrected(b).report["base"]["name"] == str(b.model)


def case_correct_out(b: Bench) -> None:
    out = corrected(b).folder
    assert (out / "adapter" / "adapter.gguf").is_file() and (out / "decomposition.json").is_file()


def case_correct_calibration(b: Bench) -> None:
    other = write_code_rows(b.folder / "elsewhere.jsonl", rows=12)
    assert differs(corrected(b), corrected(b, calibration=[str(other)]))


def case_correct_rank(b: Bench) -> None:
    assert corrected(b, rank=3).manifest[Q]["rank"] == 3


def case_correct_calibration_tokens(b: Bench) -> None:
    assert corrected(b, calibration_tokens=1024).report["calibration"]["tokens"] == 1024


def case_correct_context_length(b: Bench) -> None:
    assert corrected(b, context_length=32).report["calibration"]["context_length"] == 32


def case_correct_targets(b: Bench) -> None:
    assert all("q_proj" in name for name in corrected(b, targets="q_proj$").manifest)


def case_correct_exclude(b: Bench) -> None:
    assert not any("up_proj" in name for name in corrected(b, exclude="up_proj").manifest)


def case_correct_factor_format(b: Bench) -> None:
    assert corrected(b, factor_format="bf16").manifest[Q]["left_format"] == "bf16"


def case_correct_adapter_type(b: Bench) -> None:
    run = corrected(b, rank=32, adapter_type="q8_0")
    assert gguf_kinds(run.folder / "adapter" / "adapter.gguf") == {"Q8_0"}


def case_correct_dtype(b: Bench) -> None:
    assert corrected(b, dtype="float16").manifest[Q]["left_format"] == "fp16"


def case_correct_seed(b: Bench) -> None:
    assert differs(corrected(b), corrected(b, seed=3))


def case_correct_plain_prompts(b: Bench) -> None:
    with pytest.raises(UsageError, match="`plain_prompts` has no effect"):  # of a corrected model's calibration
        corrected(b, plain_prompts=True)
    _, rows = prompts(b)
    assert corrected(b, plain_prompts=True, calibration=[str(rows)]).report["config"]["plain_prompts"]


def case_correct_overwrite(b: Bench) -> None:
    out = corrected(b).folder
    given = {"calibration": [str(b.rows)], "targets": "q_proj$", **SHORT}
    with pytest.raises(UsageError, match="already holds files"):
        lord_tune.correct(str(b.folder / "q4_0.gguf"), str(b.model), str(out), **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
        lord_tune.correct(str(b.folder / "q4_0.gguf"), str(b.model), str(out), overwrite=True, **given)
    assert all("q_proj" in name for name in Run({}, out).manifest)


def case_correct_dry_run(b: Bench) -> None:
    out = b.fresh("dry")
    given = {"calibration": [str(b.rows)], "dry_run": True}
    with pytest.raises(UsageError, match="q.gguf does not exist"):
        lord_tune.correct("q.gguf", str(b.model), str(out), **given)
    lord_tune.correct(str(b.model), str(b.model), str(out), **given)
    assert not out.exists()


def case_correct_push_to_hub(b: Bench) -> None:
    with uploads() as seen:
        run = corrected(b, push_to_hub="me/it")
    assert seen[-1] == (run.folder, "me/it", False)


def case_correct_private(b: Bench) -> None:
    with uploads() as seen:
        run = corrected(b, push_to_hub="me/it", private=True)
    assert seen[-1] == (run.folder, "me/it", True)


CORRECT: dict[str, Case] = {
    name.removeprefix("case_correct_"): case
    for name, case in list(globals().items())
    if name.startswith("case_correct_")
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("field", CORRECT)
def test_correct(field, bench):
    CORRECT[field](bench)


# ---- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_model_and_json(bench, tmp_path, capfd):
    run = bench.decompose()
    assert lord_tune.inspect(str(run.folder))["layers"] == json.loads(json.dumps(run.report["layers"]))
    assert Q in capfd.readouterr().out
    lord_tune.inspect(str(run.folder), json=str(tmp_path / "table.json"))
    assert json.loads((tmp_path / "table.json").read_text())["layers"].keys() == run.ranks.keys()
    assert lord_tune.inspect(str(bench.adapter()))["layers"].keys() == run.ranks.keys()  # of its base


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "cases"),
    [
        (DecomposeConfig, DECOMPOSE),
        (PlanConfig, PLAN),
        (TrainConfig, TRAIN),
        (EvaluateConfig, EVALUATE),
        (ExportConfig, EXPORT),
        (CorrectConfig, CORRECT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_has_a_case(record, cases):
    assert set(cases) == set(record.model_fields)
    assert len(set(cases.values())) == len(cases), "two fields share a case"


def test_every_format_can_be_chosen():
    """The lists in config.py are literals, for the help; they are the quantizers' names in the quantizers' order."""
    assert FORMATS == ("none", *QUANTIZERS) and FACTOR_FORMATS == (*DTYPES, *QUANTIZERS)
    top = {form: MethodConfig(model="m", top_format=form).top_format for form in (*DTYPES, "int8")}
    assert all(form in DTYPES or form in QUANTIZERS for form in top)
    for method in METHODS:
        assert set(METHODS[method].widths) < set(QUANTIZERS)


FLAGS: dict[str, list[tuple[type[RunConfig], str]]] = {
    "decompose": [
        (DecomposeConfig, "m o --full-rank --method svd"),
        (
            DecomposeConfig,
            "m o --method whitened --backbone nf4 --factor-format bf16 --rank 3 --calibration a.txt b.txt "
            "--calibration-tokens 99 --context-length 9 --sink-weight 0.5 --block-size 128 --double-quant "
            "--targets q --exclude k --seed 7 --dtype float16 --plain-prompts --overwrite --dry-run "
            "--embeddings int8 --push-to-hub me/it --private",
        ),
        (
            DecomposeConfig,
            "m o --method afm --no-centred --kept-fraction 0.7 --allocation loss_weighted --sensitivity-tokens 5 "
            "--form pivoted --calibration=a.txt --dry_run",
        ),
        (DecomposeConfig, "m o --method loftq --backbone nf4 --rank 3 --iterations 2 --dry-run"),
        (DecomposeConfig, "m o --plan p.json --calibration a.txt"),
        (DecomposeConfig, "m o --average-rank 16 --backbone nf4 --rounding nearest --calibration a.txt"),
        (DecomposeConfig, "m o --method two_sided --damping 0.3 --rank 3 --calibration a.txt"),
        (
            DecomposeConfig,
            "m o --method afm --covariance-groups 2 --kept-fraction 0.7 --allocation bolaco --trials 5 --probes 4 "
            "--validation-tokens 99 --kl-weight 2.5 --searched qk,up+gate --calibration a.txt",
        ),
        (
            DecomposeConfig,
            "m o --max-bytes 80MB --allocation mixed --mix int2 nf4 --refine 3 --measure-control --calibration a.txt",
        ),
        (DecomposeConfig, "m o --rank 3 --calibration a.txt --propagate sequential --shrinkage auto --resume"),
        (
            DecomposeConfig,
            "m o --method caldera --backbone int4 --rank 3 --downdate off --order lr --incoherence --group-size 16 "
            "--symmetric --calibration a.txt",
        ),
        (
            DecomposeConfig,
            "m o --rank 3 --calibration a.txt --shrinkage 0.25 --recover-epochs 2 --recover-learning-rate 0.1",
        ),
        (
            DecomposeConfig,
            "m o --method caldera --backbone spqr --spqr-bits 4 --outliers 0.02 --bits-per-weight 7.5 "
            "--factor-format lloyd4 --top-rank 2 --top-format int8 --weighting fisher --calibration a.txt",
        ),
    ],
    "plan": [
        (
            PlanConfig,
            "m --backbone nf4 --factor-format bf16 --rank 3 --calibration a.txt b.txt --calibration-tokens 99 "
            "--context-length 9 --sink-weight 0.5 --shrinkage auto --block-size 128 --double-quant --targets q "
            "--exclude k --seed 7 --dtype float16 --propagate sequential --processes 2 --plain-prompts --json j "
            "--gpu-memory 24GB",
        ),
        (PlanConfig, "m --method afm --no-centred --kept-fraction 0.7 --allocation uniform --form pivoted"),
        (PlanConfig, "m --method loftq --backbone nf4 --rank 3 --iterations 2 --save s"),
        (PlanConfig, "m --plan p.json"),
        (PlanConfig, "m --full-rank --method svd"),
        (PlanConfig, "m --average-rank 16 --backbone nf4 --rounding nearest"),
        (PlanConfig, "m --method two_sided --damping 0.3 --rank 3"),
        (
            PlanConfig,
            "m --method afm --covariance-groups 2 --kept-fraction 0.7 --allocation bolaco --trials 5 --probes 4 "
            "--validation-tokens 99 --kl-weight 2.5 --searched qk,up+gate",
        ),
        (PlanConfig, "m --max-bytes 9 --embeddings nf4 --allocation mixed --mix int2 nf4 --refine 3 --measure-control"),
        (PlanConfig, "m --sweep s --measure --calibration a.txt --bits-per-weight 8 --allocation mixed"),
        (
            PlanConfig,
            "m --method caldera --backbone int4 --rank 3 --downdate off --order q --incoherence --group-size 16 "
            "--symmetric",
        ),
        (PlanConfig, "m --kept-fraction 0.7 --sensitivity-tokens 5 --recover-epochs 2 --recover-learning-rate 0.1"),
        (
            PlanConfig,
            "m --method caldera --backbone spqr --spqr-bits 4 --outliers 0.02 --bits-per-weight 7.5 "
            "--factor-format lloyd4 --top-rank 2 --top-format int8 --weighting fisher",
        ),
    ],
    "train": [
        (
            TrainConfig,
            "--model_name_or_path m --output_dir o --dataset_name d --dataset_config c --dataset_train_split s "
            "--dataset_test_split t --eval_dataset_name e --mode lora --lora_r 3 --lora_alpha 5.5 --lora_dropout 0.1 "
            "--lora_on smaller --targets q --dtype float16 --dequantize_once --dry_run --learning_rate 0.5 --packing "
            "--objective distill --teacher_model_name_or_path t --teacher_logits l --teacher_top_k 5 "
            "--distill_ce_weight 0.5 --distill_temperature 2 --plain_prompts",
        ),
        (
            TrainConfig,
            "--model_name_or_path m --output_dir o --dataset_name d --mode scales --scales_on components_and_outputs "
            "--learning_rate 0.5 --packing",
        ),
        (
            TrainConfig,
            "--model_name_or_path m --output_dir o --dataset_name d --mode basis --basis_share 0.3 --basis_new 4 "
            "--basis_start 0.1 --basis_every 7 --learning_rate 0.5 --packing",
        ),
        *(
            (
                TrainConfig,
                f"--model_name_or_path m --output_dir o --dataset_name d --mode basis {size} --learning_rate 0.5 "
                "--packing",
            )
            for size in ("--basis_kept_fraction 0.3", "--basis_max_bytes 8MB")
        ),
    ],
    "evaluate": [
        (
            EvaluateConfig,
            "m --text a.txt b.txt --context-length 9 --max-tokens 8 --dtype float16 --dequantize-once --json j "
            "--plain-prompts --dry-run --original o --samples 2 --speed --batch-size 3 --tasks humaneval,piqa copa "
            "--tasks-dir t --limit 4 --apply-chat-template --confirm-run-unsafe-code --max-new-tokens 5 "
            "--samples-per-problem 6 --temperature 0.5 --seed 7",
        )
    ],
    "export": [
        (
            ExportConfig,
            "m o --format dense --dtype float16 --threshold 0.5 --text a.txt --plain-prompts --overwrite --dry-run "
            "--push-to-hub me/it --private",
        ),
        (ExportConfig, "m o --format gguf --base b --like a.gguf --adapter-type q8_0 --dense-type f32"),
        (ExportConfig, "m o --format peft --pad-ranks"),
        (
            ExportConfig,
            "m o --format factored --merge feedback --advise --merge-limit 0.1 --text t.txt --calibration a.txt b.txt "
            "--calibration-tokens 9",
        ),
    ],
    "inspect": [(InspectConfig, "m --json j")],
    "correct": [
        (
            CorrectConfig,
            "q.gguf m o --calibration a.txt b.txt --rank 3 --calibration-tokens 9 --context-length 8 --targets t "
            "--exclude e --factor-format bf16 --adapter-type q8_0 --dtype float16 --seed 4 --plain-prompts --overwrite "
            "--dry-run --push-to-hub me/it --private",
        )
    ],
    "chat": [
        (ChatConfig, "m --prompt p --system s --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --seed 2 --json j"),
        (ChatConfig, "m --file f --dtype float16 --dequantize-once"),
    ],
    "doctor": [(DoctorConfig, "--json j")],
}


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keywords that the command line hands to the Python function of its verb."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(lord_tune, words[0], lambda **values: seen.update(values), raising=False)
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
    return seen


@pytest.mark.parametrize("verb", FLAGS)
def test_every_field_is_a_flag(verb, monkeypatch):
    """And arrives with the type of its field."""
    reached: set[str] = set()
    for record, text in FLAGS[verb]:
        config = record.build(parsed([verb, *text.split()], monkeypatch))
        defaults = {name: entry.get_default(call_default_factory=True) for name, entry in record.model_fields.items()}
        reached |= config.model_fields_set & {name for name in defaults if getattr(config, name) != defaults[name]}
        assert verb != "train" or (config.model_extra or {}) == {"learning_rate": "0.5", "packing": "true"}
        assert len(getattr(config, "calibration", [])) < 2 or config.calibration == ["a.txt", "b.txt"]
        assert verb != "evaluate" or config.text == ["a.txt", "b.txt"]
        word = next(iter(text.partition("--shrinkage ")[2].split()), "0.0")
        assert getattr(config, "shrinkage", word) in (word, float(word) if word != "auto" else word)
    same_as_default = {"method", "allocation"} & set(record.model_fields)  # set above, to their defaults in one run
    assert reached | same_as_default == set(record.model_fields)


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        ("decompose", {"model": "a model", "out": "o", "rank": 3, "calibration": ["a b.txt", "c.txt"], "seed": 4}),
        ("decompose", {"model": "m", "out": "o", "method": "afm", "centred": False, "rank": 3, "calibration": ["c"]}),
        ("decompose", {"model": "m", "out": "o", "method": "svd", "rank": 0, "backbone": "nf4", "double_quant": True}),
        (
            "decompose",
            {"model": "m", "out": "o", "method": "caldera", "bits_per_weight": 5.5, "rank": 8, "calibration": ["c"]}
            | {"factor_format": "e8-3", "top_rank": 1, "top_format": "fp32", "incoherence": False, "downdate": "on"},
        ),
        ("export", {"model": "m", "out": "o", "format": "dense", "dtype": "float16", "threshold": 0.0}),
        (
            "train",
            {"model_name_or_path": "m", "output_dir": "o", "dataset_name": "d", "mode": "lora", "lora_alpha": 2.0}
            | {"packing": True, "learning_rate": 1e-3, "report_to": ["none"], "run_name": "first try"},
        ),
        (
            "train",
            {"model_name_or_path": "m", "output_dir": "o", "dataset_name": "d", "label_names": ["labels", "ids"]}
            | {"lr_scheduler_kwargs": {"num_cycles": 2}},
        ),
    ],
    ids=[
        "decompose",
        "decompose afm",
        "decompose nf4",
        "decompose caldera",
        "export",
        "train",
        "train with lists and mappings",
    ],
)
def test_the_recorded_command_repeats_the_run(verb, values, monkeypatch):
    """The `command` in decomposition.json and the cards parses back to the configuration it came from."""
    from lord_tune.provenance import command_line

    record = {"decompose": DecomposeConfig, "export": ExportConfig, "train": TrainConfig}[verb]
    config = record.build(values)
    again = record.build(parsed(shlex.split(command_line(verb, config))[1:], monkeypatch))
    for name in record.model_fields:
        assert getattr(again, name) == getattr(config, name)
    if isinstance(config, TrainConfig):
        first, second = (
            dataclasses.asdict(trainer_arguments(run.trainer_values(), run.mode, True, [])) for run in (config, again)
        )
        assert first == second


# ---- precedence ----------------------------------------------------------------------------------------------------


def test_command_line_beats_yaml_beats_defaults(bench, tmp_path, capfd):
    file = tmp_path / "run.yaml"
    file.write_text("method: svd\nrank: 12\nfactor_format: fp16\nform: plain\ntargets: q_proj$\n")
    with pytest.raises(SystemExit) as stop:
        main(["decompose", str(bench.model), str(tmp_path / "out"), "--config", str(file), "--rank", "6"])
    assert stop.value.code == 0
    written = json.loads((tmp_path / "out" / "decomposition.json").read_text())["config"]
    assert written["rank"] == 6  # the command line over YAML
    assert written["factor_format"] == "fp16" and written["method"] == "svd"  # YAML over the defaults
    assert written["backbone"] == "none" and written["seed"] == 0  # the defaults
    assert Run({}, tmp_path / "out").tensors[f"{Q}.left.weight"].shape == (64, 6)


def test_command_line_beats_yaml_for_trl_keys(bench, tmp_path, capfd):
    file = tmp_path / "run.yaml"
    out = tmp_path / "out"
    content = {"model_name_or_path": str(bench.decompose().folder), "dataset_name": str(bench.rows)}
    content |= {"max_steps": 5, "max_length": 32, "mode": "lora", "lora_r": 2, "save_strategy": "no"}
    file.write_text(json.dumps(content))  # JSON is YAML
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(file), "--output_dir", str(out), "--max_steps", "1", "--lora-r", "3"])
    assert stop.value.code == 0
    assert json.loads((out / "train_results.json").read_text())["steps"] == 1
    assert adapter_config(out)["r"] == 3


def test_everything_may_stand_in_yaml(bench, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": str(bench.model), "out": str(tmp_path / "out"), "method": "svd", "rank": 4}))
    with pytest.raises(SystemExit) as stop:
        main(["decompose", "--config", str(file)])
    assert stop.value.code == 0 and Run({}, tmp_path / "out").manifest[Q]["rank"] == 4


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "decompose MODEL OUT --method svd --rank 8 --dry-run",
            ("rank", "8", "backbone", "none", "calibration_tokens"),
        ),
        (
            "train --model_name_or_path FACTORED --output_dir OUT --dataset_name ROWS --max_steps 9 --dry-run",
            ("9", "activations", "peak"),
        ),
        ("export MODEL OUT --format factored --dry-run", ("factored", "overwrite")),
        ("evaluate MODEL --text ROWS --json OUT --dry-run", ("context_length", "1024")),
    ],
    ids=["decompose", "train", "export", "evaluate"],
)
def test_dry_run_prints_the_plan_and_writes_nothing(words, shown, bench, tmp_path, capfd):
    places = {"MODEL": str(bench.model), "OUT": str(tmp_path / "out"), "ROWS": str(bench.rows)}
    places["FACTORED"] = str(bench.decompose().folder)
    with pytest.raises(SystemExit) as stop:
        main([places.get(word, word) for word in words.split()])
    printed = capfd.readouterr().out
    assert stop.value.code == 0 and all(part in printed for part in shown)
    assert list(tmp_path.iterdir()) == []
