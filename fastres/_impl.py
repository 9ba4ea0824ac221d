"""Chooses the implementation, compiled or Python. No other module does, and the two are never mixed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = (
    "MODULES", "Aggregate", "Decoder", "Delivery", "Frames", "MessageTemplate", "compact", "encode", "expand",
    "fulfil", "impl", "in_order", "listed", "load", "publication",
)  # fmt: skip

#: The modules that an implementation consists of.
MODULES = ("aggregate", "decode", "frames", "ids", "publications")

PACKAGES = {"c": "fastres_ext", "python": "fastres._py"}


def load(name: str) -> dict[str, ModuleType]:
    """The modules of an implementation, ``"c"`` or ``"python"``.

    Raises:
        ImportError: it is missing or incomplete.
    """
    try:
        return {module: importlib.import_module(f"{PACKAGES[name]}.{module}") for module in MODULES}
    except ModuleNotFoundError as exc:
        spec = importlib.util.find_spec(PACKAGES[name])
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if spec is not None and exc.name in {f"{PACKAGES[name]}.{module}" for module in MODULES}:
            raise ImportError(
                f"the compiled modules of fastres are not in {', '.join(places)}, which is a source tree, or a "
                "broken installation: `pip install .` there, and start Python in another folder; or set "
                f"FASTRES_IMPL=python for the slower implementation ({exc})"
            ) from exc
        raise


def choose() -> str:
    """The implementation that ``FASTRES_IMPL`` names; if unset, the compiled one where it is installed.

    Raises:
        ValueError: ``FASTRES_IMPL`` is neither ``c`` nor ``python``.
    """
    asked = os.environ.get("FASTRES_IMPL", "")
    if asked in PACKAGES:
        return asked
    if asked:
        raise ValueError(f"FASTRES_IMPL={asked!r}: expected 'c', 'python', or not set")
    # Only a missing package is passed over: a package that fails must be noticed.
    if importlib.util.find_spec(PACKAGES["c"]) is not None:
        return "c"
    warnings.warn(
        "fastres runs on its Python implementation: this installation has no compiled modules. "
        "Install a wheel for this platform, or a compiler and reinstall; "
        "FASTRES_IMPL=python asks for the Python implementation without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "python"


impl = choose()
_modules = load(impl)
Aggregate = _modules["aggregate"].Aggregate
Decoder = _modules["decode"].Decoder
Delivery = _modules["frames"].Delivery
Frames = _modules["frames"].Frames
MessageTemplate = _modules["publications"].MessageTemplate
compact = _modules["ids"].compact
encode = _modules["decode"].encode
expand = _modules["ids"].expand
fulfil = _modules["aggregate"].fulfil
in_order = _modules["aggregate"].in_order
listed = _modules["aggregate"].listed
publication = _modules["publications"].publication
