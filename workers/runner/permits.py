"""Ask the store for permission to send requests to a server with limits per minute."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

from persyn.jobs import rate_limits
from persyn.llm import rates
from persyn.llm.protocols import ModelSpec, Request, Result
from persyn.llm.rates import Cost, Costs, Limits
from persyn.workers.runner.transactions import Transactions

#: The interval between two questions to the store is drawn from this range, so that workers take turns.
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.1, 0.3


class Permits:
    """The permits of one worker's engine; a model without limits needs none."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._spec: ModelSpec | None = None
        self._limits: Limits | None = None
        self._ask_at = 0.0
        #: Tokens charged for requests in flight, by the request's identity.
        self._charged: dict[int, int] = {}
        self._unused_tokens = 0

    def turn_to(self, spec: ModelSpec) -> None:
        """The engine serves this model from now on."""
        if spec != self._spec:
            self._spec, self._limits, self._costs = spec, rates.limits(spec), Costs(spec)
            self._charged, self._unused_tokens = {}, 0

    def take(self, upcoming: Iterable[Request], room: int) -> int:
        """How many of the next requests may be sent now.

        upcoming: only looked at when it is time to ask.
        room:     how many the engine has room for.
        """
        if self._limits is None:
            return room
        if time.monotonic() < self._ask_at or not (requests := list(upcoming)):
            return 0
        costs = [self._costs.of(request) for request in requests]
        permitted = self._ask(self._limits, costs)
        self._ask_at = time.monotonic() + random.uniform(_SHORTEST_SECONDS, _LONGEST_SECONDS)  # noqa: S311 - no secret
        self._unused_tokens = 0
        for request, cost in zip(requests[:permitted], costs, strict=False):
            self._charged[id(request)] = cost.tokens
        return permitted

    def landed(self, request: Request, result: Result) -> None:
        """A request was answered; what its estimate was wrong by is corrected with the next question."""
        if self._limits is None:
            return
        charged, used = self._charged.pop(id(request), None), self._costs.used(result)
        if charged is not None and used is not None:
            self._unused_tokens += charged - used

    def _ask(self, limits: Limits, costs: Sequence[Cost]) -> int:
        unused = self._unused_tokens
        return self._transactions.write(lambda session: rate_limits.take(session, limits, costs, unused_tokens=unused))
