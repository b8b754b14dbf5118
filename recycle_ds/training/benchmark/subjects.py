"""The models that are compared: the backbone alone, with its recycle module, and Hugging Face's of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from recycle_ds.config import RecycleConfig, RunConfig, resolve_deepspeed
from recycle_ds.data.loader import Batch
from recycle_ds.data.targets import make_targets
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.training.batches import assemble
from recycle_ds.training.benchmark.live_memory import PersistentTensors, persistent_tensors
from recycle_ds.training.engine.build import build_engine
from recycle_ds.training.engine.optimizer import AdamW, parameter_groups
from recycle_ds.training.engine.zero.choice import weights_at, zero_adapter
from recycle_ds.training.errors import TrainingError
from recycle_ds.training.run_context import RunContext

BACKBONE, RECYCLE, HUGGING_FACE = "backbone", "recycle", "huggingface"


class Subject(Protocol):
    """A model in its training engine."""

    config: RunConfig
    """What it trains, for the FLOP count."""

    def step(self) -> None:
        """One optimizer step."""

    def held(self) -> PersistentTensors:
        """The tensors that it keeps between steps."""


class OurSubject:
    """RecycleGPT in its training engine."""

    def __init__(self, context: RunContext) -> None:
        config, mesh = context.config, context.mesh
        self.config = config
        self.engine = build_engine(context)
        depth = self.engine.model.depth
        self._batches = assemble(random_batches(config, mesh, depth), 1 + depth, mesh)
        weights = [1.0] + [config.recycle.loss_weight / max(1, depth)] * depth
        self._scales = self._batches.scales(weights, mesh.replicas.size)

    def step(self) -> None:
        """See `Subject`."""
        self.engine.passes.train(self._batches.micro, self._scales)
        self.engine.gradients.step()

    def held(self) -> PersistentTensors:
        """See `Subject`."""
        return persistent_tensors(self.engine.model, self.engine.optimizer, self.engine.zero)


class HuggingFaceSubject:
    """transformers' LlamaForCausalLM of the same shape, under the same DeepSpeed settings and optimizer."""

    def __init__(self, context: RunContext) -> None:
        import deepspeed
        from transformers import LlamaForCausalLM

        config, mesh = context.config, context.mesh
        self.config = config
        model = LlamaForCausalLM(llama_config(config))
        self._model = model.to(mesh.device)
        self._optimizer = AdamW(parameter_groups(self._model, config.training.weight_decay), config.training)
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            optimizer=self._optimizer,
            config=dict(context.deepspeed_config),
            dist_init_required=False,
        )
        weights = weights_at(self._engine.zero_optimization_stage(), mesh)
        self._zero = zero_adapter(self._engine, self._optimizer, mesh, weights)
        self._optimizer.hold = False
        self._tokens = [batch.tokens_BS.to(mesh.device) for batch in random_batches(config, mesh, 0)]

    def step(self) -> None:
        """See `Subject`."""
        for tokens in self._tokens:
            loss = self._engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            self._engine.backward(loss)
            self._engine.step()

    def held(self) -> PersistentTensors:
        """See `Subject`."""
        return persistent_tensors(self._model, self._optimizer, self._zero)


def llama_config(config: RunConfig) -> Any:
    """The LlamaConfig of the run's backbone."""
    from transformers import LlamaConfig

    model = config.model
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.dim_per_head,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
        attention_bias=model.qkv_bias,
        attn_implementation="sdpa",
    )


def random_batches(config: RunConfig, mesh: Mesh, depth: int) -> list[Batch]:
    """This rank's micro-batches of one step, of random tokens; every sequence is one document."""
    training = config.training
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(training.seed + mesh.data.rank)
    batches = []
    for _ in range(training.global_batch_size // (training.micro_batch_size * mesh.data.size)):
        shape = (training.micro_batch_size, training.seq_length + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        targets = make_targets(tokens, torch.zeros_like(tokens), depth)
        positions = torch.arange(training.seq_length).expand(training.micro_batch_size, -1)
        documents = torch.zeros(training.micro_batch_size, training.seq_length, dtype=torch.int64)
        batches.append(Batch(targets.inputs[0], positions, documents, targets.inputs, targets.targets, single=True))
    return batches


def build_subjects(config: RunConfig, mesh: Mesh) -> dict[str, Subject]:
    """The backbone alone, with its recycle module, and Hugging Face's. Raises TrainingError for settings they cannot share."""
    parallel = config.parallel
    if parallel.tensor * parallel.pipeline * parallel.ulysses > 1:
        raise TrainingError(
            f"parallel.tensor={parallel.tensor}, pipeline={parallel.pipeline}, ulysses={parallel.ulysses}: the comparison "
            "with Hugging Face runs data-parallel; set all three to 1"
        )
    if config.model.qk_norm or config.model.rope.unrotated_layers:
        raise TrainingError(
            "model.qk_norm, model.rope.unrotated_layers: the comparison builds Hugging Face's LLaMA, which has neither: "
            "remove both"
        )
    if not config.recycle.layers:
        raise TrainingError("recycle.layers=0: there is no module to measure; set it to 1 or more")
    plain = config.model_copy(update={"recycle": RecycleConfig(layers=0)})
    makers: dict[str, tuple[Callable[..., Subject], RunConfig]] = {
        BACKBONE: (OurSubject, plain),
        RECYCLE: (OurSubject, config),
        HUGGING_FACE: (HuggingFaceSubject, plain),
    }
    return {
        name: maker(RunContext(own, resolve_deepspeed(own, mesh.data.size), mesh))
        for name, (maker, own) in makers.items()
    }
