"""NNCF's rank correction in OpenVINO (packages nncf and openvino): it has no gradients, so that it is not trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .protocol import Made, Setting


class _Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class Served(nn.Module):
    """A compiled model that gives `.logits`."""

    def __init__(self, compiled: Any):
        super().__init__()
        self.compiled = compiled

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.from_numpy(self.compiled([input_ids.numpy()])[0]))


def nncf_corrected(setting: Setting, folder: Path, mode: str = "nf4", group: int = 64) -> Made:
    """`nncf.compress_weights(..., lora_correction=True)`, embedding and head stay as they are."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, AdvancedLoraCorrectionParameters

    dense = setting.dense()
    windows = setting.windows(setting.calibration, setting.calibration_tokens)
    with torch.no_grad():  # of windows of this length
        graph = openvino.convert_model(torch.export.export(_Logits(dense), (windows[:1],)))
    vocabulary = len(dense.get_input_embeddings().weight)
    ignored = [op.get_friendly_name() for op in graph.get_ordered_ops() if _is_head(op, vocabulary)]
    parameters = AdvancedLoraCorrectionParameters(adapter_rank=setting.rank)
    compressed = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(mode),
        group_size=group,
        ratio=1.0,
        dataset=nncf.Dataset([window[None].numpy() for window in windows]),
        ignored_scope=nncf.IgnoredScope(names=ignored),
        backup_mode=nncf.BackupMode.NONE,
        lora_correction=True,
        advanced_parameters=AdvancedCompressionParameters(lora_correction_params=parameters),
    )
    file = folder / "model.xml"
    openvino.save_model(compressed, file, compress_to_fp16=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(compressed, "CPU", exact | threads)
    return Made(Served(compiled), [file.with_suffix(".bin")], linears=False)


def _is_head(op: Any, vocabulary: int) -> bool:
    """The product that gives the logits."""
    return op.get_type_name() == "MatMul" and op.output(0).get_partial_shape()[-1].get_max_length() == vocabulary
