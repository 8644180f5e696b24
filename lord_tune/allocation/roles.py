"""What a layer does in its block, as far as its name and shape say: for priors that treat roles differently.

Names are compared in parts, and only with the words that model families use for these places; no family is named. A
layer that says nothing is told by its shape: MLPs widen and narrow.
"""

from __future__ import annotations

import re

QUERY_KEY, VALUE, FUSED, OUTPUT, GATE, UP, DOWN, OTHER = "qk", "v", "qkv", "o", "gate", "up", "down", "other"
ROLES = (QUERY_KEY, VALUE, FUSED, OUTPUT, GATE, UP, DOWN, OTHER)
_WORDS = (  # the first that is found in the last parts of the name decides
    (FUSED, r"qkv|wqkv|c_attn|query_key_value|in_proj|kv_b|kv_proj|kv_a"),
    (QUERY_KEY, r"q|k|wq|wk|query|key|(q|k)_(proj|lin)|(q|k)_[ab]_proj|(q|k)_?proj|to_(q|k)|queries|keys"),
    (VALUE, r"v|wv|value|v_(proj|lin)|v_?proj|to_v|values"),
    (OUTPUT, r"o|wo|o_proj|out_proj|out_lin|to_out|o_?proj|out"),
    (GATE, r"gate|gate_proj|w1|wi_0|gate_up_proj|gate_up"),
    (UP, r"up|up_proj|fc1|fc_in|c_fc|w3|wi|wi_1|lin1|dense_h_to_4h|intermediate|ffn1|up_?proj"),
    (DOWN, r"down|down_proj|fc2|fc_out|w2|wo_ff|lin2|dense_4h_to_h|ffn2|down_?proj"),
)
_ATTENTION = re.compile(r"attn|attention")


def role_of(name: str, shape: tuple[int, int]) -> str:
    """name: of the module; shape: (out, in)."""
    parts = [part.lower() for part in name.split(".") if not part.isdigit()]
    for part in reversed(parts[-2:]):
        for role, words in _WORDS:
            if re.fullmatch(words, part):
                return role
    out, inputs = shape
    if any(_ATTENTION.search(part) for part in parts):
        return FUSED if out > inputs else OUTPUT
    return UP if out > inputs else DOWN if inputs > out else OTHER
