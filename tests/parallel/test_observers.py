"""Observers of real runs on two ranks: which calls they get, what they add, and what is left when they fail."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recycle_ds.checkpoint.portable.folders import completed
from recycle_ds.config import RunConfig
from tests.distributed import run_ranks
from tests.parallel.ranks import run_all
from tests.parallel.watching import Broken, Poison, Recorder, run_observed, stand_in
from tests.runs import figures, make_corpus, read_metrics, steps_of, tiny_run

pytestmark = pytest.mark.ranks
COLUMNS = {"training__observers": ["tests.parallel.watching:Columns"], "training__log_every": 2}


class Results:
    """Runs of four steps in one folder, and what `run_observed` returned for each, by rank."""

    def __init__(self, root: Path) -> None:
        self.root, self.corpus = root, make_corpus(root / "corpus")
        self.by_name: dict[str, list[tuple[str, str, list[Any]]]] = {}

    def config(self, name: str, **changes: Any) -> RunConfig:
        return tiny_run(self.corpus, self.root / name, **({"training__steps": 4} | changes))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = Results(tmp_path_factory.mktemp("observers"))
    watched = {
        "training__eval_every": 2,
        "training__eval_batches": 1,
        "training__save_every": 2,
        "training__nonfinite": "retry",
    }
    runs = {
        "plain": (found.config("plain"), list),
        "watched": (found.config("watched", **watched), make_watched),
        "columns": (found.config("columns", **COLUMNS), list),
        **{
            name: (found.config(name), functools.partial(make_broken, rank, method))
            for name, rank, method in (
                ("broken", 1, "after_step"),
                ("at_start", 0, "at_start"),
                ("at_end", 0, "at_end"),
            )
        },
    }
    outcomes = run_ranks(run_observed, 2, list(runs.values()), timeout=200)
    found.by_name = {name: [outcomes[rank][number] for rank in (0, 1)] for number, name in enumerate(runs)}
    return found


def make_broken(rank: int, method: str) -> list[Any]:
    return [Broken(rank, method)]


def make_watched() -> list[Any]:
    return [Poison(), Recorder()]


def test_every_call_comes_at_its_point(results: Results) -> None:
    """Prevents an observer that sees a step before it was run, does not see a repeated one, or only sees rank 0's."""
    step = [("phase", phase) for phase in ("data", "count", "compute", "agree", "update")]
    bad = [*step, ("event", ("nonfinite", 3))]
    for rank in (0, 1):
        ending, _, (_, calls) = results.by_name["watched"][rank]
        assert ending == "finished"
        found = [(name, value["step"] if name == "log" else value) for name, value in calls]
        found = [(name, value[0] if name == "evaluation" else value) for name, value in found]
        saves = [value for name, value in found if name == "save"]
        assert saves == [(2, True), (4, True)]
        expected = [
            *[
                ("start", (0, 4, rank)),
                ("before", (1, 1)),
                *step,
                ("phase", "log"),
                ("after", (1, 1, "apply", 1)),
                ("log", 1),
            ],
            *[
                ("phase", "save"),
                ("before", (2, 2)),
                *step,
                ("phase", "log"),
                ("after", (2, 2, "apply", 2)),
                ("log", 2),
            ],
            *[("phase", "save"), ("phase", "evaluate"), ("evaluation", 2), ("before", (3, 3)), *bad],
            *[("phase", "log"), ("after", (3, 3, "retry", 2)), ("before", (3, 4)), *step, ("phase", "log")],
            *[
                ("after", (3, 4, "apply", 3)),
                ("log", 3),
                ("phase", "save"),
                ("before", (4, 5)),
                *step,
                ("phase", "log"),
            ],
            *[("after", (4, 5, "apply", 4)), ("log", 4), ("phase", "save"), ("phase", "evaluate"), ("evaluation", 4)],
            *[("phase", "save"), ("end", (4, "finished", 5, True))],
        ]
        assert [call for call in found if call[0] != "save"] == expected
    lines = [value for name, value in results.by_name["watched"][0][2][1] if name == "log"]
    assert lines == steps_of(results.root / "watched"), "what is written is what observers get"


def test_an_observer_changes_nothing(results: Results) -> None:
    """Prevents losses, norms or written files that depend on whether somebody watches."""
    assert figures(results.root / "watched") == figures(results.root / "plain"), "bit for bit"


def test_figures_and_events_of_a_configured_observer(results: Results) -> None:
    """Prevents `training.observers` from creating an observer on ranks that it is not for, and figures that are not logged."""
    assert [outcome[2][0] for outcome in results.by_name["columns"]] == [1, 0]
    lines = steps_of(results.root / "columns")
    assert [(line["step"], line["perplexity"]) for line in lines] == [
        (line["step"], line["backbone_loss"] * 10) for line in lines
    ]
    assert [line["step"] for line in lines] == [1, 2, 4] and list(lines[0])[-2:] == ["rank_seconds", "perplexity"]
    (event,) = [line for line in read_metrics(results.root / "columns") if "event" in line]
    assert (event["event"], event["step"], event["even"]) == ("odd", 2, True)
    assert json.loads((results.root / "columns" / "summary.json").read_text())["anomalies"] == {"odd": 1}
    output = results.by_name["columns"][0][1]
    assert output.count("warning: step 2 is odd\n") == 1


def test_a_failed_observer_ends_the_run_with_its_steps_saved(results: Results) -> None:
    """Prevents a mistake in a user's observer from losing steps, from making other ranks hang, or from having no name."""
    endings = [outcome[0] for outcome in results.by_name["broken"]]
    assert endings[0] == endings[1]
    assert re.fullmatch(
        r"error: observer tests\.parallel\.watching:Broken failed at step 2: KeyError: 'no such colour' \(watching\.py:\d+\); "
        r"step 3 is saved: correct the observer or leave it out, and start the run again \(rank 1 on .+\)",
        endings[0],
    )
    assert [path.name for path in completed(results.root / "broken")] == ["step-00000003"]
    assert json.loads((results.root / "broken" / "summary.json").read_text())["state"] == endings[0][len("error: ") :]
    assert run_ranks(run_all, 2, [results.config("broken")]) == [["finished"]] * 2
    assert figures(results.root / "broken") == figures(results.root / "plain"), "bit for bit"


def test_failures_at_the_start_and_at_the_end(results: Results) -> None:
    """Prevents training without the observer that was asked for, and an error at the end that costs the last checkpoint."""
    first, other = (outcome[0] for outcome in results.by_name["at_start"])
    assert first == other and "Broken failed at step 0: KeyError" in first and "correct the observer" in first
    assert not completed(results.root / "at_start") and not (results.root / "at_start" / "summary.json").exists()
    first, other = (outcome[0] for outcome in results.by_name["at_end"])
    assert "Broken failed at step 4: KeyError" in first and "the run had ended: finished at step 4" in first
    assert other == "finished" and completed(results.root / "at_end")[0].name == "step-00000004"


def test_weights_and_biases_gets_the_run(results: Results, tmp_path: Path) -> None:
    """Prevents a resumed run that is another one in wandb, steps that wandb refuses after a rollback, and missing losses."""
    change: dict[str, Any] = {"training__wandb": "speech", "training__eval_every": 4, "training__eval_batches": 1}
    runs = [(results.config("wandb", **change, training__stop_at=2), list), (results.config("wandb", **change), list)]
    folder = stand_in(tmp_path / "packages")
    outcomes = run_ranks(run_observed, 2, runs, folder)
    assert [[ending for ending, *_ in rank] for rank in outcomes] == [["stop_at", "finished"]] * 2
    calls = [json.loads(line) for line in Path(folder, "calls.jsonl").read_text().splitlines()]
    starts = [arguments for name, arguments in calls if name == "init"]
    assert [(one["project"], one["name"], one["resume"], one["console"]) for one in starts] == [
        ("speech", "wandb", "allow", "off")
    ] * 2, "rank 0 only, once a start"
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["config"]["training"]["seq_length"] == 24
    defined = [(one["name"], one["step_metric"]) for name, one in calls if name == "define_metric"]
    assert defined == [("step", None), ("*", "step")] * 2
    logged = [one["data"] for name, one in calls if name == "log"]
    assert [one["step"] for one in logged] == [1, 2, 2, 3, 4, 4], "with two evaluations"
    lines = steps_of(results.root / "wandb")
    assert [(one["loss"], one["recycle_loss/2"]) for one in logged if "loss" in one] == [
        (line["loss"], line["recycle_loss"][1]) for line in lines
    ]
    assert "eval_acceptance/1" in logged[2] and "eval_acceptance/1" in logged[5]
    assert [one["exit_code"] for name, one in calls if name == "finish"] == [0, 0]


def test_a_lost_metrics_service_does_not_end_the_run(results: Results, tmp_path: Path) -> None:
    """Prevents a run of a week that ends because wandb cannot be reached, and a warning at each of its steps."""
    folder = stand_in(tmp_path / "packages", fails_at=2)
    runs = [(results.config("lost", training__wandb="speech"), list)]
    (ending, output, _), (other, *_) = (rank[0] for rank in run_ranks(run_observed, 2, runs, folder))
    assert (ending, other) == ("finished", "finished")
    (line,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert "WeightsAndBiases failed at step 2: ConnectionError: wandb is gone" in line and "not called any more" in line
    (event,) = [line for line in read_metrics(results.root / "lost") if "event" in line]
    assert (event["event"], event["step"]) == ("observer_dropped", 2)
    calls = [json.loads(line)[0] for line in Path(folder, "calls.jsonl").read_text().splitlines()]
    assert calls.count("log") == 2 and "finish" not in calls
    assert figures(results.root / "lost") == figures(results.root / "plain")
