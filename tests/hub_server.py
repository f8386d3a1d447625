"""A hub on the loopback interface: it speaks the protocol to the real `huggingface_hub` client.

`serve` starts it with repositories of given files; `Server.environment` and `Server.run` point a
subprocess at it, `Server.connect` points this process at it. Every request is recorded. Large
files (by suffix, as on the hub) are stored apart, behind a redirect to another origin.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote

import pytest

LARGE = (".safetensors", ".bin", ".h5", ".msgpack")


@dataclass
class Repository:
    """Files by commit, commits by branch; the token that sees it, and the one that may read it."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    private: str = ""
    gated: str = ""
    disabled: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        """Makes `files` the files of a branch, and returns the commit."""
        text = repr((sorted(files.items()), branch, len(self.commits)))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.messages[commit] = message
        self.branches[branch] = commit
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The files at the head of a branch."""
        return self.commits[self.branches[branch]]


@dataclass(frozen=True)
class Request:
    """One request that came in; `file` is set where its contents were sent."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    storage: bool
    file: str = ""

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Fault:
    """What matching requests get for an answer, or where its body breaks off if `cut` is given."""

    pattern: str
    method: str = "GET"
    times: int = 1000
    status: int = 200
    body: bytes = b""
    cut: int | None = None


@dataclass
class Answer:
    """A response that is not written yet."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: str = ""


class Refusal(Exception):
    """Ends the search for an answer with a no of the hub's kind."""

    def __init__(self, status: int, code: str, **headers: str) -> None:
        body = json.dumps({"error": code}).encode()
        self.answer = Answer(status, body, {"X-Error-Code": code, **headers})


class Server:
    """The state of the hub, and how clients get to it."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {name: Repository() for name in repositories}
        for name, files in repositories.items():
            self.repositories[name].commit(files)
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.url = self.storage_url = ""

    def __getitem__(self, name: str) -> Repository:
        return self.repositories[name]

    def fetched(self) -> list[str]:
        """The files whose contents were sent, sorted, each as often as it was."""
        return sorted(request.file for request in self.requests if request.file)

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this for the hub, and `home` for its HF_HOME."""
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "TRANSFORMERS_OFFLINE": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUG"))} | ours

    def run(self, home: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a process that sees this hub and can import the checkout."""
        return subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(home) | variables,
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Makes this process take it for the hub; `huggingface_hub.close_session` ends that."""
        constants = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")

    def answer(self, request: Request) -> Answer:
        """Finds the answer to a request, or what a fault puts in its place."""
        fault = self.take_fault(request, cutting=False)
        if fault is not None:
            return Answer(fault.status, fault.body)
        try:
            for storage, methods, pattern, handler in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in methods.split() and storage == request.storage:
                    return handler(self, request, *map(unquote, match.groups()))
            raise Refusal(404, "NotFound")
        except Refusal as refusal:
            return refusal.answer

    def take_fault(self, request: Request, *, cutting: bool) -> Fault | None:
        """The fault that hits a request, if any; it is used up by one."""
        for fault in self.faults:
            hit = fault.method == request.method and re.search(fault.pattern, request.path)
            if hit and fault.times and (fault.cut is not None) == cutting:
                fault.times -= 1
                return fault
        return None


def find(server: Server, request: Request, name: str, revision: str) -> tuple[Repository, str]:
    """The repository and the commit that a request is about."""
    repository = server.repositories.get(name)
    if repository is None or (repository.private and request.token != repository.private):
        raise Refusal(404 if request.token else 401, "RepoNotFound")
    if repository.disabled:
        raise Refusal(403, "", **{"X-Error-Message": "Access to this resource is disabled."})
    commit = repository.branches.get(revision, revision)
    if commit not in repository.commits:
        raise Refusal(404, "RevisionNotFound")
    return repository, commit


def tell(value: object) -> Answer:
    """An answer in JSON."""
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def information(server: Server, request: Request, name: str, revision: str = "main") -> Answer:
    repository, commit = find(server, request, name, revision)
    files: list[dict[str, object]] = [{"rfilename": file} for file in repository.commits[commit]]
    if "blobs=" in request.query.lower():
        for entry, data in zip(files, repository.commits[commit].values(), strict=True):
            entry |= {"size": len(data)}
    return tell({"id": name, "sha": commit, "siblings": files})


def tree(server: Server, request: Request, name: str, revision: str) -> Answer:
    repository, commit = find(server, request, name, revision)
    files = {path: (len(d), blob_id(path, d)) for path, d in repository.commits[commit].items()}
    return tell([{"type": "file", "path": p, "size": s, "oid": o} for p, (s, o) in files.items()])


def blob_id(path: str, data: bytes) -> str:
    """The id of contents: of git for a small file, of large file storage for a large one."""
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def contents(server: Server, request: Request, name: str, revision: str, file: str) -> Answer:
    repository, commit = find(server, request, name, revision)
    if repository.gated and request.token != repository.gated:
        raise Refusal(403 if request.token else 401, "GatedRepo")
    data = repository.commits[commit].get(file)
    headers = {"X-Repo-Commit": commit}
    if data is None:
        raise Refusal(404, "EntryNotFound", **headers)
    oid = blob_id(file, data)
    if not file.endswith(LARGE):
        return Answer(200, data, headers | {"ETag": f'"{oid}"'}, file)
    server.objects[oid] = data
    headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
    return Answer(302, b"", headers | {"Location": f"{server.storage_url}/{oid}/{quote(file)}"})


def stored(server: Server, request: Request, oid: str, file: str) -> Answer:
    return Answer(200, server.objects[oid], {"ETag": f'"{oid}"'}, file)


def store(server: Server, request: Request, oid: str) -> Answer:
    server.objects[oid] = request.body
    return tell({})


def create(server: Server, request: Request) -> Answer:
    if request.token != "may-write":
        raise Refusal(403 if request.token else 401, "Forbidden")
    asked = json.loads(request.body)
    name = f"{asked['organization'] or 'me'}/{asked['name']}"
    told = tell({"url": f"{server.url}/{name}"})
    if name in server.repositories:
        return replace(told, status=409)
    private = asked.get("private") or asked.get("visibility") == "private"
    secret = request.token if private else ""
    server.repositories[name] = Repository(private=secret)
    server.repositories[name].commit({})
    return told


def branch(server: Server, request: Request, name: str, new: str) -> Answer:
    repository, commit = find(server, request, name, "main")
    if new in repository.branches:
        raise Refusal(409, "Conflict")
    repository.branches[new] = commit
    return tell({})


def preupload(server: Server, request: Request, name: str, revision: str) -> Answer:
    find(server, request, name, revision)
    paths = [file["path"] for file in json.loads(request.body)["files"]]
    modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
    files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
    return tell({"files": files})


def batch(server: Server, request: Request, name: str) -> Answer:
    objects = json.loads(request.body)["objects"]
    for item in objects:
        item["actions"] = {"upload": {"href": f"{server.storage_url}/{item['oid']}"}}
    return tell({"transfer": "basic", "objects": objects})


def commit(server: Server, request: Request, name: str, revision: str) -> Answer:
    repository, _ = find(server, request, name, revision)
    files, message = dict(repository.files(revision)), ""
    for line in map(json.loads, request.body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            message = value["summary"]
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = server.objects[value["oid"]]
    number = len(repository.branches)
    target = f"refs/pr/{number}" if "create_pr=1" in request.query else revision
    made = repository.commit(files, target, message)
    told = {"commitUrl": f"{server.url}/{name}/commit/{made}", "commitOid": made}
    return tell(told | {"pullRequestUrl": f"{server.url}/{name}/discussions/{number}"})


def approve(server: Server, request: Request) -> Answer:
    return tell({})


_ID = "((?:[^/]+/)?[^/]+)"
ROUTES: list[tuple[bool, str, str, Callable[..., Answer]]] = [
    (False, "GET", f"/api/models/{_ID}/revision/([^/]+)", information),
    (False, "GET", f"/api/models/{_ID}/tree/([^/]+)", tree),
    (False, "GET", f"/api/models/{_ID}", information),
    (False, "GET HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", contents),
    (False, "POST", "/api/repos/create", create),
    (False, "POST", "/api/validate-yaml", approve),
    (False, "POST", f"/api/models/{_ID}/branch/([^/]+)", branch),
    (False, "POST", f"/api/models/{_ID}/preupload/([^/]+)", preupload),
    (False, "POST", f"/api/models/{_ID}/commit/([^/]+)", commit),
    (False, "POST", rf"/{_ID}\.git/info/lfs/objects/batch", batch),
    (True, "GET", "/([0-9a-f]{64})/(.+)", stored),
    (True, "PUT", "/([0-9a-f]{64})", store),
]


class _Listener(ThreadingHTTPServer):
    """One origin of the hub; closing it waits for the answers under way."""

    daemon_threads = False

    def __init__(self, hub: Server, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers; one for each connection, so that none stays open."""

    server: _Listener
    timeout = 30

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body(headers)
        request = Request(self.command, path, query, headers, body, self.server.storage)
        hub = self.server.hub
        answer = hub.answer(request)
        if self.command == "GET" and answer.status == 200:
            request = replace(request, file=answer.file)
        hub.requests.append(request)
        data = self._ranged(answer, headers.get("range", ""))
        fault = hub.take_fault(request, cutting=True)
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: fault.cut] if fault else data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _ranged(self, answer: Answer, wanted: str) -> bytes:
        match = re.fullmatch(r"bytes=(\d+)-", wanted)
        if match is None or answer.status != 200:
            return answer.body
        start, size = int(match[1]), len(answer.body)
        answer.status = 206
        answer.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        return answer.body[start:]

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent: requests are recorded."""


@contextmanager
def serve(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Server]:
    """Runs a hub with repositories of given files until the block ends."""
    hub = Server(repositories)
    with ExitStack() as stack:
        listeners = [stack.enter_context(_Listener(hub, storage)) for storage in (False, True)]
        hub.url, hub.storage_url = (listener.url for listener in listeners)
        for listener in listeners:
            thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown)
        yield hub
