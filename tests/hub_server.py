"""A stand-in for the Hub on this machine: makes repositories and branches, takes commits of small and large files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
READER = "hf_may_only_read"


@dataclass
class Hub:
    """What the stand-in holds: repositories (private or not), branches, files by repository and branch, messages."""

    address: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, set[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    licenses: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: bool = False  # answers every commit with an error of its own

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """The status and the JSON with which a request is answered."""
        self.asked.append(f"{method} {path}")
        if method == "HEAD":
            return 200, {}
        if path.startswith("/blobs/"):
            self.blobs[path.removeprefix("/blobs/")] = body
            return 200, {}
        if token not in (TOKEN, READER):
            return 401, {"error": "Invalid username or password."}
        if method == "GET":
            return self.look(path.removeprefix("/api/models/"))
        if token == READER:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        repo, verb, branch = path.removeprefix("/api/models/").rsplit("/", 2)
        if verb == "branch":
            self.branches[repo].add(branch)
            return 200, {}
        if repo not in self.repositories or branch not in self.branches[repo]:
            return 404, {"error": "Repository not found"}
        if verb == "preupload":
            return 200, {"files": [self.mode(each) for each in json.loads(body)["files"]]}
        return self.commit(repo, branch, body)

    def look(self, repo: str) -> tuple[int, Any]:
        """What is known of a repository, or of a model that somebody else put there."""
        if repo in self.licenses:
            return 200, {"id": repo, "private": False, "cardData": {"license": self.licenses[repo]}}
        if repo not in self.repositories:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "private": self.repositories[repo]}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'ann'}/{asked['name']}"
        known = repo in self.repositories
        if not known:
            self.repositories[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.branches[repo] = {"main"}
        return 409 if known else 200, {"url": f"{self.address}/{repo}", "error": "You already created this repo"}

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = [
            {**each, "actions": {"upload": {"href": f"{self.address}/blobs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        return {"transfer": "basic", "objects": upload}

    def commit(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        if self.broken:
            return 400, {"error": "the card's metadata\nis not valid"}
        files = self.files.setdefault((repo, branch), {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/0123", "commitOid": "0123"}


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers on this machine while the block lasts."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            path = unquote(urlsplit(self.path).path)
            status, answer = state.answer(self.command, path, body, token)
            text = b"" if self.command == "HEAD" else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_HEAD = do_GET = do_POST = do_PUT = reply

        def chunks(self) -> bytes:
            found = b""
            while length := int(self.rfile.readline(), 16):
                found += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
