from __future__ import annotations

from tests.train.sharding_table import TABLE, table


def test_the_40b_run_lies_on_its_devices_as_the_table_says():
    """A change that is meant: `python -m tests.train.sharding_table`, and read the difference."""
    assert table() == TABLE.read_text()
