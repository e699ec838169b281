"""A server on loopback with the batch protocol of OpenAI, which executes batches whether or not anyone asks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.loopback import LoopbackServer


class BatchServer(LoopbackServer):
    """Keeps files and batches; a batch is over when its state was asked for `looks` times.

    reply:  the line of the output file for a request, without its id; None if it expires.
    moment: called with a name before and after the effect of each call, such as "create: before".
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks = 2
        self._serial = itertools.count()
        self.reply: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda body: answered("Four.")
        self.moment: Callable[[str], None] = lambda name: None

    @property
    def sent(self) -> list[str]:
        """The ids of all requests in all batches."""
        return [line["custom_id"] for batch in self.batches.values() for line in self._lines(batch)]

    def keys(self) -> list[str]:
        """The key of each batch."""
        return [batch["metadata"]["persyn_key"] for batch in self.batches.values()]

    async def _upload(self, request: web.Request) -> web.Response:
        self.moment("upload: before")
        form = await request.post()
        name, content = f"file-{len(self.files)}", form["file"]
        assert isinstance(content, web.FileField)
        self.files[name] = content.file.read().decode()
        self.moment("upload: after")
        return web.json_response({"id": name})

    async def _create(self, request: web.Request) -> web.Response:
        self.moment("create: before")
        given = await request.json()
        batch = {"id": f"batch-{next(self._serial)}", "status": "validating", "looks": 0, **given}
        self.batches[batch["id"]] = batch
        self.moment("create: after")
        return web.json_response(batch)

    async def _list(self, request: web.Request) -> web.Response:
        self.moment("list: before")
        return web.json_response({"data": list(self.batches.values())[::-1], "has_more": False})

    async def _look(self, request: web.Request) -> web.Response:
        self.moment("look: before")
        if request.match_info["id"] not in self.batches:
            return web.json_response({"error": {"message": "no such batch"}}, status=404)
        batch = self.batches[request.match_info["id"]]
        batch["looks"] += 1
        if batch["looks"] >= self.looks:
            self._execute(batch)
            self.moment("over: before")
        return web.json_response(batch)

    async def _content(self, request: web.Request) -> web.StreamResponse:
        self.moment("content: before")
        response = web.StreamResponse()
        await response.prepare(request)
        for line in self.files[request.match_info["id"]].splitlines(keepends=True):
            await response.write(line.encode())
            self.moment("content: within")
        return response

    def _execute(self, batch: dict[str, Any]) -> None:
        if batch["status"] in ("completed", "expired"):
            return
        output, errors = [], []
        for line in self._lines(batch):
            reply = self.reply(line["body"])
            (errors if reply is None else output).append(
                {"custom_id": line["custom_id"], **(reply or {"response": None, "error": {"code": "batch_expired"}})}
            )
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines)
        batch["status"] = "expired" if errors else "completed"
        batch["request_counts"] = {"total": len(output) + len(errors), "completed": len(output), "failed": 0}

    def _lines(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._look)
        return app


def answered(text: str) -> dict[str, Any]:
    """The output line of a request with this response."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    return {"response": {"status_code": 200, "body": body}, "error": None}


def refused(status: int, message: str) -> dict[str, Any]:
    """The output line of a request that was answered with an error."""
    return {"response": {"status_code": status, "body": {"error": {"message": message}}}, "error": None}
