"""A hub on 127.0.0.1: what downloads and uploads through huggingface_hub ask for, answered from memory.

In: repositories, each with its files, or with the error it answers; tokens, each with the namespaces it may write to.
Out: an endpoint for HF_ENDPOINT, the requests it got, and what was uploaded. It keeps nothing between instances.

An upload without Xet goes: create, validate-yaml with the card, preupload (which files are large?), the LFS batch (what
is there already, where does the rest go?), PUTs of a whole file or of its parts, verify, and one commit of NDJSON.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

RELATIONS = {"adapter", "finetune", "merge", "quantized"}
TASKS = {"text-generation", "image-text-to-text"}


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main",)
    error: tuple[int, str] | None = None
    """Status and X-Error-Code of the answer to everything."""
    cuts: int = 0
    """How many downloads of a file over a thousand bytes break after half of what they asked for."""
    private: bool = False
    """Only seen by who may write to it."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in self.files.items())).hexdigest()


class Hub:
    """`with Hub({"owner/name": Repository(...)}) as hub:` serves `hub.endpoint` until the block ends."""

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        *,
        writers: Mapping[str, tuple[str, ...]] = {},
        part_size: int = 1_000_000,
    ) -> None:
        self.repositories = dict(repositories)
        self.writers = dict(writers)  # token -> namespaces
        self.part_size = part_size  # bytes; a larger file goes up in parts
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.created: list[dict[str, Any]] = []  # what was asked for when a repository was made
        self.cards: list[str] = []  # what was sent to be validated
        self.large: dict[str, bytes] = {}  # content of large files by SHA-256, committed or not
        self.parts: dict[tuple[str, int], bytes] = {}  # (SHA-256, number from 1)
        self.summaries: list[str] = []  # of the commits
        self._failures: list[tuple[str, int, bytes]] = []
        self._lock = threading.Lock()

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

    def fail(self, request: str, status: int = 500, *, times: int = 1, body: bytes = b"{}") -> None:
        """Answer the next `times` requests that contain `request`, as in "PUT /lfs/", with an error."""
        self._failures += [(request, status, body)] * times

    def recover(self) -> None:
        self._failures.clear()

    def next_failure(self, request: str) -> tuple[int, bytes] | None:
        with self._lock:
            for number, (wanted, status, body) in enumerate(self._failures):
                if wanted in request:
                    del self._failures[number]
                    return status, body
        return None


class _Handler(BaseHTTPRequestHandler):
    owner: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._note()
        name = _repository_of(path)
        repository = self.owner.repositories.get(name)
        if repository is None or (repository.private and not self._may_write(name)):
            self._fail(404, "RepoNotFound")
        elif repository.error is not None:
            self._fail(*repository.error)
        elif "/xet-" in path:
            self._fail(404, "")  # no Xet here
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
            self._json(entries)
        elif revision and revision not in (*repository.revisions, repository.commit):
            self._fail(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            about = {"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings}
            self._json(about)

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

    def do_PUT(self) -> None:
        """A large file, or a part of one: the address alone gives the right to it."""
        body, path = self._body(), self._note()
        if failure := self.owner.next_failure(f"PUT {path}"):
            return self._answer(*failure)
        _, _, oid, *part = path.split("/")
        if part:
            self.owner.parts[oid, int(part[0])] = body
        else:
            self.owner.large[oid] = body
        self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def do_POST(self) -> None:
        body, path = self._body(), self._note()
        if failure := self.owner.next_failure(f"POST {path}"):
            return self._answer(*failure)
        if re.fullmatch("/lfs/[0-9a-f]{64}", path):
            return self._assemble(path.split("/")[2], json.loads(body))
        if self._token() not in self.owner.writers:
            return self._fail(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path.endswith("/verify"):
            wanted = json.loads(body)
            stored = self.owner.large.get(wanted["oid"], b"")
            self._json({}) if len(stored) == wanted["size"] else self._fail(400, "", "another size")
        else:
            self._write(_repository_of(path), path, body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.owner.repositories:
            self._json({"url": f"{self.owner.endpoint}/{name}", "error": "You already created this model repo"}, 409)
        elif not self._may_write(name):
            self._fail(403, "", f"You don't have the rights to create a model under {wanted['organization']}")
        else:
            self.owner.created.append(wanted)
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.owner.repositories[name] = Repository(private=private)
            self._json({"url": f"{self.owner.endpoint}/{name}", "name": name})

    def _validate(self, card: str) -> None:
        self.owner.cards.append(card)
        errors = [{"message": message} for message in wrong_in_card(card)]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _write(self, name: str, path: str, body: bytes) -> None:
        repository = self.owner.repositories.get(name)
        if repository is None:
            self._fail(404, "RepoNotFound")
        elif repository.error is not None:
            self._fail(*repository.error)
        elif not self._may_write(name):
            self._fail(403, "", "You have read access but not the required permissions for this operation")
        elif path.endswith("/preupload/main"):
            self._json({"files": [_kind(repository, file["path"]) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._where(wanted["oid"], wanted["size"]) for wanted in json.loads(body)["objects"]]
            self._json({"transfer": "multipart", "objects": objects})
        elif path.endswith("/commit/main"):
            self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        else:
            self._fail(404, "")

    def _where(self, oid: str, size: int) -> dict[str, Any]:
        """To where the content of that SHA-256 goes, in how many parts; nothing when it is there."""
        if oid in self.owner.large:
            return {"oid": oid, "size": size}
        address, part = f"{self.owner.endpoint}/lfs/{oid}", self.owner.part_size
        header = {str(number): f"{address}/{number}" for number in range(1, -(-size // part) + 1)}
        upload = {"href": address, "header": {"chunk_size": str(part), **header} if size > part else {}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{address}/verify"}}}

    def _assemble(self, oid: str, wanted: dict[str, Any]) -> None:
        parts = [self.owner.parts[oid, part["partNumber"]] for part in wanted["parts"]]
        tags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        content = b"".join(parts)
        if [part["etag"] for part in wanted["parts"]] != tags or hashlib.sha256(content).hexdigest() != oid:
            return self._fail(400, "", "the parts do not make the file")
        self.owner.large[oid] = content
        self._json({})

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.owner.summaries.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.owner.large:
                files[value["path"]] = self.owner.large[value["oid"]]
            else:
                return self._fail(400, "", f"{value} cannot be committed")
        repository.files |= files
        address = f"{self.owner.endpoint}/{name}/commit/{repository.commit}"
        self._json({"success": True, "commitOid": repository.commit, "commitUrl": address})

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append((self.command, path))
        return path

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        return name.split("/")[0] in self.owner.writers.get(self._token(), ())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, status: int, code: str, message: str = "") -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        headers = {name: value for name, value in named.items() if value}
        self._answer(status, json.dumps({"error": message or code}).encode(), headers)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode())

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _repository_of(path: str) -> str:
    owner, name, *_ = [*path.removeprefix("/api/models").strip("/").split("/"), ""]
    return f"{owner}/{name.removesuffix('.git')}"


def _kind(repository: Repository, file: str) -> dict[str, Any]:
    """Whether `file` is large, as the hub's .gitattributes have it, and the hash of what the repository has there."""
    large = file.endswith((".safetensors", "tokenizer.json"))
    answer: dict[str, Any] = {"path": file, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if (data := repository.files.get(file)) is not None:
        blob = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        answer["oid"] = blob.hexdigest()
    return answer


def wrong_in_card(card: str) -> list[str]:
    """What the hub has against the front matter of a model's README.md; its rules as far as they are documented."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    relation = data.get("base_model_relation")
    rules = {
        "license": re.fullmatch("[a-z0-9.-]+", str(data.get("license", "other"))),
        "license_link": str(data.get("license_link", "LICENSE")).startswith(("LICENSE", "https://")),
        "language": all(re.fullmatch("[a-z]{2,3}", str(code)) for code in _listed(data.get("language"))),
        "base_model": all(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) for name in _listed(data.get("base_model"))),
        "base_model_relation": relation is None or (relation in RELATIONS and "base_model" in data),
        "library_name": isinstance(data.get("library_name", ""), str),
        "pipeline_tag": data.get("pipeline_tag", "text-generation") in TASKS,
        "tags": all(isinstance(tag, str) for tag in data.get("tags", [])),
    }
    return [f"{key}: {data[key]!r} is not valid" for key, right in rules.items() if not right]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
