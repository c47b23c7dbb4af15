from __future__ import annotations

import os
import subprocess
import sys

from train.machine import RECOMMENDED, recommend


def test_flags_are_set_once_and_the_users_own_stay():
    mine: dict[str, str] = {}
    recommend("gpu", mine)
    assert mine == {"XLA_FLAGS": " ".join(RECOMMENDED["gpu"][1])}
    theirs = {"LIBTPU_INIT_ARGS": "--mine"}
    recommend("tpu", theirs)
    recommend("cpu", theirs)
    assert theirs == {"LIBTPU_INIT_ARGS": "--mine"}


def test_xla_knows_every_gpu_flag():
    """XLA stops the process at a flag that it does not know, whatever the platform."""
    environment = os.environ | {"XLA_FLAGS": " ".join(RECOMMENDED["gpu"][1]), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True, timeout=120)
