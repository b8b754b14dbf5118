"""The configuration tree of a run.

Every section is frozen and rejects unknown keys. Checks that need only the configuration are validators here; checks
that need the world size are in `recycle_ds.parallel.mesh`, those that need data in `recycle_ds.data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recycle_ds.config.errors import ConfigError
from recycle_ds.config.fault_section import FaultConfig, Policy
from recycle_ds.config.model_sections import ModelConfig, RecycleConfig
from recycle_ds.config.section import Fraction, NonNegative, OnResume, Positive, Section, Text


class ParallelConfig(Section):
    """How one model is split over ranks. Data parallelism uses the remaining factor of the world size."""

    tensor: Positive = 1
    """Tensor-parallel degree; divides heads, kv_heads and ffn."""
    pipeline: Positive = 1
    """Pipeline stages."""
    sequence: bool = False
    """Megatron sequence parallelism: norms and residuals sharded over the tensor group."""
    ulysses: Positive = 1
    """DeepSpeed Ulysses degree: sequences split over ranks, attention over heads; divides heads and kv_heads."""

    @model_validator(mode="after")
    def _combinable(self) -> ParallelConfig:
        if self.ulysses > 1 and self.tensor * self.pipeline > 1:
            raise ValueError(
                f"ulysses ({self.ulysses}) needs tensor=1 and pipeline=1, not tensor={self.tensor}, pipeline={self.pipeline}: "
                "both split the heads; combine it with ZeRO"
            )
        return self


class ProfileConfig(Section):
    """A torch profiler trace of steps `start` to `end`, both included, in run_dir/profile/."""

    start: Positive
    """First step traced."""
    end: Positive
    """Last step traced."""

    @model_validator(mode="after")
    def _ordered(self) -> ProfileConfig:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not be before start ({self.start})")
        return self


class TrainingConfig(Section):
    """Optimisation, checkpoints and logging of a run."""

    steps: Annotated[Positive, OnResume.FREE]
    """Optimizer steps; also the length of the learning-rate schedule."""
    stop_at: Annotated[Positive | None, OnResume.FREE] = None
    """Save and exit after this step; the schedule stays that of `steps`."""
    micro_batch_size: Annotated[Positive, OnResume.FREE]
    """Sequences in one forward pass of one data-parallel rank."""
    global_batch_size: Annotated[Positive, OnResume.FIXED]
    """Sequences in one optimizer step, over all ranks."""
    seq_length: Annotated[Positive, OnResume.FIXED]
    """Tokens in a sequence."""
    dtype: Annotated[Literal["fp32", "bf16"], OnResume.FREE] = "fp32"
    """Arithmetic of forward and backward; master weights and optimizer moments are always fp32."""
    tf32: Annotated[bool, OnResume.FREE] = False
    """With dtype=fp32 on a GPU: matrix products round their operands to TF32 (10 bits of mantissa), which is several times as
    fast. CPUs ignore it."""
    seed: Annotated[NonNegative, OnResume.FIXED] = 1234
    """Seed of initial weights and data order."""
    learning_rate: Annotated[float, Field(gt=0), OnResume.REPORTED]
    """Peak learning rate."""
    min_learning_rate_ratio: Annotated[Fraction, OnResume.REPORTED] = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""
    warmup_steps: Annotated[NonNegative, OnResume.REPORTED] = 0
    """Steps of linear warm-up; cut to `steps` with a warning if longer."""
    schedule: Annotated[Literal["cosine", "wsd", "constant"], OnResume.REPORTED] = "cosine"
    """`wsd`: warm-up, stable, then linear decay over `decay_steps`."""
    decay_steps: Annotated[NonNegative | None, OnResume.REPORTED] = None
    """wsd: length of the decay; a tenth of `steps` if not given."""
    weight_decay: Annotated[float, Field(ge=0), OnResume.REPORTED] = 0.1
    """AdamW's weight decay, on matrices only: norms and biases have none."""
    beta1: Annotated[float, Field(ge=0, lt=1), OnResume.REPORTED] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1), OnResume.REPORTED] = 0.95
    """AdamW's second-moment decay."""
    epsilon: Annotated[float, Field(gt=0), OnResume.REPORTED] = 1e-8
    """AdamW's epsilon."""
    gradient_clipping: Annotated[float, Field(ge=0), OnResume.REPORTED] = 1.0
    """Largest gradient norm; 0 disables clipping. With detached gradients module and backbone are clipped separately."""
    activation_checkpointing: Annotated[Literal["none", "full"], OnResume.FREE] = "none"
    """`full`: blocks keep only their input and recompute in the backward pass."""
    loss_chunk: Annotated[Positive, OnResume.FREE] = 1024
    """Rows (tokens) of logits that the output head computes at once."""
    compile: Annotated[bool | Literal["auto"], OnResume.FREE] = "auto"
    """Compile blocks, recycle module and losses with torch.compile, which takes time at the start. `auto`: on CUDA, except in a
    pipeline; on a CPU only `true` does."""
    dry_run: Annotated[bool, OnResume.FREE] = True
    """One forward and backward pass before step 1 that changes no state, so that an out-of-memory error comes at once."""
    nonfinite: Annotated[Policy, OnResume.FREE] = "stop"
    """What all ranks do when a loss or the gradient norm is not finite on any of them. `stop`: save the state before the
    step and exit. `skip`: skip the step and its data. `retry`: repeat the step with the same data once, then skip.
    `rollback`: restore the newest intact checkpoint and skip all data read since, at most `faults.max_rollbacks`
    times."""
    max_skipped_in_a_row: Annotated[Positive, OnResume.FREE] = 20
    """Consecutive skipped steps allowed before the run stops."""
    log_every: Annotated[Positive, OnResume.FREE] = 10
    """Steps between lines of metrics.jsonl."""
    save_every: Annotated[NonNegative, OnResume.FREE] = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Annotated[Positive, OnResume.FREE] = 2
    """Newest checkpoints kept."""
    save_buffer_gib: Annotated[float, Field(ge=0), OnResume.FREE] = 8.0
    """GiB of host memory per rank for copies of a checkpoint that is written while training continues; 0 waits for the
disk."""
    eval_every: Annotated[NonNegative, OnResume.FREE] = 0
    """Steps between evaluations, the last step included; 0 never evaluates."""
    eval_batches: Annotated[Positive, OnResume.FREE] = 8
    """Global batches in one evaluation."""
    tensorboard: Annotated[bool, OnResume.FREE] = True
    """Write TensorBoard events to run_dir/tensorboard/."""
    wandb: Annotated[Text | None, OnResume.FREE] = None
    """Project of Weights & Biases that gets the metrics (needs the package wandb)."""
    observers: Annotated[tuple[Text, ...], OnResume.FREE] = ()
    """Observers of the run, as module:Class, see docs/observers.md."""
    profile: Annotated[ProfileConfig | None, OnResume.FREE] = None
    """Steps to trace."""


class TokenSource(Section):
    """One tokenised corpus: the prefix of a .bin/.idx pair."""

    path: Text
    """Prefix of the pair, without the suffix."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Fraction of samples drawn from it, relative to the other sources."""


class PrepareConfig(Section):
    """How pretrain creates missing token files. One rank creates them, the others wait."""

    source: Text
    """`shipped` (the corpus in the package), a text, json, jsonl or parquet file, a folder of them or of a saved
    data set, or a Hugging Face dataset (OWNER/NAME)."""
    output: Text
    """Folder for train.bin/.idx, validation.bin/.idx and, when `tokenizer_vocab` is given, tokenizer.json."""
    tokenizer_vocab: Positive | None = None
    """Vocabulary size of a BPE tokenizer trained on the source; without it data.tokenizer must exist."""
    text_column: str = "text"
    """Column that contains the document, in jsonl, parquet and datasets; `data.text` also inside an object."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    chat_column: Text | None = None
    """Column with lists of messages, which the tokenizer's chat template renders; replaces `text_column`."""
    parse_special: bool = False
    """Special tokens that are written in documents stand for themselves; otherwise they are text."""
    skip_invalid: bool = False
    """Leave out rows and files that cannot be used (broken JSON, other types than text, not UTF-8), and count them."""
    all_files: bool = False
    """Read hidden files and dataset cards (README.md and the like) of a folder too."""
    exclude: tuple[str, ...] = ()
    """Patterns of files of a folder that are left out, such as `*test*`."""

    @model_validator(mode="after")
    def _template(self) -> PrepareConfig:
        if self.chat_column is not None and self.tokenizer_vocab is not None:
            raise ValueError(
                f"chat_column={self.chat_column!r} needs a tokenizer with a chat template, which tokenizer_vocab "
                f"({self.tokenizer_vocab}) does not make: name one as data.tokenizer"
            )
        return self

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Fraction of documents held out for validation; each document is drawn on its own, so the share is approximate."""


class DataConfig(Section):
    """Token files and their tokenizer."""

    train: Annotated[tuple[TokenSource, ...], Field(min_length=1)]
    """Weighted blend of token files."""
    validation: tuple[TokenSource, ...] = ()
    """Token files of the evaluations."""
    tokenizer: Text
    """tokenizer.json, or a folder that contains one."""
    prepare: PrepareConfig | None = None
    """How to create missing token files; without it missing files are an error."""


class RunConfig(Section):
    """The configuration of a run. `recycle_ds.pretrain --config FILE section.key=value` reads this."""

    run_dir: Annotated[Text, OnResume.FREE]
    """Folder for everything that the run writes: metrics, checkpoints, the resolved configuration."""
    deepspeed: Annotated[Text, OnResume.FREE]
    """DeepSpeed's JSON file; the values that this configuration sets are "auto" in it."""
    init_from: Annotated[Text | None, OnResume.FREE] = None
    """Run folder or checkpoint to load the initial weights from. If it has no recycle module, one is initialised."""
    data: Annotated[DataConfig, OnResume.FREE]
    """Data. At a resume they are compared by content, as files may have moved."""
    model: Annotated[ModelConfig, OnResume.FIXED]
    """Backbone."""
    recycle: Annotated[RecycleConfig, OnResume.FIXED] = RecycleConfig()
    """Recycle module."""
    parallel: Annotated[ParallelConfig, OnResume.FREE] = ParallelConfig()
    """Layout."""
    training: TrainingConfig
    """Optimisation."""
    faults: Annotated[FaultConfig, OnResume.FREE] = FaultConfig()
    """Bad steps, hangs, slow ranks, the end of the job."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        model, training, recycle = self.model, self.training, self.recycle
        if training.seq_length > model.max_positions:
            raise ValueError(
                f"training.seq_length ({training.seq_length}) exceeds model.max_positions ({model.max_positions})"
            )
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
                f"training.micro_batch_size ({training.micro_batch_size})"
            )
        if recycle.depth >= training.seq_length:
            raise ValueError(
                f"recycle.depth ({recycle.depth}) must be below training.seq_length ({training.seq_length})"
            )
        if recycle.layers == 0 and recycle.gradient != "joint":
            raise ValueError(f"recycle.gradient={recycle.gradient} needs a module, but recycle.layers is 0")
        if training.tf32 and training.dtype != "fp32":
            raise ValueError(f"training.tf32=true is for training.dtype=fp32, not {training.dtype}: remove it")
        self._divides()
        recycle.check_taps(model.layers)
        if training.decay_steps is not None and training.schedule != "wsd":
            raise ValueError(f"training.decay_steps belongs to training.schedule=wsd, not to {training.schedule}")
        if training.profile is not None and training.profile.start > training.steps:
            raise ValueError(
                f"training.profile.start ({training.profile.start}) is after training.steps ({training.steps})"
            )
        if training.eval_every and not self.data.validation:
            raise ValueError(f"training.eval_every ({training.eval_every}) needs token files in data.validation")
        return self

    def with_vocabulary(self, tokens: int) -> RunConfig:
        """This configuration with `model.vocab_size`: if it has none, the tokenizer's number of tokens.

        Raises ConfigError if its own is smaller than that."""
        given = self.model.vocab_size
        if given is not None and given < tokens:
            raise ConfigError(
                f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({tokens}): "
                "raise it, or leave it out"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": given or tokens})})

    def _divides(self) -> None:
        """Raises ValueError with the numbers if a size is not divisible by the degree that splits it."""
        parallel = self.parallel
        if parallel.pipeline > self.model.layers:
            raise ValueError(
                f"parallel.pipeline ({parallel.pipeline}) exceeds model.layers ({self.model.layers}): a stage would have no "
                "block; lower it"
            )
        heads = {"model.heads": self.model.heads, "model.kv_heads": self.model.kv_heads}
        widths = {"model.ffn": self.model.ffn}
        if self.recycle.layers:  # only its first matrix product is split over the hidden width
            widths["model.hidden"] = self.model.hidden
        length = {"training.seq_length": self.training.seq_length}
        split_by = (
            ("parallel.tensor", parallel.tensor, heads | widths),
            ("parallel.ulysses", parallel.ulysses, heads | length),
            ("parallel.tensor", parallel.tensor, length if parallel.sequence else {}),
        )
        for degree_name, degree, sizes in split_by:
            for name, size in sizes.items():
                if size % degree:
                    why = " when parallel.sequence is on" if degree_name == "parallel.tensor" and name in length else ""
                    raise ValueError(f"{name} ({size}) must be divisible by {degree_name} ({degree}){why}")
