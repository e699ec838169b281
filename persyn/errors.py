"""The errors a caller may catch. Each message says what was wrong, what was given and what to do next."""


class PersynError(Exception):
    """An error that a person can fix; shown as one line, without a traceback."""


class UsageError(PersynError):
    """The request is invalid: a bad run file, a missing file, an unknown name."""


class StoreUnavailable(UsageError):
    """The database is unreachable: its address is wrong, or it is not running yet."""


class EngineError(PersynError):
    """A model could not be loaded, or its engine failed as a whole. The job is retried, then fails."""

    #: Calls of a server that may have been charged, and whose responses are lost.
    may_be_charged = 0


class PermanentError(EngineError):
    """Loading this model will never succeed, for example because of an invalid option or missing weights."""


class HostLacks(PermanentError):
    """This host cannot load the model: a key, a GPU, a package or a file is missing. Another host may be able to."""


class AccountError(PermanentError):
    """A server rejects every request until a person acts: no credit, a wrong key, a wrong address or model."""


class OutageError(EngineError):
    """A server is temporarily unavailable; its jobs wait for up to `outage_seconds` of the run file."""


def shorten(text: str, *, most: int = 200) -> str:
    """Shorten a library's message to one line of bounded length, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
