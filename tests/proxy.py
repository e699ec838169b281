"""A TCP proxy on loopback that can stop forwarding without closing, like a half-open connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class Proxy:
    """Forwards to a Unix socket; data received while frozen is forwarded after thawing."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_open = True
        #: One gate per connection, and the gates of permanently frozen connections.
        self._gates: list[threading.Event] = []
        self._stranded: list[threading.Event] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Stop forwarding without closing, including on future connections."""
        self._is_open = False
        for gate in self._gates:
            gate.clear()

    def strand(self) -> None:
        """Stop forwarding on existing connections without closing them; new connections work."""
        for gate in self._gates:
            gate.clear()
        self._stranded += self._gates
        self._gates = []

    def thaw(self) -> None:
        """Resume forwarding, starting with the data received meanwhile."""
        self._is_open = True
        for gate in self._gates:
            gate.set()

    def close(self) -> None:
        """Close every connection."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for gate in (*self._gates, *self._stranded):
            gate.set()
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client,), daemon=True))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        gate = threading.Event()
        if self._is_open:
            gate.set()
        self._gates.append(gate)
        self._sockets.append(client)
        gate.wait()
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(str(self._target))
            back = threading.Thread(target=_pump, args=(server, client, gate), daemon=True)
            back.start()
            _pump(client, server, gate)
            back.join()


def _pump(source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            gate.wait()
            sink.sendall(data)
    gate.wait()
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
