"""What the Hub is asked, against a small server of our own; a token is never said."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SECRET = "hf_secretsecretsecretsecretsecretsecr"
ASK = """
import json, sys, time
from toolkit.checks.access import check_access
from toolkit.recipe.load import load_recipe
began = time.monotonic()
for f in check_access(load_recipe(sys.argv[1]), seconds=float(sys.argv[2])):
    print(json.dumps(f.as_dict()))
print(time.monotonic() - began, file=sys.stderr)
assert "torch" not in sys.modules
"""
ANSWERS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "/api/models/acme/base": (200, {}, {"id": "acme/base", "gated": False}),
    "/api/datasets/acme/none": (404, {"X-Error-Code": "RepoNotFound"}, {}),
    "/api/datasets/acme/rows/revision/v9": (404, {"X-Error-Code": "RevisionNotFound"}, {}),
    "/api/datasets/acme/hidden": (401, {"X-Error-Message": "Invalid username or password."}, {}),
    "/api/datasets/acme/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}, {}),
    "/api/datasets/acme/broken": (500, {}, {}),
}


class Hub(BaseHTTPRequestHandler):
    """Answers by path; what it has no answer for it leaves waiting."""

    user: tuple[int, dict[str, Any]] = (401, {})
    closing = threading.Event()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        status, headers, body = ANSWERS.get(path, (0, {}, {}))
        if path == "/api/whoami-v2":
            status, body = self.user
        if not status:
            self.closing.wait(60)
            return
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing on the error stream."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.closing.set()
    server.shutdown()


@pytest.fixture
def asked(hub: str, write: Any, tmp_path: Path) -> Any:
    """Findings about a recipe with these data sets, and the seconds it took, through `HF_ENDPOINT`."""

    def _asked(data: list[Any], repo_id: str | None = None, seconds: float = 20, **env: str) -> tuple[list[Any], float]:
        recipe: dict[str, Any] = {"model": {"name_or_path": "acme/base"}, "stages": [{"type": "sft", "data": data}]}
        if repo_id:
            recipe["hub"] = {"repo_id": repo_id}
        own = {
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", ASK, str(write(recipe)), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own | env, check=True)
        assert SECRET not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], float(done.stderr.splitlines()[-1])

    return _asked


def test_what_is_there_missing_hidden_or_gated(asked: Any) -> None:
    names = ["none", "hidden", "gated", "broken"]
    data = [{"path": "acme/rows", "revision": "v9"}, *(f"acme/{name}" for name in names)]
    found, _ = asked(data, HF_TOKEN=SECRET)
    assert [(f["level"], f["check"]) for f in found] == [
        ("note", "access"),
        ("error", "access"),
        ("error", "access"),
        ("error", "access"),
        ("error", "access"),
        ("warning", "access"),
    ]
    for f, text in zip(
        found,
        (
            "the model acme/base is on the Hub",
            "the dataset acme/rows has no revision 'v9'; expected a branch, tag or commit of it",
            "the Hub has no dataset acme/none, or hides it from this token",
            "the Hub refuses the dataset acme/hidden (401); see the name, or run `hf auth login`",
            "the dataset acme/gated is gated; ask for access on its page",
            "not checked, as the Hub gave no answer: ",
        ),
        strict=True,
    ):
        assert text in f["text"]
    assert found[1]["where"].endswith("stages[0].data[0].path")


def test_a_silent_server_is_not_waited_for(asked: Any) -> None:
    found, seconds = asked(["acme/silent"], seconds=1)
    assert [f["text"] for f in found[1:]] == ["not checked, as the Hub gave no answer: no answer in 1 s"]
    assert seconds < 5


@pytest.mark.parametrize(
    ("user", "level", "text"),
    [
        (None, "warning", "there is no token, so acme/adapter cannot be pushed to"),
        ((401, {}), "error", "the Hub does not know this token"),
        ((200, {"name": "me", "orgs": []}), "error", "me is no member of acme; push to one of me"),
        ((200, {"name": "me", "orgs": [{"name": "acme", "roleInOrg": "read"}]}), "error", "me may only read in acme"),
        ((200, {"name": "acme", "auth": {"accessToken": {"role": "read"}}}), "error", "this token may only read"),
        ((200, {"name": "acme", "auth": {"accessToken": {"role": "write"}}}), "note", "acme may push to acme"),
    ],
)
def test_whether_the_token_may_push(asked: Any, monkeypatch: Any, user: Any, level: str, text: str) -> None:
    if user:
        monkeypatch.setattr(Hub, "user", user)
    found, _ = asked(["acme/none"], "acme/adapter", **({"HF_TOKEN": SECRET} if user else {"HF_TOKEN": ""}))
    push = next(f for f in found if f["check"] == "push")
    assert push["level"] == level and text in push["text"]
