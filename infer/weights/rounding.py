"""Rounding matrices to number formats: `quantise`.

int4 without recorded inputs: of several scales of a group, the one with the least squared error, as the quantisers of
llama.cpp search. With inputs, numbers are rounded one input after the other, and each one's error is corrected in the
inputs that follow, so far as these go with it in the recorded text (GPTQ, arXiv:2210.17323; inputs of most energy
first, with the scales found beforehand).
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.linalg.lapack
from jax import lax

from falcon_relu.errors import FalconError
from infer.weights.formats import Array, Format, Rows, rows_like
from infer.weights.int4 import INT4_GROUP, NORMAL_LEVELS, pack_int4
from infer.weights.library import native_library
from infer.weights.memory import huge_empty, usable_cores

# Levels to which the number of largest magnitude of a group is scaled; the scale with the least error is used.
_PEAKS = (*range(-136, -90, 4), 100, 106, 112, 118)
_LEVELS = np.array(NORMAL_LEVELS, np.float32)
_MIDDLES = (_LEVELS[1:] + _LEVELS[:-1]) / 2

_CONVERTED_ROWS = 1024  # converted at a time, so that there is never a second copy of a matrix in memory
_SEARCHED_ROWS = 128  # whose scales a thread searches at a time
_TOGETHER = 4096  # inputs whose errors are corrected in each other, at most: the work grows with the square
_DAMPING = 0.01  # added to every input's energy, in units of the mean: few tokens are not believed too much
_CHUNK = 512  # outputs that a thread rounds at a time
_PANEL, _TILE = 32, 64  # as in infer/native/quantise.cc


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a matrix is multiplied with in recorded text.

    Attributes:
      of_tokens: [N, D], the vectors that rows are multiplied with, or, with `weigh_rows`, [N, M], the weights of a sum
        of rows; any float dtype.
      weigh_rows: see above.
    """

    of_tokens: np.ndarray
    weigh_rows: bool = False


def quantise(x_MxD: Array, format: Format, inputs: Inputs | None = None) -> Rows:
    """Rows in `format`, in huge pages, from any float matrix, converted block by block.

    int8 is symmetric with one scale a row, max|row| / 127: no number is off by more than half of its row's scale. int4
    is described at the top of this module.

    Args:
      x_MxD: the matrix.
      format: what to convert to.
      inputs: int4 only: what it will be multiplied with, for a smaller error of the products.

    Raises:
      FalconError: the format is unknown, or a number is not finite or does not fit into f16.
    """
    if format not in get_args(Format):
        raise FalconError(f"unknown number format {format!r}; there are: {', '.join(get_args(Format))}")
    M, D = x_MxD.shape
    like = rows_like(M, D, format)
    data = huge_empty(like.data.shape, like.data.dtype)
    if format == "int4":
        _round_int4(x_MxD, data, inputs)
        return Rows(data, _LEVELS.copy(), like.columns, like.group)
    scale = np.empty(M, np.float32) if format == "int8" else None
    for start in range(0, M, _CONVERTED_ROWS):
        block = _finite(x_MxD, start, _CONVERTED_ROWS)
        rows = slice(start, start + len(block))
        if scale is not None:
            scale[rows] = np.maximum(np.abs(block).max(axis=1), np.finfo(np.float32).tiny) / 127
            data[rows] = np.rint(block / scale[rows, None])
        else:
            if format == "f16" and np.abs(block).max() > np.finfo(np.float16).max:
                raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers too large for f16; use bf16")
            data[rows] = block.astype(ml_dtypes.bfloat16).view(np.uint16) if format == "bf16" else block
    return Rows(data, scale)


def _finite(x_MxD: Array, start: int, rows: int) -> np.ndarray:
    block = np.ascontiguousarray(x_MxD[start : start + rows], np.float32)
    if not np.isfinite(block).all():
        raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers that are not finite")
    return block


# ---- int4


def _round_int4(matrix: Array, data: np.ndarray, inputs: Inputs | None) -> None:
    """Fills `data` with int4 rows as stored."""
    x_MxD = np.asarray(matrix)
    M, D = x_MxD.shape
    equal_D = np.ones(D, np.float32)
    if inputs is None:

        def convert(start: int) -> None:
            block = _finite(x_MxD, start, _SEARCHED_ROWS)
            data[start : start + len(block)] = pack_int4(*int4_codes(block, equal_D))

        _in_threads(convert, range(0, M, _SEARCHED_ROWS))
        return
    scales_MxG = np.empty((M, -(-D // INT4_GROUP)), np.float16)

    def search(start: int) -> None:
        block = _finite(x_MxD, start, _SEARCHED_ROWS)
        scales_MxG[start : start + len(block)] = int4_codes(block, equal_D)[1]

    _in_threads(search, range(0, M, _SEARCHED_ROWS))
    codes_MxD = codes_with_feedback(x_MxD, scales_MxG, inputs)

    def pack(start: int) -> None:
        rows = slice(start, start + _CONVERTED_ROWS)
        data[rows] = pack_int4(codes_MxD[rows], scales_MxG[rows])

    _in_threads(pack, range(0, M, _CONVERTED_ROWS))


def int4_codes(x_MxD: np.ndarray, importance_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of `NORMAL_LEVELS` and a scale for each group: of several scales, the one with the least weighted error.

    Each attempt scales the number of largest magnitude to another value of `_PEAKS`, rounds all numbers to the nearest
    level, and then fits the scale to the levels by weighted least squares, as the quantisers of llama.cpp do.

    Args:
      x_MxD: f32.
      importance_D: weight of the squared error of each column, f32, at least 0.

    Returns:
      Codes from 0 to 15, uint8 [M, D], and scales, f16 [M, groups].
    """
    if (library := _native()) is None:
        codes, scales = search_with_xla(x_MxD, importance_D)
        return np.asarray(codes), np.asarray(scales)
    M, D = x_MxD.shape
    codes_MxD, scales_MxG = np.empty((M, D), np.uint8), np.empty((M, -(-D // INT4_GROUP)), np.float16)
    x_MxD, importance_D = (np.ascontiguousarray(a, np.float32) for a in (x_MxD, importance_D))
    peaks = np.array(_PEAKS, np.float32)
    _call(library.falcon_int4_search, x_MxD, M, D, importance_D, _LEVELS, peaks, len(peaks), codes_MxD, scales_MxG)
    return codes_MxD, scales_MxG


@jax.jit
def search_with_xla(x_MxD: Array, importance_D: Array) -> tuple[jax.Array, jax.Array]:
    """`int4_codes` without the native library; says what that computes."""
    M, D = x_MxD.shape
    padding = -D % INT4_GROUP
    x = jnp.pad(jnp.asarray(x_MxD), ((0, 0), (0, padding))).reshape(M, -1, INT4_GROUP)
    weight = jnp.pad(jnp.asarray(importance_D, jnp.float32), (0, padding)).reshape(1, -1, INT4_GROUP)
    peak = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=-1, keepdims=True), axis=-1)
    peaks = jnp.array(_PEAKS, jnp.float32)

    def code(scaled: jax.Array) -> jax.Array:
        return sum((scaled > middle).astype(jnp.float32) for middle in _MIDDLES)

    def level(scaled: jax.Array) -> jax.Array:
        steps = zip(_MIDDLES, np.diff(_LEVELS), strict=True)
        return sum((jnp.where(scaled > middle, step, 0) for middle, step in steps), jnp.float32(_LEVELS[0]))

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, chosen = best
        q = level(x * jnp.where(peak == 0, 0, peaks[i] / peak))
        fit = jnp.sum(weight * q * q, -1, keepdims=True)
        scale = jnp.where(fit > 0, jnp.sum(weight * q * x, -1, keepdims=True) / fit, 0)
        scale = scale.astype(jnp.float16).astype(jnp.float32)
        error = jnp.sum(weight * jnp.square(x - scale * q), -1, keepdims=True)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, scale, chosen)

    start = jnp.full_like(peak, jnp.inf), jnp.zeros_like(peak)
    _, scale = lax.fori_loop(0, len(_PEAKS), attempt, start)
    codes = code(x * jnp.where(scale == 0, 0, 1 / scale)).astype(jnp.uint8)
    return codes.reshape(M, -1)[:, :D], scale[..., 0].astype(jnp.float16)


# ---- error feedback


def codes_with_feedback(x_MxD: np.ndarray, scales_MxG: np.ndarray, inputs: Inputs) -> np.ndarray:
    """Codes [M, D] under which the products with the recorded inputs have a small error, for given scales.

    Inputs K (columns, or rows where these are weighed) are taken in blocks of at most 4,096 in descending order of
    energy. With U^T U the inverse of a block's second moment (U upper triangular, damped), the error of number k,
    divided by U[k, k], is subtracted from each later number j of its output, times U[k, j].
    """
    M, D = x_MxD.shape
    tokens_NxK = inputs.of_tokens
    wanted = M if inputs.weigh_rows else D
    if tokens_NxK.ndim != 2 or tokens_NxK.shape[1] != wanted:
        raise FalconError(f"inputs of {tokens_NxK.shape} do not fit a matrix of {(M, D)}")
    energy_K = sum(
        np.square(tokens_NxK[n : n + _CHUNK].astype(np.float32)).sum(0) for n in range(0, len(tokens_NxK), _CHUNK)
    ) / len(tokens_NxK)
    order_K = np.argsort(-energy_K, kind="stable")
    codes_MxD = np.empty((M, D), np.uint8)
    for first in range(0, wanted, _TOGETHER):
        chosen = order_K[first : first + _TOGETHER]
        factor = _factor(tokens_NxK[:, chosen].astype(np.float32), float(energy_K.mean()))
        rounded = functools.partial(_feedback, factor_KxK=factor, panels=_panels(factor))

        def run(start: int, chosen: np.ndarray = chosen, rounded: Callable[..., np.ndarray] = rounded) -> None:
            if inputs.weigh_rows:
                columns = slice(start, min(start + _CHUNK, D))
                groups = np.arange(columns.start, columns.stop) // INT4_GROUP
                w = x_MxD[:, columns][chosen]
                codes_MxD[chosen, columns] = rounded(w, scales_MxG[chosen][:, groups])
            else:
                rows = slice(start, start + _CHUNK)
                w = x_MxD[rows][:, chosen].T
                codes_MxD[rows, chosen] = rounded(w, scales_MxG[rows][:, chosen // INT4_GROUP].T).T

        _in_threads(run, range(0, D if inputs.weigh_rows else M, _CHUNK))
    return codes_MxD


def _factor(tokens_NxK: np.ndarray, mean_energy: float) -> np.ndarray:
    """U [K, K], upper triangular, f32: U^T U is the inverse of the damped second moment."""
    moment_KxK = tokens_NxK.T @ tokens_NxK / np.float32(len(tokens_NxK))
    moment_KxK[np.diag_indices_from(moment_KxK)] += np.float32(_DAMPING * mean_energy + 1e-30)
    # The Cholesky factor of the moment with all inputs reversed, inverted and reversed again, is U.
    lower = np.linalg.cholesky(moment_KxK[::-1, ::-1].astype(np.float64))
    inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1], np.float32)


def _feedback(w_KxM: np.ndarray, scales_KxM: np.ndarray, factor_KxK: np.ndarray, panels: np.ndarray) -> np.ndarray:
    """Codes [K, M] of numbers rounded from k = 0 on; see `codes_with_feedback`."""
    K, M = w_KxM.shape
    library = _native()
    if library is None:
        return feedback_with_numpy(w_KxM, scales_KxM, factor_KxK)
    shape = K + -K % _PANEL, M + -M % _TILE
    w, scales = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    w[:K, :M], scales[:K, :M] = w_KxM, scales_KxM
    codes = np.empty(w.shape, np.uint8)
    _call(library.falcon_int4_feedback, w, scales, panels, *w.shape, _LEVELS, codes)
    return codes[:K, :M]


def feedback_with_numpy(w_KxM: np.ndarray, scales_KxM: np.ndarray, factor_KxK: np.ndarray) -> np.ndarray:
    """`_feedback` without the native library; says what that computes."""
    w_KxM, codes_KxM = np.array(w_KxM, np.float32), np.empty(w_KxM.shape, np.uint8)
    for k, scale_M in enumerate(scales_KxM.astype(np.float32)):
        inverse_M = np.divide(1, scale_M, out=np.zeros_like(scale_M), where=scale_M != 0)
        codes_KxM[k] = np.searchsorted(_MIDDLES, w_KxM[k] * inverse_M)
        error_M = (w_KxM[k] - scale_M * _LEVELS[codes_KxM[k]]) / factor_KxK[k, k]
        w_KxM[k + 1 :] -= factor_KxK[k, k + 1 :, None] * error_M[None]
    return codes_KxM


def _panels(factor_KxK: np.ndarray) -> np.ndarray:
    """The factor as the native library reads it: [K / 32, K, 32], panel p, j, b = U[32 p + b, j]; K padded to 32."""
    K = len(factor_KxK)
    padded = np.eye(K + -K % _PANEL, dtype=np.float32)
    padded[:K, :K] = factor_KxK
    return np.ascontiguousarray(padded.reshape(-1, _PANEL, len(padded)).transpose(0, 2, 1))


# ---- calls


@functools.cache
def _native() -> ctypes.CDLL | None:
    try:
        return native_library()
    except OSError:
        return None


def _call(function: Callable[..., object], *args: np.ndarray | int) -> None:
    """Calls a function of the native library; arrays, which must be contiguous, as pointers."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    assert all(a.flags.c_contiguous for a in arrays)
    function(*(ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in args))


def _in_threads(do: Callable[[int], None], starts: Iterable[int]) -> None:
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(do, starts):
            pass
