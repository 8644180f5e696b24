"""Runtime layers and the surgery that puts them into a model."""

from .embeddings import (
    TokenTable,
    dense_tables,
    put_table,
    stored_tables,
    token_modules,
    token_tables,
)
from .experts import container_of, expert_of, fuse, fuse_untouched, unfuse, unfused_parameters
from .factored_linear import FactoredLinear, FrozenBasis, FrozenSum, Parts, build_layer, dense_factor
from .names import place_of
from .pivoted_linear import PivotedLinear
from .quantized_embedding import QuantizedEmbedding, QuantizedHead
from .quantized_linear import CastLinear, Packed, QuantizedLinear, ZeroLinear, dequantize_once
from .sentinels import sentinel, sentinels_of
from .surgery import (
    SHARED,
    bias_of,
    check_finite,
    check_plain,
    densify,
    factored_layers,
    fused_parameters,
    is_linear,
    is_transposed,
    plain_model,
    select_linears,
    shape_of,
    weight_of,
)

__all__ = [
    "SHARED",
    "CastLinear",
    "FactoredLinear",
    "FrozenBasis",
    "FrozenSum",
    "Packed",
    "Parts",
    "PivotedLinear",
    "QuantizedEmbedding",
    "QuantizedHead",
    "QuantizedLinear",
    "TokenTable",
    "ZeroLinear",
    "bias_of",
    "build_layer",
    "check_finite",
    "check_plain",
    "container_of",
    "dense_factor",
    "dense_tables",
    "densify",
    "dequantize_once",
    "expert_of",
    "factored_layers",
    "fuse",
    "fuse_untouched",
    "fused_parameters",
    "is_linear",
    "is_transposed",
    "place_of",
    "plain_model",
    "put_table",
    "select_linears",
    "sentinel",
    "sentinels_of",
    "shape_of",
    "stored_tables",
    "token_modules",
    "token_tables",
    "unfuse",
    "unfused_parameters",
    "weight_of",
]
