"""The scheduler's state, as it is printed and compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recycle_ds.inference.engine.sequence import Sequence
from tests.unit.inference.engine.invented_runner import Machine, sequence


def test_the_state_can_be_compared() -> None:
    """Prevents a scheduler whose state cannot be seen, so that an error in it cannot be reproduced."""
    states = []
    for _ in range(2):
        machine = Machine(20, 2)
        for number in range(3):
            machine.scheduler.add(sequence(number, [1, 2, 3, number]))
        machine.step()
        states.append(machine.scheduler.state())
    assert states[0] == states[1]
    assert eval(repr(states[0]), {}) == states[0], "it can be printed, and what is printed be compared"
    assert [one["number"] for one in states[0]["running"]] == [0, 1]  # type: ignore[attr-defined]
    assert [one["number"] for one in states[0]["waiting"]] == [2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda machine, one: machine.scheduler.pool.share(one.blocks[0]), id="users of a block"),
        pytest.param(
            lambda machine, one: machine.scheduler.pool.add_module_entries(one.blocks[-1]), id="module's entries"
        ),
        pytest.param(
            lambda machine, one: machine.scheduler.pool.register(one.blocks[0], 0, (7, 7, 7, 7)), id="content"
        ),
        pytest.param(lambda machine, one: machine.scheduler.tables.move([(1, 2)]), id="moves"),
        pytest.param(lambda machine, one: machine.scheduler.budget.forget(one.number), id="budget"),
        pytest.param(lambda machine, one: one.tokens.__setitem__(0, 6), id="a token"),
        pytest.param(lambda machine, one: setattr(one, "confidences", (0.25,)), id="a confidence"),
        pytest.param(lambda machine, one: one.stopping.take([1]), id="tokens left"),
    ],
)
def test_the_state_shows_every_change(change: Callable[[Machine, Sequence], object]) -> None:
    """Prevents two schedulers that compare equal but go on differently."""
    machine = Machine(20, 2)
    one = sequence(0, [1, 2, 3, 0, 1, 2], mode="verified", new_tokens=20)
    machine.scheduler.add(one)
    for _ in range(3):
        machine.step()
    before = machine.scheduler.state()
    assert machine.scheduler.state() == before
    change(machine, one)
    assert machine.scheduler.state() != before
