"""Builds the optional native decoding kernels; everything else about the package is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup


def _native_kernels() -> list[Extension]:
    """The extension, or nothing where jaxlib, whose headers it needs, is not there at build time."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        print("jaxlib is not there: building without the native kernels; decoding will use XLA's own operations")
        return []
    return [
        Extension(
            "infer._native",
            sources=sorted(str(path) for path in Path("infer/native").glob("*.cc")),
            depends=[str(path) for path in Path("infer/native").glob("*.h")],
            include_dirs=[str(Path(jaxlib.origin).parent / "include")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-Wno-psabi",
                "-Wno-attributes",
                "-Wno-maybe-uninitialized",
            ],
            language="c++",
            optional=True,  # no compiler, no kernels: never a failed install
            py_limited_api=True,  # no Python module but a library of XLA custom calls, loaded by infer.kernels.native
        )
    ]


setup(ext_modules=_native_kernels(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
