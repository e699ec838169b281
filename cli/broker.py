"""The broker checks of `persyn doctor`; no message contains the broker's password."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from persyn.errors import UsageError

DoctorFinding: TypeAlias = tuple[str, str, str]
"""(ok | warning | error, what was checked, the finding and what to do about it)."""

_SECONDS = 5.0
_OLDEST_REDIS = (7, 2)
#: CVE-2025-49844 allows anyone who may run scripts to execute code on the server; the first fixed patch of each series.
_PATCHED_REDIS: Mapping[tuple[int, ...], int] = {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}


def look(url: str) -> Iterator[DoctorFinding]:
    """Query a broker's properties; an unreachable broker is an error."""
    if importlib.util.find_spec("redis") is None or importlib.util.find_spec("celery") is None:
        yield "error", "broker", "PERSYN_BROKER_URL is set and Celery is not installed; pip install 'persyn[celery]'"
        return
    import redis

    try:
        place = place_of(url)
        with redis.Redis.from_url(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS) as client:
            facts: Mapping[str, Any] = client.info()
    except UsageError as error:
        yield "error", "broker", str(error)
    except redis.exceptions.NoPermissionError:
        yield "warning", "broker", f"{place} answers, but does not permit INFO to this user; check its version by hand"
    except redis.RedisError as error:
        yield "error", "broker", f"{place} does not answer: {error}; check PERSYN_BROKER_URL"
    except (TypeError, ValueError):  # the exception's text may contain the password
        yield "error", "broker", f"{place} has options after the ? that are ignored"
    else:
        yield "ok", "broker", f"{place} answers"
        yield from judge(facts)


def place_of(url: str) -> str:
    """A broker's URL without user, password or options; raise a `UsageError` that reveals nothing of an invalid URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        parts, port = urlsplit(""), 0
    # An @ after the host belongs before it: what looks like the host is then part of the password.
    is_cut = "@" in f"{parts.path}{parts.query}{parts.fragment}"
    is_number = parts.path.strip("/").isdigit() or not parts.path.strip("/")
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or is_cut or not is_number:
        raise UsageError(
            "PERSYN_BROKER_URL must be redis://user:password@host:port/db or rediss://..., "
            "with /, @, ? and # in a password written as %2F, %40, %3F and %23"
        )
    return f"{parts.scheme}://{parts.hostname}:{port}{parts.path}"


def judge(facts: Mapping[str, Any]) -> Iterator[DoctorFinding]:
    """Evaluate the INFO of a server."""
    yield _version(facts)
    policy = facts.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        yield "ok", "broker memory", "noeviction"
    else:
        yield "warning", "broker memory", f"{policy}: messages may be evicted; set maxmemory-policy noeviction"
    is_kept = "on" if facts.get("aof_enabled") else "off"
    yield (
        "ok",
        "broker persistence",
        f"append-only file {is_kept}; either is fine: losing the broker's content only costs time",
    )


def _version(facts: Mapping[str, Any]) -> DoctorFinding:
    if facts.get("server_name") == "valkey" or "valkey_version" in facts:
        return "ok", "broker version", f"Valkey {facts.get('valkey_version', '')}".strip()
    version = str(facts.get("redis_version", "unknown"))
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    said = f"Redis {version}"
    if numbers[:2] < _OLDEST_REDIS:
        return "warning", "broker version", f"{said} is older than PerSyn supports; use 7.2 or newer, or Valkey"
    if not _is_patched(numbers):
        fixed = "7.2.11, 7.4.6, 8.0.4 or 8.2.2"
        return "warning", "broker version", f"{said} has CVE-2025-49844 (scripts can take it over); upgrade to {fixed}"
    return "ok", "broker version", said


def _is_patched(version: tuple[int, ...]) -> bool:
    series, patch = version[:2], version[2:]
    return series > max(_PATCHED_REDIS) or patch >= (_PATCHED_REDIS.get(series, sys.maxsize),)
