"""Recordings without a model behind them, and batches of random text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from falcon_relu.checkpoints.digests import digest
from infer.predictor.recording import CONTRIBUTION_DTYPE, INPUT_DTYPE, MATRICES, Batch, Recording


def write_recording(folder: Path, layers: list[tuple[np.ndarray, np.ndarray]]) -> Recording:
    """A recording of the given inputs [N, D] and contributions [N, F]."""
    folder.mkdir()
    for i, (x_NxD, c_NxF) in enumerate(layers):
        x_NxD.astype(INPUT_DTYPE).tofile(folder / f"{i:03}.inputs")
        c_NxF.astype(CONTRIBUTION_DTYPE).tofile(folder / f"{i:03}.contributions")
        for matrix in MATRICES:
            x_NxD[:8192].astype(INPUT_DTYPE).tofile(folder / f"{i:03}.{matrix}.inputs")
    x_NxD[:8192].astype(INPUT_DTYPE).tofile(folder / "head.inputs")
    (N, D), F = layers[0][0].shape, layers[0][1].shape[1]
    files = {path.name: digest(path) for path in folder.iterdir()}
    sizes = {"n_layers": len(layers), "d_model": D, "d_ff": F, "heads": D}
    return Recording(folder=folder, input="mlp_input", tokens=N, files=files, **sizes)


def planted_layer(
    rng: np.random.Generator, tokens: int, D: int = 32, F: int = 128, R: int = 8
) -> tuple[np.ndarray, ...]:
    """Inputs, and contributions of about 15 % of the neurons, decided by a hidden predictor of rank R."""
    x_NxD = rng.normal(size=(tokens, D)).astype(np.float32)
    x_NxD[:, 0] = 1  # there are no biases
    hidden_NxR = np.maximum(x_NxD @ rng.normal(size=(D, R)), 0)
    z_NxF = hidden_NxR @ rng.normal(size=(R, F))
    return x_NxD, np.maximum(z_NxF - np.quantile(z_NxF, 0.85), 0).astype(np.float32)


def random_batch(seed: int, vocab: int, B: int = 4, T: int = 32) -> Batch:
    """Rows of two segments and some padding."""
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.array([1, 2, 0], np.int32), (T // 2, T - T // 2 - 4, 4))
    positions = np.concatenate([np.arange(T // 2), np.arange(T - T // 2 - 4), np.zeros(4)]).astype(np.int32)
    return {
        "tokens_BxT": rng.integers(0, vocab, (B, T), dtype=np.int32),
        "segment_ids_BxT": np.tile(segments, (B, 1)),
        "positions_BxT": np.tile(positions, (B, 1)),
    }
