"""The whole job from a hub: one on this machine that answers as the real one does; then again from its cache alone."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.embedded import build, generate

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "c0ff"
CARD = """---
configs:
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
  - {split: validation, path: sst2/validation-*}
  - {split: test, path: sst2/test-*}
dataset_info:
- config_name: sst2
  features:
  - {name: sentence, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': negative, '1': positive}}}
---
"""


class FakeHub:
    """A model and data hub on this machine: just the calls that the hub's client libraries make to list and fetch files.

    Serves folders as repositories: {"models/user/name": folder, "datasets/user/name": folder}. A context manager.
    """

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


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("hub"), generate(400, 0)
    found = {"datasets/nyu-mll/glue": root / "glue"}
    for alias, repo in {
        "bert": "google-bert/bert-base-uncased",
        "distilbert": "distilbert/distilbert-base-uncased",
    }.items():
        module, tokenizer = build(alias, [text for text, _ in rows], 2, 0)
        found[f"models/{repo}"] = root / alias
        module.base_model.save_pretrained(root / alias)  # no head, like the published encoders
        tokenizer.save_pretrained(root / alias)
    (root / "glue" / "sst2").mkdir(parents=True)
    (root / "glue" / "README.md").write_text(CARD)
    parts = {"train": rows[:300], "validation": rows[300:350], "test": [(text, -1) for text, _ in rows[350:]]}
    for part, part_rows in parts.items():
        table = pa.table({"sentence": [text for text, _ in part_rows], "label": [label for _, label in part_rows]})
        pq.write_table(table, root / "glue" / "sst2" / f"{part}-00000-of-00001.parquet")
    return found


@pytest.mark.slow
def test_models_and_data_from_the_hub_then_from_its_cache(repositories, tmp_path):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"), "METADISTIL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def run(output: str, **more: str) -> dict:
        command = [sys.executable, "-m", "engine.train", "--source", "hub", "--teachers", "bert,bert2", "--student",
                   "distilbert", "--epochs", "1", "--prepare-epochs", "1", "--output", str(tmp_path / output)]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / output / "summary.json").read_text())

    with FakeHub(repositories) as hub:
        first = run("first", HF_ENDPOINT=hub.endpoint)
        assert not hub.unknown
        assert hub.calls.count("HEAD /") == 1  # the hub is asked once
        assert not any(".bin" in call or "glue.py" in call for call in hub.calls if call.startswith("GET"))
    assert first["source"] == "hub" and first["task"]["labels"] == ["negative", "positive"]
    assert any("has no labels" in note for note in first["notes"])
    assert [teacher["source"] for teacher in first["teachers"]] == ["google-bert/bert-base-uncased"] * 2
    second = run("second", HF_HUB_OFFLINE="1")
    assert second["metrics"] == first["metrics"] and second["source"] == "hub"
    assert [teacher["origin"] for teacher in second["teachers"]] == ["reused"] * 2
