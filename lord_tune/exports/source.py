"""What is exported: a model in memory, or one whose tensors stay in their files until something computes with them.

Of a factored checkpoint nothing is read before a block runs or a tensor is written. Of one with an adapter, L, R and
what else the adapter is about are read when it is put on; Q, the embeddings and the output head are not. What cannot be
treated so is loaded whole: a model whose code computes with the weights of a block elsewhere, an adapter that folds
with values of Q, one on dense layers of 16 bits, a checkpoint that transformers would write again where there is no
room for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.attach import has_adapters
from ..adapters.fold import fold
from ..adapters.loading import adapter_keys, load_adapter, load_to_fold, tokenizer_of
from ..adapters.merging import needs_float32
from ..errors import LordError
from ..integrations.checkpoint import StoredModel
from ..integrations.files import ADAPTER_FILE
from ..integrations.models import model_class
from ..integrations.sources import base_of_adapter, resolve_model
from ..integrations.transformers_quantizer import QUANT_METHOD
from ..layers import factored_layers, plain_model, token_modules
from ..protocols import CausalModel, Tokenizer
from .by_blocks import has_room, walked, without_values
from .parts import to_nothing
from .verify import outputs_of


class Source:
    """A model, maybe with an adapter, and where the tensors are that it has no values of."""

    def __init__(
        self,
        model: CausalModel,
        stored: StoredModel | None = None,  # None: all are there
        again: Callable[[], CausalModel] | None = None,  # loads it whole
    ):
        self.model, self._stored, self._again = model, stored, again
        # what stays in its files, by the names that the checkpoint has
        self.absent = set() if stored is None else {n for n in stored.names() if stored.awaits(n)}

    def load(self, names: Iterable[str]) -> None:
        """Into memory, if they are not there."""
        if self._stored is not None:
            self._stored.load(names)

    def release(self, names: Iterable[str]) -> None:
        """Those that were not in memory when this was opened."""
        if self._stored is not None:
            self._stored.release(self.absent.intersection(names))

    def outputs(self, ids: Tensor) -> Tensor:
        """`outputs_of` the model, which afterwards is as it was."""
        if self._stored is None:
            return outputs_of(self.model, ids)
        try:
            found = walked(self.model, self._stored, sorted(self.absent), ids)
        except RuntimeError as error:  # NotImplementedError is one
            if not without_values(error):
                raise
            self.load(self.absent)
            return outputs_of(self.model, ids)
        self._stored.release(self.absent)
        return found

    def folded(self) -> PreTrainedModel:
        """The model, plain, with its adapter folded. Uses it up."""
        if not has_adapters(self.model):
            return plain_model(self.model)
        if self._stored is None or self._again is None:
            return fold(self.model)
        try:
            model = fold(self.model)
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            empty = [n for n, tensor in model.state_dict().items() if tensor.is_meta and n not in tied]
            if all(self._stored.holds(name) for name in empty):
                return model
        except RuntimeError as error:
            if not without_values(error):
                raise
        to_nothing(self.model)
        self.model, self._stored = self._again(), None
        return fold(self.model)


def open_source(name: str, scratch: Path) -> tuple[Source, Tokenizer]:
    """A factored checkpoint, or a training output on one, read no more than need be; anything else loaded.

    scratch: empty, kept as long as the source is used.
    """
    found = resolve_model(name)
    adapter = Path(found) if (Path(found) / ADAPTER_FILE).is_file() else None
    origin = found if adapter is None else base_of_adapter(adapter)
    if _is_factored(origin) and has_room(Path(origin), scratch):
        try:
            stored = StoredModel(origin, scratch)
            model = stored.model if adapter is None else _adapted(stored, adapter)
        except LordError:  # loading it whole says what is wrong
            model = None
        if model is not None:
            return Source(model, stored, lambda: load_to_fold(name)[0]), tokenizer_of(found, origin)
    whole, tokenizer = load_to_fold(name)
    return Source(whole), tokenizer


def _is_factored(name: str) -> bool:
    found = getattr(model_class(name)[1], "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == QUANT_METHOD


def _adapted(stored: StoredModel, adapter: Path) -> CausalModel | None:
    """The model with its adapter, of which all is in memory but Q, and but embeddings and head that it leaves alone.
    None where it must be loaded whole."""
    keys = adapter_keys(adapter)
    layers = tuple(f"{name}.backbone." for name in factored_layers(stored.model))
    tables = [name for names in token_modules(stored.model) for name in names]
    untouched = not any(key.startswith(f"{name}.") for key in keys for name in tables)
    aside = layers + tuple(f"{name}." for name in tables if untouched)
    stored.load(name for name in stored.names() if not name.startswith(aside))
    model = load_adapter(stored.model, adapter)
    wrappers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    learnt = [p for module in wrappers for n, p in module.named_parameters() if ".base_layer." not in f".{n}"]
    if needs_float32(model) or any(parameter.is_meta for parameter in learnt):
        to_nothing(stored.model)
        return None
    return model
