"""Ways to serve L R without an adapter, and what each costs on held-out text.

decoded: Q + L R multiplied out, in 16 or 32 bits: the model itself, as large as the original.
original: what training changed, L R - L0 R0, added to the original weights, with which Q's error is gone as well.
nearest, feedback: Q + L R rounded into the format of Q again, to the nearest or with error feedback on calibration text
  (LDLQ): as small as Q alone, without what L R brought below a step of the grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.attach import has_adapters
from .adapters.fold import fold
from .adapters.loading import load_to_fold
from .calibration.corpus import file_windows
from .config import ExportConfig
from .console import human_bytes, note, progress, say, show_table
from .declared import Options
from .errors import LordError, UsageError
from .evaluation.perplexity import perplexity
from .exports.base import Job
from .exports.dense import DenseExport
from .exports.verify import compare, outputs_of
from .integrations.files import ADAPTER_FILE
from .integrations.models import load_dense_or_factored
from .integrations.running import kind_of, window_length
from .integrations.sources import base_of_adapter, original_of, resolve_model
from .integrations.vocabulary import check_vocabulary
from .layers import FactoredLinear, expert_of, factored_layers, plain_model
from .layers.sizes import sizes
from .plans import LayerChoice, Plan
from .protocols import CausalModel, Tokenizer
from .quantizers import GIVEN

DECODED, ORIGINAL, NEAREST, FEEDBACK = "decoded", "original", "nearest", "feedback"
UNMERGED = "unmerged"
WAYS = {
    UNMERGED: "nothing: kept as they are",
    DECODED: "decoded Q",
    ORIGINAL: "the original weights",
    NEAREST: "Q, rounded to nearest",
    FEEDBACK: "Q, rounded with feedback",
}
_ADVICE = {
    UNMERGED: "keep L and R as they are",
    DECODED: "`format` dense",
    ORIGINAL: "`format` dense, `merge` original",
    NEAREST: "`merge` nearest, Q alone",
    FEEDBACK: "`merge` feedback, Q alone",
}
TOKENS = 4096  # of the held-out text
LENGTH = 512  # of a window of it


@dataclass(frozen=True)
class Cost:
    """One way against the unmerged model on the held-out text."""

    bytes: int  # of its tensors
    loss: float | None  # nats per token; None without a language-model head
    kl: float | None  # from the unmerged model, nats per token
    difference: float  # of the outputs, relative

    def rise(self, unmerged: Cost) -> float:
        """What merging costs: of the loss, or without a head of the outputs."""
        return self.difference if self.loss is None or unmerged.loss is None else self.loss - unmerged.loss


class Merges:
    """The merged models of one checkpoint or training output. decompose: the verb; it rounds again."""

    def __init__(self, config: ExportConfig, work: Path, decompose: Callable[..., Any]):
        self._config, self._work, self._decompose = config, work, decompose
        self.unmerged, self.tokenizer = load_to_fold(config.model)
        self._layers = factored_layers(plain_model(self.unmerged))
        if not self._layers:
            raise UsageError("The model has no factored layers, so that there is nothing to merge.")

    def refusal(self, way: str) -> str | None:
        """Why there is no such merge of this model, in the words of an error; None if there is one."""
        alone = next((name for name, layer in self._layers.items() if layer.plan.backbone == "none"), None)
        experts = next((name for name in self._layers if expert_of(name) is not None), None)
        if way == ORIGINAL:
            if not (Path(self._config.model) / ADAPTER_FILE).is_file():
                return f"{self._config.model} is no training output, so that nothing was changed since the original"
            if experts is not None:
                return f"the experts '{experts}' are one tensor in the original"
            try:
                self._original()
            except UsageError as error:
                return str(error).rstrip(".")
        elif way in (NEAREST, FEEDBACK):
            if alone is not None:
                return f"'{alone}' has L and R alone, without a Q to round into"
            given = next((name for name, layer in self._layers.items() if layer.plan.backbone in GIVEN), None)
            if given is not None:
                return f"'{given}' holds the blocks of a GGUF file, which nothing here rounds into"
            if way == FEEDBACK and not self._config.calibration:
                return "error feedback needs calibration text; pass `calibration` FILE"
        return None

    def model(self, way: str) -> CausalModel:
        """The merged model; a rounded one is factored, with rank 0."""
        if way == UNMERGED:
            return self.unmerged
        if way == ORIGINAL:
            return self._onto_original()
        folder, dense = self._work / way, self._dense()
        if way != DECODED and not folder.is_dir():
            self._round(dense, folder, way)
        return load_dense_or_factored(str(folder))

    def _folded(self) -> CausalModel:
        model, _ = load_to_fold(self._config.model)
        return fold(model) if has_adapters(model) else model

    def _dense(self) -> Path:
        folder = self._work / DECODED
        if not folder.is_dir():
            folder.mkdir()
            dtype = self._config.dtype or "float32"
            model, ids = plain_model(self._folded()), torch.tensor([[0, 1]])
            DenseExport().write(model, Job(self.tokenizer, folder, folder, dtype, ids))
        return folder

    def _round(self, dense: Path, folder: Path, way: str) -> None:
        plan = Plan({name: _rounded(layer, way) for name, layer in self._layers.items()})
        plan.save(self._work / f"{way}.json")
        exactly = "|".join(map(re.escape, self._layers))
        options: dict[str, Any] = {"plan": str(self._work / f"{way}.json"), "targets": f"^({exactly})$"}
        if way == FEEDBACK:
            text = {"calibration": self._config.calibration, "calibration_tokens": self._config.calibration_tokens}
            options |= text | ({"plain_prompts": True} if self._config.plain_prompts else {})
        note(f"rounding Q + L R ({way})")
        with redirect_stdout(StringIO()):
            self._decompose(str(dense), str(folder), **options)

    def _original(self) -> str:
        base = Path(base_of_adapter(Path(resolve_model(self._config.model))))
        if not (base / "decomposition.json").is_file():
            raise UsageError(f"{base} has no decomposition.json that names the original model.")
        return original_of(base, "put it back")

    @torch.no_grad()
    def _onto_original(self) -> CausalModel:
        """W + (L R - L0 R0), the difference taken in float64; all other weights are the trained model's."""
        trained = factored_layers(folded := plain_model(self._folded()))
        start = factored_layers(load_dense_or_factored(base_of_adapter(Path(resolve_model(self._config.model)))))
        model = load_dense_or_factored(self._original(), self._config.dtype or "float32")
        for name, layer in trained.items():
            change = layer.dense_weight(torch.float64) - start[name].dense_weight(torch.float64)
            owner = model.get_submodule(name)
            _add(owner.get_parameter("weight"), change.T if layer.plan.conv1d else change)
            if layer.bias is not None:
                before, held = start[name].bias, getattr(owner, "bias", None)
                moved = layer.bias.double() - (0.0 if before is None else before.double())
                if held is not None:
                    _add(held, moved)
                elif moved.abs().max() > 0:
                    raise UsageError(f"Training moved the bias of '{name}', for which the original has no place.")
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in [*folded.named_parameters(), *folded.named_buffers()]:
            if not any(name.startswith(layer + ".") for layer in trained) and name in own:
                own[name].copy_(value)
        return model


def _add(weight: Tensor, change: Tensor) -> None:
    weight.copy_(weight.double() + change)


def _rounded(layer: FactoredLinear, way: str) -> LayerChoice:
    """Q alone, in the layer's own format."""
    plan = layer.plan
    options: Options = {"rounding": "feedback"} if way == FEEDBACK else {}
    return LayerChoice(
        "whitened" if options else "svd", 0, options, plan.backbone, plan.backbone_options, shape=plan.shape
    )


def held_out(config: ExportConfig, model: CausalModel, tokenizer: Tokenizer) -> Tensor:
    """Windows of `text`."""
    assert config.text is not None
    windows = file_windows(config.text, tokenizer, window_length(LENGTH, model), TOKENS, config.plain_prompts, note)
    check_vocabulary(plain_model(model), tokenizer, [windows])
    return windows


def cost_of(unmerged: CausalModel, model: CausalModel, tokenizer: Tokenizer, windows: Tensor, what: str) -> Cost:
    """windows: (window, length)."""
    tokens = kind_of(plain_model(model)) != "bare"
    kl = difference = 0.0
    with progress() as update:
        for number, window in enumerate(windows):
            found = compare(outputs_of(unmerged, window[None]), outputs_of(model, window[None]), tokens)
            kl, difference = kl + (found.kl or 0.0), difference + found.relative_difference
            update(f"comparing {what}", number + 1, len(windows))
    loss = perplexity(model, tokenizer, windows)[0] if tokens else None
    count = len(windows)
    return Cost(int(sizes(model)["model_bytes"]), loss, kl / count if tokens else None, difference / count)


def weigh(merges: Merges, config: ExportConfig) -> dict[str, Any]:
    """What the ways cost, shown and as entries of export.json. UsageError or LordError if `merge` is impossible or
    costs more than `merge_limit`."""
    ways = list(WAYS) if config.advise else [UNMERGED, str(config.merge)]
    if config.merge is not None and (why := merges.refusal(config.merge)):
        raise UsageError(f"`merge` {config.merge} is not possible: {why}.")
    windows = held_out(config, merges.unmerged, merges.tokenizer)
    costs: dict[str, Cost] = {}
    for way in ways:
        if why := merges.refusal(way):
            say(f"{way} is left out: {why}")
            continue
        costs[way] = cost_of(merges.unmerged, merges.model(way), merges.tokenizer, windows, way)
    unmerged = costs[UNMERGED]
    rows = [[WAYS[way], *_cells(cost, unmerged)] for way, cost in costs.items()]
    columns = ["L R merged into", "weights", "perplexity", "loss +", "KL to unmerged", "outputs differ by"]
    show_table(f"{config.model} on {windows.numel():,} tokens of {config.text}", columns, rows)
    found: dict[str, Any] = {"merges": {way: asdict(cost) for way, cost in costs.items()}}
    if config.advise:
        best = _smallest(costs, config.merge_limit)
        say(f"advice: {_ADVICE[best]} (smallest of those that raise the loss by at most {config.merge_limit:g})")
        found["advice"] = best
    if config.merge is not None and not costs[config.merge].rise(unmerged) <= config.merge_limit:
        what = "relative difference of the outputs" if unmerged.loss is None else "rise of the loss in nats per token"
        raise LordError(
            f"Merging L R ({config.merge}) costs too much: got a {what} of {costs[config.merge].rise(unmerged):.3g}, "
            f"expected at most {config.merge_limit:g}. Nothing was written; export without `merge`, or raise "
            "`merge_limit`."
        )
    return found


def _cells(cost: Cost, unmerged: Cost) -> list[str]:
    perplexity_, rise = "-", "-"
    if cost.loss is not None:
        perplexity_, rise = f"{math.exp(cost.loss):.3f}", f"{cost.rise(unmerged):+.4f}"
    kl = "-" if cost.kl is None else f"{cost.kl:.2g}"
    return [human_bytes(cost.bytes), perplexity_, rise, kl, f"{cost.difference:.2g}"]


def _smallest(costs: dict[str, Cost], limit: float) -> str:
    """The smallest way within the limit; of equally small ones the cheapest."""
    unmerged = costs[UNMERGED]
    fitting = [way for way, cost in costs.items() if cost.rise(unmerged) <= limit]
    return min(fitting, key=lambda way: (costs[way].bytes, costs[way].rise(unmerged)))
