"""What only a whole process shows: peak memory and the number of threads. Each test starts one with this file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def in_process(what: str, *args: str):
    done = subprocess.run(
        [sys.executable, __file__, what, *args], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_peak_memory_is_weights_and_cache_and_a_tenth(format):
    for way, figures in in_process("memory", format).items():
        allowed = 1.1 * (figures["weights"] + figures["cache"])
        assert figures["peak"] <= allowed, f"{way} took {figures['peak'] / allowed:.2f} of what it may"


def test_a_number_of_threads_is_kept_to_and_gives_the_same_bits_again():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    one, two, again = (in_process("threads", threads) for threads in ("1", "2", "2"))
    assert one["threads"] == 1
    assert two["threads"] == 2
    assert two["logits"] == again["logits"]


def test_a_kernel_that_gets_no_memory_is_an_error_and_the_process_goes_on():
    from infer.kernels import native

    if native.missing() is not None:
        pytest.skip("native kernels not built")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor, on which the sum takes less memory")
    told = in_process("starved", "")
    assert "not enough memory" in told["error"]
    assert told["afterwards"] == 2.0


# ---- inside the process


def memory(format: str) -> dict[str, dict[str, int]]:
    """For every way to run: bytes above those of the compiled programs alone."""
    import gc

    import jax
    import jax.numpy as jnp

    from falcon_relu.config import family
    from infer.bench import random_weights
    from infer.kernels import native
    from infer.step import MODES, DecodeState, decode_step, prefill
    from infer.weights.layout import Formats

    layers = 8 if format == "int8" else 4  # a gigabyte: else buffers of a fixed size show
    config = family("falcon-40b").replace(
        d_model=2048, d_ff=24576, n_heads=32, n_kv_heads=2, n_layers=layers, vocab_size=64000, activation="relu"
    )
    make = lambda: random_weights(config, Formats.all(format), rank=64)  # noqa: E731
    cache = lambda: DecodeState.empty(config, 1, 512, "f16")  # noqa: E731
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (make(), cache()))
    token_B, tokens_BxT, valid_B = jnp.zeros(1, jnp.int32), jnp.zeros((1, 64), jnp.int32), jnp.full(1, 64, jnp.int32)
    programs = {
        f"{mode}, {backend}": (decode_step.lower(*shapes, token_B, mode=mode, backend=backend).compile(), (token_B,))
        for backend in ("xla",) + (("native",) if native.missing() is None else ())
        for mode in (("sparse",) if backend == "xla" and native.missing() is None else MODES)  # every kernel is in it
    }
    programs["prefill"] = prefill.lower(*shapes, tokens_BxT, valid_B).compile(), (tokens_BxT, valid_B)
    gc.collect()
    before = status("VmRSS")
    weights = make()
    figures = {}
    for way, (program, args) in programs.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        state = cache()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        for _ in range(2):
            state = jax.block_until_ready(program(weights, state, *args))[1]
        figures[way] = {"peak": status("VmHWM") - before, "weights": weights.nbytes, "cache": size}
    return figures


def threads(count: str) -> dict[str, object]:
    """How many threads XLA computes on, and a digest of what a step gives."""
    from infer.kernels.threads import limit_threads

    limit_threads(int(count))

    import jax.numpy as jnp
    import numpy as np

    from falcon_relu.config import family
    from infer.bench import random_weights, with_active_share
    from infer.step import DecodeState, decode_step
    from infer.weights.layout import Formats

    config = family("falcon-40b").replace(
        d_model=1024, d_ff=4096, n_heads=16, n_kv_heads=2, n_layers=2, vocab_size=4000, activation="relu"
    )
    weights = with_active_share(random_weights(config, Formats.all("bf16"), rank=128), 0.3)
    state = DecodeState.empty(config, 1, 16)
    digest = hashlib.sha256()
    for token in range(8):
        logits, state, _ = decode_step(weights, state, jnp.full(1, token, jnp.int32), mode="sparse")
        digest.update(np.asarray(logits).tobytes())
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return {"threads": sum("XLAEigen" in name for name in names), "logits": digest.hexdigest()}


def starved(_: str) -> dict[str, object]:
    """What a sum says that needs 256 MiB beside its result where 170 MiB are left, and what it gives later."""
    import resource

    import jax
    import numpy as np

    from infer.kernels import native
    from infer.weights.formats import Rows

    w, h = Rows(np.ones((2, 1 << 18), np.float32)), np.ones((64, 2), np.float32)
    native.use_instruction_set("plain" if "plain" in native.instruction_sets() else native.instruction_sets()[-1])
    run = jax.jit(native.weighted_row_sum).lower(w, h).compile()
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (170 << 20), resource.RLIM_INFINITY))
    try:
        jax.block_until_ready(run(w, h))
        error = "none"
    except Exception as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"error": error, "afterwards": float(run(w, h)[5, 7])}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    print(json.dumps({"memory": memory, "threads": threads, "starved": starved}[sys.argv[1]](sys.argv[2])))
