"""Moments against float64 references, the block walk against a plain forward pass, windows from text."""

from __future__ import annotations

import functools
import json
import random
import re
import time
import warnings

import pytest
import torch
from tiny import CLASSIFIERS, tiny_bert, tiny_gpt2, tiny_head, tiny_llama, tiny_tokenizer
from torch import nn

from lord_tune.calibration.blocks import find_blocks, first_input
from lord_tune.calibration.collect import BlockWalk
from lord_tune.calibration.corpus import file_windows, token_windows
from lord_tune.calibration.moments import MomentAccumulator, SampleAccumulator, add_gram
from lord_tune.calibration.sensitivity import output_sensitivity, whole_model_sensitivity
from lord_tune.data.rows import recognise
from lord_tune.data.texts import documents
from lord_tune.decomposition import Survey
from lord_tune.errors import CalibrationError, LordWarning, UsageError
from lord_tune.factorizations import Core
from lord_tune.integrations.running import task_of
from lord_tune.layers import select_linears
from lord_tune.parallel import Workers

MODELS = [tiny_llama, tiny_gpt2, tiny_bert]


@pytest.mark.parametrize("width", [1, 7, 64, 130, 515, 640])
def test_gram_equals_the_float64_product(width):
    """Float32 products of 300 rows: relative error within 300 * 6e-8 of the largest entry."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randn(1, 300, width, generator=generator) + 2 for _ in range(3)]
    accumulator = MomentAccumulator(width, torch.device("cpu"))
    for window in windows:
        accumulator.update(window)
    moments = accumulator.result("x")
    rows = torch.cat(windows, 1)[0].double()
    exact = rows.T @ rows / 900
    assert torch.allclose(moments.gram, exact, rtol=0, atol=300 * 6e-8 * float(exact.max()))
    assert torch.equal(moments.gram, moments.gram.T)
    assert torch.allclose(moments.mean, rows.mean(0), atol=1e-6)
    first = torch.cat([window[:, 0] for window in windows]).double()
    assert torch.allclose(moments.sink_gram, first.T @ first / 3, atol=1e-5) and moments.tokens == 900


def test_float64_sums_keep_what_float32_sums_lose():
    total = torch.zeros(2, 2, dtype=torch.float64)
    add_gram(total, torch.tensor([[1e4, 1e4]]))
    for _ in range(100):
        add_gram(total, torch.tensor([[1.0, 1.0]]))
    assert float(total[0, 0]) == 1e8 + 100  # in float32, 1e8 + 1 == 1e8


def test_shifted_moment_is_centred():
    x = torch.randn(1, 200, 5, dtype=torch.float64) + 3
    accumulator = MomentAccumulator(5, x.device)
    accumulator.update(x)
    moments = accumulator.result("x")
    covariance = torch.cov(x[0].T, correction=0)
    rows = torch.randn(4, 5, dtype=torch.float64)
    expected = ((rows @ covariance) * rows).sum(1)
    assert torch.allclose(moments.energies(rows, moments.mean), expected, atol=1e-12)
    core = Core.of(rows, moments)
    assert torch.allclose(core.shifted_outputs(moments.mean, moments.mean), rows @ covariance @ rows.T, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_kept_rows_and_a_gram_matrix_measure_the_same(centred):
    x = torch.randn(1, 40, 6, dtype=torch.float64) + 1
    moments, sample = MomentAccumulator(6, x.device), SampleAccumulator(6, x.device)
    for accumulator in (moments, sample):
        accumulator.update(x[:, :25])
        accumulator.update(x[:, 25:])
    rows, centre = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64) if centred else None
    measured = [a.result("x").energies(rows, centre) for a in (moments, sample)]
    assert torch.allclose(*measured, rtol=1e-12)


def test_dead_inputs_and_massive_activations_are_described():
    x = torch.randn(1, 50, 8, dtype=torch.float64)
    x[..., 3], x[..., 5] = 0.0, 100.0
    accumulator = MomentAccumulator(8, x.device)
    accumulator.update(x)
    facts = accumulator.result("x").describe()
    assert facts["dead_inputs"] == 1 and facts["tokens"] == 50 and facts["largest_input_share"] > 0.99


def test_nan_inputs_are_named():
    accumulator = MomentAccumulator(3, torch.device("cpu"))
    accumulator.update(torch.full((1, 4, 3), float("nan")))
    with pytest.raises(CalibrationError, match="'layers.3.up'"):
        accumulator.result("layers.3.up")


@pytest.mark.parametrize("make", MODELS)
def test_block_walk_equals_hooks_on_a_plain_forward_pass(make, tmp_path):
    model = make().eval()
    ids = torch.randint(4, 200, (3, 24), generator=torch.Generator().manual_seed(1))
    blocks = find_blocks(model)
    layers, _ = select_linears(model, blocks.names(), None, None)
    rows: dict[str, list] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, n=name: rows[n].append(a[0].reshape(-1, a[0].shape[-1]).double()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    task = task_of(tiny_tokenizer())
    walk = BlockWalk(model, blocks, {"calibration": ids[:2], "heldout": ids[2:]}, task.forward, tmp_path)
    walk.start()
    seen = 0
    for index, prefix in enumerate(blocks.names()):
        members = {n: m for n, m in layers.items() if n.startswith(prefix + ".")}
        moments = walk.collect(index, members)
        for name in members:
            for stream, chosen in (("calibration", slice(0, 2)), ("heldout", slice(2, 3))):
                exact = torch.cat(rows[name][chosen])
                expected = exact.T @ exact / len(exact)
                # float32 forward passes of the same values; the walk only cuts them into blocks
                assert torch.allclose(moments[stream][name].gram, expected, rtol=1e-4, atol=1e-6)
            seen += 1
    assert seen == len(layers) > 0


def test_layers_with_one_input_share_one_record(tmp_path):
    model = tiny_llama().eval()
    blocks = find_blocks(model)
    layers, _ = select_linears(model, blocks.names(), None, None)
    ids = torch.randint(4, 200, (1, 16))
    walk = BlockWalk(model, blocks, {"calibration": ids}, task_of(tiny_tokenizer()).forward, tmp_path)
    walk.start()
    first = {n: m for n, m in layers.items() if n.startswith("model.layers.0.")}
    found = {name.rpartition(".")[2]: moments for name, moments in walk.collect(0, first)["calibration"].items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"] and found["gate_proj"] is found["up_proj"]
    assert [found[name].readers for name in ("q_proj", "o_proj", "gate_proj", "down_proj")] == [3, 1, 2, 1]
    assert found["q_proj"] is not found["o_proj"]


def test_a_model_without_blocks_is_walked_whole_and_said_so(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, ids):
            return self.two(self.one(nn.functional.one_hot(ids, 6).float()))

    model = Plain()
    blocks = find_blocks(model)
    assert any("no list of blocks" in note for note in Survey(blocks, {}, {}).notes())
    walk = BlockWalk(model, blocks, {"calibration": torch.randint(0, 6, (4, 8))}, lambda m, ids: m(ids), tmp_path)
    walk.start()
    moments = walk.collect(0, {"one": model.one, "two": model.two})["calibration"]
    assert moments["one"].gram.shape == (6, 6) and moments["two"].tokens == 32


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_windows_and_what_belongs_to_them_are_dealt_by_one_rule(size, names, tmp_path):
    """Every window goes to one process, odd streams from the other end; other ids of a stream go
    where its states are."""
    model = tiny_llama(layers=1)
    streams = {name: torch.arange(7)[:, None] + 10 * number for number, name in enumerate(names)}
    walks = [
        BlockWalk(model, find_blocks(model), streams, lambda m, ids: m(ids), tmp_path, Workers(rank, size))
        for rank in range(size)
    ]
    for number, name in enumerate(names):
        dealt = [walk.windows[name].flatten() for walk in walks]
        assert torch.cat(dealt).sort().values.equal(streams[name].flatten())
        counts = [len(part) for part in dealt]
        assert counts == sorted(counts, reverse=number % 2 == 0) and max(counts) - min(counts) <= 1
        labels = torch.arange(100, 107)
        for walk, before in zip(walks, dealt, strict=True):
            assert (walk.share(name, labels) - 100).equal(before - 10 * number)
            walk.hand_out(name, labels[:, None])
            assert (walk.windows[name].flatten() - 100).equal(before - 10 * number)
            with pytest.raises(AssertionError, match="as many windows"):
                walk.hand_out(name, labels[:6, None])


@pytest.mark.parametrize("make", [*MODELS, *(functools.partial(tiny_head, name, 2) for name in CLASSIFIERS)])
def test_sensitivity_equals_the_gradients_second_moment(make, tmp_path):
    """Block by block from stored states against one ordinary backward pass, for every layer of every block."""
    model = make().eval()
    ids = torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(2))
    blocks = find_blocks(model)
    layers, _ = select_linears(model, blocks.names(), None, None)
    task = task_of(tiny_tokenizer(), "masked" if make is tiny_bert else "causal")
    gradients: dict[str, list] = {name: [] for name in layers}
    handles = [
        layer.register_full_backward_hook(lambda m, i, o, n=name: gradients[n].append(o[0].reshape(-1, o[0].shape[-1])))
        for name, layer in layers.items()
    ]
    for window in ids:
        task.loss(model, window[None]).backward()
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    prepared = torch.cat([task.prepare(window[None]) for window in ids])
    walk = BlockWalk(model, blocks, {"s": prepared}, task.forward, tmp_path)
    walk.start()
    for index in range(len(blocks.modules)):
        walk.advance(index, "s")
    walk.windows["s"] = ids
    walk.write_gradients("s", task.loss)
    for index in reversed(range(len(blocks.modules))):
        members = {name: layer for name, layer in layers.items() if blocks.holds(index, name)}
        bases = {}
        for name in members:
            out = gradients[name][0].shape[1]
            bases[name] = torch.linalg.qr(torch.randn(out, 7)).Q
        found = output_sensitivity(walk, index, "s", members, bases, ids.numel())
        for name in members:
            rows = torch.cat(gradients[name]).double()
            expected = ((rows @ bases[name].double()) ** 2).sum(0) / ids.numel()
            # float32 gradients of the same values; the order of summation differs in the blocks above
            assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-9 * float(expected.max())), name


class _Caller(nn.Module):
    """Blocks that are called in one way or another, like those of XLM (by position) or of a custom model."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, mask, x):
            x, shift = x if isinstance(x, tuple) else (x, 0.0)
            return x + mask * self.down(input=torch.tanh(self.up(x + shift)))

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.embed, self.layers, self.head = nn.Embedding(200, 6), nn.ModuleList(), nn.Linear(6, 4)
        for _ in range(3):
            self.layers.append(self.Block())

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        shift = x.mean(1, keepdim=True)
        for block in self.layers:
            x = self.call(block, ids[..., None] % 3 > 0, x, shift)
        return self.head(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda block, mask, x, shift: block(mask, x),
        lambda block, mask, x, shift: block(mask=mask, x=x),
        lambda block, mask, x, shift: block(mask, x=(x, shift)),
        lambda block, mask, x, shift: block(mask, (x, 0.5)),
    ],
    ids=["position", "keyword", "tuple", "tuple alone"],
)
def test_blocks_and_layers_may_be_called_in_any_way(call, tmp_path):
    """Gram matrices and gradients are those of ordinary passes over the whole model."""
    torch.manual_seed(0)
    model = _Caller(call).requires_grad_(False)
    ids = torch.randint(4, 200, (3, 5))
    layers = {name: module for name, module in model.layers.named_modules(prefix="layers") if "." in name[7:]}
    inputs: dict[str, list] = {name: [] for name in layers}
    gradients: dict[str, list] = {name: [] for name in layers}

    def watch(name, module):
        def see(layer, args, kwargs, output):
            inputs[name].append(first_input(args, kwargs).detach().flatten(0, 1).double())
            output.register_hook(lambda g: gradients[name].append(g.flatten(0, 1).double()))

        return module.register_forward_hook(see, with_kwargs=True)

    def loss(model, ids):
        return (model(ids) ** 2).sum()

    handles = [watch(name, module) for name, module in layers.items()]
    model.embed.requires_grad_(True)
    for window in ids:
        loss(model, window[None]).backward()
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()

    blocks = find_blocks(model)
    walk = BlockWalk(model, blocks, {"calibration": ids}, lambda model, ids: model(ids), tmp_path)
    walk.start()
    for index in range(3):
        members = {name: layer for name, layer in layers.items() if blocks.holds(index, name)}
        for name, found in walk.collect(index, members)["calibration"].items():
            x = torch.cat(inputs.pop(name))
            assert torch.allclose(found.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6), name
    assert not inputs
    walk.write_gradients("calibration", loss)
    for index in reversed(range(3)):
        members = {name: layer for name, layer in layers.items() if blocks.holds(index, name)}
        bases = {name: torch.eye(layer.out_features) for name, layer in members.items()}
        found = output_sensitivity(walk, index, "calibration", members, bases, ids.numel())
        for name in members:
            g = torch.cat(gradients.pop(name))
            assert torch.allclose(found[name], (g * g).mean(0), rtol=1e-3, atol=1e-9), name
            assert float(found[f"{name}:total"]) == pytest.approx(float(found[name].sum()), rel=1e-4)  # bases are whole
    assert not gradients


def test_whole_model_sensitivity_is_the_same():
    model = tiny_llama().eval().requires_grad_(False)
    ids = torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(2))
    name, layer = list(select_linears(model, find_blocks(model).names(), None, None)[0].items())[-1]
    task = task_of(tiny_tokenizer())
    rows = []

    def keep(module, args, output):
        output.register_hook(lambda gradient: rows.append(gradient.reshape(-1, 64)))

    handle = layer.register_forward_hook(keep)
    basis = torch.linalg.qr(torch.randn(64, 7)).Q
    found = whole_model_sensitivity(model, ids, {name: layer}, {name: basis}, task.loss, ids.numel())[name]
    handle.remove()
    expected = ((torch.cat(rows).double() @ basis.double()) ** 2).sum(0) / ids.numel()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_windows_are_seeded_disjoint_and_of_the_asked_size():
    tokenizer = tiny_tokenizer()
    texts = [f"def function_{i}(value):\n    return value + {i}\n" * 20 for i in range(30)]
    first, held = token_windows(texts, tokenizer, 512, 128, 64, 0)
    again, _ = token_windows(texts, tokenizer, 512, 128, 64, 0)
    other, _ = token_windows(texts, tokenizer, 512, 128, 64, 1)
    assert first.shape == (8, 64) and held.shape == (2, 64)
    assert torch.equal(first, again) and not torch.equal(first, other)
    text = tokenizer.decode(held.flatten())
    numbers = {part.split("(")[0] for part in text.split("function_")[2:-1]}
    assert numbers and not any(f"function_{n}(" in tokenizer.decode(first.flatten()) for n in numbers)


def test_a_single_document_is_split_by_position():
    tokenizer = tiny_tokenizer()
    text = "".join(f"line {i}: the quick brown fox\n" for i in range(200))
    calibration, held = token_windows([text], tokenizer, 256, 64, 64, 0)
    assert calibration.shape == (4, 64) and held.shape == (1, 64)
    lines, held_lines = (set(re.findall(r"\nline (\d+):", tokenizer.decode(w.flatten()))) for w in (calibration, held))
    assert lines and held_lines and not lines & held_lines


def test_short_text_warns_and_too_short_text_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.warns(LordWarning, match="all of it is used"):
        token_windows(["word " * 300], tokenizer, 100_000, 64, 64, 0)
    with pytest.raises(CalibrationError, match="at least 128"):
        token_windows(["word"], tokenizer, 512, 64, 64, 0)
    with pytest.raises(CalibrationError, match="empty"):
        token_windows([], tokenizer, 512, 64, 64, 0)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text", "path"], "text"),
        (["messages"], "messages"),
        (["prompt", "completion"], "prompt + completion"),
        (["prompt", "response", "id"], "prompt + response"),
        (["instruction", "input", "output"], "instruction + output"),
        (["text", "messages"], "messages"),
    ],
)
def test_columns_are_recognised(columns, kind):
    assert str(recognise(columns)) == kind


def test_unknown_columns_are_named():
    with pytest.raises(UsageError, match="expected text"):
        recognise(["code", "id"])


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "Add", "input": "1 2", "output": "3"}) + "\n")
    (tmp_path / "c.json").write_text(json.dumps([{"text": "row"}, {"text": " "}]))
    import datasets

    datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}]).to_parquet(tmp_path / "d.parquet")
    with pytest.warns(LordWarning, match="row 2: 'text' is blank"):
        found = documents([str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.json", "d.parquet")])
    assert found[0] == "plain" and "### Input:\n1 2" in found[1] and found[1].endswith("3")
    assert found[2:] == ["row", "pc"]  # the blank row is left out


def test_evaluation_windows_do_not_overlap_and_honour_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("abc def " * 500)
    tokenizer = tiny_tokenizer()
    windows = file_windows(str(tmp_path / "a.txt"), tokenizer, 64)
    limited = file_windows(str(tmp_path / "a.txt"), tokenizer, 64, 200)
    assert limited.shape == (3, 64) and torch.equal(windows[:3], limited)
    assert windows.flatten().tolist() == tokenizer("abc def " * 500)["input_ids"][: windows.numel()]


def test_no_warning_when_the_text_suffices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows, held = token_windows(["word " * 3000], tiny_tokenizer(), 256, 64, 64, 0)
    assert windows.shape == (4, 64) and held.shape == (1, 64)


def test_documents_shorter_than_a_window_fill_both_sets():
    """Only what the held-out window lacks is taken from the next document: 3 x 80 tokens hold two windows of 100."""

    class Characters:
        eos_token_id = None

        def __call__(self, text, verbose=False):
            return {"input_ids": list(map(ord, text))}

    calibration, heldout = token_windows(["a" * 80, "b" * 80, "c" * 80], Characters(), 100, 100, 100, 0)
    assert calibration.shape == heldout.shape == (1, 100)


class Letters:
    """A tokenizer of one id per character."""

    eos_token_id = 0

    def __call__(self, text, verbose=False):
        return {"input_ids": list(map(ord, text))}


def quadratic_windows(texts, tokens, heldout_tokens, length, seed):
    """The same split, with the ids of all documents counted anew at every step."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    counts = -(-tokens // length), -(-heldout_tokens // length)
    wanted = sum(counts) * length
    encoded = []
    for text in order:
        encoded.append([*list(map(ord, text))[: 2 * length], 0])
        if sum(map(len, encoded)) >= wanted + 4 * length and len(encoded) > 1:
            break
    if sum(map(len, encoded)) < wanted:
        encoded = [[*map(ord, text), 0] for text in order]
    available = sum(map(len, encoded))
    target = min(counts[1], counts[1] if available >= wanted else max(1, available // 9 // length)) * length
    taken = []
    while len(encoded) > 1 and len(taken) < target and sum(map(len, encoded[:-1])) >= length:
        taken = encoded.pop() + taken
    if len(taken) < length:
        tail, missing = encoded.pop(), target - len(taken)
        taken = tail[-missing:] + taken
        encoded.append(tail[:-missing])
    flat = [token for document in encoded for token in document]
    count = min(counts[0], len(flat) // length)
    return [flat[: count * length], taken[: min(target, len(taken) // length * length)]]


@pytest.mark.parametrize("documents", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [1, 5, 31, 64, 200])
def test_windows_are_those_of_the_plain_way_to_count(documents, size):
    """Many short documents, few long ones, too little text and more than enough."""
    texts = [chr(1 + n) * (size + n % 3) for n in range(documents)]
    for tokens, heldout in ((64, 16), (256, 64), (2000, 100)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LordWarning)
            try:
                found = token_windows(texts, Letters(), tokens, heldout, 16, 3)
            except CalibrationError:
                continue
        assert [part.flatten().tolist() for part in found] == quadratic_windows(texts, tokens, heldout, 16, 3)


def test_twenty_thousand_short_rows_are_dealt_with_at_once():
    """Linear in the rows: 0.1 s. Counting all ids anew for every row took 7 s."""
    texts = ["".join(chr(97 + (n + i) % 26) for i in range(30)) for n in range(20_000)]
    start = time.perf_counter()
    first, held = token_windows(texts, Letters(), 31 * 15_000, 31 * 4_000, 128, 0)
    assert time.perf_counter() - start < 1
    assert first.numel() + held.numel() > 31 * 18_500


def test_layers_that_share_a_weight_are_left_alone():
    """By one tensor or one module, and where transformers' list alone says so; with the name of the other."""

    def layers_of(change):
        model = tiny_llama()
        change(model, model.model.layers)
        return select_linears(model, find_blocks(model).names(), None, None)

    def one_tensor(model, blocks):
        blocks[1].mlp.up_proj.weight = blocks[0].mlp.gate_proj.weight

    def one_module(model, blocks):
        blocks[2].self_attn.k_proj = blocks[0].self_attn.v_proj

    def listed(model, blocks):
        model.all_tied_weights_keys = {
            "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.gate_proj.weight",
            "lm_head.weight": "model.embed_tokens.weight",
        }

    whole = layers_of(lambda model, blocks: None)[0]
    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    for change in (one_tensor, listed):
        chosen, skipped = layers_of(change)
        assert set(whole) - set(chosen) == {gate, up}
        assert skipped[gate] == f"shares its weight with {up}" and skipped[up] == f"shares its weight with {gate}"
    chosen, skipped = layers_of(one_module)
    value, key = "model.layers.0.self_attn.v_proj", "model.layers.2.self_attn.k_proj"
    assert set(whole) - set(chosen) == {value, key} and skipped[value] == f"shares its weight with {key}"
