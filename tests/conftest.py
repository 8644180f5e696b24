"""Folders shared by all tests: three tiny models and calibration text. Nothing here may touch the network."""

from __future__ import annotations

import gc
import os

# read when huggingface_hub and datasets are imported, so before any other import
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import datasets  # noqa: E402, F401  # its log handler keeps the stderr of its import, which must outlive one test
import pytest  # noqa: E402
import torch  # noqa: E402
from stock import StockServer  # noqa: E402
from tiny import save_tiny, tiny_bert, tiny_gpt2, tiny_llama, write_code_rows  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: a second thread only waits


@pytest.hookimpl(tryfirst=True)  # before -m takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`one_in(n)`: of a grid of cases every n-th is run always, the others with the slow tests."""
    seen: Counter[tuple[Path, str]] = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None:
            continue
        key = item.path, item.name.partition("[")[0]
        if seen[key] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[key] += 1


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_stays() -> None:
    """Every run collects garbage before it measures memory, which took a third of the time of the tests while each time
    it looked through all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def stock_server() -> Iterator[StockServer]:
    server = StockServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def stock_loads_are_forked(
    request: pytest.FixtureRequest, stock_server: StockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exports are compared by a fork of a process that has its imports, except in tests marked `own_process`."""
    if request.node.get_closest_marker("own_process") is None:
        monkeypatch.setattr("lord_tune.exports.stock.run_stock_loader", stock_server.run)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_gpt2(), tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_bert(), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code_rows(tmp_path_factory.mktemp("text") / "code.jsonl")


@pytest.fixture(scope="session")
def aligned_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All widths multiples of 64, which bitsandbytes' own loader needs on CPUs."""
    return save_tiny(tiny_llama(intermediate=192), tmp_path_factory.mktemp("models") / "aligned")
