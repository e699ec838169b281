"""Import transformers without what PerSyn does not use of it."""

from __future__ import annotations

import importlib
import sys

_GENERATION = "transformers.generation.candidate_generator"


def import_transformers() -> None:
    """Import transformers without scikit-learn, which takes a quarter of an engine's start.

    transformers imports it for assisted decoding alone if it finds it, with SciPy's statistics and pandas.
    """
    if _GENERATION in sys.modules or "sklearn" in sys.modules:
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # not found, as far as the import system knows
    try:
        importlib.import_module(_GENERATION)
    finally:
        del sys.modules["sklearn"]
