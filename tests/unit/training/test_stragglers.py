"""The timer of a rank's own work beside a compiled model, with events that behave like CUDA's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle_ds.config import resolve_deepspeed
from recycle_ds.parallel import rendezvous
from recycle_ds.parallel.mesh import build_mesh
from recycle_ds.training.benchmark.subjects import random_batches
from tests.distributed import run_ranks
from tests.runs import make_corpus, tiny_run


class Event:
    """A CUDA event as the timer sees it: what is recorded while torch.compile traces is lost."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded = False

    def record(self) -> None:
        self.recorded = not torch.compiler.is_compiling()

    def elapsed_time(self, end: Event) -> float:
        if not (self.recorded and end.recorded):
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 500.0


def _times(rank: int, world_size: int, corpus: str, folder: str) -> tuple[list[float], list[Any]]:
    """The times of two compiled passes by the timer of a run, and whether DeepSpeed's throughput timer is on."""
    from torch._dynamo.testing import CompileCounter

    from recycle_ds.training.batches import assemble
    from recycle_ds.training.engine.build import build_engine
    from recycle_ds.training.faults.slow_ranks import SlowRanks
    from recycle_ds.training.run_context import RunContext

    rendezvous.quiet_libraries()
    rendezvous.start(rendezvous.detect_launch({}))
    try:
        config = tiny_run(Path(corpus), Path(folder), training__global_batch_size=2, model__vocab_size=300)
        mesh = build_mesh(config.parallel, torch.device("cpu"))
        engine = build_engine(RunContext(config, resolve_deepspeed(config, 1), mesh))
        work = SlowRanks(engine.engine, mesh, 2.0)._work
        work._mesh = replace(mesh, device=torch.device("cuda"))
        torch.cuda.Event = Event  # type: ignore[assignment,misc]
        counter = CompileCounter()
        engine.engine.compile(backend=counter)
        batches = assemble(random_batches(config, mesh, 2), 3, mesh)
        for _ in range(2):
            engine.passes.train(batches.micro, batches.scales([1.0, 0.5, 0.5], 1))
            work.data(0.25)
        work._mesh = mesh
        throughput = engine.engine.tput_timer.config
        return work.gather(), [counter.frame_count > 0, throughput.enabled]
    finally:
        rendezvous.stop()


@pytest.mark.ranks
def test_a_compiled_model_is_timed_from_outside(tmp_path: Path) -> None:
    """Prevents "Both events must be recorded": events of hooks on the compiled module are swallowed by its graph. And
    DeepSpeed's throughput timer, which waits for the GPU in every micro-batch."""
    corpus = make_corpus(tmp_path / "corpus")
    ((seconds, (compiled, throughput)),) = run_ranks(_times, 1, str(corpus), str(tmp_path / "run"), timeout=240)
    assert compiled, "nothing was compiled"
    assert seconds == [pytest.approx(0.75)]  # 0.25 s of data and 0.5 s of a forward pass per step
    assert not throughput
