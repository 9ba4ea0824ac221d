"""The contents of the wheels and the sdist, and that a wheel built from the sdist is the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from fastres import _impl

ROOT = Path(__file__).parents[2]
FILES = {
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because a build writes into the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for package in ("fastres", "fastres_ext"):
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("*.c", "*.so", "__pycache__")
        )
    return tree


def try_to_build(tree: Path, kind: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(tree)],
        # Compiled files are compared by name only, so they are built without optimization.
        env={**os.environ, "CFLAGS": "-O0", **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def build(tree: Path, kind: str, **environment: str) -> Path:
    """Build a ``wheel`` or an ``sdist`` with the tools of this environment. Returns: its path."""
    out = tree / f"dist-{kind}{len(environment)}"
    done = try_to_build(tree, kind, out, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build(tree, "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path, wheel: Path) -> Path:
    # The build of the wheel left generated C in the tree, which must not get into the sdist.
    assert {path.stem for path in (tree / "fastres_ext").glob("*.c")} == set(_impl.MODULES)
    return build(tree, "sdist")


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without the record of checksums; of compiled ones only the names."""
    with ZipFile(wheel) as archive:
        return {
            name: b"" if name.endswith(".so") else archive.read(name)
            for name in archive.namelist()
            if not name.endswith("/RECORD")
        }


def sources(package: str) -> set[str]:
    """The files of a package in the repository that belong into a distribution."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".typed")
    }


def test_wheel(wheel: Path) -> None:
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    compiled = {name for name in names if name.endswith(".so")}
    assert {name.split(".")[0] for name in compiled} == {f"fastres_ext/{name}" for name in _impl.MODULES}
    assert len(compiled) == len(_impl.MODULES)
    assert names - compiled == sources("fastres") | sources("fastres_ext")


def test_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources("fastres") | sources("fastres_ext") <= names
    assert names >= FILES
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]


def test_wheel_of_the_sdist(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, "wheel")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_error_without_a_compiler_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    copied = tmp_path / "tree"
    shutil.copytree(tree, copied, ignore=shutil.ignore_patterns("build", "dist-*", "*.c"))
    done = try_to_build(copied, "wheel", tmp_path / "out", CC="no-such-compiler")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "fastres could not be compiled" in said
    assert "apt-get install gcc" in said
    assert "FASTRES_NO_EXTENSIONS=1" in said


def test_the_compiled_modules_have_no_symbols(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        size = sum(info.file_size for info in archive.infolist() if info.filename.endswith(".so"))
    assert size < 1_000_000


def test_the_error_in_the_source_tree_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "tree"
    shutil.copytree(tree, bare, ignore=shutil.ignore_patterns("build", "dist-*", "*.c", "*.so"))
    done = subprocess.run(
        [sys.executable, "-c", "import fastres"], cwd=bare, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("ImportError: the compiled modules of fastres are not in")
    assert "pip install ." in last
    assert "FASTRES_IMPL=python" in last


def test_pure_wheel(tree: Path, wheel: Path) -> None:
    pure = build(tree, "wheel", FASTRES_NO_EXTENSIONS="1")
    assert re.fullmatch(r"fastres-[\d.]+-py3-none-any\.whl", pure.name)
    names = {name for name in contents(pure) if ".dist-info/" not in name}
    assert names == sources("fastres")
    assert contents(pure).keys() >= {"fastres/py.typed", "fastres/_py/decode.py", "fastres/chords/joiner.py"}
