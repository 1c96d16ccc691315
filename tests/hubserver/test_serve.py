"""The life of a server: starting, stopping, running a command, importing, and surviving a kill."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfmerge.errors import HfMergeError, OutputError, PushError
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer, main_run, main_serve
from tests.hubserver.harness import USERS, Hub, commit


pytestmark = pytest.mark.slow


def _alive(endpoint: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(endpoint.rpartition(":")[2]))) == 0


def _wait(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_start_and_stop(tmp_path: Path) -> None:
    with HubServer(tmp_path / "a" / "b") as server:
        assert server.tokens == {"me": server.token} and server.token.startswith("hf_")
        home = tmp_path / "home"
        assert server.env(home) == {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": server.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        assert _alive(server.endpoint)
    assert not _alive(server.endpoint)
    server.stop()  # again, harmless
    with HubServer(tmp_path / "a" / "b") as again:
        assert again.token != server.token


def test_loud_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "store"
    with HubServer(root) as first:
        with pytest.raises(HfMergeError, match="could not start.*stop the other server"):
            HubServer(root)
        port = first.endpoint.rpartition(":")[2]
        assert main_serve(["--root", str(tmp_path / "other"), "--port", port]) == 1
        assert "cannot listen" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    assert main_serve(["--root", str(foreign), "--port", "0"]) == 1
    assert "not empty and not a store" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    (root / "format").write_text("99\n")
    assert main_serve(["--root", str(root), "--port", "0"]) == 1
    assert "another version" in capsys.readouterr().err
    for host in ("0.0.0.0", "192.0.2.1", "example.com", "::"):
        assert main_serve(["--root", str(tmp_path / "x"), "--port", "0", "--host", host]) == 1
        assert "--public" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(HfMergeError, match="add --public"):
        HubServer(tmp_path / "x", host="0.0.0.0")


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from hfmerge.hubserver.serve import HubServer;"
        f"print(HubServer(Path({str(tmp_path / 'store')!r})).endpoint, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=_here()) as parent:
        assert parent.stdout is not None
        endpoint = parent.stdout.readline().strip()
        assert _alive(endpoint)
        parent.kill()
    assert _wait(lambda: not _alive(endpoint))


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.ask("POST", "/api/repos/create", {"name": "kept"})
    done = commit(hub, "alice/kept", {"a.txt": b"a"})
    sha = done.json()["commitOid"]
    data = os.urandom(3 << 20)
    objects = [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]
    body = {"operation": "upload", "transfers": ["basic"], "objects": objects}
    batch = hub.ask("POST", "/alice/kept.git/info/lfs/objects/batch", body).json()["objects"][0]
    # Half an object is on its way when the process is killed.
    connection = http.client.HTTPConnection(hub.server.endpoint.removeprefix("http://"))
    connection.putrequest("PUT", batch["actions"]["upload"]["href"].removeprefix(hub.server.endpoint))
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(data[: 2 << 20])
    store = tmp_path / "store"
    assert _wait(lambda: any(path.stat().st_size for path in (store / "incoming").iterdir()))
    process = hub.server._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    hub.server.stop()
    git = next((store / "repos").iterdir())
    (git / "refs" / "heads" / "main.lock").write_text("left by the kill")
    (store / "repos" / "0123.git").mkdir()
    orphan = store / "objects" / "ab" / "cd" / ("abcd" + "0" * 60)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"nobody's")

    again = Hub(tmp_path)
    assert again.ask("GET", "/api/models/alice/kept").json()["sha"] == sha
    assert again.ask("GET", "/alice/kept/resolve/main/a.txt").body == b"a"
    assert list((store / "incoming").iterdir()) == [] and len(list((store / "repos").iterdir())) == 1
    assert not orphan.exists()
    assert commit(again, "alice/kept", {"b.txt": b"b"}, parentCommit=sha).status == 200
    batch = again.ask("POST", "/alice/kept.git/info/lfs/objects/batch", body).json()["objects"][0]
    assert "actions" in batch  # nothing half-written counts as there
    again.close()


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.ask("POST", "/api/repos/create", {"name": "r", "organization": "acme", "visibility": "private"})
    sha = commit(hub, "acme/r", {"a.txt": b"a"}).json()["commitOid"]
    hub.ask("POST", "/api/models/acme/r/discussions", {"title": "a title", "description": "d", "pullRequest": True})
    hub.ask("POST", "/api/repos/move", {"fromRepo": "acme/r", "toRepo": "acme/s", "type": "model"})
    hub.close()
    again = Hub(tmp_path)
    info = again.ask("GET", "/api/models/acme/s").json()
    assert (info["sha"], info["private"]) == (sha, True)
    assert again.ask("GET", "/api/models/acme/s", user="bob").status == 404
    assert again.ask("GET", "/api/models/acme/r").headers["Location"] == "/api/models/acme/s"
    assert again.ask("GET", "/api/models/acme/s/discussions/1").json()["title"] == "a title"
    again.close()


def test_import_folder(tmp_path: Path) -> None:
    cache = tmp_path / "models--new-org--model"
    folder = cache / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (cache / "blobs").mkdir()
    (cache / "blobs" / "blob").write_bytes(b"w" * 5000)
    (folder / "model.safetensors").symlink_to("../../blobs/blob")
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    endpoint = hub.server.endpoint
    sha = import_folder(endpoint, USERS["alice"], folder, "new-org/model", message="imported")
    assert import_folder(endpoint, USERS["alice"], folder, "new-org/model") == sha
    assert hub.ask("GET", "/new-org/model/resolve/main/config.json").body == b"{}"
    assert hub.ask("GET", "/api/models/new-org/model/commits/main").json()[0]["title"] == "imported"
    data = import_folder(endpoint, USERS["bob"], folder, "bob/data", repo_type="dataset", private=True)
    assert hub.ask("GET", "/api/datasets/bob/data", user="bob").json()["sha"] == data
    assert hub.ask("GET", "/api/datasets/bob/data").status == 404
    with pytest.raises(PushError, match="rights to create a model"):
        import_folder(endpoint, USERS["bob"], folder, "alice/model")
    with pytest.raises(OutputError, match="no such folder"):
        import_folder(endpoint, USERS["bob"], tmp_path / "nowhere", "bob/x")
    hub.close()


def test_run_a_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    script = (
        "import os, sys; from huggingface_hub import HfApi, hf_hub_download;"
        "assert 'HF_HUB_OFFLINE' not in os.environ and not os.path.exists(os.environ['HF_HOME'] + '/hub');"
        "print(open(hf_hub_download('acme/m', 'config.json')).read());"
        "print(HfApi().whoami()['name'], os.environ['HF_ENDPOINT']); sys.exit(7)"
    )
    log = tmp_path / "log.jsonl"
    code = main_run(["--import", f"{folder}=acme/m", "--log", str(log), "--", sys.executable, "-c", script])
    out = capfd.readouterr().out.split()
    assert code == 7 and out[:3] == ['{"a":', "1}", "me"]
    assert not _alive(out[3])
    assert any(json.loads(line)["path"].endswith("/resolve/main/config.json") for line in log.read_text().splitlines())
    assert main_run(["--root", str(tmp_path / "kept"), "--", "sh", "-c", "kill -9 $$"]) == 128 + 9
    assert (tmp_path / "kept" / "hub.sqlite").exists()
    assert main_run(["--", str(tmp_path / "no-such-command")]) == 127
    none = f"{tmp_path / 'none'}=acme/m"
    for wrong in ([], ["true"], *(["--import", text, "--", "true"] for text in ("folder", "f=a/b/c", "=a/b", none))):
        with pytest.raises(SystemExit) as caught:
            main_run(wrong)
        assert caught.value.code == 2


def _here() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def test_serve_in_the_foreground(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = tmp_path / "users.json"
    users.write_text(json.dumps(USERS))
    arguments = ["--root", str(tmp_path / "store"), "--port", "0", "--users", str(users)]
    command = [sys.executable, "-m", "hfmerge.hubserver", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_here()) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline().strip() for _ in range(11)]
        endpoint = next(line for line in lines if line.startswith("export HF_ENDPOINT=")).partition("=")[2]
        assert "export HF_TOKEN=hf_alice" in lines and "export HF_TOKEN=hf_carol" in lines
        assert _alive(endpoint)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and process.stderr.read() == ""
    users.write_text("[]")
    assert main_serve(arguments) == 1 and "names and tokens" in capsys.readouterr().err
    users.write_text("{")
    assert main_serve(arguments) == 1 and "cannot be read" in capsys.readouterr().err


def test_help_needs_none_of_the_packages() -> None:
    code = (
        "import sys; import hfmerge.hubserver.serve, hfmerge.hubserver.importer;"
        "bad = {'starlette', 'uvicorn', 'dulwich', 'torch', 'huggingface_hub', 'numpy'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_here(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
