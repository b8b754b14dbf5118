"""Maps canonical names to Hugging Face's, one tensor to one: nothing is fused, transposed or permuted."""

from __future__ import annotations

import re

BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_ENDS = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_IN_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$")
RECYCLE = "recycle."


def hugging_face_name(canonical: str) -> str:
    """Returns a tensor's name in a Hugging Face folder. The module's tensors, in separate files, keep their canonical names."""
    if canonical.startswith(RECYCLE):
        return canonical
    match = _IN_BLOCK.match(canonical)
    if match:
        layer, part, suffix = match.groups()
        return f"model.layers.{layer}.{BLOCK[part]}.{suffix}"
    part, _, suffix = canonical.rpartition(".")
    return f"{_ENDS[part]}.{suffix}"
