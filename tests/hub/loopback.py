"""A Hub on this machine: the part of its HTTP interface that huggingface_hub uses to publish and fetch models.

It keeps commits, checks tokens, parent commits and checksums as the Hub does, and can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
LARGE = (".safetensors", ".png", ".bin")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Its commits, oldest first, each all files by path; and tags."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"* text\n"}])
    tags: dict[str, int] = field(default_factory=dict)

    def sha(self, index: int) -> str:
        return hashlib.sha1(repr((index, sorted(self.commits[index]))).encode()).hexdigest()

    def index(self, revision: str) -> int | None:
        names = {self.sha(i): i for i in range(len(self.commits))} | self.tags | {"main": len(self.commits) - 1}
        return names.get(revision)


class LoopbackHub(ThreadingHTTPServer):
    """The server; `failures` maps (method, part of the path) to what goes wrong.

    A status, None for a cut connection, bytes to send in place of the answer, or seconds (float) without any answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: dict[tuple[str, str], int | float | bytes | None] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the server itself cut is no news."""

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *arguments: Any) -> None:
        """The test's output stays clean."""

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        for (failing, part), status in self.server.failures.items():
            if failing == method and part in path:
                if status is None:
                    self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
                    self.close_connection = True
                    self.connection.close()
                    return
                self.body()
                if isinstance(status, bytes):
                    self.answer(status)
                elif isinstance(status, float):
                    threading.Event().wait(status)  # the tests replace time.sleep
                    self.close_connection = True
                else:
                    self.answer({"error": "told to fail"}, status)
                return
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self.whoami()
        elif path == "/api/validate-yaml":
            self.validate_yaml()
        elif path == "/api/repos/create":
            self.create()
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.model_api("/".join(parts[2:4]), parts[4:])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
        elif parts[0] == "lfs" and method == "PUT":
            self.lfs_put(parts[1])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), method)
        else:
            self.answer({"error": "no such page"}, 404)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token() == WRITE_TOKEN:
            return True
        known = self.token() == READ_TOKEN
        error = "You don't have the rights" if known else "Invalid credentials in Authorization header"
        self.answer({"error": error}, 403 if known else 401)
        return False

    def whoami(self) -> None:
        if self.token() in (WRITE_TOKEN, READ_TOKEN):
            self.answer({"type": "user", "name": "me", "orgs": []})
        else:
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)

    def validate_yaml(self) -> None:
        text = json.loads(self.body())["content"]
        header = yaml.safe_load(text.split("---")[1])
        errors = [] if isinstance(header, dict) else [{"message": "no mapping"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        request = json.loads(self.body())
        if not self.may_write():
            return
        name = f"{request['organization'] or 'me'}/{request['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self.answer({"error": "You already created this model repo", **url}, 409)
            return
        self.server.repositories[name] = Repository()
        self.answer(url)

    def model_api(self, name: str, rest: list[str]) -> None:
        content = self.body()
        repository = self.server.repositories.get(name)
        if repository is None:
            self.missing("RepoNotFound")
            return
        action = rest[0] if rest else "revision"
        index = repository.index(rest[1] if len(rest) > 1 else "main")
        if index is None:
            self.missing("RevisionNotFound")
            return
        files, sha = repository.commits[index], repository.sha(index)
        if action == "revision":
            siblings = [{"rfilename": path, "size": len(data), "blobId": git_oid(data)} for path, data in files.items()]
            self.answer({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0})
        elif action == "tree":
            self.answer([entry(path, data) for path, data in files.items()])
        elif action == "preupload":
            self.preupload(json.loads(content)["files"], files)
        elif action == "commit":
            self.commit(repository, sha, content, name)
        else:
            self.answer({"error": f"no {action}"}, 404)

    def preupload(self, requested: list[dict[str, Any]], files: dict[str, bytes]) -> None:
        answer = []
        for item in requested:
            path = item["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                answer[-1]["oid"] = entry(path, files[path]).get("lfs", {}).get("oid") or git_oid(files[path])
        self.answer({"files": answer})

    def lfs_batch(self) -> None:
        request = json.loads(self.body())
        if not self.may_write():
            return
        objects = []
        for item in request["objects"]:
            there = item["oid"] in self.server.blobs
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}}
            objects.append({"oid": item["oid"], "size": item["size"], **({} if there else upload)})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer({"error": "checksum"}, 422)
            return
        self.server.blobs[oid] = data
        self.answer({})

    def commit(self, repository: Repository, head: str, content: bytes, name: str) -> None:
        if not self.may_write():
            return
        files = dict(repository.commits[-1])
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", head) != head:
                self.answer({"error": "A commit has happened since"}, 412)
                return
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        repository.commits.append(files)
        oid = repository.sha(len(repository.commits) - 1)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def resolve(self, name: str, revision: str, path: str, method: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.missing("RepoNotFound")
            return
        index = repository.index(revision)
        if index is None:
            self.missing("RevisionNotFound")
            return
        data = repository.commits[index].get(path)
        if data is None:
            self.missing("EntryNotFound")
            return
        lfs = entry(path, data).get("lfs")
        headers = {"ETag": f'"{lfs["oid"] if lfs else git_oid(data)}"', "X-Repo-Commit": repository.sha(index)}
        self.answer(data, headers={**headers, "Accept-Ranges": "bytes"})


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in the listing of a tree."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return found
