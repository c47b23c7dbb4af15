"""How sparse a model's MLPs are on text: zeros by layer and neuron, and what stays the same from token to token."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import BATCH_KEYS, Falcon, Params
from falcon_relu.sharding import on_host

UNIONS = (1, 2, 4, 8, 16, 32)  # sequences decoded together


def measure_sparsity(
    config: FalconConfig, params: Params, batches: Iterable[Mapping[str, Any]], *, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Statistics of the neurons' activations, padding left out.

    Args:
      config: the model.
      params: its parameters, on a mesh or not; on one, the mesh must be the current one (`use_mesh`).
      batches: tokens_BxT, positions_BxT and segment_ids_BxT, int32, as of train.data.batches.
      dtype: compute dtype.

    Returns:
      A mapping of

      - zeros: share of activations that are exactly zero.
      - tokens: how many were looked at.
      - layers: a mapping for each layer: zeros; overlap, the share of the neurons firing at a token that fired at the
        one before as well; never and always, the share of neurons that fire at no and at every token; hot, the
        smallest share of the neurons that makes four fifths of the firings.
      - union: a mapping for each of `UNIONS` up to the rows of a batch: batch; fired, the share of the neurons that
        fire in any of so many sequences at once; layers, the same for each layer.
      - rates_LxF: how often each neuron fires, numpy float64.

    Raises:
      FalconError: the batches hold no token.
    """
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = on_host(sparsity_sums(config, dtype, params, *(batch[k] for k in BATCH_KEYS)))
        totals = {name: totals.get(name, 0) + value.astype(np.float64) for name, value in sums.items()}
    if not totals.get("tokens"):
        raise FalconError("there are no tokens to measure sparsity on: no batch, or padding alone")
    rates_LxF = totals["fired_LxF"] / totals["tokens"]
    overlap_L = totals["again_LxF"].sum(1) / np.maximum(totals["followed_LxF"].sum(1), 1)
    layers = [
        {
            "layer": i,
            "zeros": float(1 - rates_F.mean()),
            "overlap": float(overlap),
            "never": float((rates_F == 0).mean()),
            "always": float((rates_F == 1).mean()),
            "hot": _hot(rates_F),
        }
        for i, (rates_F, overlap) in enumerate(zip(rates_LxF, overlap_L, strict=True))
    ]
    union = []
    for n in UNIONS:
        if totals.get(f"groups_{n}"):  # no group where every batch is smaller
            fired_L = totals[f"union_{n}_LxF"].mean(1) / totals[f"groups_{n}"]
            union.append({"batch": n, "fired": float(fired_L.mean()), "layers": fired_L.tolist()})
    return {
        "zeros": float(1 - rates_LxF.mean()),
        "tokens": int(totals["tokens"]),
        "layers": layers,
        "union": union,
        "rates_LxF": rates_LxF,
    }


def _hot(rates_F: np.ndarray) -> float:
    share_F = np.cumsum(np.sort(rates_F)[::-1])
    return float((np.searchsorted(share_F, 0.8 * share_F[-1]) + 1) / len(rates_F)) if share_F[-1] else 0.0


@functools.partial(jax.jit, static_argnums=(0, 1))
def sparsity_sums(
    config: FalconConfig,
    dtype: Any,
    params: Params,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
) -> dict[str, jax.Array]:
    """The program behind `measure_sparsity`: counts of a batch, for each layer and neuron, so that int32 holds them."""
    real_BxT = segments_BxT != 0
    pair_BxT = real_BxT[:, 1:] & (segments_BxT[:, 1:] == segments_BxT[:, :-1])
    B, T = tokens_BxT.shape
    sizes = [n for n in UNIONS if n <= B]
    # The same place in n rows: tokens that would be decoded together.
    together = {n: real_BxT[: B // n * n].reshape(B // n, n, T).all(1) for n in sizes}

    def count(h_BxTxF: jax.Array) -> dict[str, jax.Array]:
        """Counts of one layer; the activations of all would not fit."""
        fires_BxTxF = (h_BxTxF != 0) & real_BxT[:, :, None]
        later_BxTxF = fires_BxTxF[:, 1:] & pair_BxT[:, :, None]
        found = {
            "fired_LxF": fires_BxTxF.sum((0, 1)),
            "followed_LxF": later_BxTxF.sum((0, 1)),
            "again_LxF": (later_BxTxF & fires_BxTxF[:, :-1]).sum((0, 1)),
        }
        for n, real_GxT in together.items():
            any_GxTxF = fires_BxTxF[: B // n * n].reshape(B // n, n, T, -1).any(1)
            found[f"union_{n}_LxF"] = (any_GxTxF & real_GxT[:, :, None]).sum((0, 1))
        return found

    _, variables = Falcon(config, dtype, observe=count).apply(
        {"params": params}, tokens_BxT, positions_BxT, segments_BxT, method="hidden", mutable=["activations"]
    )
    groups = {f"groups_{n}": real_GxT.sum() for n, real_GxT in together.items()}
    return variables["activations"]["layers"]["mlp"]["neurons"] | groups | {"tokens": real_BxT.sum()}
