"""The equations of the MiMo layout (Qwen2 backbone and MTP head), from a folder's files, by the layout's names.

Independent of the package: it shares no code with it. One sequence, fp32, no cache.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class MimoReference:
    """A folder with config.json and safetensors. Tensors are [T, D] unless noted."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.weights |= {name: value.float() for name, value in load_file(file).items()}

    def before_norm(self, tokens: Tensor) -> Tensor:
        """The backbone's states before its final norm. vLLM's model returns these."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            x = self._block(f"model.layers.{layer}.", x)
        return x

    def after_norm(self, tokens: Tensor) -> Tensor:
        """The states after it. SGLang's model returns these."""
        return self._norm("model.norm", self.before_norm(tokens))

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.weights["lm_head.weight"].T

    def head(self, states: Tensor, following: Tensor, *, zero_first: bool) -> Tensor:
        """The head's states for the token after the next one. following: at each position, the token after it.

        zero_first: the embedding at position 0 is zero, as in vLLM and SGLang.
        """
        return self._finish(self._block("model.mtp_layers.0.", self._joined(states, following, zero_first)))

    def second_draft(self, states: Tensor, following: Tensor, second: Tensor) -> Tensor:
        """States of the draft after that, at every position: the head is fed its own state and the token `second`.

        Its cache then contains the entries of all positions so far, made of the backbone's states, and its own entry.
        """
        first = self.head(states, following, zero_first=False)
        entries = self._joined(states, following, False)
        rows = []
        for position in range(len(states)):
            own = self._joined(first[position : position + 1], second[position : position + 1], False)
            chain = torch.cat((entries[: position + 1], own))
            rows.append(self._finish(self._block("model.mtp_layers.0.", chain)[-1:]))
        return torch.cat(rows)

    def _joined(self, states: Tensor, following: Tensor, zero_first: bool) -> Tensor:
        embedded = self.weights["model.embed_tokens.weight"][following].clone()
        if zero_first:
            embedded[0] = 0
        prefix = "model.mtp_layers.0."
        pair = (self._norm(prefix + "hidden_layernorm", states), self._norm(prefix + "token_layernorm", embedded))
        return torch.cat(pair, dim=-1) @ self.weights[prefix + "input_proj.weight"].T

    def _finish(self, x: Tensor) -> Tensor:
        return self._norm("model.mtp_layers.0.final_layernorm", x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name + ".weight"]

    def _block(self, prefix: str, x: Tensor) -> Tensor:
        x = x + self._attention(prefix + "self_attn.", self._norm(prefix + "input_layernorm", x))
        y = self._norm(prefix + "post_attention_layernorm", x)
        gate, up, down = (self.weights[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width, count = self.config["hidden_size"] // heads, len(x)

        def projected(part: str, parts: int) -> Tensor:  # [parts, T, width]
            value = x @ self.weights[f"{prefix}{part}_proj.weight"].T + self.weights[f"{prefix}{part}_proj.bias"]
            return value.view(count, parts, width).transpose(0, 1)

        query, key = self._rotated(projected("q", heads)), self._rotated(projected("k", groups))
        value = projected("v", groups)
        key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (key, value))
        scores = query @ key.transpose(1, 2) / math.sqrt(width)
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return mixed.transpose(0, 1).reshape(count, -1) @ self.weights[f"{prefix}o_proj.weight"].T

    def _rotated(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        frequency = self.config["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
        scaling = self.config.get("rope_scaling")
        if scaling and scaling["rope_type"] == "linear":
            frequency = frequency / scaling["factor"]
        elif scaling:
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / scaling["factor"]
        angle = torch.arange(x.shape[1]).double()[:, None] * frequency
        cosine, sine = torch.cat((angle, angle), -1).cos().float(), torch.cat((angle, angle), -1).sin().float()
        left, right = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-right, left), dim=-1) * sine
