"""The child process that compares answers: algebra on untrusted text.

Some expressions never terminate, or exhaust memory, inside C code that no exception can interrupt. The
process therefore has a memory limit, an alarm that kills it, and a parent that replaces it.
Run as `python -m persyn.llm.scorers.math_child FD TIMEOUT_SECONDS MEMORY_MB`.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection

import msgspec

from persyn.llm.scorers.answers.comparison import VERSION, judge
from persyn.llm.scorers.math_scorer import Case, Verdict


def main(fd: int, timeout_seconds: float, memory_mb: int) -> None:
    """Read lists of cases and answer one verdict at a time, until the parent closes the pipe."""
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    logging.disable(logging.WARNING)
    judge(Case(r"\frac{1}{2}", r"$\frac{2}{4} + 0 \cdot x$"))  # builds the parser's tables

    pipe = Connection(fd)
    decode = msgspec.msgpack.Decoder(list[Case]).decode
    pipe.send_bytes(msgspec.msgpack.encode(VERSION))
    while True:
        try:
            cases = decode(pipe.recv_bytes())
        except EOFError:
            return
        for case in cases:
            pipe.send_bytes(msgspec.msgpack.encode(_guarded(case, timeout_seconds, memory_mb)))


def _guarded(case: Case, timeout_seconds: float, memory_mb: int) -> Verdict:
    # The alarm has no handler, so it kills the process even inside C code and without a parent.
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_seconds)
    before = _peak_mb()
    try:
        verdict = judge(case)
    except Exception as error:
        verdict = Verdict(None, failure=f"crashed: {type(error).__name__}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    # A comparison that hits the memory limit has its error swallowed and looks like "not equal".
    if not verdict.is_right and _peak_mb() - before > memory_mb / 4:
        return Verdict(None, failure=f"crashed: the comparison needs more than {memory_mb} MB")
    return verdict


def _peak_mb() -> float:
    """This process's peak memory; getrusage would include the parent's memory before the fork."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
