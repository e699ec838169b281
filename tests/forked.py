"""The command `persyn` for scripts of a shell, forked for each call from a process that has imported every command.

A process that starts anew imports for a second before it does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

MODULES = str(Path(__file__).parents[1])
#: Hands arguments, folder, environment and streams over; starts Python anew where it would import other modules.
_CALL = """#!{python} -SE
import json, os, socket, sys
if os.environ.get("PYTHONPATH") != {modules!r}:
    os.execv({python!r}, [{python!r}, "-m", "persyn.cli", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(said)
    sys.exit(int.from_bytes(server.recv(1) or bytes([1])))
"""


@contextmanager
def running(modules: str = MODULES) -> Iterator[Path]:
    """A folder for the PATH with `persyn`, forked where the PYTHONPATH is `modules`, and started anew elsewhere."""
    environment = {**os.environ, "PYTHONPATH": modules}
    with tempfile.TemporaryDirectory(prefix="persyn-") as name:
        address = f"{name}/socket"
        command = Path(name) / "persyn"
        command.write_text(_CALL.format(python=sys.executable, modules=modules, address=address))
        command.chmod(0o755)
        server = [sys.executable, "-P", "-c", f"from tests import forked; forked.serve({address!r})"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(server, env=environment, **pipes) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                yield Path(name)
            finally:
                process.kill()


def serve(address: str) -> NoReturn:
    """Run each command that is handed over in a fork of this process."""
    import persyn.cli

    for module in pkgutil.iter_modules(persyn.cli.__path__):
        if module.name != "__main__":
            importlib.import_module(f"persyn.cli.{module.name}")
    for lazily in ("alembic.command", "pyarrow.pandas_compat"):  # imported by commands
        importlib.import_module(lazily)
    _end_with(0)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        os.write(1, b"ready\n")
        while True:
            call, _ = door.accept()
            if os.fork() == 0:
                _run(call)
            call.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _run(call: socket.socket) -> NoReturn:
    from persyn.cli.main import main

    size, streams, _, _ = socket.recv_fds(call, 8, 3)
    with call.makefile("rb") as said:
        arguments, folder, environment = json.loads(said.read(int.from_bytes(size, "big")))
    for stream, given in enumerate(streams):
        os.dup2(given, stream)
    _end_with(call.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["persyn", *arguments]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        call.send(bytes([code]))
        os._exit(code)


def _end_with(pipe: int) -> None:
    """Kill this process when the other end of a pipe or socket is closed, however its owner ends."""

    def wait() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
