"""Teachers behind an OpenAI-compatible chat completions server: a hosted API, vLLM, llama.cpp, ...

Many requests wait for the server concurrently, each in a coroutine; `replicas` and `concurrency` say which of them is
sent when. The API key is read from the environment and only sent in the request's header.

A request without a response is in doubt until the cause is known: the request itself, if the server answers
another one that was sent later; the server, if it no longer answers anything, not even a probe.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from persyn.errors import AccountError, EngineError, OutageError, PermanentError
from persyn.llm import options
from persyn.llm.protocols import Engine, Failed, Generate, Generated, ModelSpec, Request, Result, Tick
from persyn.llm.teachers import addresses, complaints
from persyn.llm.teachers.complaints import Blame, RefusedError, RetryableError
from persyn.llm.teachers.concurrency import Concurrency
from persyn.llm.teachers.http_client import HttpClient
from persyn.llm.teachers.replicas import Replica, Replicas

_log = logging.getLogger(__name__)

_MOMENT_SECONDS = 0.2
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
#: After this many consecutive requests without a response, each after all its retries, probe the server.
_DOUBT_AFTER = 16
#: The probe: a minimal request to see whether the server answers at all.
_GREETING, _GREETING_TOKENS = "Hello!", 16
_RATE_LIMITED = 429


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Prepare to use a server; nothing is sent before the first request.

    A server limits a response by its own context: a prompt that fits, but not together with `max_tokens`, may fail
    as `too_long`. `seconds` includes retries. Options: `options.OpenAIOptions`. The engine raises `OutageError` when
    the server is temporarily unavailable, `AccountError` when a person must act first.
    """
    chosen = options.decode(spec, options.OpenAIOptions)
    if chosen.mode == "batch":
        raise PermanentError('mode = "batch" is for teachers only; remove it')
    urls, key = [addresses.endpoint(base_url) for base_url in chosen.urls], addresses.read_key(chosen)
    places = {url: addresses.proxy(url) for url in urls}
    client = HttpClient(spec.model, chosen, places, key)
    return ChatServerEngine(spec.model, chosen, client, list(map(str, places)))


class Client(Protocol):
    """Sends requests, one attempt at a time."""

    #: Name of what serves the model, stored with every response.
    version: str

    async def ask(self, url: str, request: Generate, began: float) -> Result:
        """Send a request to one replica; `RetryableError` or `RefusedError` when it is not answered.

        began: when the request was first sent, by `time.perf_counter`.
        """

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A request without a response, and the time at which that became final."""

    request: Generate
    reason: str
    #: None: the server failed.
    blame: Blame | None
    at: float


class ChatServerEngine:
    """A coroutine per request, which waits for one of the places that each replica has for requests in flight."""

    def __init__(self, model: str, chosen: options.HostedOptions, client: Client, urls: Sequence[str]) -> None:
        self.version = client.version
        self.window = 2 * chosen.concurrency * len(urls)
        self._model = model
        self._options = chosen
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._replicas = Replicas([Replica(url, Concurrency(chosen.concurrency)) for url in urls], self._loop)
        #: Requests being served, and probes of replicas that are left out.
        self._tasks: set[asyncio.Task[None]] = set()
        self._probes: set[asyncio.Task[None]] = set()
        self._finished: list[Result] = []
        self._error: BaseException | None = None
        self._is_closing = False
        self._doubts: list[_Doubt] = []
        #: When each request in progress was first sent, by id.
        self._began: dict[int, float] = {}
        #: Calls that may have been charged without a usable answer, by the request's id.
        self._repeats: Counter[int] = Counter()
        #: Calls in progress.
        self._calls = 0
        #: Ids of requests on their last attempt.
        self._last: set[int] = set()
        self._unanswered = 0
        #: When a request was last answered, and how long that took.
        self._answered_at, self._answer_seconds = float("-inf"), 0.0
        self._looking = asyncio.Lock()
        self.pending = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Serve requests, in this order, during `step`."""
        for request in requests:
            assert isinstance(request, Generate)
            self._begin(self._serve(request), self._tasks)
        self.pending += len(requests)

    def step(self) -> list[Result]:
        """Serve until something is finished or a moment has passed; return everything finished."""
        if self._doubts and not self._tasks:
            self._begin(self._look(), self._tasks)
        if self._tasks and not self._finished and self._error is None:
            alarm = self._loop.call_later(_MOMENT_SECONDS, self._loop.stop)
            self._loop.run_forever()
            alarm.cancel()
        if self._error is not None and not self._finished:
            if isinstance(self._error, EngineError):
                self._error.may_be_charged = self._repeats.total() + self._calls
            raise self._error
        results, self._finished = self._finished, []
        self.pending -= len(results)
        return results

    def close(self) -> None:
        """Cancel requests in flight and close the connections."""
        self._is_closing = True
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        tasks = [*self._tasks, *self._probes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _begin(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> None:
        task = self._loop.create_task(work)
        among.add(task)
        task.add_done_callback(partial(self._end, among))

    def _end(self, among: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        among.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        """Make `step` return, except during `close`, which waits for several tasks."""
        if not self._is_closing:
            self._loop.stop()

    async def _serve(self, request: Generate) -> None:
        """Have a request answered; when nothing else is in flight, resolve those in doubt."""
        try:
            result = await self._ask_patiently(request)
            self._finish(result)  # not in one expression: `step` replaces the list meanwhile
        except RefusedError as error:
            if error.blame == "prompt":
                self._finish(Failed(request.id, str(error), *(error.tokens or ())))
            else:
                self._doubt(_Doubt(request, str(error), error.blame, self._loop.time()))
        except RetryableError as error:
            if error.is_absent:
                where = self._where()
                raise OutageError(f"no server at {where}: {error}; check that it is running, and base_url") from error
            self._doubt(_Doubt(request, f"server_error: {error}", None, self._loop.time()))
        finally:
            self._began.pop(request.id, None)
        if self._unanswered > _DOUBT_AFTER or (self._doubts and len(self._tasks) == 1):
            await self._look()

    def _finish(self, result: Result) -> None:
        if (repeats := self._repeats.pop(result.id, 0)) and isinstance(result, Generated | Failed):
            result = msgspec.structs.replace(result, repeats=result.repeats + repeats)
        self._finished.append(result)

    def _doubt(self, doubt: _Doubt) -> None:
        self._doubts.append(doubt)
        self._unanswered += 1

    def _settle(self, since: float, *, is_greeting: bool = False) -> None:
        """A request sent at `since` was answered, so the server is not the cause of earlier doubts.

        Those requests fail. One that met a failing server gets a last attempt, as the server may have recovered.
        """
        self._unanswered = 0
        known = [doubt for doubt in self._doubts if doubt.at <= since]
        self._doubts = [doubt for doubt in self._doubts if doubt.at > since]
        for doubt in known:
            may_retry = is_greeting or self._options.max_retries
            if doubt.blame is None and may_retry and doubt.request.id not in self._last:
                self._last.add(doubt.request.id)
                self._begin(self._serve(doubt.request), self._tasks)
            else:
                self._last.discard(doubt.request.id)
                self._finish(Failed(doubt.request.id, doubt.reason))

    async def _look(self) -> None:
        """Resolve the doubts by probing the server: if it answers, it is not the cause.

        Raises `OutageError` or `AccountError`, which leaves every request in doubt unanswered.
        """
        async with self._looking:
            if not self._doubts or self._error is not None:
                return  # resolved in the meantime
            is_much = self._unanswered > _DOUBT_AFTER
            if is_much or any(doubt.blame != "request" for doubt in self._doubts):
                await self._greet(is_much=is_much)
            self._settle(self._loop.time(), is_greeting=True)

    async def _greet(self, *, is_much: bool) -> None:
        """Probe one replica after the other until one answers."""
        many = f"{self._unanswered} request{'s' if self._unanswered > 1 else ''} in a row"
        greeting = _greeting(self._doubts[-1].request, self._doubts[-1].reason)
        outage: RetryableError | None = None
        refusal: AccountError | None = None
        for replica in self._replicas.by_health():
            try:
                await self._ask(replica, greeting, time.perf_counter())
                return
            except RetryableError as error:
                outage = outage or error
            except RefusedError as error:
                is_form = error.blame == "request" and any(doubt.blame == "request" for doubt in self._doubts)
                if error.blame not in ("access", "account") and not (is_form and is_much):
                    return
                refusal = refusal or self._refusal(replica, error)
        if outage is not None:  # a replica that is away may be the one that does not refuse
            raise OutageError(f"{many} were not answered by {self._where()}: {outage}") from outage
        if refusal is not None:
            raise refusal

    def _where(self) -> str:
        return ", ".join(replica.url for replica in self._replicas.all)

    def _refusal(self, replica: Replica, error: RefusedError) -> AccountError:
        return AccountError(
            f"{replica.url} answered {str(error).removeprefix('refused: ')}; check base_url, the model "
            f"{self._model!r} and {self._options.key_source}, and that the account may use them"
        )

    async def _ask_patiently(self, request: Generate) -> Result:
        """Ask until it is answered or no retry is left.

        HTTP 429 costs no retry while others are answered: the request is sent again after about as long as an answer
        takes, and meanwhile the server gets fewer at a time.
        """
        retries = 0 if request.id in self._last else self._options.max_retries
        attempt, rejected_at = 0, self._loop.time()
        while True:
            try:
                return await self._ask_each(request, is_again=attempt > 0)
            except RetryableError as error:
                if error.status == _RATE_LIMITED and self._answered_at > rejected_at:
                    attempt, longest = 0, min(_FIRST_WAIT_SECONDS, self._answer_seconds)
                elif attempt >= retries:
                    raise
                else:
                    longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**attempt)
                attempt, rejected_at = attempt + 1, self._loop.time()
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - spreads load, hides nothing

    async def _ask_each(self, request: Generate, *, is_again: bool) -> Result:
        """One attempt: ask each replica that answers, until one answers this request.

        Raises the most telling error: that of a server which is there, rather than a refused connection.
        """
        tried: list[Replica] = []
        errors: list[RetryableError | RefusedError] = []
        while (replica := await self._replicas.take(tried, is_first=is_again or bool(tried))) is not None:
            sent_at = self._loop.time()
            began = self._began.setdefault(request.id, time.perf_counter())
            try:
                self._calls += 1
                result = await self._ask(replica, request, began)
                self._answered(replica, sent_at, result.response_tokens if isinstance(result, Generated) else None)
                return result
            except (RetryableError, RefusedError) as error:
                self._repeats[request.id] += _may_be_charged(error)
                if isinstance(error, RefusedError) and error.blame == "account":
                    raise self._refusal(replica, error) from error
                if isinstance(error, RefusedError) and error.blame == "prompt":
                    self._answered(replica, sent_at, None)
                    raise
                self._failed(replica, request, error, sent_at)
                errors.append(error)
            finally:
                self._calls -= 1
                self._replicas.leave(replica)
            tried.append(replica)
        raise max(errors, key=_tells)

    def _answered(self, replica: Replica, sent_at: float, tokens: int | None) -> None:
        self._answered_at = self._loop.time()
        self._answer_seconds = self._answered_at - sent_at
        replica.answered(sent_at, self._answered_at, tokens)
        self._settle(sent_at)

    def _failed(
        self, replica: Replica, request: Generate, error: RetryableError | RefusedError, sent_at: float
    ) -> None:
        if replica.failed(error, sent_at, self._loop.time()) and len(self._replicas.all) > 1:
            _log.warning("%s is left out until it answers again: %s", replica.url, error)
            self._begin(self._revive(replica, _greeting(request, str(error))), self._probes)

    async def _revive(self, replica: Replica, greeting: Generate) -> None:
        """Probe a replica that is left out, after growing pauses, until it answers."""
        while replica.is_sick:
            await asyncio.sleep(replica.next_pause())
            try:
                await self._ask(replica, greeting, time.perf_counter())
            except RetryableError:
                continue
            except RefusedError as error:
                if error.blame in ("access", "account"):
                    continue
            replica.is_well()
        self._replicas.share()

    async def _ask(self, replica: Replica, request: Generate, began: float) -> Result:
        """One request to one replica. Raises `RetryableError` or `RefusedError`."""
        while (pause := replica.resume_at - self._loop.time()) > 0:
            await asyncio.sleep(pause)
        return await self._client.ask(replica.url, request, began)


def _may_be_charged(error: RetryableError | RefusedError) -> bool:
    """Whether a call without a response may have been charged, with an unknown number of tokens."""
    return error.tokens == (None, None) if isinstance(error, RefusedError) else error.may_be_charged


def _tells(error: RetryableError | RefusedError) -> int:
    """How much an error says about a request that several replicas did not answer."""
    if isinstance(error, RefusedError):
        return 2 if error.blame == "request" else 1
    return 0 if error.is_absent else 3


def _greeting(request: Generate, reason: str) -> Generate:
    """The probe sent in place of a request in doubt: the same form, but short and harmless.

    It keeps the request's `max_tokens` if the server rejected that number.
    """
    sampling = request.sampling
    if not complaints.MAX_TOKENS.search(reason):
        sampling = msgspec.structs.replace(sampling, max_tokens=_GREETING_TOKENS)
    return Generate(request.id, [{"role": "user", "content": _GREETING}], sampling, request.seed)
