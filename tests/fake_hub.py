"""A model and data hub on this machine: just the calls that the hub's client libraries make to list and fetch files."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """Serves folders as repositories: {"models/user/name": folder, "datasets/user/name": folder}. A context manager."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories, self.calls, self.unknown = repositories, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.calls.append(f"{request.command} {request.path}")
        for name, folder in self.repositories.items():
            kind, repo = name.split("/", 1)
            if path.startswith(f"api/{name}"):
                return self.api(request, path.removeprefix(f"api/{name}").strip("/"), folder, repo, kind)
            prefix = repo if kind == "models" else name
            if path.startswith(f"{prefix}/resolve/"):
                file = folder / path.removeprefix(f"{prefix}/resolve/").split("/", 1)[1]
                return self.send_file(request, file)
        if not path:
            return self.send(request, 200, b"a hub")
        self.unknown.append(path)
        return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def api(self, request, rest: str, folder: Path, repo: str, kind: str) -> None:
        what, *words = rest.split("/")
        if what in ("", "revision"):
            files = (file for file in sorted(folder.rglob("*")) if file.is_file())
            siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self.send_json(request, info | {"disabled": False, "gated": False, "lastModified": None})
        if what == "tree":
            entries = [self.entry(e, folder) for e in folder.rglob("*")]
            return self.send_json(request, [e for e in entries if e["path"].startswith("/".join(words[1:]))])
        self.unknown.append(request.path)
        return self.send(request, 404, b"{}")

    def entry(self, path: Path, folder: Path) -> dict:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": self.etag(path), "size": path.stat().st_size, "path": name}

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send_file(self, request, file: Path) -> None:
        if not file.is_file():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(request, 200, file.read_bytes(), headers)

    def send_json(self, request, value) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, request, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
