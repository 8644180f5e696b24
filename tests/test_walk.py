"""The walk over the blocks of models that do more than hand hidden states on, against whole passes; and the check that
every run makes of its own walk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from forking import ForkServer
from test_engine import assert_equal_decompositions, changed, decompose_recorded, written
from tiny import save_tiny
from torch import Tensor, nn

import lord_tune
from lord_tune.calibration import handed
from lord_tune.calibration.blocks import Blocks, first_input
from lord_tune.calibration.collect import BlockWalk
from lord_tune.calibration.sensitivity import output_sensitivity
from lord_tune.decomposition import survey as surveying
from lord_tune.decomposition.survey import survey
from lord_tune.errors import CalibrationError, LordWarning, UsageError
from lord_tune.integrations.checkpoint import skeleton
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.running import run_model, task_of

ON = ""  # the blocks hand their states on
# architecture -> (part of the reason why its own forward is followed, blocks)
CASES: dict[str, tuple[str, int]] = {
    "Qwen3Model": (ON, 3),  # without a head: a key-value cache must not outlive its window
    "Qwen2ForSequenceClassification": (ON, 3),
    "BloomForCausalLM": (ON, 3),  # returns attention weights that nobody uses
    "XLNetLMHeadModel": (ON, 3),
    "DebertaV2ForMaskedLM": (ON, 3),  # projections that run twice in a block
    "Gemma4ForCausalLM": ("arguments of its blocks differ between windows", 4),  # inputs per layer
    "Gemma3nForCausalLM": ("differ between windows", 4),  # and keys and values shared through a mapping
    "DeepseekV4ForCausalLM": ("differ between windows", 3),  # experts chosen by the token
    "BartForConditionalGeneration": ("is not the output of the block before", 6),
    "T5ForConditionalGeneration": ("more of what the one before returned", 6),  # the first block's position bias
    "SwitchTransformersForConditionalGeneration": ("more of what the one before returned", 15),
    "DebertaV2ForMaskedLM:conv": ("is not the output of the block before", 3),  # a convolution after block 0
    "XLMWithLMHeadModel": ("is not the output of the block before", 6),  # lists of attentions and of feed-forwards
    "AlbertForMaskedLM": ("a block runs more than once", 1),
}


def walked(name: str, folder: Path, ids: Tensor) -> tuple[Any, Blocks, dict[str, nn.Module], BlockWalk, str]:
    model = build(name)
    found = survey(model.requires_grad_(False), None, None, run_model)
    layers = {layer: model.get_submodule(layer) for layer in found.layers}
    walk = BlockWalk(model, found.blocks, {"s": ids}, run_model, folder)
    return model, found.blocks, layers, walk, walk.start()


def inputs_of(model: nn.Module, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """Layer -> its inputs in whole forward passes, every call of it; absent if it never ran."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, n=name: rows[n].append(first_input(args, kwargs).flatten(0, -2).double()),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for window in ids:
            run_model(model, window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items() if found}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_sees_what_it_sees_in_whole_passes(name, tmp_path):
    """Gram matrices to 1e-5 of their norm: float32 forward passes of the same values."""
    ids = torch.randint(1, 250, (3, 40), generator=torch.Generator().manual_seed(3))
    model, blocks, layers, walk, reason = walked(name, tmp_path, ids)
    expected, count = CASES[name]
    assert len(blocks.modules) == count and (expected in reason if expected else not reason), reason
    rows = inputs_of(model, layers, ids)
    seen = set()
    for index in range(count):
        members = {n: m for n, m in layers.items() if blocks.holds(index, n)}
        for layer, moments in walk.collect(index, members, streams=("s",))["s"].items():
            gram = rows[layer].T @ rows[layer] / len(rows[layer])
            assert float((moments.gram - gram).norm()) < 1e-5 * float(gram.norm()), layer
            assert moments.tokens == len(rows[layer])
            seen.add(layer)
        walk.forget(index - 1, ["s"])
    assert seen == rows.keys() and seen


@pytest.mark.parametrize("name", [name for name in CASES if "MaskedLM" not in name])
def test_gradients_are_those_of_whole_passes(name, tmp_path):
    """Of the loss by every layer's output, block by block from files against one backward pass: to 1e-3."""
    ids = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(4))
    model, blocks, layers, walk, _ = walked(name, tmp_path, ids)
    loss = task_of(None).loss
    gradients: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        layer.register_full_backward_hook(lambda m, i, o, n=n: gradients[n].append(o[0].flatten(0, -2).double()))
        for n, layer in layers.items()
    ]
    handles += [
        module.register_forward_hook(lambda m, args, output: output.requires_grad_(True))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    for window in ids:
        with torch.enable_grad():
            loss(model, window[None]).backward()
    for handle in handles:
        handle.remove()
    for index in range(len(blocks.modules)):
        walk.advance(index, "s")
    walk.write_gradients("s", loss)
    generator = torch.Generator().manual_seed(5)
    checked = 0
    for index in reversed(range(len(blocks.modules))):
        members = {n: m for n, m in layers.items() if blocks.holds(index, n) and gradients[n]}
        bases = {n: torch.linalg.qr(torch.randn(gradients[n][0].shape[1], 5, generator=generator)).Q for n in members}
        found = output_sensitivity(walk, index, "s", members, bases, 1)
        walk.forget_gradients(index, "s")
        for layer in members:
            sums = found[layer]
            exact = ((torch.cat(gradients[layer]) @ bases[layer].double()) ** 2).sum(0)
            assert torch.allclose(sums, exact, rtol=1e-3, atol=1e-6 * float(exact.max())), layer
            checked += 1
    assert checked
    # what is left of the files is the last step's: nothing piles up
    assert not [p for p in tmp_path.iterdir() if "gradients" in p.name and f"-{len(blocks.modules) - 1:05d}-" in p.name]


def test_a_model_that_comes_back_to_a_block_is_run_whole_and_said_so():
    model = build("HrmTextForCausalLM")
    found = survey(model, None, None, run_model)
    assert found.blocks.whole and any("one after the other" in note for note in found.notes())


def test_a_vision_tower_is_not_taken_for_the_model():
    """Deeper than the text model; a forward pass on text does not run it."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 300, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    ids = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    found = survey(model, None, None, run_model)
    assert found.blocks.names() == ["model.language_model.layers.0", "model.language_model.layers.1"]
    assert found.skipped["model.visual.blocks.0.attn.qkv"] == "outside the blocks"


# --- whole decompositions ---

TEXT = {"calibration_tokens": 512, "context_length": 64}
KINDS: dict[str, dict[str, Any]] = {
    "weighted": {"kept_fraction": 0.8},
    "sequential": {"backbone": "nf4", "rank": 4, "propagate": "sequential"},
    "recovered": {"backbone": "nf4", "rank": 4, "recover_epochs": 1},
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its blocks get an input per layer that depends on the tokens."""
    return save_tiny(build("Gemma4ForCausalLM"), tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def server():
    made = ForkServer()
    yield made
    made.close()


def words(base: Path, rows: Path, kind: str, *more: str) -> list[str]:
    options = [w for key, value in (KINDS[kind] | TEXT).items() for w in (f"--{key.replace('_', '-')}", str(value))]
    return ["decompose", str(base), "out", "--calibration", str(rows), *options, *more]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_continues_to_the_same_bytes_and_two_processes_do_the_same(
    server, gemma, rows_file, tmp_path, kind
):
    step = "sensitivity/1" if kind == "weighted" else "writing/1"
    assert server.run(tmp_path / "one", words(gemma, rows_file, kind)).codes == [0]
    assert server.run(tmp_path / "cut", words(gemma, rows_file, kind), die=("line", step, "half")).killed
    assert server.run(tmp_path / "cut", words(gemma, rows_file, kind, "--resume")).codes == [0]
    assert not changed(written(tmp_path / "one" / "out"), written(tmp_path / "cut" / "out"))
    assert server.run(tmp_path / "two", words(gemma, rows_file, kind), processes=2).codes == [0, 0]
    if kind != "recovered":  # each process takes steps of its own windows
        assert_equal_decompositions(tmp_path / "one" / "out", tmp_path / "two" / "out")


def test_encoder_and_decoder_are_decomposed_and_reload(rows_file, tmp_path):
    base = save_tiny(build("BartForConditionalGeneration"), tmp_path / "base")
    with pytest.warns(LordWarning, match="own forward, and the parts outside the blocks stay in memory"):
        report = lord_tune.decompose(
            str(base), str(tmp_path / "out"), calibration=[str(rows_file)], backbone="int8", rank=48, **TEXT
        )
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        lord_tune.train(
            model_name_or_path=str(tmp_path / "out"), dataset_name=str(rows_file), output_dir=str(tmp_path / "run")
        )
    stacks = {name.split(".")[1] for name, entry in report["layers"].items() if entry["rank"] == 48}
    assert stacks == {"encoder", "decoder"}
    ids = torch.arange(1, 50)[None]
    with torch.no_grad():
        dense, found = (run_model(load_dense_or_factored(str(path)), ids).logits for path in (base, tmp_path / "out"))
    assert float((found - dense).norm()) < 0.02 * float(dense.norm())  # 8 bits and rank 48 of 64


def test_a_head_that_is_registered_first_leaves_the_hidden_states_their_values(rows_file, tmp_path):
    """Its parameters are on the meta device while the blocks run; the ids must not follow them there."""
    base = save_tiny(build("XLMRobertaForMaskedLM"), tmp_path / "base")
    options: dict[str, Any] = {"calibration": [str(rows_file)], "rank": 8} | TEXT
    runs = [decompose_recorded(base, tmp_path / name, **options) for name in ("a", "b")]
    assert not {name for name in changed(*(written(run.folder) for run in runs)) if name.endswith(".safetensors")}
    model = load_dense_or_factored(str(base))
    layers = {name: model.get_submodule(name) for name in runs[0].report["layers"]}
    rows = inputs_of(model, layers, runs[0].windows["calibration"])
    for streams in runs[0].statistics.values():
        for name, moments in streams["calibration"].items():
            gram = rows[name].T @ rows[name] / len(rows[name])
            assert float((moments.gram - gram).norm()) < 1e-5 * float(gram.norm()), name


# --- the check of every run ---


def test_a_walk_that_gives_blocks_other_inputs_is_stopped_with_the_block(gemma, rows_file, tmp_path, monkeypatch):
    """As it was before arguments were compared: those of the first window for all."""
    monkeypatch.setattr(handed, "same", lambda first, second: True)
    monkeypatch.setattr(handed.HandedOn, "resume", _arguments_of_another_text)
    with pytest.raises(CalibrationError, match=r"the output of model\.layers\.0 differs from that of an ordinary"):
        lord_tune.decompose(
            str(gemma), str(tmp_path / "out"), calibration=[str(rows_file)], backbone="nf4", rank=4, **TEXT
        )


@torch.no_grad()
def _arguments_of_another_text(route: handed.HandedOn) -> None:
    for stream, window in route._ground.examples.items():
        route._calls[stream] = route.watched(window.roll(1), learn=True).calls


def test_a_model_whose_end_uses_more_than_the_last_block_is_stopped(llama_dir, rows_file, tmp_path, monkeypatch):
    original = handed.HandedOn._ending_with
    monkeypatch.setattr(handed.HandedOn, "_ending_with", lambda route, hidden: original(route, hidden.roll(1, 1)))
    with pytest.raises(CalibrationError, match="what the model returns differs from that of an ordinary forward pass"):
        lord_tune.decompose(
            str(llama_dir), str(tmp_path / "out"), calibration=[str(rows_file)], backbone="nf4", rank=4, **TEXT
        )


@pytest.mark.parametrize("name", [name for name in CASES if "Switch" not in name and "DeepseekV4" not in name])
def test_a_skeleton_without_values_tells_what_will_be_followed(name):
    model = build(name)
    with torch.device("meta"):
        shape = type(model)(model.config).eval()
    needs = {n: p.requires_grad for n, p in shape.named_parameters()}
    found = survey(shape, None, None, run_model)
    reason = CASES[name][0]  # not of the two whose routing of experts needs values
    assert (reason in found.follows) if reason else found.follows == ON
    assert {n: p.requires_grad for n, p in shape.named_parameters() if n in needs} == needs
    assert any("stay in memory" in note for note in found.notes()) == bool(reason)


def test_plan_counts_the_parts_that_stay_in_memory(tmp_path, monkeypatch):
    save_tiny(build("Gemma4ForCausalLM"), tmp_path / "m")
    phases, said = [], []
    for follows in (True, False):
        if not follows:
            monkeypatch.setattr(surveying, "foreseen", lambda *given: "")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            phases.append(lord_tune.plan(str(tmp_path / "m"), rank=4)["phases"])
        said.append(any("stay in memory" in str(one.message) for one in caught))
    shape = skeleton(str(tmp_path / "m"))
    outside = [p for name, p in shape.named_parameters() if "layers." not in name]  # its head is tied to the embedding
    assert phases[0]["writing"] - phases[1]["writing"] == sum(p.numel() * p.element_size() for p in outside)
    assert said == [True, False]
