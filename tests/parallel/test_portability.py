"""A checkpoint of any layout resumes at any other: the next steps equal those of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.config import RunConfig
from tests.distributed import run_in_sets
from tests.parallel.parity import PIPELINE
from tests.parallel.ranks import run_all
from tests.runs import figures, make_corpus, read_metrics, tiny_run, zero

Change = dict[str, Any]
# name: (ranks, changes)
LAYOUTS: dict[str, tuple[int, Change]] = {
    "one_zero0": (1, {"deepspeed": zero(0)}),
    "one_zero3": (1, {"deepspeed": zero(3)}),
    "dp2_zero0": (2, {"deepspeed": zero(0), "training__micro_batch_size": 4}),
    "dp2_zero1": (2, {"deepspeed": zero(1)}),
    "dp2_zero2": (2, {"deepspeed": zero(2), "training__micro_batch_size": 1}),
    "dp2_zero3": (2, {"deepspeed": zero(3)}),
    "dp2_zero3_offload": (2, {"deepspeed": zero("3_offload")}),
    "tp2_zero1": (2, {"parallel__tensor": 2, "deepspeed": zero(1)}),
    "tp2_sp_zero3": (2, {"parallel__tensor": 2, "parallel__sequence": True, "deepspeed": zero(3)}),
    "pp2": (2, {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
    "ulysses2_zero2": (2, {"parallel__ulysses": 2, "deepspeed": zero(2)}),
    "tp2_dp2_zero2": (4, {"parallel__tensor": 2, "deepspeed": zero(2)}),
    "tp2_dp2_zero3": (4, {"parallel__tensor": 2, "deepspeed": zero(3)}),
    "pp2_tp2_sp": (
        4, {"parallel__pipeline": 2, "parallel__tensor": 2, "parallel__sequence": True, "deepspeed": PIPELINE},
    ),
    "pp2_dp2": (4, {"parallel__pipeline": 2, "deepspeed": PIPELINE}),
    "ulysses2_dp2_zero3": (4, {"parallel__ulysses": 2, "deepspeed": zero(3)}),
}  # fmt: skip
BASE: Change = {
    "training__steps": 6,
    "training__learning_rate": 2e-3,
    "model__tied_embeddings": False,
    "model__layers": 3,
}
ALL = os.environ.get("RECYCLE_TEST_ALL") == "1"


def pairs() -> list[tuple[str, str]]:
    """Pairs (source, target). The full list has every source and target at least twice, and ZeRO 1 to 3 and back."""
    draw = random.Random(23)
    names = sorted(LAYOUTS)
    found = [("dp2_zero1", "dp2_zero3"), ("dp2_zero3", "dp2_zero1")]
    while len(found) < 2 * len(names):
        sources, targets = draw.sample(names, len(names)), draw.sample(names, len(names))
        new = [pair for pair in zip(sources, targets, strict=True) if pair[0] != pair[1] and pair not in found]
        found += new
    # four pairs of the full list, the same in every run: a failure is the change's; the test's id shows its pair
    seed = int(os.environ.get("RECYCLE_TEST_SEED", "0"))
    return found if ALL else random.Random(seed).sample(found, 4)


PAIRS = pairs()


def settings(number: int) -> Change:
    """A padding of the vocabulary that differs from that of the previous run."""
    return {"model__vocab_multiple": (64, 16, 50)[number % 3]}


def run_together(configs: dict[str, tuple[int, RunConfig]]) -> dict[str, str]:
    """Runs (ranks, configuration) pairs, those of one world size in few processes. Returns how each ended."""
    endings: dict[str, str] = {}
    for world_size in sorted({ranks for ranks, _ in configs.values()}):
        names = [name for name, (ranks, _) in configs.items() if ranks == world_size]
        found = run_in_sets(run_all, world_size, [configs[name][1] for name in names])
        endings |= dict(zip(names, found[0], strict=True))
    return endings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/: one process, uninterrupted. from_*/: every source, stopped at step 3. SOURCE_to_TARGET/: every pair."""
    root = tmp_path_factory.mktemp("portability")
    corpus = make_corpus(root / "corpus")

    def config(name: str, layout: str, **change: Any) -> tuple[int, RunConfig]:
        ranks, changes = LAYOUTS[layout]
        return ranks, tiny_run(corpus, root / name, **(BASE | changes | change))

    first = {"whole": config("whole", "one_zero0")}
    sources = sorted({source for source, _ in PAIRS})
    first |= {f"from_{name}": config(f"from_{name}", name, training__stop_at=3) for name in sources}
    endings = run_together(first)
    assert endings == {name: "finished" if name == "whole" else "stop_at" for name in first}
    second = {}
    for number, (source, target) in enumerate(PAIRS):
        name = f"{source}_to_{target}"
        shutil.copytree(root / f"from_{source}", root / name)
        second[name] = config(name, target, **settings(number))
    assert set(run_together(second).values()) == {"finished"}
    return root


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_next_steps_equal_the_uninterrupted_run(root: Path, source: str, target: str) -> None:
    """Prevents weights, moments, Adam's step, schedule or data position from depending on the ranks that saved them."""
    run = root / f"{source}_to_{target}"
    # on a busy machine any rank may be slow
    events = [record for record in read_metrics(run) if record.get("event", "straggler") != "straggler"]
    assert [(event["event"], event["step"]) for event in events] == [("resume", 3)], "it must not have started over"
    resumed, whole = figures(run), figures(root / "whole")
    assert len(resumed) == len(whole) == 6
    for left, right in zip(resumed, whole, strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    first, fourth = figures(root / "whole")[0], resumed[3]
    assert fourth != pytest.approx(first, rel=1e-2), "a run that started over would show the first step's figures"


def test_hugging_face_weights_start_a_run_at_any_layout(root: Path) -> None:
    """Prevents continued pretraining with shards of other ranks, or with weights that stay random."""
    source = root / f"from_{PAIRS[0][0]}"
    convert(str(source), str(root / "hf"), Conversion("hf"))
    layouts = ("one_zero0", "dp2_zero3", "tp2_sp_zero3", "pp2", "ulysses2_zero2", "tp2_dp2_zero3", "pp2_tp2_sp")
    configs = {}
    for number, name in enumerate(layouts):
        ranks, change = LAYOUTS[name]
        start = {"init_from": str(root / "hf"), "training__steps": 2, "training__warmup_steps": 0, **settings(number)}
        configs[name] = (ranks, tiny_run(root / "corpus", root / f"started_{name}", **(BASE | change | start)))
    random = tiny_run(root / "corpus", root / "started_random", **(BASE | {"training__steps": 2, "deepspeed": zero(0)}))
    endings = run_together(configs | {"random": (1, random)})
    assert set(endings.values()) == {"finished"}
    curves = {name: figures(root / f"started_{name}") for name in layouts}
    for name in layouts:
        for left, right in zip(curves[name], curves["one_zero0"], strict=True):
            assert left == pytest.approx(right, rel=1e-5), name
    trained, untrained = figures(root / "whole")[3], figures(root / "started_random")[0]
    assert abs(curves["one_zero0"][0][0] - trained[0]) < abs(curves["one_zero0"][0][0] - untrained[0]) / 3
