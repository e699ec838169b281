"""The errors a caller may catch. Each message says what was wrong, what was given and what to do next."""


class PersynError(Exception):
    """Something a person can mend; shown as one line, without a traceback."""


class UsageError(PersynError):
    """What was asked for cannot be done as asked: a bad run file, a missing file, an unknown name."""


class StoreAway(UsageError):
    """The database does not answer: its address is wrong, or it is not up yet."""


class EngineError(PersynError):
    """A model could not be loaded, or its engine failed as a whole; the job is tried again, then fails."""


class PermanentError(EngineError):
    """A model that never loads, however often it is tried: an option that is wrong, weights that are missing."""


class HostLacks(PermanentError):
    """This host never loads a model: a key, a GPU, a package or a file is missing. Another host may have it."""


class AccountError(PermanentError):
    """A server refuses everybody until a person mends something: no credit, a wrong key, a wrong address or model."""


class OutageError(EngineError):
    """A server serves nobody at the moment; whoever needs it waits, for `outage_seconds` of the run file."""


def shorten(text: str, *, most: int = 200) -> str:
    """A library's message on one line of bounded length, without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
