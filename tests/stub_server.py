"""A chat completions server as a program, which answers with the prompt in capitals, or with a rating.

It starts a process of its own in a session of its own, as real servers start workers. The prompt "die" kills it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        # Like llama.cpp or vLLM; other servers have no /health.
        self._answer(200 if self.path == "/v1/models" else 404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"]
        if said == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        text = '{"rating": 4}' if "rating" in said else f"{asked['model']}: {said.upper()}"
        self._answer(200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def _answer(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    given = parser.parse_args()
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    given.pids.write_text(f"{os.getpid()} {worker.pid}")
    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
