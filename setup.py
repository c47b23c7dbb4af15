"""Builds the optional native decoding kernels; everything else about the package is in pyproject.toml."""

import importlib.util
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Leaves why a build failed beside the package, for `decode` to say: the installation itself goes on."""

    def build_extension(self, ext: Extension) -> None:
        """Builds, or writes the reason into infer/_native_failed.txt."""
        library = Path(self.get_ext_fullpath(ext.name))
        failed = library.with_name("_native_failed.txt")
        failed.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            failed.parent.mkdir(parents=True, exist_ok=True)
            reason = re.sub(r"\['([^']+)'.*\]", r"\1", str(error))  # of a command its name alone
            failed.write_text(f"{reason}\n", encoding="utf-8")
            library.unlink(missing_ok=True)  # of other sources
            raise


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


setup(
    ext_modules=_native_kernels(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
