"""Shared by all tests: eight virtual CPU devices, strict ranks, randomised parameters."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from falcon_relu.config import FalconConfig
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import abstract_params, make_mesh, param_shardings, use_mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is most of what the tests take: both workers, the processes that tests start and the next run share it.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
for option, value in (("jax_compilation_cache_dir", str(COMPILED)), ("jax_persistent_cache_min_compile_time_secs", 0)):
    if option.upper() not in os.environ:
        os.environ[option.upper()] = str(value)
        jax.config.update(option, value)

# No test fails because the machine is slow.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

TINY = ("tiny-40b", "tiny-7b", "tiny-11b", "tiny-rw")


def random_params(config: FalconConfig, seed: int = 0) -> Params:
    """Every parameter random, LayerNorms and biases included, with logits of order 1 to 10."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        centre = 1.0 if name == "scale" else 0.0
        std = 0.3 if name in ("scale", "bias") or name.endswith("_bias") else 1.5 / np.sqrt(config.d_model)
        return jax.numpy.asarray(rng.normal(centre, std, leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@contextlib.contextmanager
def sharded(config: FalconConfig, params: Params, shape: tuple[int, int, int] = (2, 2, 2)) -> Iterator[Params]:
    """A context in which a mesh of the eight devices is the current one; yields the parameters sharded over it."""
    mesh = make_mesh(shape)
    with use_mesh(mesh):
        yield jax.device_put(params, param_shardings(config, mesh))


@contextlib.contextmanager
def opened_files() -> Iterator[collections.Counter[str]]:
    """A context in which files that Python opens are counted by their path."""
    counts: collections.Counter[str] = collections.Counter()
    going = True

    def note(event: str, arguments: tuple) -> None:
        if going and event == "open" and isinstance(arguments[0], str | os.PathLike):
            counts[os.path.realpath(arguments[0])] += 1

    sys.addaudithook(note)
    try:
        yield counts
    finally:
        going = False


def same_but_for_ties(model: Falcon, params: Params, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy continuations are equal, up to a token that is as likely as the other's within rounding."""
    n = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if n is None:
        return True
    logits_V = jax.jit(model.apply)({"params": params}, jax.numpy.asarray([prompt + expected[:n]]))[0, -1]
    return float(abs(logits_V[found[n]] - logits_V[expected[n]])) < 1e-3


@pytest.fixture(params=TINY)
def tiny_name(request: pytest.FixtureRequest) -> str:
    """Each member of the tiny family in turn."""
    return request.param


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny demo that was interrupted twice on its way; one for all workers. Leave it as it is."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    out = shared / "finished_demo"
    with FileLock(shared / "finished_demo.lock"):
        if not out.with_suffix(".json").exists():
            _run_demo(out)
    return out


def _run_demo(out: Path) -> None:
    command = [sys.executable, "-m", "falcon_relu", "demo", "--config", "demo_tiny", "--out", str(out)]
    for stage, sign in (("] teacher", signal.SIGINT), ("] predictor", signal.SIGKILL)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if stage in line:
                    break
            else:
                pytest.fail(f"the demo ended without {stage}")
            time.sleep(2)
            process.send_signal(sign)
            process.stderr.read()
        assert process.returncode == (130 if sign == signal.SIGINT else -sign)
        assert not (out / "report.html").exists()
        assert sign == signal.SIGKILL or not list(out.rglob(".*.falcon-relu-*"))
    last = [*command, "--json", str(out.with_suffix(".json"))]
    finished = subprocess.run(last, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr
    assert "] tokens" not in finished.stderr  # finished stages are not run again
    assert "] decode" in finished.stderr
    assert not list(out.rglob(".*.falcon-relu-*"))
