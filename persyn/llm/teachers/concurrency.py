"""How many requests a server is given at a time: additive increase, multiplicative decrease.

This is the rule by which TCP shares a link (Chiu and Jain 1989, Jacobson 1988), with the decrease of DCTCP (Alizadeh et
al. 2010): half of the share of requests that were rejected, and at least a tenth. Many rejections thus halve the number
in flight, and a few, as when it is close to what a provider allows, hardly change it.
"""

from __future__ import annotations

#: The least share of the limit that an overload takes off.
_LEAST_DECREASE = 0.1
#: A round's answers count as slow if they took this many times as long as usual. Requests in flight double the latency
#: of a saturated server only if they are doubled (Little's law), and a round adds far fewer: the cause is another.
_SLOW = 2.0
#: The least number of answers whose latency is compared, and the weight of a round in what is usual.
_LEAST_ANSWERS, _WEIGHT = 16, 0.2


class Concurrency:
    """The number of requests that one server may have in flight.

    It starts at `most`. An overload (HTTP 429 or 503, a timeout, answers twice as slow as usual) decreases it, at most
    once per round; a *round* is as many answers as may be in flight. Each round without one adds a step, which grows by
    one with each such round. A server that rejects everything is away rather than overloaded: that costs one decrease.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._step = 1.0
        self._cut_at = float("-inf")
        #: Requests that were answered and that met an overload, since the last decrease.
        self._n_answered, self._n_overloaded = 1, 0
        #: Answers of this round, the seconds they took, and their tokens.
        self._answers, self._seconds, self._tokens = 0, 0.0, 0
        #: Seconds per token, or per answer of a server that does not count tokens; None before the first round.
        self._usual: float | None = None

    @property
    def limit(self) -> int:
        """The current limit, 1 to `most`."""
        return int(self._limit)

    def answered(self, sent_at: float, now: float, tokens: int | None) -> None:
        """A request was answered.

        tokens: number of tokens of the response; None if unknown.
        """
        self._n_answered += 1
        self._limit = min(self._most, self._limit + self._step / self._limit)
        self._answers += 1
        self._seconds += now - sent_at
        self._tokens += tokens or 1
        if self._answers >= max(self._limit, _LEAST_ANSWERS):
            self._end_round(now)

    def overloaded(self, sent_at: float, now: float) -> None:
        """The server was too busy for a request. Those that were in flight at the last decrease do not count again."""
        self._n_overloaded += 1
        if self._n_answered and sent_at >= self._cut_at:
            share = self._n_overloaded / (self._n_answered + self._n_overloaded)
            self._limit = max(1.0, self._limit * (1 - max(share / 2, _LEAST_DECREASE)))
            self._step, self._cut_at = 1.0, now
            self._n_answered = self._n_overloaded = 0

    def _end_round(self, now: float) -> None:
        pace = self._seconds / self._tokens
        self._answers, self._seconds, self._tokens = 0, 0.0, 0
        self._step += 1
        if self._usual is None:
            self._usual = pace
        if pace > _SLOW * self._usual:
            self.overloaded(now, now)
        self._usual += _WEIGHT * (pace - self._usual)
