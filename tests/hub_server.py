"""A stand-in Hub on loopback: its HTTP protocol as the real, unmodified client uses it. No part of the product.

The client reads `HF_ENDPOINT` once, when it is imported, so the port is taken here and the server listens later.
"""

import base64
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_SOCKET = socket.socket()
_SOCKET.bind(("127.0.0.1", 0))
ENDPOINT = f"http://127.0.0.1:{_SOCKET.getsockname()[1]}"
STORAGE = ENDPOINT.replace("127.0.0.1", "localhost")  # another host, as the real one's: tokens do not follow there
USERS = {"hf_writer": ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}
"""Token -> user, and whether it may write."""


@dataclass
class Repository:
    """Commits, newest last: `(id, {path: content})`; branches, tags and pull requests point at ids."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files))
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        known = dict(self.commits)
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in known else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return dict(self.commits)[self.resolve(revision) or ""]


@dataclass
class Fault:
    """What happens to requests whose path holds `where`, `times` times: a status, or `cut`, `lost`, `silent`."""

    where: str
    kind: int | str
    times: int = 1
    retry_after: int | None = 0
    method: str = "POST"


class StandInHub:
    """The server and what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.validated: list[str] = []
        self.corrupt: set[str] = set()
        """Paths whose content comes back damaged."""
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self.server.socket.close()
        self.server.socket = _SOCKET
        self.server.server_address = _SOCKET.getsockname()
        self.server.daemon_threads = True
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        for held in (self.repositories, self.faults, self.log, self.validated, self.corrupt, self.objects):
            held.clear()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        repository = self.repositories.setdefault(name, Repository(private))
        return repository.commit(files, "main")


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png"))


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        self.hub.log.append(f"{self.command} {self.route}")
        fault = next(
            (f for f in self.hub.faults if f.where in self.route and f.method == self.command and f.times), None
        )
        if fault is not None:
            fault.times -= 1
            if self._fail(fault):
                return
        self.body = self._read()
        self.lost = fault is not None and fault.kind == "lost"
        parts = self.route.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
        elif parts[0] == "storage":
            self._storage(parts[1])
        elif self.route.endswith(".git/info/lfs/objects/batch"):
            self._batch("/".join(parts[:2]).removesuffix(".git"))
        elif len(parts) > 3 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), unquote(parts[3]), unquote("/".join(parts[4:])))
        else:
            self._error(404, "RepoNotFound")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, fault: Fault) -> bool:
        if fault.kind == "cut":
            self.rfile.read(16)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault.kind == "silent":
            self.hub.released.wait(5)
            self.close_connection = True
        elif isinstance(fault.kind, int):
            self._read()
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._reply(fault.kind, {"error": "as the test wants it"}, **wait)
        else:
            return False
        return True

    # --- the API -----------------------------------------------------------------------------------------------------

    def _api(self, parts: list[str]) -> None:  # noqa: PLR0912 - one case for each address
        user, may_write = self._user()
        if parts[0] == "whoami-v2":
            return self._reply(200, {"name": user}) if user else self._error(401, "")
        if parts[0] == "validate-yaml":
            return self._validate(json.loads(self.body)["content"])
        if parts == ["repos", "create"]:
            return self._create(json.loads(self.body), user, may_write)
        name, rest = "/".join(parts[1:3]), [unquote(part) for part in parts[3:]]
        repository = self._visible(name)
        if repository is None:
            return self._error(404, "RepoNotFound")
        if self.command == "POST" and rest[0] != "paths-info" and (user != name.split("/")[0] or not may_write):
            return self._reply(403, {"error": "Forbidden"}, **{"X-Error-Message": "Forbidden"})
        match rest:
            case [] | ["revision", _]:
                self._info(name, repository, rest[1] if rest else "main")
            case ["tree", revision, *folder]:
                self._tree(repository, revision, "/".join(folder))
            case ["refs"]:
                branches = [_ref(n, f"refs/heads/{n}", c) for n, c in repository.refs.items() if "/" not in n]
                tags = [_ref(n, f"refs/tags/{n}", c) for n, c in repository.tags.items()]
                self._reply(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})
            case ["discussions"]:
                found = [r for r in repository.requests if r["author"]["name"] == self.query.get("author", [""])[0]]
                self._reply(200, {"count": len(found), "start": 0, "discussions": found})
            case ["branch", branch]:
                if branch in repository.refs:
                    return self._error(409, "")
                repository.refs[branch] = repository.refs["main"]
                self._reply(200, {})
            case ["tag", revision]:
                repository.tags[json.loads(self.body)["tag"]] = repository.resolve(revision) or ""
                self._reply(200, {})
            case ["preupload", revision]:
                self._preupload(repository, revision)
            case ["commit", revision]:
                self._commit(name, repository, revision, str(user))
            case _:
                self._error(404, "EntryNotFound")

    def _create(self, asked: dict[str, Any], user: str | None, may_write: bool) -> None:
        name = f"{asked['organization'] or user}/{asked['name']}"
        url = {"url": f"{ENDPOINT}/{name}", "name": name}
        if user is None:
            return self._reply(401, {"error": "Invalid username or password."})
        if name in self.hub.repositories:
            return self._reply(409, url | {"error": "You already created this model repo"})
        if not may_write or user != name.split("/", maxsplit=1)[0]:
            return self._reply(403, {"error": "Forbidden"})
        repository = self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        self._reply(200, url)

    def _validate(self, content: str) -> None:
        self.hub.validated.append(content)
        data = yaml.safe_load(content.split("---")[1])
        base = data.get("base_model")
        errors = [{"message": f"base_model: {base} is no id"}] if base and str(base).startswith(("/", ".")) else []
        self._reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.files(oid)]
        self._reply(200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, repository: Repository, revision: str, folder: str) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound")
        found = {p: c for p, c in repository.files(oid).items() if not folder or p.startswith(folder + "/")}
        if folder and not found:
            return self._error(404, "EntryNotFound")
        self._reply(200, [_entry(path, content) for path, content in found.items()])

    def _preupload(self, repository: Repository, revision: str) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound")
        there = {path: _oid(path, content) for path, content in repository.files(oid).items()}
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if is_lfs(f["path"]) else "regular",
                "shouldIgnore": False,
                "oid": there.get(f["path"]),
            }
            for f in json.loads(self.body)["files"]
        ]
        self._reply(200, {"files": files})

    def _commit(self, name: str, repository: Repository, revision: str, user: str) -> None:
        files = dict(repository.files(revision))
        summary = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        reply: dict[str, Any] = {"success": True}
        if "create_pr" in self.query:
            number = len(repository.requests) + 1
            revision = f"refs/pr/{number}"
            repository.requests.append(
                {
                    "title": summary,
                    "num": number,
                    "author": {"name": user},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "repo": {"name": name, "type": "model"},
                    "isPullRequest": True,
                }
            )
            reply["pullRequestUrl"] = f"{ENDPOINT}/{name}/discussions/{number}"
        oid = repository.commit(files, revision)
        self._reply(200, reply | {"commitUrl": f"{ENDPOINT}/{name}/commit/{oid}", "commitOid": oid})

    # --- files -------------------------------------------------------------------------------------------------------

    def _batch(self, name: str) -> None:
        user, may_write = self._user()
        if user != name.split("/", maxsplit=1)[0] or not may_write:
            return self._reply(403, {"error": "Forbidden"})
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{ENDPOINT}/storage/{asked['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": href}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": actions}))
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _storage(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self._reply(400, {"error": "checksum"})
            self.hub.objects[oid] = self.body
            return self._reply(200, {})
        if self.command == "POST":
            return self._reply(200 if oid in self.hub.objects else 404, {})
        self._send(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._visible(name)
        if repository is None:
            return self._error(401 if self._user()[0] is None else 404, "RepoNotFound")
        oid = repository.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound")
        content = repository.files(oid).get(path)
        if content is None:
            return self._error(404, "EntryNotFound", **{"X-Repo-Commit": oid})
        if path in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        about = {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, content)}"'}
        if not is_lfs(path):
            return self._send(200, content, about)
        digest = _oid(path, content)
        self.hub.objects[digest] = content
        about |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", about | {"Location": f"{STORAGE}/storage/{digest}"})

    # --- what they share ---------------------------------------------------------------------------------------------

    def _user(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return USERS.get(token, (None, False))

    def _visible(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is not None and repository.private and self._user()[0] != name.split("/", maxsplit=1)[0]:
            return None
        return repository

    def _error(self, status: int, code: str, **headers: str) -> None:
        self._reply(status, {"error": code}, **({"X-Error-Code": code} if code else {}), **headers)

    def _reply(self, status: int, body: Any, **headers: str) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if getattr(self, "lost", False):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(path: str, content: bytes) -> str:
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return entry


def _ref(name: str, ref: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": commit}
