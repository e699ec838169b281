"""The prices of providers' models, from the table that comes with an installed litellm; nothing is fetched.

The file is read without importing litellm, which takes seconds.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

_FILE = "model_prices_and_context_window_backup.json"
_MILLION = 1e6


def of(model: str) -> tuple[float | None, float | None]:
    """US dollars per million prompt and response tokens of "provider/model"; None where litellm is not installed or
    does not list it.

    These are the prices of short prompts without cached tokens.
    """
    found = _entry(_table(), model)
    return _price(found.get("input_cost_per_token")), _price(found.get("output_cost_per_token"))


def _entry(table: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The row of a model, which the table names with its provider or without."""
    provider, _, name = model.partition("/")
    found = table.get(model)
    if not isinstance(found, dict):
        found = table.get(name)
        if not isinstance(found, dict) or not _is_of(provider, str(found.get("litellm_provider"))):
            return {}
    return found


def _is_of(provider: str, listed: str) -> bool:
    """Whether a row is a provider's: the table has `vertex_ai-anthropic_models`, `bedrock_converse`, ..."""
    return listed == provider or listed.startswith((f"{provider}-", f"{provider}_"))


def _price(per_token: Any) -> float | None:
    is_number = isinstance(per_token, int | float) and not isinstance(per_token, bool) and per_token >= 0
    return round(per_token * _MILLION, 6) if is_number else None


@functools.cache
def _table() -> Mapping[str, Any]:
    try:
        package = importlib.util.find_spec("litellm")
        if package is None or package.origin is None:
            return {}
        found = msgspec.json.decode((Path(package.origin).parent / _FILE).read_bytes())
    except (OSError, ValueError, ImportError):  # `msgspec.DecodeError` is a `ValueError`
        return {}
    return found if isinstance(found, dict) else {}
