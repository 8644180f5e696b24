"""What every row goes through, whoever made its model: sizes, errors, perplexities, training.

Nothing here knows a method. A model is anything that gives `.logits`; a linear layer is anything that maps (n, in) to
(n, out), whose weight is found by giving it the unit vectors.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lord_tune.calibration.corpus import file_windows


@dataclass(frozen=True)
class Setting:
    """What all rows of one model share."""

    source: str  # folder of the original
    calibration: str  # text to calibrate and to train on
    validation: str  # text for held-out output errors and for the choice of the rate
    texts: Mapping[str, str]  # name -> text that is reported
    calibration_tokens: int = 16384
    error_tokens: int = 4096  # of the calibration text, and of the validation text
    validation_tokens: int = 2048
    tokens: int = 4096  # of each reported text
    length: int = 512  # of a window that is measured or calibrated on
    steps: int = 32
    train_length: int = 256  # tokens of a step
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    rank: int = 16
    seed: int = 0

    def windows(self, text: str, tokens: int, length: int | None = None) -> Tensor:  # (window, length)
        return file_windows(text, self.tokenizer(), length or self.length, tokens)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.source)

    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Made:
    """A model that a method made, and what a user would keep of it."""

    model: Any  # gives `.logits`
    kept: Sequence[Path]  # files with tensors
    trains: bool = False  # whether parameters with requires_grad are its adapter
    merge: Callable[[Any], Any] | None = None  # the trained model -> the model without an adapter
    merged: str = ""  # what `merge` does, in a word
    linears: bool = True  # whether its linear layers can be called one by one


def dense_linears(model: Any) -> dict[str, nn.Module]:
    """The linear layers of the blocks: not the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


# --- sizes ---


def sizes(made: Made, dense: Any) -> dict[str, float]:
    """Bytes of what is kept; bits per weight of the linears: of all bytes but the other tensors of the original."""
    linears = dense_linears(dense)
    whole = {id(p): p for p in dense.parameters()}
    other = sum(p.nbytes for p in whole.values()) - sum(layer.weight.nbytes for layer in linears.values())
    weights = sum(layer.weight.numel() for layer in linears.values())
    stored = sum(path.stat().st_size for path in made.kept)
    return {"bytes": stored, "linear_bytes": stored - other, "bits_per_weight": 8 * (stored - other) / weights}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


# --- losses ---


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    """Nats per token; every window predicts its tokens 2..n, logits in float32."""
    total, count = 0.0, 0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return total / count


def perplexities(model: Any, setting: Setting) -> dict[str, float]:
    """Text -> perplexity."""
    ready(model)
    return {name: math.exp(loss(model, setting.windows(path, setting.tokens))) for name, path in setting.texts.items()}


def ready(model: Any) -> None:
    """Evaluation mode. Some CPUs would multiply bitsandbytes' 4-bit weights in bfloat16, and repack them in place."""
    model.eval()
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


# --- errors of the linears ---


@torch.no_grad()
def collect_moments(setting: Setting, text: str, target: Path) -> None:
    """What every linear of the original gets: XᵀX/n as `gram.NAME` (in, in) and mean |x| as `abs.NAME` (in,), of the
    layers that get the same input under the name of the first; the header says which name belongs to which layer."""
    model = setting.dense()
    grams: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    last: dict[str, Any] = {"x": None, "name": ""}

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if last["x"] is args[0]:
                first[name] = last["name"]
                return
            last.update(x=args[0], name=name)
            first[name] = name
            rows = args[0].reshape(-1, args[0].shape[-1])
            gram, total = rows.T @ rows, rows.abs().sum(0)
            grams[name] = grams[name] + gram if name in grams else gram
            sums[name] = sums[name] + total if name in sums else total

        return hook

    for name, layer in dense_linears(model).items():
        layer.register_forward_pre_hook(seen(name))
    windows = setting.windows(text, setting.error_tokens)
    for window in windows:
        model.base_model(input_ids=window[None])
        last.update(x=None)
    count = windows.numel()
    tensors = {f"gram.{name}": value / count for name, value in grams.items()}
    tensors |= {f"abs.{name}": value / count for name, value in sums.items()}
    temporary = target.with_suffix(".part")
    save_file(tensors, temporary, metadata=first)
    temporary.replace(target)


class Moments:
    """Reads what `collect_moments` wrote, a layer at a time."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self._first = self._file.metadata()

    def gram(self, name: str) -> Tensor:  # (in, in)
        return self._file.get_tensor(f"gram.{self._first[name]}")

    def magnitude(self, name: str) -> Tensor:  # (in,)
        return self._file.get_tensor(f"abs.{self._first[name]}")


@torch.no_grad()
def effective_weight(layer: Any, width: int) -> Tensor:  # (out, in)
    units = torch.eye(width)
    return (layer(units) - layer(torch.zeros(1, width))).float().T


@torch.no_grad()
def errors(model: Any, dense: Any, moments: Mapping[str, Moments]) -> dict[str, float]:
    """Relative errors, means over the linears: of the weights, and of the outputs on each text, every layer given what
    it gets in the original."""
    ready(model)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, list[float]] = {"weight": [], **{text: [] for text in moments}}
    for name, layer in dense_linears(dense).items():
        weight = layer.weight
        missing = weight - effective_weight(inner.get_submodule(name), weight.shape[1])
        found["weight"].append(float(missing.norm() / weight.norm()))
        for text, of in moments.items():
            gram = of.gram(name)
            lost, whole = (float(((value @ gram) * value).sum().clamp_min(0)) for value in (missing, weight))
            found[text].append(math.sqrt(lost / whole))
    return {what: sum(values) / len(values) for what, values in found.items()}


# --- training ---


def adapter_of(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def stored_state(model: Any) -> dict[str, Tensor]:
    """Round what trains to the 16 bits that it is kept in, and copy it."""
    for value in adapter_of(model).values():
        value.copy_(value.bfloat16())
    return {name: value.detach().clone() for name, value in adapter_of(model).items()}


@torch.no_grad()
def set_state(model: Any, state: Mapping[str, Tensor]) -> None:
    for name, value in adapter_of(model).items():
        value.copy_(state[name])


def train(model: Any, setting: Setting, rate: float) -> list[float]:
    """AdamW without decay, the rate falling linearly to 0, gradients clipped to norm 1; one window a step, in the order
    of the text. The losses of the steps."""
    model.train()
    model.config.use_cache = False
    parameters = list(adapter_of(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    windows = setting.windows(setting.calibration, setting.steps * setting.train_length, setting.train_length)
    history = []
    for step, window in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / len(windows))
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        step_loss = nn.functional.cross_entropy(logits, window[1:])
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(float(step_loss))
    return history
