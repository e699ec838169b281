"""A minimal Hugging Face hub on loopback, sufficient for pushing a dataset with its own client."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field

from aiohttp import web

from tests.loopback import LoopbackServer

TOKEN = "hf_of_the_test"


@dataclass
class Repo:
    """A repository and its pushed content."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.parquet filter=lfs\n"})
    #: One message per commit.
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    """The hub's object id: SHA-256 for large files, git's hash for others."""
    if path.endswith(".parquet"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(LoopbackServer):
    """Repositories by name; `fails` makes every upload of a large file fail with HTTP 500."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fails = False

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"{body['organization']}/{body['name']}"
        assert body["type"] == "dataset"
        url = f"{self.url}/datasets/{name}"
        if name in self.repos:
            return web.json_response({"error": "You already created this dataset repo", "url": url}, status=409)
        self.repos[name] = Repo(private=body.get("private") or body.get("visibility") == "private")
        return web.json_response({"url": url, "id": name})

    async def info(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        siblings = [{"rfilename": path} for path in repo.files]
        return web.json_response(
            {"id": self._name(request), "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    async def tree(self, request: web.Request) -> web.Response:
        files = self._repo(request).files
        return web.json_response(
            [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
        )

    async def resolve(self, request: web.Request) -> web.Response:
        repo, path = self._repo(request), request.match_info["path"]
        data = repo.files[path]
        headers = {"ETag": f'"{oid_of(path, data)}"', "X-Repo-Commit": repo.sha}
        return web.Response(body=data, headers=headers)

    async def validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def preupload(self, request: web.Request) -> web.Response:
        there = self._repo(request).files
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".parquet") else "regular",
                "shouldIgnore": False,
                "oid": oid_of(path, there[path]) if path in there else None,
            }
            for path in (file["path"] for file in (await request.json())["files"])
        ]
        return web.json_response({"files": files})

    async def batch(self, request: web.Request) -> web.Response:
        objects = []
        for item in (await request.json())["objects"]:
            known = item["oid"] in self.objects
            upload = {"upload": {"href": f"{self.url}/objects/{item['oid']}", "header": {}}}
            objects.append({**item, **({} if known else {"actions": upload})})
        return web.json_response({"transfer": "basic", "objects": objects})

    async def put(self, request: web.Request) -> web.Response:
        if self.fails:
            return web.json_response({"error": "storage is down"}, status=403)
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.objects[request.match_info["oid"]] = data
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        for line in (await request.text()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.commits.append(value["summary"])
            elif item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.objects[value["oid"]]
            else:
                assert item["key"] == "deletedFile"
                del repo.files[value["path"]]
        url = f"{self.url}/datasets/{self._name(request)}/commit/{repo.sha}"
        return web.json_response({"success": True, "commitUrl": url, "commitOid": repo.sha})

    @staticmethod
    def _name(request: web.Request) -> str:
        return f"{request.match_info['owner']}/{request.match_info['name']}"

    def _repo(self, request: web.Request) -> Repo:
        return self.repos[self._name(request)]

    @web.middleware
    async def _with_token(self, request: web.Request, handler: web.Handler) -> web.StreamResponse:  # type: ignore[name-defined]
        is_open = request.path.startswith("/objects/") or request.path == "/api/validate-yaml"
        if not is_open and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid username or password."}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._with_token], client_max_size=2**30)
        of = "/api/datasets/{owner}/{name}"
        app.router.add_post("/api/repos/create", self.create)
        app.router.add_get(of, self.info)
        app.router.add_get(of + "/revision/{revision}", self.info)
        app.router.add_get(of + "/tree/{revision}", self.tree)
        app.router.add_get("/datasets/{owner}/{name}/resolve/{revision}/{path:.*}", self.resolve)
        app.router.add_post("/api/validate-yaml", self.validate)
        app.router.add_post(of + "/preupload/{revision}", self.preupload)
        app.router.add_post("/datasets/{owner}/{name}.git/info/lfs/objects/batch", self.batch)
        app.router.add_put("/objects/{oid}", self.put)
        app.router.add_post(of + "/commit/{revision}", self.commit)
        return app
