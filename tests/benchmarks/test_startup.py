from __future__ import annotations

from benchmarks.startup import run_once, table


def test_every_step_is_reached_in_order(tiny_folder):
    seconds = run_once(str(tiny_folder))
    assert len(seconds) == 3
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_the_cold_round_is_not_counted():
    rounds = [[9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [2.0, 3.0, 4.0]]
    last = table(rounds).splitlines()[-1]
    assert last.split() == ["first", "result", "4.00", "3.00", "to", "5.00", "9.00"]
