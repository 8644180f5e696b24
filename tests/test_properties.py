"""Laws that hold for any input: packing, row slices of the formats, budgets, the journal, plans.

hypothesis looks for counterexamples; derandomized, so a run is repeated exactly.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_tune.allocation import ALIGNMENT, ALLOCATORS, Uniform, break_even
from lord_tune.decomposition import Journal
from lord_tune.decomposition.choices import Measured, Menu, Sized
from lord_tune.decomposition.decide import Bits, Request, decide
from lord_tune.decomposition.sizes import bits_at
from lord_tune.errors import UsageError
from lord_tune.plans import LayerChoice, Plan
from lord_tune.quantizers import QUANTIZERS, make_quantizer
from lord_tune.quantizers.packing import CODES_PER_WORD, pack, packed_bytes, word_table, words_of
from lord_tune.sites import Site

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SIDES = st.integers(1, 300)


@FEW
@given(st.sampled_from(sorted(CODES_PER_WORD)), st.integers(1, 19), st.integers(1, 19), st.integers(0, 2**16))
def test_packing_loses_nothing(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(codes.numel(), bits)
    table = word_table(torch.arange(2.0**bits), bits)
    back = table[words_of(packed, bits).long()].reshape(-1)
    assert torch.equal(back[: codes.numel()].reshape(codes.shape), codes.float())


@pytest.mark.parametrize("name", QUANTIZERS)
@settings(FEW, max_examples=6)
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_rows_of_a_format_are_rows_of_the_whole(name, steps, columns, data):
    form, width = make_quantizer(name), 32 * columns
    step = form.row_step((1, width))
    shape = (step * steps, width)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(steps))
    parts = form.quantize(weight)
    whole = form.dequantize(parts, shape, torch.float32)
    first = data.draw(st.integers(0, steps - 1))
    last = data.draw(st.integers(first + 1, steps))
    start, stop = first * step, last * step
    slice_ = form.dequantize(form.rows(parts, shape, start, stop), (stop - start, width), torch.float32)
    assert torch.equal(slice_, whole[start:stop])


@pytest.mark.parametrize("name", ALLOCATORS)
@FEW
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), st.floats(0.05, 0.95), st.integers(0, 99))
def test_a_budget_is_kept(name, shapes, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, shape in enumerate(shapes):
        energies = torch.rand(min(shape), generator=generator, dtype=torch.float64).sort(descending=True).values
        found[str(index)] = Measured(shape, energies, torch.rand(min(shape), generator=generator).double())
    sites = {key: Site(key, one.shape, torch.float32, False, False) for key, one in found.items()}
    menu = Menu(sites, LayerChoice("svd", None), Sized(fraction, Uniform()))
    layers = menu.table(found)
    budget = fraction * sum(site.numbers for site in sites.values())
    try:
        picked = ALLOCATORS[name]().allocate(layers, budget)
    except UsageError:
        return  # rank 8 everywhere is above the budget
    spent = 0.0
    for key, index in picked.items():
        rank, shape = menu.choices[key][index].rank, found[key].shape
        assert rank is None or (rank % ALIGNMENT == 0 and 0 < rank <= break_even(shape))
        if rank is not None or name != "uniform":  # uniform leaves a layer dense that is too small for its share
            spent += float(layers[key].costs[index]) - fraction * sites[key].numbers
    assert spent <= 1e-6


@FEW
@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    st.floats(3, 12),
    st.sampled_from(["nf4", "int2", "int4"]),
)
def test_bits_are_never_exceeded(shapes, bits, backbone):
    sites = {str(i): Site(str(i), shape, torch.float16, False, False) for i, shape in enumerate(shapes)}
    template = LayerChoice("svd", None, backbone=backbone, factor_format="fp16")
    try:
        plan = decide(sites, Request(template, Bits(bits, (template,))))
    except UsageError:
        return  # the backbone alone takes more
    assert plan is not None
    for name, choice in plan.layers.items():
        if choice.rank is None:
            assert min(sites[name].shape) < ALIGNMENT and choice.reason
        else:
            assert choice.rank % ALIGNMENT == 0 and bits_at(sites[name], choice) <= bits


@FEW
@given(st.integers(0, 5), st.floats(0, 1))
def test_a_journal_cut_anywhere_resumes_to_its_first_steps(count, where):
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "out")
        journal.open({"seed": 1}, False)
        for index in range(count):
            journal.commit(f"writing/{index}", note="é" * index)
        steps = list(journal.steps)
        path = journal.work / "progress.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[: round(where * len(content))])
        journal._lock.release()
        again = Journal(Path(folder) / "out")
        again.open({"seed": 1}, True)
        again._lock.release()
        assert list(again.steps) == steps[: len(again.steps)]
        assert len(again.steps) == max(0, content[: round(where * len(content))].count(b"\n") - 1)


@FEW
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9), st.tuples(st.none() | st.integers(1, 512), st.booleans()), max_size=5
    )
)
def test_a_plan_survives_json(entries):
    layers = {
        name: LayerChoice("svd", rank, backbone="nf4" if rounded else "none", reason=None if rank else "too small")
        for name, (rank, rounded) in entries.items()
    }
    assert Plan.from_dict(json.loads(json.dumps(Plan(layers).to_dict()))) == Plan(layers)
