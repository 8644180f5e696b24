"""Write a Hugging Face checkpoint tensor by tensor: the files that `save_pretrained` writes, to the last byte, of
tensors that need not be in memory together; or one safetensors file of tensors that are made when they are written.

safetensors writes a file from tensors that all are there. Its format (https://github.com/huggingface/safetensors) lets
a file be begun without them: 8 bytes of length, a JSON header with the place of each tensor, the tensors. What belongs
into which file, and under which names, is asked of transformers and huggingface_hub with tensors on the meta device.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_torch_storage_size, split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..memory import give_back
from ..storage import write_text

MOST = "50GB"  # of a file; transformers' own default
# in safetensors' order; larger ones stand first in a file
_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_CODES)}


def stored_tensors(skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Runtime name -> what `save_pretrained` would write of a model on the meta device before it renames anything: one
    of those that are tied, none that transformers ignores; of a factored model with its sentinels."""
    ignored, quantizer = set(skeleton._keys_to_ignore_on_save or ()), getattr(skeleton, "hf_quantizer", None)
    held = skeleton.state_dict() if quantizer is None else quantizer.get_state_dict_and_metadata(skeleton)[0]
    state = {name: tensor for name, tensor in held.items() if name not in ignored}
    return remove_tied_weights_from_state_dict(state, skeleton)


def groups_of(skeleton: PreTrainedModel, state: Mapping[str, Tensor]) -> list[list[str]]:
    """The runtime names, in their order, in groups whose tensors become tensors of the file without the others.

    Nearly all are alone: renamed, or cut into several (experts that are one tensor at run time). Those of which one
    tensor of the file is made together are one group.
    """
    whole = _shapes(revert_weight_conversion(skeleton, dict(state)))
    alone: dict[str, dict[str, object]] = {}
    for name, tensor in state.items():
        try:
            alone[name] = _shapes(revert_weight_conversion(skeleton, {name: tensor}))
        except Exception:  # a conversion that needs other tensors may fail in any way
            alone[name] = {"": None}
    made = Counter(key for found in alone.values() for key in found)
    twice = {key for key, count in made.items() if count > 1}
    groups: list[list[str]] = []
    together: list[str] = []
    for name, found in alone.items():
        if found.items() <= whole.items() and not twice & found.keys():
            groups.append([name])
        else:
            together.append(name)
    return [*groups, together] if together else groups


def _shapes(state: Mapping[str, Tensor]) -> dict[str, object]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def save_streamed(
    skeleton: PreTrainedModel,  # the model as it is to be read again, on the meta device
    folder: Path,
    read: Callable[[str], Tensor],  # the tensor of a runtime name; asked for once, in the order of the model
    written: Callable[[Iterable[str]], None],  # told which names may be let go of
    largest: int | str = MOST,  # bytes of a file
) -> None:
    """What `save_pretrained` would write of a model with these tensors, none of which is held longer than its group."""
    state = stored_tensors(skeleton)
    quantizer = skeleton.__dict__.pop("hf_quantizer", None)  # which would give it the tensors all the same
    skeleton.save_pretrained(folder, state_dict={})  # configuration, code of the model, generation
    if quantizer is not None:
        skeleton.__dict__["hf_quantizer"] = quantizer
    whole = revert_weight_conversion(skeleton, dict(state))
    split = split_state_dict_into_shards_factory(
        whole,
        get_storage_size=get_torch_storage_size,
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,  # parts of one tensor stay together
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=largest,
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        places |= {
            name: (folder / file, offset) for name, offset in begin(folder / file, {n: whole[n] for n in names}).items()
        }
    left = dict(places)
    for group in groups_of(skeleton, state):
        tensors = {name: read(name).to(state[name].dtype) for name in group}
        for name, tensor in revert_weight_conversion(skeleton, tensors).items():
            assert tensor.shape == whole[name].shape and tensor.dtype == whole[name].dtype, name
            _put(*left.pop(name), tensor)
        del tensors
        written(group)
    assert not left, f"no values for {sorted(left)[:3]}"
    if split.is_sharded:
        metadata = {"total_parameters": skeleton.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class Piece:
    """Tensors of a file that are made together, when they are written."""

    shapes: Mapping[str, Tensor]  # name -> on the meta device, what will be written
    make: Callable[[], Mapping[str, Tensor]]  # the same with values


def save_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """What safetensors' `save_file` would write of all these tensors, none of which is held longer than its piece."""
    expected = {name: tensor for piece in pieces for name, tensor in piece.shapes.items()}
    offsets = begin(path, expected)
    for piece in pieces:
        made = piece.make()
        assert made.keys() == piece.shapes.keys(), f"{sorted(made)} were made of {sorted(piece.shapes)}"
        for name, tensor in made.items():
            wanted = expected[name]
            assert tensor.shape == wanted.shape and tensor.dtype == wanted.dtype, f"'{name}' is another tensor"
            _put(path, offsets.pop(name), tensor)
        del made, tensor
        give_back()
    assert not offsets, f"no values for {sorted(offsets)[:3]}"


def begin(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A safetensors file of the right length with zeros in place of the tensors; where in it each one begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-_ORDER[entry[1].dtype], entry[0])):
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        offsets[name] = start
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + start for name, start in offsets.items()}


def _put(path: Path, offset: int, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with path.open("r+b") as file:
        file.seek(offset)
        values.numpy().tofile(file)
