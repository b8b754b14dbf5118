"""megatron-core's own GPTModel on the CPU, the reference for the conversion. Functions that run on every rank."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recycle_ds.checkpoint.loading import load_weights
from recycle_ds.checkpoint.recognition import open_source
from recycle_ds.checkpoint.sources import Source
from recycle_ds.config import ModelConfig, RecycleConfig
from recycle_ds.data.loader import Batch
from recycle_ds.model import build_model
from recycle_ds.model.layers import padded_vocabulary
from tests.unit.checkpoint.megatron_cases import TOKENS


class _NoGenerators:
    """Replaces the tracker of CUDA generators, which attention forks although its dropout is 0."""

    fork = staticmethod(contextlib.nullcontext)


def start(tensor: int) -> None:
    """Creates the groups of a tensor-parallel model, and replaces CUDA calls that megatron-core makes on any device."""
    from megatron.core import parallel_state, tensor_parallel

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    tensor_parallel.get_cuda_rng_tracker = _NoGenerators
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    parallel_state.initialize_model_parallel(tensor, 1)


def make(model: ModelConfig, recycle: RecycleConfig, tensor: int) -> Any:
    """Builds a GPTModel of a configuration, from megatron-core's local layers, with an MTP layer for the module."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    assert model.vocab_size is not None
    unrotated = model.rope.unrotated_layers
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.dim_per_head,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        no_rope_freq=[int(layer in unrotated) for layer in range(model.layers)] if unrotated else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mtp_num_layers=recycle.layers or None,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm)
    scaling = model.rope.scaling
    return GPTModel(
        config,
        spec,
        vocab_size=padded_vocabulary(model.vocab_size, model.vocab_multiple, tensor),
        max_sequence_length=model.max_positions,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope.theta,
        rope_scaling=scaling is not None and scaling.kind == "llama3",
        rope_scaling_factor=scaling.factor if scaling is not None else 8.0,
        seq_len_interpolation_factor=scaling.factor if scaling is not None and scaling.kind == "linear" else None,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if recycle.layers else None,
        parallel_output=False,
    ).eval()


@torch.no_grad()
def their_logits(gpt: Any, vocabulary: int) -> list[Tensor]:
    """Returns logits [B, S, V] of the backbone and of the MTP layer, if there is one."""
    count = TOKENS.shape[1]
    states: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if hasattr(gpt, "mtp"):
            # the model would add the MTP loss to the states, so the logits are computed from the states directly
            hook = gpt.mtp.register_forward_hook(lambda _, __, found: states.append(found))
            stack.callback(hook.remove)
        mask = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
        positions = torch.arange(count).expand_as(TOKENS)
        labels = torch.zeros_like(TOKENS) if hasattr(gpt, "mtp") else None
        found = gpt(TOKENS, positions, mask, labels=labels)
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    parts = states[0].chunk(2) if states else []
    logits = [gpt.output_layer(part, weight=weight)[0].transpose(0, 1) for part in parts] or [found]
    return [part[..., :vocabulary] for part in logits]


@torch.no_grad()
def our_logits(source: Source) -> list[Tensor]:
    """Returns the same logits of our model with a source's weights, the module at depth 1."""
    model = build_model(source.model, source.recycle, seed=None).eval()
    load_weights(model, source)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    ahead = torch.stack([TOKENS.roll(-shift, dims=1) for shift in range(1 + model.depth)])
    states = model.states(Batch(TOKENS, positions, torch.zeros_like(TOKENS), ahead, ahead))
    return [model.logits(state).transpose(0, 1) for state in states[:2]]


@dataclass(frozen=True)
class Gap:
    """The largest differences between logits, and the largest logit."""

    backbone: float
    module: float | None
    scale: float


def compare(ours: list[Tensor], theirs: list[Tensor]) -> Gap:
    assert len(ours) == len(theirs)
    # megatron-core puts zero after the last token, our batch the first token: not compared
    gaps = [float((a[:, :-1] - b[:, :-1]).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return Gap(gaps[0], gaps[1] if len(gaps) > 1 else None, float(theirs[-1].abs().max()))


Case = tuple[ModelConfig, RecycleConfig, dict[str, Any], Any]
"""Model, module, the metadata that selects how layers are stored, and `args`."""


def exchange(
    rank: int, world_size: int, ours: list[str], target: str, cases: list[Case]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Loads checkpoints that this package wrote and saves others for it to read; returns the logits of both."""
    start(world_size)
    return _load(world_size, ours), _save(rank, world_size, Path(target), cases)


def _load(world_size: int, folders: list[str]) -> list[list[Tensor]]:
    """Loads checkpoints strictly with megatron-core's own loader into its own model."""
    from megatron.core import dist_checkpointing

    found = []
    for folder in folders:
        source = open_source(folder)
        gpt = make(source.model, source.recycle, world_size)
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.fill_(torch.nan)
        sharded = gpt.sharded_state_dict()
        loaded, unused, absent = dist_checkpointing.load(sharded, str(source.folder), strict="return_all")
        assert not absent, absent
        # states that only Transformer Engine's layers load
        assert all("_extra_state" in key for key in unused), unused
        metadata = dist_checkpointing.load_content_metadata(str(source.folder))
        assert metadata == {"singleton_local_shards": False, "non_homogeneous_layers": False}
        gpt.load_state_dict({key: loaded[key] for key in sharded})
        assert source.model.vocab_size is not None
        found.append(their_logits(gpt, source.model.vocab_size))
    return found


def _save(rank: int, world_size: int, root: Path, cases: list[Case]) -> list[list[Tensor]]:
    """Saves models with random weights with megatron-core's own `save`, to root/0, 1, ..."""
    from megatron.core import dist_checkpointing

    found = []
    for number, (model, recycle, metadata, args) in enumerate(cases):
        target = root / f"{number}"
        if rank == 0:
            target.mkdir(parents=True)
        dist.barrier()
        gpt = make(model, recycle, world_size)
        generator = torch.Generator().manual_seed(1000 * number + rank)
        with torch.no_grad():
            for name, parameter in sorted(gpt.named_parameters()):
                if "norm" in name:  # replicated on every tensor rank
                    same = torch.Generator().manual_seed(number)
                    parameter.copy_(torch.rand(parameter.shape, generator=same) + 0.5)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        state = gpt.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save({**state, "args": args, "iteration": 12}, str(target), content_metadata=metadata)
        assert model.vocab_size is not None
        found.append(their_logits(gpt, model.vocab_size))
    return found
