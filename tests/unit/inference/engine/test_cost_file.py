"""Measured costs on disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from recycle_ds.inference import SamplingParams
from recycle_ds.inference.engine.build import local_engine
from recycle_ds.inference.engine.costs import measurement as costs
from recycle_ds.inference.engine.costs.cost_file import CostFile, Extent
from recycle_ds.inference.speculation.cost_model import CostModel
from tests.unit.inference.models import random_model

EXTENT = Extent(context=8, tokens=40, sequences=4)
COSTS = CostModel(((1, 1e-3), (4, 2e-3)), ((1, 1e-4),), ((1, 2e-4),))


def test_a_second_start_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents every start from waiting for measurements, the costs of another model or of smaller batches from
    being used, and those of larger ones from being measured again because less memory is free."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    original = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *arguments: measured.append(1) or original(*arguments))
    monkeypatch.setattr(costs, "_MOST_CHANGE", 1e9)  # however busy the machine is
    first = local_engine(random_model(7, 1), max_batch=2).measure_costs()
    (file,) = (tmp_path / "recycle_ds").iterdir()
    engine = local_engine(random_model(7, 1), max_batch=2)
    engine.finish(engine.add([1, 2], SamplingParams(max_new_tokens=5), "verified"))
    assert len(measured) == 1 and (engine.measure_costs().full, first.full) == (first.full, first.full)
    local_engine(random_model(7, 1), max_batch=1, kv_memory_gib=1e-4).measure_costs()
    assert len(measured) == 1, "the costs of larger calls are known"
    local_engine(random_model(7, 1), max_batch=3).measure_costs()
    local_engine(random_model(7, 1), max_batch=2).measure_costs()
    local_engine(random_model(7, 1, layers=3), max_batch=2).measure_costs()
    assert len(measured) == 3 and len(list((tmp_path / "recycle_ds").iterdir())) == 2
    # measured once more on a machine that has become faster or slower
    monkeypatch.setattr(costs, "_MOST_CHANGE", 1.0)
    local_engine(random_model(7, 1), max_batch=2).measure_costs()
    assert len(measured) == 4 and json.loads(file.read_text())["measured"][0]["full"] != [
        list(point) for point in first.full
    ]


def test_a_user_is_told_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a first start that is silent for seconds, and a line on stderr where nothing takes long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure(*_: object) -> CostModel:
        time.sleep(seconds)
        return COSTS

    monkeypatch.setattr(costs, "measure", measure)
    for silent_seconds, seconds in ((60.0, 0.0), (0.01, 1.0)):
        monkeypatch.setattr(costs, "_SILENT_SECONDS", silent_seconds)
        local_engine(random_model(7, 1), max_batch=2 + int(seconds)).measure_costs()
        assert ("note: measuring what calls" in capsys.readouterr().err) == (seconds > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": []},
        {"measured": 5},
        {"full": [[1, 1.0]]},
        {"full": [[4, 1.0], [1, 2.0]]},
        {"full": [[1, -1.0], [4, 2.0]]},
        {"module": []},
        {"module": [["x", 1.0]]},
        {"first": [[1, -1.0]]},
        {"extent": {"context": 8}},
        {"extent": {"context": 8, "tokens": "40", "sequences": 4}},
        {"extent": None},
        {"key": {"machine": "another"}},
        None,
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, changes: dict[str, object] | None) -> None:
    """Prevents a truncated file, or one that was edited, from stopping decoding or deciding how much is drafted."""
    file = CostFile(tmp_path, {"machine": "this", "layout": [1, 1]})
    assert file.read(EXTENT) is None
    file.write(COSTS, EXTENT)
    assert file.read(EXTENT) == file.read(Extent(8, 12, 0)) == COSTS
    assert [file.read(Extent(*wanted)) for wanted in ((7, 40, 4), (8, 41, 4), (8, 40, 5))] == [None] * 3
    # engines of which neither covers the other, and a smaller one that measured again, do not take each other's costs
    later = CostModel(((1, 3e-3), (4, 4e-3)), COSTS.module, COSTS.first)
    file.write(COSTS, Extent(8, 32, 8))
    file.write(later, Extent(8, 12, 0))
    assert file.read(EXTENT) == file.read(Extent(8, 32, 8)) == COSTS and file.read(Extent(8, 12, 0)) == later
    file.path.unlink()
    file.write(COSTS, EXTENT)
    tree = json.loads(file.path.read_text())
    inside = {name: value for name, value in (changes or {}).items() if name not in ("key", "measured")}
    outside = {name: value for name, value in (changes or {}).items() if name in ("key", "measured")}
    tree["measured"][0] |= inside
    file.path.write_text("{" if changes is None else json.dumps(tree | outside))
    assert file.read(EXTENT) is None
    file.write(COSTS, EXTENT)
    assert file.read(EXTENT) == COSTS, "a damaged file is replaced"


def test_a_folder_that_refuses_files_is_no_error(tmp_path: Path) -> None:
    """Prevents decoding from failing on machines whose home is read-only."""
    (tmp_path / "file").write_text("")
    file = CostFile(tmp_path / "file" / "below", {})
    file.write(COSTS, EXTENT)
    assert file.read(EXTENT) is None


def test_a_change_of_the_machines_speed_does_not_raise_the_cost_of_larger_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents a decoder that hardly drafts for its first minutes: memory had become slower between the timing of one token
    and that of four, which then seemed to cost 17 instead of 5 % more."""
    clock = [0.0]

    def run(_executor: object, _context: int, _start: int, sequences: int, drafts: int) -> None:
        slower = 1.4 if clock[0] > 0.5 else 1.0
        clock[0] += slower * (0.010 + 0.0002 * sequences + 0.001 * (drafts > 0) + 0.0003 * max(drafts - 1, 0))

    monkeypatch.setattr(costs, "_run", run)
    monkeypatch.setattr(costs, "_read_context", lambda *_: None)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(costs.time, "monotonic", lambda: 0.0)
    found = costs.measure(None, 400, 16, 2048, 4, with_module=True)  # type: ignore[arg-type]
    assert clock[0] > 1
    assert [(size, seconds) for size, seconds in found.full] == [
        (size, pytest.approx(0.010 + 0.0002 * size)) for size, _ in found.full
    ]
    assert [size for size, _ in found.full] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert [seconds for _, seconds in found.first] == [pytest.approx(0.001, rel=0.02)] * 4
    assert [seconds for _, seconds in found.module] == [pytest.approx(0.0003, rel=0.02)] * 4


def test_measurements_on_a_busy_machine_are_repaired() -> None:
    """Prevents verified decoding that drafts nothing for hundreds of tokens because one size was timed while another program
    ran: four tokens were stored at thirteen times the cost of one."""
    points = [(1, 0.044), (2, 0.02), (4, 0.597), (8, 0.08), (16, 2.96)]
    assert costs.without_outliers(points) == ((1, 0.02), (2, 0.02), (4, 0.04), (8, 0.08), (16, 0.16))
    calm = ((1, 0.008), (2, 0.009), (4, 0.009), (8, 0.012))
    assert costs.without_outliers(calm) == calm
    assert costs.without_outliers([]) == ()


def test_one_wrong_difference_does_not_make_all_drafts_free() -> None:
    """Prevents drafts that are taken to cost nothing at any batch size because the difference of two noisy times came out
    below zero at one of them: far too many were then verified."""
    noisy = [(1, 0.3), (2, 0.4), (4, 0.5), (8, -0.1), (16, 0.9), (32, 0.8)]
    found = costs.ascending(noisy, 0.001)
    assert [size for size, _ in found] == [1, 2, 4, 8, 16, 32]
    assert [seconds for _, seconds in found] == pytest.approx([0.275] * 4 + [0.85] * 2)
    assert costs.ascending([(1, -0.2), (2, -0.1), (4, 0.2)], 0.001) == ((1, 0.001), (2, 0.001), (4, 0.2))
    assert costs.ascending([], 0.001) == ()
