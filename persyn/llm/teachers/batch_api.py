"""The batch protocol of OpenAI: upload a file of requests, create a batch of it, and collect its results hours later.

A batch costs less than its requests one by one, and a provider executes it whether or not anyone waits for it. So that
no batch is created twice, each carries a key that the caller has stored before: `find` returns the batch of a key.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import aiohttp
from msgspec import Struct
from yarl import URL

from persyn.errors import AccountError, OutageError, shorten
from persyn.llm import options
from persyn.llm.protocols import Failed, Generate, Result
from persyn.llm.teachers import addresses, chat_completions, complaints
from persyn.llm.teachers.complaints import RefusedError, RetryableError

#: The field of a batch's metadata that holds its key.
_KEY = "persyn_key"
_PATH = "/chat/completions"
#: Batches per page when they are listed.
_PAGE = 100
#: Of one call; a file of requests may have 200 MB.
_CALL_SECONDS = 900.0
#: A batch that the provider rejected for its own limits, which pass.
_LATER = ("token_limit_exceeded", "rate_limit", "too_many")

State: TypeAlias = Literal["waiting", "over", "rejected"]
_STATES: Mapping[str, State] = {
    "completed": "over",
    "expired": "over",
    "cancelled": "over",
    "failed": "rejected",
}


class Batch(Struct, frozen=True):
    """A batch at the provider."""

    id: str
    state: State
    #: Files with the results and with the requests that failed; None if there is none.
    output_file: str | None
    error_file: str | None
    #: Why it was rejected; empty if it was not.
    error: str
    #: Requests that the provider has finished.
    finished: int


class BatchGone(AccountError):
    """The server knows no such batch, or no such file of it: it was deleted."""


@dataclass(frozen=True, slots=True)
class Again:
    """A request without a result, which may be sent again.

    may_be_charged: although the answer is unusable.
    """

    why: str
    may_be_charged: bool = False


class BatchClient:
    """Calls the batch protocol of one server.

    Every call raises `OutageError` or `AccountError` when it fails, and `BatchGone` for a batch that is not there.
    """

    def __init__(self, model: str, chosen: options.OpenAIOptions) -> None:
        chat = addresses.endpoint(chosen.urls[0])
        self._model = model
        self._options = chosen
        #: Of the API, up to its version.
        self.url = chat.with_path(chat.raw_path.removesuffix(_PATH), encoded=True, keep_query=True)
        self._key = addresses.read_key(chosen)
        self._proxy = addresses.proxy(chat)
        self._version = chat.raw_path.removesuffix(_PATH).rpartition("/")[2]
        #: Name of what serves the model, stored with every response.
        self.version = f"openai-compatible {chat.host} (batch)"

    async def upload(self, key: str, requests: Mapping[str, Generate]) -> str:
        """Upload requests, by ids that are unique in the batch, as a file named by its key; return the file's id."""
        lines = b"".join(self._line(custom_id, request) for custom_id, request in requests.items())
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", lines, filename=f"{key}.jsonl", content_type="application/jsonl")
        return self._text(await self._call("POST", "files", data=form), "id")

    async def create(self, key: str, file_id: str) -> Batch:
        """Create the batch of an uploaded file.

        key: stored by the caller before; see `find`.
        """
        body = {
            "input_file_id": file_id,
            "endpoint": f"/{self._version}{_PATH}",
            "completion_window": "24h",
            "metadata": {_KEY: key},
        }
        return self._batch(await self._call("POST", "batches", json=body))

    async def find(self, key: str) -> Batch | None:
        """The batch that was created with this key; None if there is none."""
        after: dict[str, str] = {}
        while True:
            page = await self._call("GET", "batches", params={"limit": str(_PAGE), **after})
            listed = page.get("data") if isinstance(page, dict) else None
            batches = [each for each in listed or [] if isinstance(each, dict)]
            for each in batches:
                if isinstance(each.get("metadata"), dict) and each["metadata"].get(_KEY) == key:
                    return self._batch(each)
            if not batches or not page.get("has_more"):
                return None
            after = {"after": self._text(batches[-1], "id")}

    async def look(self, batch_id: str) -> Batch:
        """The present state of a batch."""
        return self._batch(await self._call("GET", f"batches/{batch_id}"))

    async def cancel(self, batch_id: str) -> None:
        """Ask the provider to stop a batch."""
        await self._call("POST", f"batches/{batch_id}/cancel")

    async def results(
        self, batch: Batch, requests: Mapping[str, Generate]
    ) -> AsyncIterator[tuple[str, Result | Again]]:
        """Yield the result of each request that has one in a batch that is over; others are left out.

        requests: by the ids that they were sent with; results of other requests are ignored.
        """
        for file in (batch.output_file, batch.error_file):
            if file is None:
                continue
            async for line in self._lines(file):
                custom_id = str(line.get("custom_id"))
                if custom_id in requests:
                    yield custom_id, self._result(requests[custom_id].id, line)

    def _line(self, custom_id: str, request: Generate) -> bytes:
        body = chat_completions.body(self._model, request, self._options)
        head = json.dumps({"custom_id": custom_id, "method": "POST", "url": f"/{self._version}{_PATH}"})
        return head[:-1].encode() + b', "body": ' + body + b"}\n"

    def _result(self, request_id: int, line: Mapping[str, Any]) -> Result | Again:
        response = line.get("response")
        response = response if isinstance(response, dict) else {}
        status, body = response.get("status_code"), response.get("body")
        try:
            if status == 200:
                return chat_completions.read(
                    request_id, self._clean(json.dumps(body)), {}, 0.0, self._options.inline_reasoning
                )
            found = complaints.complaint(body if body else line)
            if not isinstance(status, int):  # expired, or cancelled: it was not executed
                return Again(found.said)
            raise complaints.trouble(status, {}, found)
        except RefusedError as error:
            tokens = error.tokens or (None, None)
            return Failed(request_id, str(error), *tokens, int(error.tokens == (None, None)))
        except RetryableError as error:
            return Again(str(error), error.may_be_charged)

    def _batch(self, found: Any) -> Batch:
        batch_id = self._text(found, "id")
        counts = found.get("request_counts")
        finished = [counts.get(name) for name in ("completed", "failed")] if isinstance(counts, dict) else []
        error = shorten(self._clean(json.dumps(found.get("errors")))) if found.get("errors") else ""
        return Batch(
            id=batch_id,
            state=_STATES.get(str(found.get("status")), "waiting"),
            output_file=found.get("output_file_id") or None,
            error_file=found.get("error_file_id") or None,
            error=error,
            finished=sum(count for count in finished if isinstance(count, int)),
        )

    def _text(self, found: Any, field: str) -> str:
        value = found.get(field) if isinstance(found, dict) else None
        if not isinstance(value, str) or not value:
            raise OutageError(f"{self.url} answered without {field!r}: {shorten(self._clean(json.dumps(found)))}")
        return value

    async def _lines(self, file: str) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a file, line by line."""
        path = f"files/{file}/content"
        with self._outages(path):
            async with self._session() as session, self._request(session, "GET", path) as answer:
                if answer.status != 200:
                    raise self._error(answer.status, await answer.read())
                async for line in answer.content:
                    try:
                        found = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(found, dict):
                        yield found

    async def _call(self, method: str, path: str, **given: Any) -> Any:
        with self._outages(path):
            async with self._session() as session, self._request(session, method, path, **given) as answer:
                content = await answer.read()
        if not 200 <= answer.status < 300:
            raise self._error(answer.status, content)
        return chat_completions.parse(chat_completions.decode(content, None))

    @contextmanager
    def _outages(self, path: str) -> Iterator[None]:
        """Turn errors of the connection into `OutageError`."""
        try:
            yield
        except TimeoutError as error:
            raise OutageError(f"{self.url} did not answer {path} within {_CALL_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            said = self._clean(f"{type(error).__name__}: {error}")
            raise OutageError(f"{self.url} did not answer {path}: {said}") from error

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=addresses.key_header(self._options, self._key),
            timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS),
            read_bufsize=2**22,  # a line is a whole response
        )

    def _request(self, session: aiohttp.ClientSession, method: str, path: str, **given: Any) -> Any:
        url = URL(f"{self.url.with_query(None)}/{path}").with_query({**dict(self.url.query), **given.pop("params", {})})
        return session.request(method, url, allow_redirects=False, proxy=self._proxy, **given)

    def _error(self, status: int, content: bytes) -> OutageError | AccountError:
        said = complaints.complaint(chat_completions.parse(self._clean(chat_completions.decode(content, None))))
        message = f"{self.url} answered HTTP {status}: {said.said}"
        if status == 404:
            return BatchGone(message)
        is_passing = status in (408, 409, 425, 429) or status >= 500
        return OutageError(message) if is_passing else AccountError(message)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def is_passing(batch: Batch) -> bool:
    """Whether a rejected batch may be sent again later: too much was in the provider's queue."""
    return any(code in batch.error for code in _LATER)
