"""How sparse a model's MLPs are on text: zeros by layer and neuron, and what stays the same from token to token."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig
from falcon_relu.model import Falcon, Params


def sparsity(
    config: FalconConfig, params: Params, batches: Iterable[Mapping[str, Any]], *, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Statistics of the neurons' activations, padding left out.

    Args:
      config: the model.
      params: its parameters.
      batches: tokens_BxT, positions_BxT and segment_ids_BxT, int32, as of train.data.
      dtype: compute dtype.

    Returns:
      zeros: share of activations that are exactly zero.
      layers: a mapping for each layer: zeros; overlap, the share of the neurons firing at a token that fired at the one
        before as well; never and always, the share of neurons that fire at no and at every token.
      rates_LxF: how often each neuron fires, numpy float64.
    """
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = _sums(config, dtype, params, *(batch[k] for k in ("tokens_BxT", "positions_BxT", "segment_ids_BxT")))
        totals = {name: totals.get(name, 0) + np.asarray(value, np.float64) for name, value in sums.items()}
    rates_LxF = totals["fired_LxF"] / totals["tokens"]
    overlap_L = totals["again_L"] / np.maximum(totals["followed_L"], 1)
    layers = [
        {
            "layer": i,
            "zeros": float(1 - rates_F.mean()),
            "overlap": float(overlap),
            "never": float((rates_F == 0).mean()),
            "always": float((rates_F == 1).mean()),
        }
        for i, (rates_F, overlap) in enumerate(zip(rates_LxF, overlap_L, strict=True))
    ]
    return {"zeros": float(1 - rates_LxF.mean()), "layers": layers, "rates_LxF": rates_LxF}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    config: FalconConfig,
    dtype: Any,
    params: Params,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
) -> dict[str, jax.Array]:
    _, variables = Falcon(config, dtype).apply(
        {"params": params}, tokens_BxT, positions_BxT, segments_BxT, method="hidden", mutable=["activations"]
    )
    real_BxT = segments_BxT != 0
    fires_LxBxTxF = (variables["activations"]["layers"]["mlp"]["neurons"] != 0) & real_BxT[None, :, :, None]
    pair_BxT = real_BxT[:, 1:] & (segments_BxT[:, 1:] == segments_BxT[:, :-1])
    later = fires_LxBxTxF[:, :, 1:] & pair_BxT[None, :, :, None]
    return {
        "tokens": real_BxT.sum(),
        "fired_LxF": fires_LxBxTxF.sum((1, 2)),
        "followed_L": later.sum((1, 2, 3)),
        "again_L": (later & fires_LxBxTxF[:, :, :-1]).sum((1, 2, 3)),
    }
