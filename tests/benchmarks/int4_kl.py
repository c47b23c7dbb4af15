"""What 4-bit weights cost against bf16: int4 with and without a recording, and llama.cpp's Q4_0.

`python -m tests.benchmarks.int4_kl MODEL DATA` on a ReLU model and its token shards prints KL and first choices. Q4_0
is quantised by the gguf package (`pip install gguf`), in llama.cpp's layout; the head is int8 in all of them. Only
weights are rounded: the model runs in f32. `--rate` measures how fast matrices are rounded instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from falcon_relu.checkpoints.load import load_model
from falcon_relu.config import FalconConfig, family
from falcon_relu.model import BATCH_KEYS, Falcon, Params
from infer.predictor.recording import Batch, Recording, record_activations
from infer.weights.convert import convert_matrix
from infer.weights.formats import widen
from infer.weights.rounding import Inputs, quantise
from train.data.batches import DataConfig, Source, train_batches, validation_batches
from train.data.shards import read_manifest

How = Literal["Q4_0", "int4", "int4, calibrated"]
HOWS: tuple[How, ...] = ("Q4_0", "int4", "int4, calibrated")
MATRICES = {"qkv": "attention", "out": "attention", "up": "mlp", "down": "mlp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: tyro.conf.Positional[Path] = Path("model")
    """Weights of a ReLU model."""
    data: tyro.conf.Positional[Path] = Path("data")
    """Token shards: the training split is recorded, the validation split measures."""
    tokens: int = 8192
    """Tokens to record."""
    batches: int = 16
    """Validation batches of 8 rows to measure on, at most."""
    rate: bool = False
    """Measure the rate of rounding at the widths of Falcon-40B instead; reads no model."""


def rounded(
    config: FalconConfig, params: Params, how: How, recording: Recording, matrices: Sequence[str] = tuple(MATRICES)
) -> Params:
    """The parameters with these matrices rounded, and the embedding and head in int8 if all of them are."""
    out = jax.tree.map(np.array, params)
    for matrix in matrices:
        for layer, w in enumerate(out["layers"][MATRICES[matrix]][matrix]):
            rows = w.reshape(len(w) if matrix in ("out", "up", "down") else -1, _width(config, matrix))
            if how == "Q4_0":
                w[:] = _q4_0(rows, matrix).reshape(w.shape)
            else:
                of = recording if how == "int4, calibrated" else None
                w[:] = np.asarray(widen(convert_matrix(matrix, matrix, layer, rows, "int4", of))).reshape(w.shape)
    if len(matrices) == len(MATRICES):
        for module, name in (("embed", "embedding"), ("head", "kernel")):
            if module in out:
                out[module][name] = np.asarray(widen(quantise(out[module][name], "int8")))
    return out


def _width(c: FalconConfig, matrix: str) -> int:
    return c.n_heads * c.head_dim if matrix == "out" else c.d_model


def _q4_0(rows: np.ndarray, matrix: str) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = np.ascontiguousarray(rows.T if matrix == "down" else rows, np.float32)  # groups along the inputs
    back = gguf.quants.dequantize(gguf.quants.quantize(theirs, kind), kind)
    return back.T if matrix == "down" else back


def bf16(params: Params) -> Params:
    """Matrices rounded to bf16, in f32."""
    return jax.tree.map(
        lambda w: np.asarray(jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32)) if w.ndim > 1 else w, params
    )


def compare(
    config: FalconConfig, reference: Params, variants: Mapping[str, Params], batches: Sequence[Batch]
) -> dict[str, dict[str, float]]:
    """KL(reference || variant) in nats and share of equal first choices, a token."""
    model = Falcon(config)
    logprobs = jax.jit(lambda params, *batch: jax.nn.log_softmax(model.apply({"params": params}, *batch)))

    @jax.jit
    def sums(p: jax.Array, q: jax.Array, used: jax.Array) -> jax.Array:
        kl, same = jnp.sum(jnp.exp(p) * (p - q), -1), p.argmax(-1) == q.argmax(-1)
        return jnp.stack([jnp.sum(jnp.where(used, kl, 0)), jnp.sum(used & same), jnp.sum(used)])

    totals = {name: np.zeros(3) for name in variants}
    for batch in batches:
        arrays = [batch[k] for k in BATCH_KEYS]
        wanted = logprobs(reference, *arrays)
        for name, params in variants.items():
            totals[name] += np.asarray(sums(wanted, logprobs(params, *arrays), arrays[-1] != 0))
    return {name: {"kl": kl / n, "agreement": same / n} for name, (kl, same, n) in totals.items()}


def _table(args: Args) -> None:
    config, params = load_model(args.model)
    data = DataConfig(sources=(Source(args.data),), seq_len=read_manifest(args.data).seq_len, batch_size=8)
    reference = bf16(params)
    batches = list(itertools.islice(validation_batches(data), args.batches))
    with tempfile.TemporaryDirectory() as folder:
        recording = record_activations(
            config, reference, train_batches(data), Path(folder) / "r", tokens=args.tokens, input="mlp_input"
        )
        parts: dict[str, Sequence[str]] = {"all": tuple(MATRICES)} | {matrix: (matrix,) for matrix in MATRICES}
        print("matrices | weights | KL | of Q4_0's | first choices")
        for part, matrices in parts.items():
            ways = {how: rounded(config, reference, how, recording, matrices) for how in HOWS}
            found = compare(config, reference, ways, batches)
            for how, row in found.items():
                ratio = row["kl"] / found["Q4_0"]["kl"]
                print(f"{part} | {how} | {row['kl']:.6f} | {ratio:.2f} | {row['agreement']:.2%}")


def _rate() -> None:
    """Time of a processor, not of the wall: other work on the machine does not count."""
    c = family("falcon-40b")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2048, c.d_model), np.float32) * 0.02
    x: Any = rng.standard_normal((8192, c.d_model), np.float32)
    for name, inputs in (("plain", None), ("calibrated", Inputs(x)), ("calibrated sum", Inputs(x[:, :2048], True))):
        start = time.process_time()
        quantise(rows, "int4", inputs)
        seconds = time.process_time() - start
        print(f"{name}: {rows.size / seconds / 1e6:.1f} M weights a second of processor time")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    _rate() if args.rate else _table(args)
