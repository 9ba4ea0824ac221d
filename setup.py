"""Build of the compiled modules: everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup

MODULES = sorted(Path("fastres_ext").glob("*.pyx"))


def extensions() -> list[Extension]:
    """The Cython modules, or none when FASTRES_NO_EXTENSIONS=1 asks for the pure wheel.

    A compiler that is missing or fails stops the build: a slow install must be asked for.
    """
    if os.environ.get("FASTRES_NO_EXTENSIONS") == "1" or not MODULES:
        return []
    from Cython.Build import cythonize

    return cythonize(
        [Extension(f"fastres_ext.{path.stem}", [str(path)]) for path in MODULES],
        language_level=3,
    )


ext_modules = extensions()

setup(
    ext_modules=ext_modules,
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
