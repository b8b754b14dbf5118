"""The step time that the planner predicts for a run on the GPU at hand, to compare a measurement with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recycle_ds.config import RecycleConfig, RunConfig, load_deepspeed_json
from recycle_ds.config.deepspeed_json import offloads, zero_stage
from recycle_ds.parallel.layout import layout_of
from recycle_ds.planning.candidates import Candidate
from recycle_ds.planning.communication import communication
from recycle_ds.planning.errors import PlanningError
from recycle_ds.planning.hardware import GPUS, Cluster, Gpu, find_gpu
from recycle_ds.planning.kernels import FLASH, HUGGING_FACE, Kernels
from recycle_ds.planning.memory import local_weights, stage_counts
from recycle_ds.planning.timing import StepTime, kernels_of, step_time

# Parts of the names that CUDA gives GPUs, the more special ones first.
_DEVICES = (
    ("A100-SXM4-40GB", "a100-40"), ("A100-PCIE-40GB", "a100-40"), ("A100", "a100-80"), ("L40S", "l40s"), ("H100", "h100"),
    ("H200", "h200"), ("B200", "b200"), ("MI300X", "mi300x"),
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """A step as the planner sees it."""

    time: StepTime
    tokens_per_second: float
    """Over all GPUs."""
    kernels: Kernels

    def deviation(self, tokens_per_second: float) -> float:
        """How much faster (above 0) or slower a measurement is than predicted, as a fraction."""
        return tokens_per_second / self.tokens_per_second - 1


def gpu_of(device: str) -> Gpu:
    """The GPU of a name that `torch.cuda.get_device_name` gives or `plan.py --gpu` takes. Raises PlanningError if unknown."""
    if device.lower() in GPUS:
        return find_gpu(device)
    for part, name in _DEVICES:
        if part in device:
            return find_gpu(name)
    raise PlanningError(f"{device!r}: no rates of this GPU are known; known are {', '.join(sorted(GPUS))}")


def predict(
    config: RunConfig, device: str, *, gpus: int = 1, single_documents: bool = False, kernels: Kernels | None = None
) -> Prediction:
    """Predicts a step of a run in its own layout, on one node. Reads nothing but the run's DeepSpeed file.

    device: see `gpu_of`. gpus: world size, up to a node's. single_documents: whether each sequence is one document, which takes
    the flash kernel. kernels: what training uses by default; HUGGING_FACE for Hugging Face's model of the same shape, which has
    no recycle module. model.vocab_size must be set. Raises PlanningError for an unknown GPU, ConfigError for a layout or a
    DeepSpeed file that does not fit.
    """
    if kernels is HUGGING_FACE:
        config = config.model_copy(update={"recycle": RecycleConfig(layers=0)})
    tree = load_deepspeed_json(config.deepspeed)
    training, parallel = config.training, config.parallel
    layout = layout_of(parallel, gpus)
    candidate = Candidate(
        layout,
        zero_stage(tree),
        training.micro_batch_size,
        training.activation_checkpointing,
        offloads(tree, "offload_optimizer"),
        parallel.sequence,
    )
    used = kernels or kernels_of(config, candidate)
    if kernels is None and single_documents and (config.recycle.layers == 0 or config.recycle.depth == 1):
        used = replace(used, attention=FLASH)
    counts = stage_counts(config, layout.pipeline)
    last = len(counts) - 1
    weights = local_weights(config.model, config.recycle, layout.tensor, counts[last], (last == 0, True))
    sent = communication(config, candidate, counts[last], weights, last=True)
    time = step_time(config, candidate, Cluster(1, gpus, gpu_of(device)), counts, sent, weights.total, kernels=used)
    return Prediction(time, training.global_batch_size * training.seq_length / time.total, used)
