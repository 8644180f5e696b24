"""Export for llama.cpp: a GGUF base holding Q in our own codes, and a GGUF LoRA adapter holding L and R.

Metadata, tokenizer and all tensors that were not decomposed come from a GGUF file of the original model (`like`),
through the `gguf` package. Where a layer's Q has a type there (quantizers/engines.py), its blocks are written bit for
bit and L R goes into the adapter. Any other decomposed layer is multiplied out and written in `dense_type`.

Where the rows of each tensor lie is seen by comparing it with the model's (gguf_places.py), which also tells a file of
another model, which is refused.

In the adapter, alpha is 0, which means a scale of 1 for every layer whatever its rank.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ExportMismatch, UsageError
from ..integrations.running import kind_of
from ..integrations.space import check_space
from ..layers import FactoredLinear, factored_layers, stored_tables, unfused_parameters
from ..memory import give_back
from ..quantizers import GGML
from ..quantizers.engines import Block, gguf_blocks
from .base import Job
from .gguf_places import Located, Place, decoded, let_go_pages, metadata, places_in
from .gguf_reading import ADAPTER_FILE, MODEL_FILE, decoded_skeleton, outputs_of_files
from .llama_cpp import compared_in_engine
from .parts import Parts, to_nothing
from .stock import factors_of


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
        tables = stored_tables(model)
        if tables:
            raise UsageError(
                f"'{next(iter(tables))}' is stored in {next(iter(tables.values())).format}, and `format` gguf takes "
                "all embeddings from the file `like`, so another model would be written; export with `format` dense "
                "and convert that, or decompose with `embeddings` dense."
            )
        if importlib.util.find_spec("gguf") is None:
            raise UsageError("`format` gguf needs the package of this name; run: pip install gguf")
        experts = unfused_parameters(model)
        if experts:
            raise UsageError(
                f"The experts '{experts[0]}' are decomposed, which `format` gguf cannot hold one by one; export with "
                "`format` factored or dense."
            )

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        assert job.like is not None, "checked by the configuration"
        layers, file = factored_layers(model), Located(job.like)
        parts = Parts(model, job.store)
        reader, places = file.reader, places_in(file, model, layers, parts)
        skeleton = decoded_skeleton(model)
        typed = {name: kind for name, layer in layers.items() if (kind := _kind(layer)) is not None}
        pieces = list(_pieces(reader, layers, typed, places, job, parts))
        ranked = {name: layers[name] for name in typed if layers[name].rank}
        number = {"f32": 4, "f16": 2, "q8_0": 1}[job.adapter_type]
        adapter_bytes = sum(number * layer.rank * sum(layer.plan.shape) for layer in ranked.values())
        check_space(job.folder, sum(map(_piece_bytes, pieces)) + adapter_bytes, "The gguf export")
        _write_model(reader, pieces, job.folder / MODEL_FILE)
        if ranked:
            _write_adapter(reader, ranked, places, job, parts)
        for kind, count in Counter(piece.kind.name for piece in pieces if _is_layer(piece, layers, places)).items():
            job.notes.append(f"{count} decomposed layers as {kind}")
        other = sorted({_why(layer) for name, layer in layers.items() if name not in typed} - {""})
        if other:
            job.notes.append(f"multiplied out, since GGUF has no type for them: {', '.join(other)}")
        if not ranked and job.adapter_type != "f16":
            job.notes.append("no adapter was written, so that `adapter_type` had no effect")
        if len(typed) == len(layers) and job.dense_type != "f16":
            job.notes.append("nothing was multiplied out, so that `dense_type` had no effect")
        broken = sum(
            _stored_kind(job.adapter_type, layer.rank).name != job.adapter_type.upper() for layer in ranked.values()
        )
        if broken:
            job.notes.append(f"{broken} left factors as F16: their ranks are no whole blocks of {job.adapter_type}")
        to_nothing(model)
        written = outputs_of_files(skeleton, layers, places, job)
        adapter = job.folder / ADAPTER_FILE
        if kind_of(model) == "causal":
            base, lora = job.folder / MODEL_FILE, adapter if adapter.is_file() else None
            job.notes.append(compared_in_engine(base, lora, job.ids, written))
        else:
            job.notes.append("decoded by the gguf package; not run in llama.cpp, since it predicts no next tokens")
        return written

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch."), "float16"]


def _kind(layer: FactoredLinear) -> Any:
    """The GGUF type of a layer's Q, or None."""
    import gguf

    form = None if layer.plan.backbone == "none" else layer.backbone.quantizer
    if isinstance(form, GGML):
        return form.kind
    if not isinstance(form, Block) or layer.in_features % form.group_size:
        return None
    return getattr(gguf.GGMLQuantizationType, form.name.upper(), None)


def _why(layer: FactoredLinear) -> str:
    """Why a Q has no type; empty where there is no Q."""
    name = layer.plan.backbone
    if name == "none":
        return ""
    if layer.plan.backbone_options.get("incoherence"):
        return f"rotated {name}"
    short = isinstance(layer.backbone.quantizer, Block) and layer.in_features % layer.backbone.quantizer.group_size
    return f"{name} of {layer.in_features} inputs, no whole blocks" if short else f"backbone {name}"


# --- writing ---


def _pieces(
    reader: Any,
    layers: dict[str, FactoredLinear],
    typed: dict[str, Any],
    places: dict[str, Place],
    job: Job,
    model: Parts,
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
                size, stored = gguf.GGML_QUANT_SIZES[typed[name]]
                width = layer.in_features // size * stored

                def blocks(name: str = name, layer: FactoredLinear = layer, place: Place = place) -> np.ndarray:
                    with model.held(f"{name}.backbone"):
                        parts = {key: part.cpu() for key, part in layer.backbone.parts().items()}
                    form = layer.backbone.quantizer
                    made = parts["weight"] if isinstance(form, GGML) else gguf_blocks(form, parts, layer.plan.shape)
                    return (made if place.order is None else made[place.order]).contiguous().numpy()

                yield _Piece(tensor.name, (layer.out_features, width), typed[name], np.dtype(np.uint8), blocks)
            else:
                kind = _stored_kind(job.dense_type, layer.in_features)

                def whole(
                    name: str = name, layer: FactoredLinear = layer, place: Place = place, kind: Any = kind
                ) -> np.ndarray:
                    with model.held(*factors_of(name, layer), *_backbone_of(name, layer)):
                        weight = layer.dense_weight(torch.float32).cpu()
                    return _quantized(place.into(weight), kind)

                yield _Piece(tensor.name, _bytes_shape(layer.plan.shape, kind), kind, _dtype(kind), whole)
        elif tensor.name in biases:
            name = biases[tensor.name]

            def bias(name: str = name) -> np.ndarray:
                with model.held(f"{name}.bias"):
                    return places[f"{name}.bias"].into(model.read(f"{name}.bias").float().cpu()).contiguous().numpy()

            f32 = gguf.GGMLQuantizationType.F32
            yield _Piece(tensor.name, (layers[name].out_features,), f32, _dtype(f32), bias)
        else:

            def same(tensor: Any = tensor) -> np.ndarray:
                return np.asarray(tensor.data)

            yield _Piece(tensor.name, tensor.data.shape, tensor.tensor_type, tensor.data.dtype, same)


def _backbone_of(name: str, layer: FactoredLinear) -> list[str]:
    return [] if layer.backbone is None else [f"{name}.backbone"]


def _piece_bytes(piece: _Piece) -> int:
    return int(np.prod(piece.shape)) * piece.dtype.itemsize


def _is_layer(piece: _Piece, layers: dict[str, FactoredLinear], places: dict[str, Place]) -> bool:
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

    writer = gguf.GGUFWriter(path, metadata(reader, gguf.Keys.General.ARCHITECTURE))
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        if field.name in (gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION, "general.alignment"):
            continue
        array, value = field.types[0] == gguf.GGUFValueType.ARRAY, field.contents()
        if array and not value:  # the writer takes none
            continue
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if array else None)
    most = Counter(piece.kind.name for piece in pieces if len(piece.shape) == 2).most_common(1)[0][0]
    known = getattr(gguf.LlamaFileType, f"MOSTLY_{most}", None)
    writer.add_file_type(metadata(reader, gguf.Keys.General.FILE_TYPE) or 0 if known is None else known)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for piece in pieces:
        writer.add_tensor_info(piece.name, piece.shape, piece.dtype, _piece_bytes(piece), piece.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in pieces:
        writer.write_tensor_data(piece.make())
        let_go_pages(reader)
        give_back()
    writer.close()


def _write_adapter(
    reader: Any, layers: dict[str, FactoredLinear], places: dict[str, Place], job: Job, parts: Parts
) -> None:
    import gguf

    writer = gguf.GGUFWriter(job.folder / ADAPTER_FILE, metadata(reader, gguf.Keys.General.ARCHITECTURE))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for name, layer in layers.items():
        rows, columns = layer.plan.shape
        for suffix, shape in (("lora_a", (layer.rank, columns)), ("lora_b", (rows, layer.rank))):
            kind = _stored_kind(job.adapter_type, shape[1])
            stored, dtype = _bytes_shape(shape, kind), _dtype(kind)
            size = int(np.prod(stored)) * dtype.itemsize
            writer.add_tensor_info(f"{places[f'{name}.weight'].name}.{suffix}", stored, dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, layer in layers.items():
        place = places[f"{name}.weight"]
        with parts.held(*factors_of(name, layer)):
            left, right = (factor.float().cpu() for factor in layer.dense_factors())
        for value in (right, left if place.order is None else left[place.order]):
            writer.write_tensor_data(_quantized(value, _stored_kind(job.adapter_type, value.shape[1])))
        give_back()
    writer.close()


def write_adapter_for(
    layers: dict[str, FactoredLinear],
    file: Path,
    job: Job,
    parts: Parts,  # of the model, which stays as it is
    expected: Tensor | None,  # the model's logits of `job.ids`; None: it predicts no next tokens
) -> None:
    """L and R of these layers as an adapter of a GGUF file whose codes are their Q; run in llama.cpp if it is there."""
    located = Located(file)
    places = {}
    for name, layer in layers.items():
        with parts.seen(name):
            places[f"{name}.weight"], _ = located.place(f"{name}.weight", layer.dense_weight(torch.float32).cpu())
        let_go_pages(located.reader)
    _write_adapter(located.reader, layers, places, job, parts)
    _check_adapter(layers, places, job)
    if expected is not None:
        job.notes.append(compared_in_engine(file, job.folder / ADAPTER_FILE, job.ids, expected))


def _check_adapter(layers: dict[str, FactoredLinear], places: dict[str, Place], job: Job) -> None:
    """Read the written factors again: 8 bits hold them to 1 %."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(job.folder / ADAPTER_FILE).tensors}
    for name, layer in layers.items():
        place = places[f"{name}.weight"]
        left, right = (decoded(gguf, stored[f"{place.name}.{suffix}"]) for suffix in ("lora_b", "lora_a"))
        own, read = place.into(layer.dense_factors()[0].float() @ layer.dense_factors()[1].float()), left @ right
        distance = float((own.cpu() - read).norm() / own.norm().clamp_min(1e-30))
        if not distance <= 0.05:
            raise ExportMismatch(
                f"The written adapter is not L R in '{name}': got a relative distance of {distance:.2g}, expected at "
                "most 0.05. Nothing was kept; try `adapter_type` f32."
            )
