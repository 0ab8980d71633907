"""A sample of the fuzz corpus; `make fuzz` runs all of it."""

from __future__ import annotations

from collections import Counter

from tests.fuzz.cases import KINDS, make_case
from tests.fuzz.run import fuzz_rows


def test_every_case_ends_as_one_row_and_nothing_else_is_touched(tmp_path):
    # The first of every kind, then as they come.
    cases = {case.kind: case for case in map(make_case, reversed(range(400)))}
    numbers = {case.number for case in cases.values()} | set(range(200))
    assert set(cases) == set(KINDS)
    verdict = fuzz_rows([make_case(number) for number in sorted(numbers)], tmp_path, shards=4, limit_s=300)
    assert verdict.violations == []
    total = sum(verdict.outcomes.values(), start=Counter())
    assert total.total() == len(numbers)
    assert total["metrics"] > 0
    assert total["decode"] > 0
    assert total["manifest"] > 0
