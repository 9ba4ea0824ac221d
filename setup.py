"""Build of the compiled modules: everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = sorted(Path("fastres_ext").glob("*.pyx"))


def extensions() -> list[Extension]:
    """The Cython modules, or none when FASTRES_NO_EXTENSIONS=1 asks for the pure wheel.

    A compiler that is missing or fails stops the build: a slow install must be asked for.
    """
    if os.environ.get("FASTRES_NO_EXTENSIONS") == "1" or not MODULES:
        return []
    from Cython.Build import cythonize

    # Without symbols, a fifth of the size.
    stripped = ["-Wl,-s"] if sys.platform == "linux" else []
    return cythonize(
        [Extension(f"fastres_ext.{path.stem}", [str(path)], extra_link_args=stripped) for path in MODULES],
        language_level=3,
        compiler_directives={"freethreading_compatible": True},
    )


class Build(build_ext):
    """Says what to do where there is no compiler, or no headers of Python."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as exc:
            raise SystemExit(
                f"fastres could not be compiled: {exc}\n"
                "It takes a C compiler and Python's headers: apt-get install gcc libc6-dev python3-dev, "
                "dnf install gcc python3-devel, apk add gcc musl-dev python3-dev, or xcode-select --install. "
                "Without them, FASTRES_NO_EXTENSIONS=1 pip install ... installs the slower package in pure Python."
            ) from exc


ext_modules = extensions()

setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": Build},
    # Without its modules the package must not exist: fastres takes an importable fastres_ext for a whole one.
    packages=[
        "fastres",
        "fastres._py",
        "fastres.chords",
        "fastres.amqp",
        "fastres.read",
        "fastres.write",
        *(["fastres_ext"] if ext_modules else []),
    ],
)
