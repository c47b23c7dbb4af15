"""The native backend: the C++ of infer/native as XLA custom calls. `infer.kernels.xla` says what each computes."""

from __future__ import annotations

import ctypes
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.errors import FalconError
from infer.kernels import matmul
from infer.kernels.cache import Cache
from infer.weights.formats import Array, Format, Rows
from infer.weights.library import native_library

_TARGETS = ("rows_dot", "weighted_row_sum", "rows_product", "select", "attend", "read_rows")
_FORCED = "FALCON_RELU_ISA"  # environment variable that chooses the instruction set


def missing() -> str | None:
    """Why the native kernels cannot be used here; None if they can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_library()
    for name in ("falcon_instruction_sets", "falcon_instruction_set"):
        getattr(library, name).restype = ctypes.c_char_p
    library.falcon_use_instruction_set.restype = ctypes.c_bool
    library.falcon_has_product.restype = ctypes.c_bool
    library.falcon_has_product.argtypes = [ctypes.c_char_p, ctypes.c_bool]
    for name in _TARGETS:
        jax.ffi.register_ffi_target(
            f"falcon_{name}", jax.ffi.pycapsule(getattr(library, f"falcon_{name}")), platform="cpu"
        )
    if wanted := os.environ.get(_FORCED):
        _use(library, wanted)
    return library


def _use(library: ctypes.CDLL, name: str) -> None:
    if not library.falcon_use_instruction_set(name.encode()):
        known = library.falcon_instruction_sets().decode()
        raise FalconError(f"this CPU has no native kernels for {name!r}; it has: {known}")


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, best first."""
    return tuple(_library().falcon_instruction_sets().decode().split(","))


def instruction_set() -> str:
    """The instruction set in use."""
    return _library().falcon_instruction_set().decode()


def use_instruction_set(name: str) -> None:
    """Uses another instruction set from the next call on, for the products of a prefill too.

    A prefill that was compiled for an instruction set with matrix products of its own refuses to run on another one.

    Raises:
      FalconError: this CPU has no such kernels.
    """
    _use(_library(), name)


def has_product(format: Format, transposed: bool = False) -> bool:
    """Whether the instruction set in use has a matrix product of its own with rows of the format; else it is XLA's.

    Args:
      format: the rows' number format.
      transposed: whether it is the product of `weighted_rows_matmul` rather than that of `rows_matmul`.
    """
    return bool(_library().falcon_has_product(format.encode(), transposed))


def rows_dot(w: Rows, x_BxD: jax.Array) -> jax.Array:
    """See infer.kernels.xla.rows_dot."""
    return _dot(w, x_BxD, None, None, outputs=w.shape[0])


def gathered_rows_dot(w: Rows, index_A: jax.Array, count: jax.Array, x_BxD: jax.Array) -> jax.Array:
    """See infer.kernels.xla.gathered_rows_dot."""
    return _dot(w, x_BxD, index_A, count, outputs=index_A.shape[0])


def weighted_row_sum(
    w: Rows,
    h_BxA: jax.Array,
    index_A: jax.Array | None = None,
    count: jax.Array | None = None,
    skip_zeros: bool = False,
) -> jax.Array:
    """See infer.kernels.xla.weighted_row_sum."""
    out = jax.ShapeDtypeStruct((h_BxA.shape[0], w.shape[1]), jnp.float32)
    gathered, index = _index(index_A, count)
    return _call_rows("weighted_row_sum", w, out, *index, h_BxA, gathered=gathered, skip_zeros=skip_zeros)


def rows_matmul(w: Rows, x: jax.Array, count: Array | None = None) -> jax.Array:
    """See infer.kernels.matmul.rows_matmul."""
    if _has_product(w, False):
        return _product(w, x, count, transposed=False)
    return matmul.rows_matmul(w, x, count)


def weighted_rows_matmul(w: Rows, h: jax.Array, count: Array | None = None) -> jax.Array:
    """See infer.kernels.matmul.weighted_rows_matmul."""
    if _has_product(w, True):
        return _product(w, h, count, transposed=True)
    return matmul.weighted_rows_matmul(w, h, count)


def select(score_BxF: jax.Array, threshold: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See infer.kernels.xla.select."""
    out = (
        jax.ShapeDtypeStruct((score_BxF.shape[1],), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct(score_BxF.shape, jnp.bool_),
    )
    return _call("select", out, score_BxF, jnp.asarray(threshold, jnp.float32), jnp.asarray(budget, jnp.int32))


def attend(
    q_BxTxKxGxH: jax.Array,
    keys: Cache,
    values: Cache,
    length_BxT: jax.Array,
    bias_NxS: jax.Array | None = None,
) -> jax.Array:
    """See infer.kernels.xla.attend."""
    bias = jnp.zeros((0, 0), jnp.float32) if bias_NxS is None else bias_NxS
    out = jax.ShapeDtypeStruct(q_BxTxKxGxH.shape, jnp.float32)
    scale = np.float32(q_BxTxKxGxH.shape[-1] ** -0.5)
    none = np.zeros(0, np.float32)
    scales = (none if cache.scale is None else cache.scale for cache in (keys, values))
    return _call("attend", out, q_BxTxKxGxH, keys.data, values.data, length_BxT, bias, *scales, softmax_scale=scale)


def read_rows(
    w: Rows, index_A: jax.Array | None = None, count: jax.Array | None = None, seen: jax.Array | int = 0
) -> jax.Array:
    """See infer.kernels.xla.read_rows."""
    out = jax.ShapeDtypeStruct((), jnp.int32)
    gathered, index = _index(index_A, count)
    return _call_rows("read_rows", w, out, *index, jnp.asarray(seen, jnp.int32), gathered=gathered)


def _has_product(w: Rows, transposed: bool) -> bool:
    return (w.format == "int4" or w.shape[1] % 64 == 0) and has_product(w.format, transposed)


def _product(w: Rows, x: jax.Array, count: Array | None, transposed: bool) -> jax.Array:
    x_NxK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    count = jnp.asarray(len(x_NxK) if count is None else count, jnp.int32)
    out = jax.ShapeDtypeStruct((len(x_NxK), w.shape[1 if transposed else 0]), jnp.float32)
    y = _call_rows("rows_product", w, out, x_NxK, count, transposed=transposed)
    return y.reshape(*x.shape[:-1], out.shape[1])


def _dot(w: Rows, x_BxD: jax.Array, index_A: jax.Array | None, count: jax.Array | None, outputs: int) -> jax.Array:
    out = jax.ShapeDtypeStruct((x_BxD.shape[0], outputs), jnp.float32)
    gathered, index = _index(index_A, count)
    return _call_rows("rows_dot", w, out, *index, x_BxD, gathered=gathered)


def _index(index_A: jax.Array | None, count: jax.Array | None) -> tuple[bool, tuple[Array, Array]]:
    if index_A is None or count is None:
        return False, (np.zeros(0, np.int32), np.zeros((), np.int32))
    return True, (index_A, count)


def _call_rows(name: str, w: Rows, out: jax.ShapeDtypeStruct, *args: Array, **attributes: bool) -> jax.Array:
    scale = np.zeros(0, np.float32) if w.scale is None else w.scale
    about = {"columns": np.int64(w.columns or 0), "group": np.int64(w.group or 0)}
    return _call(name, out, w.data, scale, *args, **about, **attributes)


def _call(name: str, out, *args, **attributes):  # type: ignore[no-untyped-def]
    _library()
    return jax.ffi.ffi_call(f"falcon_{name}", out)(*args, **attributes)
