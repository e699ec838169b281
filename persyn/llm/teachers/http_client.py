"""Send a request to an OpenAI-compatible chat completions server, once."""

from __future__ import annotations

import time
from collections.abc import Mapping

import aiohttp
from yarl import URL

from persyn.llm import options
from persyn.llm.protocols import Generate, Result
from persyn.llm.teachers import addresses, chat_completions, complaints
from persyn.llm.teachers.complaints import RetryableError


class HttpClient:
    """Sends requests by HTTP."""

    def __init__(
        self, model: str, chosen: options.OpenAIOptions, places: Mapping[URL, URL | None], key: str | None
    ) -> None:
        self.version = f"openai-compatible {', '.join(dict.fromkeys(str(url.host) for url in places))}"
        self._model = model
        self._options = chosen
        self._places = {str(url): (url, proxy) for url, proxy in places.items()}
        self._key = key
        #: Opened by the first request, because it belongs to a running event loop.
        self._session: aiohttp.ClientSession | None = None
        passwords = [proxy.raw_password for proxy in places.values() if proxy is not None]
        secrets = [(key, "[key]"), *((password, "[password]") for password in passwords)]
        self._secrets = {secret: mark for secret, mark in secrets if secret}

    async def ask(self, url: str, request: Generate, began: float) -> Result:
        """Send a request to one replica."""
        chosen = self._options
        address, proxy = self._places[url]
        body = chat_completions.body(self._model, request, chosen)
        if self._session is None:
            self._session = self._open()
        try:
            async with self._session.post(address, data=body, allow_redirects=False, proxy=proxy) as response:
                content = await response.read()
        except TimeoutError as error:
            raise RetryableError(f"no answer within {chosen.timeout_seconds:g} s", is_late=True) from error
        except (aiohttp.ClientError, OSError) as error:
            is_absent = isinstance(error, aiohttp.ClientConnectorError)
            said = self._clean(f"{type(error).__name__}: {error}")
            raise RetryableError(said, is_absent=is_absent) from error
        answer = self._clean(chat_completions.decode(content, response.charset))
        if 200 <= response.status < 300:
            seconds = time.perf_counter() - began
            return chat_completions.read(request.id, answer, response.headers, seconds, chosen.inline_reasoning)
        found = complaints.complaint(chat_completions.parse(answer))
        raise complaints.trouble(response.status, response.headers, found)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # The replicas' places already limit connections.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json", **addresses.key_header(self._options, self._key)},
            timeout=aiohttp.ClientTimeout(total=self._options.timeout_seconds),
        )

    def _clean(self, text: str) -> str:
        """Remove the key from a server's message, in case the server repeats it."""
        for secret, mark in self._secrets.items():
            text = text.replace(secret, mark)
        return text
