"""A hub on 127.0.0.1: what a download through huggingface_hub asks for, answered from memory.

In: repositories, each with its files, or with the error it answers. Out: an endpoint for HF_ENDPOINT, and the list of
requests it got. It keeps nothing between instances.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main",)
    error: tuple[int, str] | None = None
    """Status and X-Error-Code of the answer to everything."""
    cuts: int = 0
    """How many downloads of a file over a thousand bytes break after half of what they asked for."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in self.files.items())).hexdigest()


class Hub:
    """`with Hub({"owner/name": Repository(...)}) as hub:` serves `hub.endpoint` until the block ends."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[tuple[str, str]] = []  # (method, path)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        paths = (path for method, path in self.requests if method == "GET" and "/resolve/" in path)
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}


class _Handler(BaseHTTPRequestHandler):
    owner: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append((self.command, path))
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        repository = self.owner.repositories.get(name)
        if repository is None:
            self._fail(404, "RepoNotFound")
        elif repository.error is not None:
            self._fail(*repository.error)
        elif "/resolve/" in path:
            revision, _, file = path.split("/resolve/")[1].partition("/")
            self._file(repository, revision, file)
        else:
            self._description(repository, name, path)

    def _description(self, repository: Repository, name: str, path: str) -> None:
        _, _, revision = path.partition("/revision/")
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in repository.files.items()
            ]
            self._answer(200, json.dumps(entries).encode())
        elif revision and revision not in (*repository.revisions, repository.commit):
            self._fail(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            self._answer(200, json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode())

    def _file(self, repository: Repository, revision: str, file: str) -> None:
        if revision not in (*repository.revisions, repository.commit):
            return self._fail(404, "RevisionNotFound")
        if file not in repository.files:
            return self._fail(404, "EntryNotFound")
        data = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repository.commit}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        headers["Content-Length"] = str(len(body))
        if self.command == "GET" and len(data) > 1000 and repository.cuts:
            repository.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self._answer(206 if start else 200, body, headers)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
