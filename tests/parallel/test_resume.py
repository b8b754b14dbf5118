"""Interrupted runs equal uninterrupted ones, bit for bit at the same layout. Unsuitable checkpoints are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recycle_ds.checkpoint import CheckpointError, load_model
from recycle_ds.checkpoint.portable.manifest import read_manifest
from recycle_ds.checkpoint.run.lock import RunLock
from recycle_ds.config import RunConfig
from tests.distributed import run_in_sets, run_ranks
from tests.parallel.parity import PIPELINE
from tests.parallel.ranks import run_all, run_on_full_disk, run_with_small_shards
from tests.runs import figures, make_corpus, read_metrics, steps_of, tensors, tiny_run, zero

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("zero0", {"deepspeed": zero(0)}),
    ("zero1", {"deepspeed": zero(1)}),
    ("zero2_bf16", {"deepspeed": zero(2), "training__dtype": "bf16"}),
    ("zero0_bf16", {"deepspeed": zero(0), "training__dtype": "bf16"}),
    ("zero3", {"deepspeed": zero(3)}),
    ("zero3_bf16", {"deepspeed": zero(3), "training__dtype": "bf16"}),
    (
        "zero1_bf16_many",  # gradients of this many micro-batches are accumulated in fp32
        {
            "deepspeed": zero(1), "training__dtype": "bf16", "training__micro_batch_size": 1,
            "training__global_batch_size": 24,
        },
    ),
    ("detached", {"deepspeed": zero(1), "recycle__gradient": "detached"}),
    ("frozen", {"deepspeed": zero(3), "recycle__gradient": "frozen_backbone"}),
    ("pipeline", {"deepspeed": PIPELINE, "parallel__pipeline": 2}),
    ("pipeline_bf16", {"deepspeed": PIPELINE, "parallel__pipeline": 2, "training__dtype": "bf16"}),
    ("tensor_sequence", {"deepspeed": zero(2), "parallel__tensor": 2, "parallel__sequence": True}),
    ("ulysses", {"deepspeed": zero(3), "parallel__ulysses": 2}),
    ("grown", {"deepspeed": zero(1), "training__schedule": "constant"}),
]  # fmt: skip


class Runs:
    """Configurations of runs in one folder, on one corpus."""

    def __init__(self, root: Path) -> None:
        self.root, self.corpus = root, make_corpus(root / "corpus")

    def config(self, name: str, **changes: Any) -> RunConfig:
        return tiny_run(self.corpus, self.root / name, **({"training__steps": 6} | changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """For every layout an uninterrupted run and a run in two parts, all on two ranks in one set of processes."""
    found = Runs(tmp_path_factory.mktemp("resume"))
    configs = []
    for name, change in LAYOUTS:
        first = {"training__steps": 3} if name == "grown" else {"training__stop_at": 3}
        configs += [
            found.config(f"{name}/whole", **change),
            found.config(f"{name}/parts", **change, **first),
            found.config(f"{name}/parts", **change, training__dry_run=False),
        ]
    # each set has the runs of one layout: the second part resumes from the first
    endings = run_in_sets(run_all, 2, configs, size=3)[0]
    expected = ["finished", "stop_at", "finished"] * (len(LAYOUTS) - 1) + ["finished"] * 3
    assert endings == expected
    return found


@pytest.mark.parametrize("name", [name for name, _ in LAYOUTS])
def test_interrupted_equals_uninterrupted_bit_for_bit(runs: Runs, name: str) -> None:
    """Prevents a restart that loses weights, moments, Adam's step, schedule or data position, and effects of a dry run."""
    whole, parts = runs.root / name / "whole", runs.root / name / "parts"
    assert figures(parts) == figures(whole)
    events = [record for record in read_metrics(parts) if "event" in record]
    # on a busy machine one rank may be slow at a step
    assert [(one["event"], one["step"]) for one in events if one["event"] != "straggler"] == [("resume", 3)]
    last = "checkpoints/step-00000006"
    left, right = tensors(parts / last), tensors(whole / last)
    assert left.keys() == right.keys()
    assert all(left[key].equal(right[key]) for key in left)


def test_a_run_that_starts_over_differs_from_one_that_resumes(runs: Runs) -> None:
    """Prevents the test above from passing for a run that started over: only its events differ, not its figures."""
    again = runs.root / "again"
    shutil.copytree(runs.root / "zero1" / "parts", again)
    shutil.rmtree(again / "checkpoints")
    assert run_ranks(run_all, 2, [runs.config("again", **dict(LAYOUTS)["zero1"])]) == [["finished"]] * 2
    assert figures(again) == figures(runs.root / "zero1" / "whole")
    assert "resume" not in [record.get("event") for record in read_metrics(again)]
    started_over = json.loads((again / "summary.json").read_text())["sessions"][-1]["first_step"]
    resumed = json.loads((runs.root / "zero1" / "parts" / "summary.json").read_text())["sessions"][-1]["first_step"]
    assert (started_over, resumed) == (0, 3)


def test_a_checkpoint_of_many_shards(runs: Runs) -> None:
    """Prevents errors that only larger runs have, whose ranks write several files each and wait for the disk."""
    whole = runs.config("shards/whole", deepspeed=zero(1))
    first = runs.config("shards/parts", deepspeed=zero(1), training__stop_at=3, training__save_buffer_gib=6e-5)
    second = runs.config("shards/parts", deepspeed=zero(1), training__save_buffer_gib=0)
    ended = run_ranks(run_with_small_shards, 2, [whole, first, second], 50_000, timeout=200)
    assert ended == [["finished", "stop_at", "finished"]] * 2
    for step in ("step-00000003", "step-00000006"):
        folder = runs.root / "shards" / "parts" / "checkpoints" / step
        names = {name.split("-")[1] for name in read_manifest(folder).files if name.startswith("shard-")}
        counts = [len(list(folder.glob(f"shard-{rank}-*"))) for rank in sorted(names)]
        assert len(counts) == 2 and min(counts) >= 3, counts
    assert figures(runs.root / "shards" / "parts") == figures(runs.root / "shards" / "whole"), "bit for bit"


def test_resume_at_another_layout(runs: Runs) -> None:
    """Prevents a checkpoint that depends on the ranks, parallel axes, ZeRO stage or micro-batch size that wrote it."""
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("zero1", 1, {"deepspeed": zero(3)}),
        ("zero3", 1, {"deepspeed": zero(0), "training__micro_batch_size": 4}),
        ("pipeline", 1, {"deepspeed": zero(1)}),
        ("zero3", 2, {"deepspeed": PIPELINE, "parallel__pipeline": 2}),
        ("pipeline", 2, {"deepspeed": zero(2), "parallel__tensor": 2, "parallel__sequence": True}),
        ("tensor_sequence", 2, {"deepspeed": zero(3), "parallel__ulysses": 2}),
        ("ulysses", 2, {"deepspeed": PIPELINE, "parallel__pipeline": 2}),
    ]
    targets: dict[int, list[tuple[Path, Path, RunConfig]]] = {1: [], 2: []}
    for number, (name, ranks, change) in enumerate(cases):
        source, target = runs.root / name / "parts", runs.root / f"moved_{number}"
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoints" / "step-00000006")
        targets[ranks].append((source, target, runs.config(target.name, **change)))
    for ranks, moves in targets.items():
        endings = run_ranks(run_all, ranks, [config for _, _, config in moves], timeout=300)
        assert endings == [["finished"] * len(moves)] * ranks
        for source, target, _ in moves:
            events = [record for record in read_metrics(target) if record.get("event") == "resume"]
            assert [event["step"] for event in events] == [3, 3], "one resume in the source, one of its own"
            for left, right in zip(figures(target), figures(source), strict=True):
                assert left == pytest.approx(right, rel=1e-5)


def test_refusals_and_fallback(runs: Runs) -> None:
    """Prevents a resume with another model or batch size, and a damaged checkpoint that is loaded or stops the run."""
    source = runs.root / "zero1" / "parts"
    damaged, ruined = runs.root / "damaged", runs.root / "ruined"
    for target in (damaged, ruined):
        shutil.copytree(source, target)
    shard = next((damaged / "checkpoints/step-00000006").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for folder in (ruined / "checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{")
    stray = damaged / "checkpoints" / ".tmp-step-00000009"
    stray.mkdir()
    other = make_corpus(runs.root / "other_corpus", seed=6)
    moved = runs.root / "moved_corpus"
    shutil.copytree(runs.corpus, moved)
    configs = [
        runs.config("zero1/parts", model__hidden=64),
        runs.config("zero1/parts", training__seed=1),
        runs.config("zero1/parts", training__global_batch_size=4),
        runs.config(
            "zero1/parts", data__tokenizer=str(other / "tokenizer.json"), data__train=[{"path": str(other / "train")}]
        ),
        runs.config("zero1/parts", training__steps=4),
        runs.config("ruined"),
        runs.config("damaged", training__keep_checkpoints=1, data__train=[{"path": str(moved / "train")}]),
    ]
    endings = run_ranks(run_all, 2, configs, timeout=200)
    assert endings[0] == endings[1], "ranks must agree, or some would wait forever"
    hidden, seed, batch, data, beyond, all_damaged, fallen_back = endings[0]
    assert "model.hidden was 48 and is 64" in hidden
    assert "training.seed was 1234 and is 1" in seed
    assert "training.global_batch_size was 8 and is 4" in batch
    assert "data.tokenizer" in data and "is not the tokenizer of the run" in data
    assert "at step 6" in beyond and "training.steps (4)" in beyond
    assert "checkpoints are damaged" in all_damaged
    assert fallen_back == "finished"
    assert figures(damaged) == figures(source)
    assert not stray.exists()
    # the damaged folder was replaced by an intact one, and pruning kept the checkpoint just saved
    assert load_model(str(damaged)).step == 6


def test_init_from_loads_weights_and_initialises_a_module(runs: Runs) -> None:
    """Prevents refused, swapped or ignored weights of a model without a module, and loaded moments or steps."""
    plain = runs.config("plain", recycle__layers=0)
    given = runs.config("given", init_from=str(runs.root / "plain"), recycle__gradient="frozen_backbone")
    other = runs.config("other", init_from=str(runs.root / "plain"), model__ffn=96)
    endings = run_ranks(run_all, 1, [plain, given, other])[0]
    assert endings[:2] == ["finished", "finished"]
    assert "does not fit the model" in endings[2] and "blocks.0.mlp" in endings[2]
    before = tensors(runs.root / "plain/checkpoints/step-00000006")
    after = tensors(runs.root / "given/checkpoints/step-00000006")
    names = [key for key in before if key.startswith("weight/")]
    assert names and all(after[key].equal(before[key]) for key in names)
    assert any(key.startswith("exp_avg/recycle.") for key in after)


def test_metrics_of_a_resumed_run_read_like_one_run(runs: Runs) -> None:
    """Prevents a resumed run from keeping a truncated line, or lines after the checkpoint's step, in its log."""
    source, target = runs.root / "zero1" / "parts", runs.root / "trimmed"
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    with (target / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert run_ranks(run_all, 1, [runs.config("trimmed")]) == [["finished"]]
    steps = [record["step"] for record in read_metrics(target) if "event" not in record]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_reported(runs: Runs) -> None:
    """Prevents a report of success, and half a checkpoint, if one of two ranks cannot write the last checkpoint."""
    endings = run_ranks(run_on_full_disk, 2, runs.config("full", training__save_every=4), 6)
    assert endings[0] == endings[1]
    assert "step 6: the last checkpoint could not be written" in endings[0] and "resumes from step 4" in endings[0]
    root = runs.root / "full" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004"]
    assert read_manifest(root / "step-00000004").step == 4


def test_trace_evaluations_and_kept_checkpoints(runs: Runs) -> None:
    """Prevents steps without a trace, evaluations that depend on the number of ranks, and too many kept checkpoints."""
    change = {
        "training__profile": {"start": 2, "end": 3}, "training__eval_every": 3, "training__save_every": 1,
        "training__keep_checkpoints": 2, "training__eval_batches": 1, "recycle__start_step": 2, "recycle__warmup_steps": 2,
    }  # fmt: skip
    assert run_ranks(run_all, 2, [runs.config("kept/2", **change)]) == [["finished"], ["finished"]]
    assert run_ranks(run_all, 1, [runs.config("kept/1", **change)]) == [["finished"]]
    folder = runs.root / "kept/2"
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["latest", "step-00000005", "step-00000006"]
    for rank in (0, 1):
        trace = json.loads((folder / "profile" / f"rank-0000{rank}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any("mm" in name for name in names)
    evaluations = [
        [record for record in read_metrics(runs.root / f"kept/{n}") if "eval_loss" in record] for n in (1, 2)
    ]
    assert [record["step"] for record in evaluations[1]] == [3, 6]
    for one, two in zip(*evaluations, strict=True):
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
        assert two["eval_recycle_loss"] == pytest.approx(one["eval_recycle_loss"], rel=1e-5)
        assert two["eval_acceptance"] == pytest.approx(one["eval_acceptance"], abs=0.02)
    rows = steps_of(folder)
    assert [row["loss"] == row["backbone_loss"] for row in rows] == [True, True, False, False, False, False]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Prevents two runs in one folder, each removing the other's unfinished checkpoints."""
    lock = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()


def test_a_checkpoint_is_complete(runs: Runs) -> None:
    """Prevents a checkpoint without random generators, tokenizer, configuration or provenance, and a wrong `latest`."""
    root = runs.root / "zero1" / "whole" / "checkpoints"
    assert (root / "latest").read_text() == "step-00000006\n"
    manifest = read_manifest(root / "step-00000006")
    assert {"rng-00000.safetensors", "rng-00001.safetensors", "tokenizer.json"} <= manifest.files.keys()
    assert load_file(root / "step-00000006" / "rng-00001.safetensors")["cpu"].numel() > 0
    assert manifest.provenance["command"] and manifest.next_sample == 48
    assert manifest.config["model"]["vocab_size"] == manifest.tensors["embedding.weight"].shape[0]
    record = json.loads((runs.root / "zero1" / "whole" / "run.json").read_text())
    assert (record["world_size"], record["data"], record["tensor"], record["zero_stage"]) == (2, 2, 1, 1)
