"""`persyn web`: serve the web console."""

from __future__ import annotations

import secrets
import socket
from urllib.parse import quote

import click

from persyn.cli.context import store
from persyn.errors import UsageError
from persyn.jobs import owner

#: Shorter tokens could be guessed.
_LEAST_TOKEN = 16


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 means all.")
@click.option("--port", default=8321, show_default=True, type=click.IntRange(0, 65535), help="0 chooses a free port.")
@click.option(
    "--token",
    envvar="PERSYN_WEB_TOKEN",
    show_envvar=True,
    help="Token that visitors must give. Required unless HOST is this machine; generated if not given.",
)
@click.option(
    "--allow-host",
    "names",
    metavar="NAME",
    multiple=True,
    help="Another accepted host name, for example behind a proxy.",
)
@click.option("--admin", is_flag=True, help="Allow retries of failed jobs; without it the console is read-only.")
def web(host: str, port: int, token: str | None, names: tuple[str, ...], admin: bool) -> None:
    """Serve the web console (runs, prompts, failures and SQL) until Ctrl-C.

    By default, only this machine can reach it, and it is read-only. From another machine, use ssh:
    ssh -L 8321:127.0.0.1:8321 HOST, and open http://127.0.0.1:8321 here.
    """
    from persyn.web import safety
    from persyn.web.serve import serve

    if token is None and not safety.is_loopback(host):
        token = secrets.token_urlsafe(32)
    if token is not None:
        _require_usable(token)
    access = safety.Access(
        hosts=frozenset(name.lower() for name in (*names, host, socket.gethostname(), socket.getfqdn())),
        token=token,
        admin=owner.actor() if admin else None,
    )

    def ready(port: int) -> None:
        name = socket.gethostname() if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
        shown = f"?token={quote(token, safe='')}" if token else ""
        click.echo(f"console at http://{name}:{port}/{shown}")
        click.echo("press Ctrl-C to stop", err=True)

    with store() as database:
        try:
            serve(database, access, host=host, port=port, ready=ready)
        except KeyboardInterrupt:
            click.echo("", err=True)


def _require_usable(token: str) -> None:
    if len(token) < _LEAST_TOKEN:
        raise UsageError(f"the token has {len(token)} characters; give {_LEAST_TOKEN} or more random characters")
    if not (token.isascii() and token.isprintable()):
        raise UsageError(
            "the token has characters that are not allowed in a header; use ASCII letters, digits and punctuation"
        )
