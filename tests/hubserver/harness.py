"""Real clients against a real server: each in a process of its own, as users have them."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hfmerge.hubserver.serve import HubServer


USERS = {"alice": "hf_alice", "bob": "hf_bob", "carol": "hf_carol"}

# Runs the scripts it is sent, with the official client imported once; it reads its endpoint at that moment.
_WORKER = """
import json, os, sys, traceback
sys.stdout, answers = sys.stderr, os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    request = json.loads(line)
    scope = dict(request["values"])
    try:
        exec(compile(request["script"], "<client script>", "exec"), scope)
        answer = {"result": scope.get("result")}
    except BaseException:
        answer = {"error": traceback.format_exc(), "script": request["script"]}
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""

_PRELUDE = """
import io, os, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *

def fails(kind, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        assert type(error) is kind, repr(error)
        return error
    raise AssertionError(f"no {kind.__name__}")

api = HfApi()
"""


class Client:
    """A process with the official client in it, set up for a server."""

    def __init__(self, server: HubServer, home: Path, **extra: str):
        # Nothing outside this machine may be asked: a proxy that is not there turns any attempt into an error.
        self.home = home
        dead = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        environment = {**os.environ, **dead, **quiet, "OMP_NUM_THREADS": "1", **server.env(home), **extra}
        self._errors = (home.parent / f"{home.name}.txt").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def run(self, script: str, **values: Any) -> Any:
        """Run a script; returns what it leaves in `result`. A failure inside is a failure here."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"script": _PRELUDE + script, "values": values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client process ended: {self._process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            numbered = [f"{n:4} {text}" for n, text in enumerate(answer["script"].splitlines(), start=1)]
            pytest.fail(answer["error"] + "\n".join(numbered), pytrace=False)
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._errors.close()


@dataclass(frozen=True)
class Answer:
    """A response read whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Hub:
    """A server with three users, its log, and a plain HTTP client for what the official one never sends."""

    def __init__(self, folder: Path, **options: Any):
        self.folder = folder
        self.log_file = folder / "requests.jsonl"
        self.server = HubServer(folder / "store", users=USERS, log=self.log_file, **options)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        *,
        user: str | None = "alice",
        token: str | None = None,
        endpoint: str | None = None,
        **headers: str,
    ) -> Answer:
        """One request, redirects not followed; underscores in header names stand for hyphens."""
        parts = urlsplit(endpoint or self.server.endpoint)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None or user is not None:
            sent["Authorization"] = f"Bearer {token or USERS[user or '']}"
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        connection.request(method, path, body=body, headers=sent)
        response = connection.getresponse()
        answer = Answer(response.status, response.headers, response.read())
        connection.close()
        return answer

    def log(self) -> list[dict[str, Any]]:
        """All requests so far."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def close(self) -> None:
        """Stop, and insist that the server never failed."""
        self.server.stop()
        bad = [record for record in self.log() if record["status"] >= 500 and record["status"] != 501]
        assert bad == []


def commit(hub: Hub, repo: str, files: dict[str, bytes], *, user: str = "alice", **header: Any) -> Answer:
    """A commit on main, written by hand."""
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "by hand", **header}}]
    for path, data in files.items():
        value = {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    body = "\n".join(map(json.dumps, lines)).encode()
    return hub.ask("POST", f"/api/models/{repo}/commit/main", body, user=user)
