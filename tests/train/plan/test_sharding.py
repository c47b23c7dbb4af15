from __future__ import annotations

import jax
import pytest

from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.sharding import make_mesh
from tests.train.plan.sharding_table import TABLE, table
from train.config import OptimizerConfig
from train.state import make_optimizer, state_shardings


def test_the_40b_run_lies_on_its_devices_as_the_table_says():
    """A change that is meant: `python -m tests.train.plan.sharding_table`, and read the difference."""
    assert table() == TABLE.read_text()


def test_a_mesh_that_splits_nothing_is_refused_with_one_that_does():
    mesh = make_mesh((1, 6, 1), jax.devices()[:6])
    with pytest.raises(FalconError, match="choose 2 along fsdp and 3 times as many along data"):
        state_shardings(family("tiny-40b"), make_optimizer(OptimizerConfig(), 10), mesh)
