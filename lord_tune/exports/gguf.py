"""Export for llama.cpp: a GGUF base holding Q in our own codes, and a GGUF LoRA adapter holding L and R.

Metadata, tokenizer and all tensors that were not decomposed come from a GGUF file of the original model (`like`),
through the `gguf` package. Where a layer's Q has a type there (quantizers/engines.py), its blocks are written bit for
bit and L R goes into the adapter. Any other decomposed layer is multiplied out and written in `dense_type`.

Which rows lie where is seen, not assumed: llama.cpp's converter reorders rows of some layers (q and k of the Llama
family), so each tensor of the file is compared with the model's in each order that the numbers of heads allow. That
also tells a file of another model, which is refused.

In the adapter, alpha is 0, which means a scale of 1 for every layer whatever its rank.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integrations.transformers_quantizer import detach
from ..layers import FactoredLinear, densify, factored_layers, unfused_parameters
from ..quantizers.engines import Block, gguf_blocks
from .base import Job
from .llama_cpp import compared_in_engine
from .verify import outputs_of

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
_ALIKE = 0.2  # least cosine of a decomposed weight and its original; those of unrelated weights are near 0
_ROUNDED = 0.2  # largest relative distance of what was not decomposed, where the file holds it quantized
_CAST = 0.02  # the same where the file holds it in 16 or 32 bits


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model lies in the file."""

    name: str
    order: Tensor | None  # row i of the file is row order[i] of the model
    added: float = 0.0  # what the converter added: 1 to the norms of some families
    turned: bool = False  # stored transposed, as Conv1D is not in the file

    def into(self, value: Tensor) -> Tensor:
        """As the file holds it."""
        value = (value.T if self.turned else value) + self.added
        return value if self.order is None else value[self.order]

    def back(self, value: Tensor) -> Tensor:
        """As the model holds it."""
        if self.order is not None:
            value = torch.empty_like(value).index_copy_(0, self.order, value)
        value = value - self.added
        return value.T if self.turned else value


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file to write."""

    name: str
    shape: tuple[int, ...]  # in bytes where it is quantized
    kind: Any  # gguf.GGMLQuantizationType
    dtype: np.dtype  # of the array that holds it
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class GGUFExport:
    """A quantized base and a LoRA adapter, or one file without adapter, for llama.cpp."""

    name: ClassVar[str] = "gguf"
    model_folder: ClassVar[str] = "."

    def check(self, model: PreTrainedModel) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UsageError("`format` gguf needs the package of this name; run: pip install gguf")
        experts = unfused_parameters(model)
        if experts:
            raise UsageError(
                f"The experts '{experts[0]}' are decomposed, which `format` gguf cannot hold one by one; export with "
                "`format` factored or dense."
            )

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        import gguf

        assert job.like is not None, "checked by the configuration"
        reader = _opened(job.like)
        layers = factored_layers(model)
        places = _places(reader, model, layers, job.like)
        typed = {name: kind for name, layer in layers.items() if (kind := _kind(layer)) is not None}
        pieces = list(_pieces(reader, layers, typed, places, job))
        _write_model(reader, pieces, job.folder / MODEL_FILE)
        ranked = {name: layers[name] for name in typed if layers[name].rank}
        if ranked:
            _write_adapter(reader, ranked, places, job)
        for kind, count in Counter(piece.kind.name for piece in pieces if _is_layer(piece, layers, places)).items():
            job.notes.append(f"{count} decomposed layers as {kind}")
        other = sorted({layer.plan.backbone for name, layer in layers.items() if name not in typed} - {"none"})
        if other:
            job.notes.append(f"multiplied out, since GGUF has no type for them: backbone {', '.join(other)}")
        written = outputs_of(_read_back(model, layers, places, job, gguf), job.ids)
        adapter = job.folder / ADAPTER_FILE
        if len(job.ids) == 1:
            base, lora = job.folder / MODEL_FILE, adapter if adapter.is_file() else None
            job.notes.append(compared_in_engine(base, lora, job.ids, written))
        return written

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return ["float16"]


def _opened(like: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(like)
    except (ValueError, OSError) as error:
        raise UsageError(f"{like} is not a GGUF file that can be read ({error}); pass one of the original.") from error


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _kind(layer: FactoredLinear) -> Any:
    """The GGUF type of a layer's Q, or None."""
    import gguf

    form = None if layer.plan.backbone == "none" else layer.backbone.quantizer
    if not isinstance(form, Block) or layer.in_features % form.group_size:
        return None
    return getattr(gguf.GGMLQuantizationType, form.name.upper(), None)


# --- which tensor is which ---


def _dense_names(model: PreTrainedModel, layers: dict[str, FactoredLinear]) -> dict[str, Tensor | None]:
    """Tensors of the model as it was before the decomposition; None for weights of decomposed layers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Tensor | None] = {}
    for key, value in model.state_dict().items():
        owner = next((name for name in layers if key.startswith(name + ".")), None)
        if owner is None or key == f"{owner}.bias":
            if key not in tied:
                found[key] = value.detach().float().cpu()
    return found | {f"{name}.weight": None for name in layers}


def _places(reader: Any, model: PreTrainedModel, layers: dict[str, FactoredLinear], like: Path) -> dict[str, _Place]:
    """Key of the model -> its place. Refuses a file of another model."""
    import gguf

    arch = _field(reader, gguf.Keys.General.ARCHITECTURE)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = _field(reader, f"{arch}.block_count")
    if arch not in kinds or blocks is None:
        raise UsageError(f"{like} is of the architecture {arch}, which the installed gguf package does not know.")
    names = gguf.get_tensor_name_map(kinds[arch], blocks)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {_field(reader, f"{arch}.attention.{key}") for key in ("head_count", "head_count_kv")}
    heads = {number for number in heads if isinstance(number, int) and number > 0}
    wanted = _dense_names(model, layers)
    named = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in wanted}
    for key, name in named.items():
        if name in tensors:
            continue
        if key.endswith(".bias") and key.removesuffix(".bias") in layers:
            raise UsageError(
                f"'{key}' has no place in {like.name}: the method afm added it; export with `format` factored or "
                "dense, or decompose with `method` whitened."
            )
        raise UsageError(f"'{key}' of the model has no tensor in {like}; pass a GGUF file of the original model.")
    found = {}
    for key, value in wanted.items():
        tensor = tensors[named[key]]
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        own = value
        if own is None:
            own = layers[key.removesuffix(".weight")].dense_weight(torch.float32).cpu()
        found[key] = _place(key, own, tensor.name, theirs, heads, like)
        if value is not None and key.removesuffix(".bias") not in layers:
            _check_untouched(key, own, found[key], theirs, tensor, like)
    return found


def _place(key: str, own: Tensor, name: str, theirs: Tensor, heads: Iterable[int], like: Path) -> _Place:
    """The order in which the two agree best."""
    turned = own.dim() == 2 and own.shape != theirs.shape and own.T.shape == theirs.shape
    if own.shape != theirs.shape and not turned:
        raise UsageError(
            f"'{key}' is {tuple(own.shape)} and '{name}' in {like} is {tuple(theirs.shape)}; pass a GGUF file of the "
            "original model."
        )
    rows = theirs.shape[0]
    orders: list[Tensor | None] = [None]
    for count in sorted(heads):
        if rows % (2 * count) == 0:
            orders.append(torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1))
    added = (0.0, 1.0) if own.dim() == 1 else (0.0,)
    tried = [_Place(name, order, more, turned) for more in added for order in orders]
    judged = [(_cosine(place.into(own) - place.added, theirs - place.added), place) for place in tried]
    best = max(judged, key=lambda entry: entry[0])
    if own.dim() == 2 and best[0] < _ALIKE:
        raise UsageError(
            f"'{name}' in {like} is not what '{key}' was made from (cosine of the two {best[0]:.2f}); pass a GGUF file "
            "of the original model."
        )
    return best[1]


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().flatten(), b.double().flatten()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else float(torch.equal(x, y))


def _check_untouched(key: str, own: Tensor, place: _Place, theirs: Tensor, tensor: Any, like: Path) -> None:
    expected = place.into(own)
    distance = float((expected - theirs).norm() / expected.norm().clamp_min(1e-30))
    limit = _CAST if tensor.tensor_type.name in ("F32", "F16", "BF16") else _ROUNDED
    if not distance <= limit:
        raise UsageError(
            f"'{tensor.name}' in {like} is not '{key}' of the model (relative distance {distance:.2g}, expected at "
            f"most {limit}); pass a GGUF file of the original model."
        )


# --- writing ---


def _pieces(
    reader: Any, layers: dict[str, FactoredLinear], typed: dict[str, Any], places: dict[str, _Place], job: Job
) -> Iterator[_Piece]:
    """The tensors of the file, in the order of `like`."""
    import gguf

    owners = {places[f"{name}.weight"].name: name for name in layers}
    biases = {places[key].name: name for name in layers if (key := f"{name}.bias") in places}
    for tensor in reader.tensors:
        if tensor.name in owners:
            name = owners[tensor.name]
            layer, place = layers[name], places[f"{name}.weight"]
            if name in typed:
                form = layer.backbone.quantizer
                width = layer.in_features // form.group_size * gguf.GGML_QUANT_SIZES[typed[name]][1]

                def blocks(layer: FactoredLinear = layer, place: _Place = place) -> np.ndarray:
                    parts = {key: part.cpu() for key, part in layer.backbone.parts().items()}
                    made = gguf_blocks(layer.backbone.quantizer, parts, layer.plan.shape)
                    return (made if place.order is None else made[place.order]).contiguous().numpy()

                yield _Piece(tensor.name, (layer.out_features, width), typed[name], np.dtype(np.uint8), blocks)
            else:
                kind = _stored_kind(job.dense_type, layer.in_features)

                def whole(layer: FactoredLinear = layer, place: _Place = place, kind: Any = kind) -> np.ndarray:
                    return _quantized(place.into(layer.dense_weight(torch.float32).cpu()), kind)

                yield _Piece(tensor.name, _bytes_shape(layer.plan.shape, kind), kind, _dtype(kind), whole)
        elif tensor.name in biases:
            layer, place = layers[biases[tensor.name]], places[f"{biases[tensor.name]}.bias"]

            def bias(layer: FactoredLinear = layer, place: _Place = place) -> np.ndarray:
                assert layer.bias is not None, "it has a place"
                return place.into(layer.bias.detach().float().cpu()).contiguous().numpy()

            f32 = gguf.GGMLQuantizationType.F32
            yield _Piece(tensor.name, (layer.out_features,), f32, _dtype(f32), bias)
        else:

            def same(tensor: Any = tensor) -> np.ndarray:
                return np.asarray(tensor.data)

            yield _Piece(tensor.name, tensor.data.shape, tensor.tensor_type, tensor.data.dtype, same)


def _is_layer(piece: _Piece, layers: dict[str, FactoredLinear], places: dict[str, _Place]) -> bool:
    return any(places[f"{name}.weight"].name == piece.name for name in layers)


def _stored_kind(wanted: str, width: int) -> Any:
    """The type of a matrix with rows of `width` numbers: F16 where its blocks would be broken."""
    import gguf

    kind = gguf.GGMLQuantizationType[wanted.upper()]
    return kind if width % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16


def _bytes_shape(shape: tuple[int, ...], kind: Any) -> tuple[int, ...]:
    import gguf

    if kind.name in ("F16", "F32"):
        return shape
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    return *shape[:-1], shape[-1] // size * stored


def _dtype(kind: Any) -> np.dtype:
    return np.dtype({"F16": np.float16, "F32": np.float32}.get(kind.name, np.uint8))


def _quantized(value: Tensor, kind: Any) -> np.ndarray:
    import gguf

    made: np.ndarray = gguf.quants.quantize(value.contiguous().numpy(), kind)
    return made


def _write_model(reader: Any, pieces: list[_Piece], path: Path) -> None:
    """The file `like` with other tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, _field(reader, gguf.Keys.General.ARCHITECTURE))
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        if field.name in (gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    most = Counter(piece.kind.name for piece in pieces if len(piece.shape) == 2).most_common(1)[0][0]
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{most}", gguf.LlamaFileType.ALL_F32))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for piece in pieces:
        size = int(np.prod(piece.shape)) * piece.dtype.itemsize
        writer.add_tensor_info(piece.name, piece.shape, piece.dtype, size, piece.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in pieces:
        writer.write_tensor_data(piece.make())
    writer.close()


def _write_adapter(reader: Any, layers: dict[str, FactoredLinear], places: dict[str, _Place], job: Job) -> None:
    import gguf

    writer = gguf.GGUFWriter(job.folder / ADAPTER_FILE, _field(reader, gguf.Keys.General.ARCHITECTURE))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for name, layer in layers.items():
        place = places[f"{name}.weight"]
        left, right = (factor.float().cpu() for factor in layer.dense_factors())
        left = left if place.order is None else left[place.order]
        for suffix, value in (("lora_a", right), ("lora_b", left)):
            kind = _stored_kind(job.adapter_type, value.shape[1])
            writer.add_tensor(f"{place.name}.{suffix}", _quantized(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- reading back ---


@torch.no_grad()
def _read_back(
    model: PreTrainedModel, layers: dict[str, FactoredLinear], places: dict[str, _Place], job: Job, gguf: Any
) -> PreTrainedModel:
    """The model with all its tensors as the gguf package decodes the written files."""
    names = {place.name: key for key, place in places.items()}
    turned = {name for name, layer in layers.items() if layer.plan.conv1d}
    densify(model, torch.float32)
    detach(model)
    model.float()
    state = model.state_dict()
    factors: dict[str, Tensor] = {}
    adapter = job.folder / ADAPTER_FILE
    if adapter.is_file():
        factors = {t.name: _decoded(gguf, t) for t in gguf.GGUFReader(adapter).tensors}
    for tensor in gguf.GGUFReader(job.folder / MODEL_FILE).tensors:
        key = names.get(tensor.name)
        if key is None:
            continue
        value = _decoded(gguf, tensor)
        if f"{tensor.name}.lora_a" in factors:
            value = value + factors[f"{tensor.name}.lora_b"] @ factors[f"{tensor.name}.lora_a"]
        value = places[key].back(value)
        state[key].copy_(value.T if key.removesuffix(".weight") in turned else value)
    return model


def _decoded(gguf: Any, tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
