"""Check that servers are usable: the key is set, the address accepts connections and, on request, the model answers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec.structs import replace
from yarl import URL

from persyn.config import RunConfig
from persyn.errors import EngineError
from persyn.llm import engines
from persyn.llm.protocols import Failed, Finding, Generate, ModelSpec, Sampling
from persyn.llm.teachers import addresses
from persyn.runs.checks import models
from persyn.runs.checks.models import UsedModel

_CONNECT_SECONDS = 5.0
_PING_SECONDS = 60.0
#: Of the answer to a ping; some servers refuse to generate a single token.
_PING_TOKENS = 16


def check(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Check the servers of a run file without sending a request; yields (whose, finding) for each problem."""
    served = list(models.served(config))
    if not served:
        return
    found: list[tuple[str, URL]] = []
    for model in served:
        try:
            found += [(model.whose, url) for url in _examine(model.spec)]
        except EngineError as error:
            yield model.whose, Finding("error", "server", str(error))
    silent = _silent(list(dict.fromkeys(url.origin() for _, url in found if not _by_proxy(url))))
    for whose, url in found:
        if why := silent.get(url.origin()):
            message = f"{why}; start the server, or correct base_url"
            yield whose, Finding("error", "server", message)


def seen(spec: ModelSpec) -> Finding:
    """What a run would request from a teacher's or a judge's server; sends nothing."""
    try:
        urls, chosen = _examine(spec), engines.hosted_options(spec)
    except EngineError as error:
        return Finding("error", "load", str(error))
    where, key = ", ".join(map(str, urls)) or "the provider", chosen.key_source
    return Finding("ok", "server", f"{where} will receive requests for {spec.model!r} with {key}; nothing was sent yet")


def _examine(spec: ModelSpec) -> list[URL]:
    """The endpoints of a model's replicas; `EngineError` for invalid options, a missing key or an unusable proxy."""
    chosen = engines.hosted_options(spec)
    addresses.read_key(chosen)
    urls = [addresses.endpoint(base_url) for base_url in chosen.urls]
    for url in urls:
        addresses.proxy(url)
    return urls


def ping(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Send one tiny request to each URL of each server of a run file; yields (whose, finding)."""
    for model in models.served(config):
        try:
            urls: Sequence[str | None] = engines.hosted_options(model.spec).urls or [None]
        except EngineError as error:
            yield model.whose, Finding("error", "ping", str(error))
            continue
        for url in urls:
            finding = _ping(model, url)
            at = f"{url}: " if len(urls) > 1 else ""
            yield model.whose, replace(finding, message=at + finding.message)


def _ping(model: UsedModel, url: str | None) -> Finding:
    once = {"base_url": url, "max_retries": 0, "timeout_seconds": _PING_SECONDS, "concurrency": 1}
    chosen = {name: value for name, value in model.spec.options.items() if name != "mode"}
    began = time.monotonic()
    try:
        engine = engines.load(replace(model.spec, options=chosen | once), lambda: None)
        hello = [{"role": "user", "content": "Say hello."}]
        with contextlib.closing(engine):  # type: ignore[type-var]
            engine.submit([Generate(0, hello, Sampling(max_tokens=_PING_TOKENS, temperature=0.0), seed=0)])
            results = engine.step()
            while not results:
                results = engine.step()
    except EngineError as error:
        return Finding("error", "ping", str(error))
    result = results[0]
    if isinstance(result, Failed) and not result.reason.startswith("empty"):
        return Finding("error", "ping", result.reason)
    return Finding("ok", "ping", f"{model.spec.model!r} answered in {time.monotonic() - began:.1f} s")


def _by_proxy(url: URL) -> bool:
    """Whether the environment routes requests to this server through a proxy."""
    return url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.host or "")


def _silent(origins: Sequence[URL]) -> dict[URL, str]:
    """The servers that cannot be reached, with the reason."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        return {url: why for url, why in zip(origins, pool.map(_met, origins), strict=True) if why}


def _met(origin: URL) -> str:
    """Why a server cannot be reached, if so: no connection, or a failed TLS handshake."""
    try:
        with socket.create_connection((origin.host or "", origin.port or 0), timeout=_CONNECT_SECONDS) as met:
            return _met_by_tls(origin, met) if origin.scheme == "https" else ""
    except TimeoutError:
        return f"no server answers at {origin}: no connection within {_CONNECT_SECONDS:g} s"
    except OSError as error:
        return f"no server answers at {origin}: {error.strerror or error}"


def _met_by_tls(origin: URL, met: socket.socket) -> str:
    try:
        with ssl.create_default_context().wrap_socket(met, server_hostname=origin.host):
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {origin} is not accepted: {error.verify_message}"
    except TimeoutError:
        return f"{origin} does not answer with TLS within {_CONNECT_SECONDS:g} s: is it an http:// URL?"
    except OSError as error:
        return f"{origin} does not use TLS ({error.strerror or error}): is it an http:// URL?"
