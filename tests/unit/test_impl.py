"""``FASTRES_IMPL``: the implementation that a process loads, and the warning when it is not the compiled one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastres
from fastres import _impl

#: The finder of an editable installation would add its modules to a package that precedes it on the path.
ONLY_PATHS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""
#: Hides an installed package.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastres_ext":
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
TELL = """
import sys, fastres
print(fastres.__impl__, fastres._impl.Decoder.__module__, any(m.startswith("fastres_ext") for m in sys.modules))
"""


def python(code: str, impl: str | None = None, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("FASTRES_IMPL", "PYTHONPATH")}
    if impl is not None:
        env["FASTRES_IMPL"] = impl
    package = str(Path(fastres.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), package])
    # In another folder than the repository, whose packages would be found first.
    command = [sys.executable, "-c", ONLY_PATHS + code]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("asked", [None, "", "c"])
def test_compiled(asked: str | None) -> None:
    done = python(TELL, asked)
    assert (done.stdout.split(), done.stderr) == (["c", "fastres_ext.decode", "True"], "")


def test_python_never_imports_the_extension() -> None:
    done = python(TELL, "python")
    assert (done.stdout.split(), done.stderr) == (["python", "fastres._py.decode", "False"], "")


@pytest.mark.parametrize("asked", ["bogus", "C", "py", " c"])
def test_an_unknown_implementation_is_refused(asked: str) -> None:
    done = python(TELL, asked)
    assert done.returncode != 0
    assert f"ValueError: FASTRES_IMPL={asked!r}: expected 'c', 'python', or not set" in done.stderr


def test_without_the_extension_there_is_one_warning() -> None:
    done = python(HIDE + TELL + "import fastres.backend, fastres._impl")
    assert done.stdout.split() == ["python", "fastres._py.decode", "False"], done.stderr
    assert done.stderr.count("RuntimeWarning: fastres runs on its Python implementation") == 1


def test_without_the_extension_and_asked_for_python_there_is_no_warning() -> None:
    done = python(HIDE + TELL, "python")
    assert (done.stdout.split()[0], done.stderr) == ("python", "")


def test_the_extension_is_asked_for_and_missing() -> None:
    done = python(HIDE + TELL, "c")
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named 'fastres_ext'" in done.stderr


@pytest.mark.parametrize("asked", [None, "c"])
@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"__init__.py": "raise ImportError('undefined symbol: PyLong_AsInt')"}, "undefined symbol: PyLong_AsInt"),
        ({"__init__.py": "", "aggregate.py": "Aggregate = 1"}, "No module named 'fastres_ext.decode'"),
        ({"__init__.py": "", **{f"{name}.py": "" for name in _impl.MODULES}}, "'Aggregate'"),
        ({"__init__.py": "", f"aggregate{EXTENSION_SUFFIXES[0]}": "no ELF"}, "fastres_ext"),
    ],
    ids=["raises", "not whole", "lacks a name", "no library"],
)
def test_a_broken_extension_raises(files: dict[str, str], error: str, asked: str | None, tmp_path: Path) -> None:
    package = tmp_path / "fastres_ext"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    done = python(TELL, asked, tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert error in done.stderr


def test_load_has_every_module_of_both() -> None:
    for name, package in _impl.PACKAGES.items():
        modules = _impl.load(name)
        assert {key: module.__name__ for key, module in modules.items()} == {
            key: f"{package}.{key}" for key in _impl.MODULES
        }


def test_load_of_an_unknown_implementation() -> None:
    with pytest.raises(KeyError):
        _impl.load("bogus")
