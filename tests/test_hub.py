"""A push, against a stand-in Hub on loopback, by the real and unmodified client."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class StandInHub(BaseHTTPRequestHandler):
    """As much of the Hub as `create_repo` and `create_commit` use, for files small enough to be sent inline."""

    repositories: dict[str, dict[str, bytes]]
    refuse: int | None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse is not None:
            return self._reply(self.refuse, {"error": "You are not allowed to do that."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self._reply(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._reply(200, {"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._reply(
            200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/abc", "commitOid": "abc", "success": True}
        )

    def do_GET(self) -> None:
        self._reply(404, {"error": "not here"})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    handler = type("Hub", (StandInHub,), {"repositories": {}, "refuse": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def train(recipe: dict[str, Any], write: Any, hub: ThreadingHTTPServer, tmp_path: Path) -> Any:
    """Run `toolkit train` with a `hub` section, in its own process: the client reads HF_ENDPOINT once."""
    recipe["hub"] = {"repo_id": "me/adapter", "private": True}
    recipe["stages"] = recipe["stages"][:1]
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-m", "toolkit", "train", str(write(recipe)), "--output", str(tmp_path / "run")]

    def _train() -> subprocess.CompletedProcess[str]:
        import os

        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)

    return _train


def test_a_finished_run_is_pushed_as_an_explicit_list_of_files(
    train: Any, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    ran = train()
    assert f"pushed: http://127.0.0.1:{hub.server_port}/me/adapter/commit/abc" in ran.stdout
    pushed = hub.RequestHandlerClass.repositories["me/adapter"]  # type: ignore[attr-defined]
    assert sorted(pushed) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert pushed["adapter_model.safetensors"] == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "base0"
    written = [p.read_text(errors="replace") for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [text for text in (ran.stdout, ran.stderr, *written) if "hf_secret" in text]


def test_a_refused_push_leaves_the_run_and_says_so_in_one_sentence(
    train: Any, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    hub.RequestHandlerClass.refuse = 403  # type: ignore[attr-defined]
    ran = train()
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "hub.repo_id: not pushed to me/adapter: " in ran.stderr
    assert "The run is finished and as it was; run the same command again to push" in ran.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    hub.RequestHandlerClass.refuse = None  # type: ignore[attr-defined]
    assert "sft, finished: reused" in train().stdout
    assert "me/adapter" in hub.RequestHandlerClass.repositories  # type: ignore[attr-defined]
