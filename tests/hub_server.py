"""A Hub server on the loopback interface with the part of the HTTP API that `huggingface_hub` and `transformers` use.

    with HubServer() as hub:
        hub.commit("someone/model", {"config.json": b"{}"})
        subprocess.run(..., env={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", ...})

It serves model repositories with commits, and files by name and revision. It accepts uploads: small files within the
commit and large files through LFS, as clients without Xet send them. Writing and private repositories require
`TOKEN`. Routes and fields are those of `huggingface_hub` 2.4. Requests for any other route are recorded in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_of_the_loopback"
LARGE = 100_000  # bytes from which a file goes by LFS, as do all safetensors


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    large: set[str]


@dataclass
class Repo:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    def add(self, title: str, files: dict[str, bytes], large: set[str]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files, large & files.keys()))
        return self.commits[-1]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """A Hub server that runs inside a `with` block.

    Attributes:
        repos: Repositories by id.
        objects: Completely received LFS objects by SHA-256.
        requests: Method and path of every request, in order.
        unknown: Requests without a matching route.
        received: LFS objects in the order of arrival, including incomplete ones.
        on_upload: Called after each received piece with the object's name and the number of bytes so far; an exception
            ends the connection.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.received: list[str] = []
        self.on_upload: Callable[[str, int], None] = lambda oid, size: None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Add files to a repository, keep its other files, and return the commit id."""
        repo = self.repos.setdefault(repo_id, Repo())
        earlier = repo.commits[-1].files if repo.commits else {}
        large = {name for name, content in files.items() if is_large(name, len(content))}
        return repo.add(
            "by the test", earlier | files, large | (repo.commits[-1].large if repo.commits else set())
        ).oid


def is_large(name: str, size: int) -> bool:
    return name.endswith(".safetensors") or size >= LARGE


class _Answer(Exception):
    """Ends a request with a status and a body."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass

    def _dispatch(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            self.body = b"".join(self._pieces()) if method == "POST" else b""
            for verb, pattern, name in self.ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    found = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    getattr(self, name)(**found)
            self.hub.unknown.append((self.command, path))
            raise _Answer(404, {"error": "no such route"})
        except _Answer as answer:
            self._send(answer)
        except ConnectionError:
            self.close_connection = True

    def _send(self, answer: _Answer):
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body or {}).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _pieces(self):
        """Yield the body of the request, chunked or with a content length."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionError("the client is gone")
            left -= len(piece)
            yield piece

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, repo: str, revision: str = "main", writing: bool = False) -> tuple[Repo, Commit]:
        if writing and not self._is_owner:
            raise _Answer(401, {"error": "no token"})
        found = self.hub.repos.get(repo)
        if found is None or found.private and not self._is_owner:
            raise _Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = found.at(revision)
        if commit is None:
            raise _Answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return found, commit

    def create(self):
        if not self._is_owner:
            raise _Answer(401, {"error": "no token"})
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            raise _Answer(409, url | {"error": "You already created this model repo"})
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, set())
        raise _Answer(200, url)

    def validate(self):
        """Check that the front matter is YAML and a model-index is complete; the real Hub has its own check."""
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            for entry in yaml.safe_load(front[1]).get("model-index", []):
                for result in entry["results"]:
                    required = [
                        entry["name"],
                        result["task"]["type"],
                        *(result["dataset"][key] for key in ("type", "name")),
                    ]
                    required += [metric[key] for metric in result["metrics"] for key in ("type", "value")]
                    assert None not in required
        except (yaml.YAMLError, AssertionError, AttributeError, KeyError, TypeError) as error:
            raise _Answer(400, {"errors": [{"message": repr(error)}], "warnings": []}) from error
        raise _Answer(200, {"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main"):
        found, commit = self._found(repo, revision)
        names = [{"rfilename": name} for name in sorted(commit.files)]
        fields = {"_id": repo, "id": repo, "modelId": repo, "private": found.private, "tags": [], "downloads": 0}
        raise _Answer(200, fields | {"sha": commit.oid, "siblings": names})

    def tree(self, repo: str, revision: str, path: str | None):
        _, commit = self._found(repo, revision)
        folder = f"{path}/" if path else ""
        names = [name for name in sorted(commit.files) if name.startswith(folder)]
        if folder and not names:
            raise _Answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            names = [name for name in names if "/" not in name[len(folder) :]]
        entries = []
        for name in names:
            content = commit.files[name]
            entries.append({"type": "file", "path": name, "size": len(content), "oid": git_oid(content)})
            if name in commit.large:
                entries[-1]["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
                entries[-1]["lfs"]["pointerSize"] = 134
        raise _Answer(200, entries)

    def resolve(self, repo: str, revision: str, path: str):
        _, commit = self._found(repo, revision)
        if path not in commit.files:
            headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": commit.oid}
            raise _Answer(404, {"error": "Entry not found"}, **headers)
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if path in commit.large else git_oid(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit.oid, "Content_Type": "application/octet-stream"}
        status, span = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span:
            start = int(span[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        raise _Answer(status, content, **headers)

    def preupload(self, repo: str, revision: str):
        _, commit = self._found(repo, revision, writing=True)
        files = []
        for asked in json.loads(self.body)["files"]:
            large, oid = is_large(asked["path"], asked["size"]), None
            if (content := commit.files.get(asked["path"])) is not None:
                oid = hashlib.sha256(content).hexdigest() if asked["path"] in commit.large else git_oid(content)
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            files.append({"path": asked["path"], **mode} | ({"oid": oid} if oid else {}))
        raise _Answer(200, {"files": files})

    def lfs_batch(self, repo: str):
        self._found(repo, writing=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            action = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.objects else action))
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        content = bytearray()
        with self.hub.lock:
            self.hub.received.append(oid)
        for piece in self._pieces():
            content += piece
            self.hub.on_upload(oid, len(content))
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Answer(400, {"error": "other content than was announced"})
        self.hub.objects[oid] = bytes(content)
        raise _Answer(200)

    def commit(self, repo: str, revision: str):
        found, head = self._found(repo, revision, writing=True)
        files, large, title = dict(head.files), set(head.large), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise _Answer(412, {"error": "A commit has happened since"})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Answer(400, {"error": f"{value['path']} has not arrived"})
                files[value["path"]] = self.hub.objects[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Answer(400, {"error": f"unknown key {line['key']}"})
        oid = found.add(title, files, large).oid
        raise _Answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})
