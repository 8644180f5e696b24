"""Experts of a mixture: unfused, they are layers like any other. Four styles: Mixtral and Qwen3-MoE (converted on
loading), gpt-oss (transposed, with biases), DeepSeek-V3 (a dense block first, shared experts)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from test_engine import decompose_recorded
from tiny import MIXTURES, code_document, read_tensors, save_tiny, tiny_family, tiny_tokenizer, without_sentinels
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

import lord_tune
from lord_tune.adapters import attach
from lord_tune.decomposition import Journal
from lord_tune.decomposition.survey import survey
from lord_tune.errors import LordWarning, UsageError
from lord_tune.integrations.checkpoint import Checkpoint, skeleton
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import expert_of, factored_layers, fuse, unfuse, unfused_parameters
from lord_tune.training.run import check_experts

TEXT = {"calibration_tokens": 512, "context_length": 64}
STORES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 12},
    "nf4": {"backbone": "nf4", "rank": 8},
    "weighted": {"kept_fraction": 0.8},
}
IDS = torch.tensor([tiny_tokenizer()(code_document(number))["input_ids"][:64] for number in (40, 41)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """style -> its dense checkpoint of two blocks, saved once."""
    folder = tmp_path_factory.mktemp("mixtures")

    def get(style: str) -> Path:
        return folder / style if (folder / style).is_dir() else save_tiny(two_blocks(style), folder / style)

    return get


def two_blocks(style: str) -> Any:
    return tiny_family(style, layers=2)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def experts_modules(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


# --- the modules ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", MIXTURES)
def test_unfused_experts_compute_to_the_last_bit_what_transformers_loop_does(style, dtype):
    model = two_blocks(style).to(dtype)
    model.set_experts_implementation("eager")
    state, reference = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    names = unfuse(model)
    assert len(names) == 2 * (1 if style == "deepseek" else 2) and unfused_parameters(model) == names
    assert torch.equal(logits(model), reference)
    fuse(model, names[:1])  # one parameter fused, the other not
    assert torch.equal(logits(model), reference)
    fuse(model)
    assert torch.equal(logits(model), reference)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], state[n]) for n in state)


@pytest.mark.parametrize("declared", [{"has_gate": False}, {"has_post_expert_norm": True}, {"is_transposed": True}])
def test_every_declaration_of_the_decorator_is_followed(declared):
    """Against transformers' own batched forward; one choice names an expert that is another process's."""

    @use_experts_implementation(**declared)
    class Experts(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = 3, nn.functional.silu, nn.RMSNorm(8)
            first = 12 if declared.get("has_gate", True) else 6
            shapes = (8, first), (6, 8)
            shapes = shapes if "is_transposed" in declared else tuple(shape[::-1] for shape in shapes)
            setattr(self, "gate_up_proj" if first == 12 else "up_proj", nn.Parameter(torch.randn(3, *shapes[0])))
            self.down_proj = nn.Parameter(torch.randn(3, *shapes[1]))

        def forward(self, *args: Any) -> Tensor:
            raise NotImplementedError

    torch.manual_seed(0)
    module: Any = Experts(SimpleNamespace(_experts_implementation="eager"))
    module._is_expert_parallel = True
    hidden, weights = torch.randn(5, 8), torch.rand(5, 2)
    chosen = torch.tensor([[0, 2], [2, 0], [2, 3], [0, 3], [2, 0]])
    expected = batched_mm_experts_forward(module, hidden, chosen, weights * (chosen < 3))
    unfuse(nn.ModuleDict({"experts": module}))
    assert torch.allclose(module(hidden, chosen, weights), expected, atol=1e-5)


def test_modules_without_the_declaration_stay_dense():
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=64, num_local_experts=2, interleave_moe_layer_step=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)
    found = survey(model)
    assert any("4 fused expert parameters stay dense" in note for note in found.notes())
    reasons = {name: reason for name, reason in found.skipped.items() if ".experts." in name}
    assert len(reasons) == 4 and set(reasons.values()) == {"fused experts (3-D parameter)"}


# --- reading ---


@pytest.mark.parametrize(("stored", "asked"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])  # from a converted copy, and from the checkpoint itself
def test_one_expert_is_read_without_the_others(style, stored, asked, tmp_path, monkeypatch):
    model = two_blocks(style).to(getattr(torch, stored))
    source = Checkpoint(str(save_tiny(model, tmp_path / "base")), asked, tmp_path / "scratch")
    names = unfuse(source.model)
    original = OffloadedWeightsLoader.__getitem__

    def guarded(self: Any, key: str) -> Tensor:
        assert key not in names, "the whole parameter is read"
        return original(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", guarded)
    unfuse(model)
    for name, tensor in model.state_dict().items():
        if expert_of(name) is not None or name in names:
            source.load([name])
            found = source.model.state_dict()[name]
            wanted = tensor if name in names or asked is None else tensor.to(getattr(torch, asked))
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
            kept = source.stored(name)
            assert kept is None or asked is None and torch.equal(kept, tensor)
            assert (kept is None) == (asked is not None or name in names)
            source.release([name])
            assert source.model.state_dict()[name].is_meta


# --- decompose ---


def routed_inputs(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Expert's layer -> the rows it reads in the fused model, computed here from the tokens that chose it."""
    rows: dict[str, list[Tensor]] = {}

    def observe(path: str) -> Callable:
        def hook(module: Any, args: tuple) -> None:
            hidden, chosen, _ = args
            for expert in range(len(module.down_proj)):
                x = hidden[(chosen == expert).any(-1)]
                weight = module.gate_up_proj[expert] if module.is_transposed else module.gate_up_proj[expert].T
                bias = module.gate_up_proj_bias[expert] if module.has_bias else 0.0
                rows.setdefault(f"{path}.unfused.gate_up_proj.{expert}", []).append(x)
                rows.setdefault(f"{path}.unfused.down_proj.{expert}", []).append(module._apply_gate(x @ weight + bias))

        return hook

    handles = [m.register_forward_pre_hook(observe(name)) for name, m in experts_modules(model).items()]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


@pytest.mark.parametrize("style", MIXTURES)
def test_every_expert_has_statistics_of_its_own_tokens(style, base, rows_file, tmp_path):
    """Against the fused model; float32 forward passes, so Gram matrices agree to 1e-4 of their largest entry."""
    made = decompose_recorded(base(style), tmp_path / "out", calibration=[str(rows_file)], rank=12, **TEXT)
    for stream, windows in made.windows.items():
        expected = routed_inputs(load_dense_or_factored(str(base(style))), windows)
        for block, streams in made.statistics.items():
            for name, found in streams[stream].items():
                if expert_of(name) is None:
                    continue
                rows = expected[name].double()
                gram = found.gram if hasattr(found, "gram") else found.rows.double().T @ found.rows.double() / len(rows)
                wanted = rows.T @ rows / len(rows)
                assert float((gram - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()), (block, name)
                if stream == "calibration":
                    assert made.report["layers"][name]["inputs"]["tokens"] == len(rows)


def densely(base: Path, factored: Any) -> Any:
    """The dense model, fused and eager, with the weights that the factored layers stand for put into its parameters."""
    model = load_dense_or_factored(str(base))
    model.set_experts_implementation("eager")
    state = model.state_dict()
    for name, layer in factored_layers(factored).items():
        part = expert_of(name)
        target = state[f"{name}.weight"] if part is None else state[part[0]][part[1]]
        weight = layer.dense_weight()
        target.copy_(weight.T if layer.plan.conv1d else weight)
    return model


@pytest.mark.one_in(4)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("style", MIXTURES)
def test_what_is_written_loads_saves_and_exports(style, store, base, rows_file, tmp_path):
    """Logits: float32, up to the order of sums."""
    out = tmp_path / "out"
    report = lord_tune.decompose(str(base(style)), str(out), calibration=[str(rows_file)], **STORES[store], **TEXT)
    experts = {name: entry for name, entry in report["layers"].items() if expert_of(name) is not None}
    assert len(experts) == 8 * (1 if style == "deepseek" else 2)
    assert any(entry["rank"] != "dense" for entry in experts.values())
    assert not any("experts" in name for name in report["skipped"])
    model = load_dense_or_factored(str(out))
    found = logits(model)
    dense = densely(base(style), model)
    assert float((found - logits(dense)).abs().max()) < 1e-4

    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    before, after = read_tensors(out), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "again"), device_map="cpu")), found)

    lord_tune.export(str(out), str(tmp_path / "dense"), format="dense")
    names, exported = read_tensors(base(style)), read_tensors(tmp_path / "dense")
    assert names.keys() == exported.keys() and all(names[n].shape == exported[n].shape for n in names)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and "experts_implementation" not in json.dumps(config)
    plain = load_dense_or_factored(str(tmp_path / "dense"))
    assert not unfused_parameters(plain) and float((logits(plain) - found).abs().max()) < 1e-4
    assert report["totals"]["model_bytes"] == sum(
        t.numel() * t.element_size() for t in without_sentinels(before).values()
    )


def test_blocks_of_experts_recover(base, rows_file, tmp_path):
    options = {"rank": 8, "recover_epochs": 1, "propagate": "sequential"}
    report = lord_tune.decompose(
        str(base("mixtral")), str(tmp_path / "out"), calibration=[str(rows_file)], **options, **TEXT
    )
    assert all(block["after"] < block["before"] for block in report["recovery"].values())
    model = load_dense_or_factored(str(tmp_path / "out"))
    assert float((logits(model) - logits(densely(base("mixtral"), model))).abs().max()) < 1e-4


def test_a_run_that_died_between_blocks_continues_to_the_same_bytes(base, rows_file, tmp_path, monkeypatch):
    options = {"calibration": [str(rows_file)], "kept_fraction": 0.8} | TEXT
    lord_tune.decompose(str(base("gpt-oss")), str(tmp_path / "whole"), **options)
    commit = Journal.commit

    def die(self: Journal, step: str, *rest: Any, **more: Any) -> None:
        commit(self, step, *rest, **more)
        if step == "writing/0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "commit", die)
        lord_tune.decompose(str(base("gpt-oss")), str(tmp_path / "cut"), **options)
    lord_tune.decompose(str(base("gpt-oss")), str(tmp_path / "cut"), resume=True, **options)
    files = [sorted((tmp_path / name).glob("*.safetensors*")) for name in ("whole", "cut")]
    assert len(files[0]) == 4 and [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert (tmp_path / "whole" / "config.json").read_bytes() == (tmp_path / "cut" / "config.json").read_bytes()


def test_only_what_is_targeted_is_unfused(base, tmp_path):
    first, none = tmp_path / "first", tmp_path / "none"
    options = {"rank": 12, "method": "svd"}
    report = lord_tune.decompose(str(base("gpt-oss")), str(first), targets="down_proj.[01]$", **options)
    assert len(report["layers"]) == 4  # the other experts of these parameters are dense layers
    assert report["skipped"]["model.layers.0.mlp.experts.gate_up_proj"] == "not in targets"
    assert report["skipped"]["model.layers.0.mlp.experts.unfused.down_proj.2"] == "not in targets"
    before, after = read_tensors(base("gpt-oss")), read_tensors(first)
    name = "model.layers.0.mlp.experts."
    assert torch.equal(before[name + "gate_up_proj"], after[name + "gate_up_proj"])
    assert torch.equal(before[name + "down_proj"][2], after[name + "unfused.down_proj.2.weight"])
    model = load_dense_or_factored(str(first))
    assert float((logits(model) - logits(densely(base("gpt-oss"), model))).abs().max()) < 1e-4

    report = lord_tune.decompose(str(base("gpt-oss")), str(none), exclude="experts", **options)
    assert report["skipped"]["model.layers.1.mlp.experts.down_proj"] == "in exclude"
    config = json.loads((none / "config.json").read_text())["quantization_config"]
    assert "unfused" not in config and not any("unfused" in key for key in read_tensors(none))


def test_without_lord_tune_experts_fail_loudly_and_their_dense_export_loads(base, tmp_path):
    lord_tune.decompose(str(base("mixtral")), str(tmp_path / "out"), rank=12, method="svd", targets="down_proj")
    lord_tune.export(str(tmp_path / "out"), str(tmp_path / "dense"), format="dense")
    code = "import transformers as t\nfor name in ('dense', 'out'): t.AutoModelForCausalLM.from_pretrained(name)\n"
    code = code.replace("(name)", "(name); print(name, 'loaded')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "dense loaded" and run.returncode != 0 and "mismatched" in run.stderr


# --- few tokens ---


def test_an_expert_that_never_ran_stays_dense(rows_file, tmp_path):
    model = two_blocks("gpt-oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    dense = save_tiny(model, tmp_path / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LordWarning)
        report = lord_tune.decompose(str(dense), str(tmp_path / "out"), calibration=[str(rows_file)], rank=12, **TEXT)
    left = [f"model.layers.1.mlp.experts.unfused.{leaf}.3" for leaf in ("gate_up_proj", "down_proj")]
    assert [n for n, entry in report["layers"].items() if entry["rank"] == "dense"] == left
    texts = [str(w.message) for w in caught]
    assert all(any(name in text and "never ran" in text for text in texts) for name in left)
    loaded = load_dense_or_factored(str(tmp_path / "out"))
    assert float((logits(loaded) - logits(densely(dense, loaded))).abs().max()) < 1e-4


def test_experts_that_saw_few_tokens_are_reported_in_one_line(base, rows_file, tmp_path, capfd):
    options = {"calibration_tokens": 128, "context_length": 64, "rank": 12}
    report = lord_tune.decompose(str(base("mixtral")), str(tmp_path / "out"), calibration=[str(rows_file)], **options)
    tokens = {n: e["inputs"]["tokens"] for n, e in report["layers"].items() if expert_of(n) is not None}
    few = {(expert_of(n), t) for n, t in tokens.items() if t < report["layers"][n]["shape"][1] and "down_proj" in n}
    said = " ".join("".join(capfd.readouterr()).split())
    found = re.findall(r"(\d+) of 8 experts saw fewer tokens than inputs, the least (\d+) \((\S+)\)", said)
    assert len(found) == 1 and found[0][:2] == (str(len(few)), str(min(tokens.values())))
    assert tokens[found[0][2]] == min(tokens.values())


# --- plan, train, evaluate, refusals ---


@pytest.mark.parametrize("style", ["gpt-oss", "deepseek"])  # test_plan.py has mixtral
def test_plan_foresees_what_decompose_writes(style, base, rows_file, tmp_path):
    options = {"backbone": "nf4", "rank": 8} | TEXT
    plan = lord_tune.plan(str(base(style)), json=str(tmp_path / "plan.json"), **options)
    report = lord_tune.decompose(str(base(style)), str(tmp_path / "out"), calibration=[str(rows_file)], **options)
    assert plan["model_bytes_after"] == report["totals"]["model_bytes"]
    assert plan["ranks"] == {name: entry["rank"] for name, entry in report["layers"].items()}
    found = lord_tune.evaluate(str(tmp_path / "out"), text=[str(rows_file)], max_tokens=128, context_length=64)
    for key in ("model_bytes", "linear_bits_per_weight", "parameters"):
        assert found[key] == report["totals"][key]


MODES: dict[str, dict[str, Any]] = {
    "factors": {},
    "lora": {"factor_format": "nf4"},
    "split": {"backbone": "int4", "factor_format": "lloyd4", "top_rank": 4},
    "scales": {"backbone": "nf4"},
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", ["mixtral", "gpt-oss"])
def test_experts_train_load_and_fold_in_every_mode(style, mode, base, rows_file, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    lord_tune.decompose(str(base(style)), str(out), rank=12, method="svd", **MODES[mode])
    results = lord_tune.train(
        model_name_or_path=str(out), dataset_name=str(rows_file), output_dir=str(run), mode=mode, max_steps=1,
        max_length=64, per_device_train_batch_size=2, packing=True, learning_rate=1e-2, lr_scheduler_type="constant",
        warmup_steps=0, save_strategy="no",
    )  # fmt: skip
    memory = results["memory"]  # routing is foreseen as even, which moves what is saved by a few rows
    assert memory["predicted"]["activations"] == pytest.approx(memory["measured"]["activations"], rel=0.03)
    start = load_dense_or_factored(str(out))
    model, _ = lord_tune.load(str(run))
    trained = logits(model)
    assert float((trained - logits(start)).abs().max()) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(start))
    folded = lord_tune.fold(model)
    assert float((logits(folded) - trained).abs().max()) < 1e-4
    names = [name for name in factored_layers(folded) if expert_of(name) is not None]
    before, after = factored_layers(start), factored_layers(folded)
    assert any(not torch.equal(before[name].dense_weight(), after[name].dense_weight()) for name in names)
    lord_tune.export(str(run), str(tmp_path / "folded"), format="factored")
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "folded"))), logits(folded))


def test_what_experts_cannot_do_is_refused(base, rows_file, tmp_path):
    out = tmp_path / "out"
    lord_tune.decompose(str(base("mixtral")), str(out), backbone="nf4", rank=8, method="svd")
    with pytest.raises(UsageError, match="experts .* are decomposed"):
        lord_tune.export(str(out), str(tmp_path / "peft"), format="peft")
    arguments = SimpleNamespace(world_size=2, ddp_find_unused_parameters=False)
    with pytest.raises(UsageError, match="ddp_find_unused_parameters"):
        check_experts(load_dense_or_factored(str(out)), arguments)
    check_experts(load_dense_or_factored(str(out)), SimpleNamespace(world_size=2, ddp_find_unused_parameters=None))
    shutil.rmtree(out)
    options = {"calibration": [str(rows_file)], "method": "afm", "rank": 12, "targets": "experts"} | TEXT
    lord_tune.decompose(str(base("mixtral")), str(out), **options)
    with pytest.raises(UsageError, match=r"unfused\.gate_up_proj\.0' carries a bias"):
        lord_tune.export(str(out), str(tmp_path / "dense"), format="dense")
    biased = tmp_path / "biased"  # gpt-oss has a place for it
    lord_tune.decompose(str(base("gpt-oss")), str(biased), **options)
    lord_tune.export(str(biased), str(tmp_path / "dense"), format="dense")


def test_a_skeleton_counts_as_the_model_does(base):
    shape = skeleton(str(base("mixtral")))
    unfuse(shape)
    assert all(p.data_ptr() == 0 for p in shape.parameters())  # else different experts would count as one tensor


def test_thousands_of_experts_share_patterns_of_their_adapter(base, tmp_path, monkeypatch):
    """PEFT tries each pattern on each module; the ranks must be those of the layers all the same."""
    options = {"kept_fraction": 0.8, "allocation": "uniform", "method": "svd", "form": "plain"}
    lord_tune.decompose(str(base("mixtral")), str(tmp_path / "out"), **options)
    monkeypatch.setattr(attach, "_OWN_PATTERNS", 4)
    plain = load_dense_or_factored(str(tmp_path / "out"))
    ranks = {name: layer.rank for name, layer in factored_layers(plain).items()}
    model = attach.expose_factors(plain)
    assert len(set(ranks.values())) > 1 and len(model.peft_config["default"].rank_pattern) == len(set(ranks.values()))
    assert attach.coverage(model).trained == ranks
    assert torch.equal(logits(model), logits(load_dense_or_factored(str(tmp_path / "out"))))
