"""Fuzz one target with atheris: ``run_atheris.py TARGET`` and the arguments of libFuzzer. ci/fuzz calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
# The branches of the reference count as those of the compiled modules do.
with atheris.instrument_imports(include=["fastres._py"]):
    from fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
