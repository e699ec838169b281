"""Where a server is and how it is reached: its URL, its API key, and the environment's proxy."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

from yarl import URL

from persyn.errors import HostLacks, PermanentError
from persyn.llm import options

_KEY = re.compile(r"[\x21-\x7e]+")


def endpoint(base_url: str) -> URL:
    """The chat completions URL, with the base URL's query; `PermanentError` if the base URL is invalid."""
    try:
        url = URL(base_url)
    except ValueError as error:
        raise PermanentError(f"base_url {base_url!r} is not a valid URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise PermanentError(f"base_url {base_url!r} is not an http(s) URL; give one like http://localhost:8000/v1")
    if re.search(r"\s", base_url) or url.fragment:
        raise PermanentError(f"base_url {base_url!r} contains white space or a #; remove it")
    path = url.raw_path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise PermanentError(f"base_url {base_url!r} must end before /chat/completions, which is added to it")
    return url.with_path(f"{path}/chat/completions", encoded=True).with_query(url.query)


def read_key(chosen: options.HostedOptions) -> str | None:
    """The API key from the environment; `HostLacks` if it is missing or invalid."""
    if chosen.api_key_env is None:
        return None
    key = os.environ.get(chosen.api_key_env, "").strip()
    if not key:
        raise HostLacks(
            f"the environment variable {chosen.api_key_env} is not set or is empty; "
            "set it to the API key for the worker"
        )
    if key[0] in "'\"":
        raise HostLacks(f"the environment variable {chosen.api_key_env} contains a key in quotation marks; remove them")
    if not _KEY.fullmatch(key):
        raise HostLacks(
            f"the environment variable {chosen.api_key_env} is not a single API key: it has a line break, a space or "
            "another character that a key cannot have; set it to the key alone"
        )
    return key


def key_header(chosen: options.OpenAIOptions, key: str | None) -> dict[str, str]:
    """The header with the key; none without a key."""
    header = chosen.api_key_header
    return {header: f"Bearer {key}" if header.lower() == "authorization" else key} if key else {}


def proxy(url: URL) -> URL | None:
    """The proxy for a URL by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; `HostLacks` if it is invalid."""
    # Not aiohttp's `trust_env`, which also reads .netrc and then fails if a key is sent too.
    given = urllib.request.getproxies()
    found = given.get(url.scheme) or given.get("all")
    if not found or _is_direct(url, given.get("no", "")):
        return None
    try:
        place = URL(found if "://" in found else f"http://{found}")
    except ValueError as error:  # the error's message may contain a password
        raise HostLacks(
            f"the environment names a proxy for {url.host} that is not a URL; correct HTTP(S)_PROXY"
        ) from error
    if place.scheme not in {"http", "https"} or not place.host:
        raise HostLacks(
            f"the environment names a {place.scheme} proxy for {url.host}; only http and https proxies can be used. "
            "Set HTTP_PROXY or HTTPS_PROXY to one, or NO_PROXY to that host"
        )
    return place


def _is_direct(url: URL, no_proxy: str) -> bool:
    """Whether NO_PROXY matches a URL: by host, parent domain, optional port, or network."""
    host = url.host or ""
    if urllib.request.proxy_bypass(host) or urllib.request.proxy_bypass(f"{host}:{url.port}"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        domains = [name.strip().lower().removeprefix("*") for name in no_proxy.split(",")]
        return any(name.startswith(".") and host.endswith(name) for name in domains)
    return any(address in network for network in _networks(no_proxy))


def _networks(no_proxy: str) -> Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    for name in no_proxy.split(","):
        with suppress(ValueError):
            yield ipaddress.ip_network(name.strip(), strict=False)
