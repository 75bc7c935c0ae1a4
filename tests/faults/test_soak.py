"""A short soak: all faults at random, and each operation that has returned is one row, or counted in a gap record."""

import pytest

from tests.faults.server import migrated
from tests.faults.soak import Soak


@pytest.fixture(scope="module")
def template():
    with migrated() as server:
        yield server


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_fails_each_operation_is_one_row_or_counted_in_a_gap(template, tmp_path, seed):
    report = Soak(template.copy(), tmp_path, seed).run(seconds=12)
    print(report)
    assert report.unexplained == []
    assert report.counts["duplicates"] == 0
    assert report.counts["rows"] > 0
    assert report.faults.total() > 0
