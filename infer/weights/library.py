"""The compiled C++ of infer/native, found and loaded."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

_INTERFACE = 6  # of the calls, as in infer/native/dispatch.cc


@functools.cache
def native_library() -> ctypes.CDLL:
    """The library.

    Raises:
      OSError: it was not built, or from other sources; the message says why.
    """
    here = Path(__file__).parents[1]
    found = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := here / f"_native{suffix}").exists()]
    if not found:
        failed = here / "_native_failed.txt"  # by setup.py
        reason = f": {failed.read_text(encoding='utf-8').strip()}" if failed.exists() else ""
        raise OSError(f"they were not built when the package was installed{reason}")
    library = ctypes.CDLL(str(found[0]))
    if getattr(library, "falcon_interface", lambda: 1)() != _INTERFACE:
        raise OSError("they were built from another version of the sources (python setup.py build_ext --inplace)")
    return library
