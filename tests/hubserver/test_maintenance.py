"""Import, export and check of a store: on one that a server runs on, and on one that nobody has open."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfmerge.cli import main
from tests.hubserver.harness import Client, Hub, commit


pytestmark = pytest.mark.slow
Say = Callable[..., tuple[int, str]]

LARGE = os.urandom(50_000)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `hfmerge hub ...`; returns its exit code and all it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["hub", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "sub" / "notes.txt").write_text("deep")
    (made / "model.safetensors").write_bytes(LARGE)
    return made


@pytest.fixture(params=["stopped", "running"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Hub | None]]:
    """A store, and the server on it if there is one."""
    if request.param == "stopped":
        yield tmp_path / "stopped" / "store", None
        return
    (tmp_path / "running").mkdir()
    hub = Hub(tmp_path / "running")
    yield hub.folder / "store", hub
    hub.close()


def test_plain_files(place: tuple[Path, Hub | None], folder: Path, say: Say) -> None:
    store, hub = place
    code, said = say("import", folder, "--as", "acme/model", "--owner", "alice" if hub else "me", "--store", store)
    if hub is None:
        assert code == 1 and "no such user" in said
        code, said = say("import", folder, "--as", "acme/model", "--store", store)
    assert code == 0, said
    name, sha = said.split()
    assert name == "acme/model" and say("import", folder, "--as", "acme/model", "--store", store)[1].split()[1] == sha
    (folder / "config.json").write_text('{"a": 1}')
    again = say("import", folder, "--as", "acme/model", "--store", store)[1].split()[1]
    assert again != sha
    if hub is not None:
        assert hub.ask("GET", "/acme/model/resolve/main/model.safetensors").body == LARGE
        assert hub.ask("GET", "/acme/model/resolve/main/sub/notes.txt").body == b"deep"
        assert [one["id"] for one in hub.ask("GET", "/api/models/acme/model/commits/main").json()] == [again, sha]
        assert commit(hub, "acme/model", {"more.txt": b"m"}).status == 200
    code, said = say("import", folder, "--as", "datasets/acme/rows", "--private", "--json", "--store", store)
    if hub is not None:
        assert code == 0 and json.loads(said)[0]["kind"] == "dataset"
        assert hub.ask("GET", "/api/datasets/acme/rows", user="bob").status == 404
    assert say("import", folder, "--store", store) == (1, f"error: {folder}: plain files; say with --as org/name what"
               " the repository is called\n")  # fmt: skip
    assert "write org/name" in say("import", folder, "--as", "x", "--store", store)[1]
    assert "not a name" in say("import", folder, "--as", "a/..", "--store", store)[1]
    assert "no such folder" in say("import", folder / "none", "--as", "a/b", "--store", store)[1]
    assert say("fsck", "--store", store) == (0, "0 faults\n")


def test_an_export_comes_back_with_the_same_commits(
    place: tuple[Path, Hub | None], folder: Path, say: Say, tmp_path: Path
) -> None:
    (tmp_path / "origin").mkdir()
    origin = Hub(tmp_path / "origin")
    assert say("import", folder, "--as", "alice/model", "--store", tmp_path / "origin" / "store")[0] == 0
    commit(origin, "alice/model", {"config.json": b'{"new": 1}', "README.md": b"---\nlicense: mit\n---\n# hi\n"})
    origin.ask("POST", "/api/models/alice/model/branch/state", {})
    origin.ask("POST", "/api/models/alice/model/tag/main", {"tag": "v1", "message": "words"})
    origin.ask("PUT", "/api/models/alice/model/settings", {"visibility": "private", "gated": "manual"})
    refs = origin.ask("GET", "/api/models/alice/model/refs").json()
    history = origin.ask("GET", "/api/models/alice/model/commits/main").json()
    out = tmp_path / "out"
    code, said = say("export", "alice/model", out, "--store", tmp_path / "origin" / "store")
    assert code == 0 and history[0]["id"] in said
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert "not empty" in say("export", "alice/model", out, "--store", tmp_path / "origin" / "store")[1]
    assert "no such model" in say("export", "alice/none", tmp_path / "x", "--store", tmp_path / "origin" / "store")[1]
    origin.close()
    if shutil.which("git") is not None:
        plain = {**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"}
        subprocess.run(["git", "clone", "-q", out / "repository.bundle", tmp_path / "clone"], check=True, env=plain)
        assert (tmp_path / "clone" / "config.json").read_text() == '{"new": 1}'

    store, hub = place
    code, said = say("import", out, "--store", store, *(["--as", "bob/copy"] if hub else []))
    assert code == 0, said
    name = "bob/copy" if hub else "alice/model"
    assert said.split() == [name, history[0]["id"]]
    assert "exists already" in say("import", out, "--store", store, *(["--as", "bob/copy"] if hub else []))[1]
    assert say("fsck", "--store", store) == (0, "0 faults\n")
    if hub is not None:
        copied = hub.ask("GET", "/api/models/bob/copy/commits/main", user="bob").json()
        assert copied == history and hub.ask("GET", "/api/models/bob/copy/refs", user="bob").json() == refs
        info = hub.ask("GET", "/api/models/bob/copy", user="bob").json()
        assert (info["private"], info["gated"], info["cardData"]) == (True, "manual", {"license": "mit"})
        assert hub.ask("GET", "/bob/copy/resolve/main/model.safetensors", user="bob").body == LARGE
        assert hub.ask("GET", "/api/models/bob/copy", user="alice").status == 404


def test_the_files_of_a_revision(place: tuple[Path, Hub | None], folder: Path, say: Say, tmp_path: Path) -> None:
    store, _ = place
    sha = say("import", folder, "--as", "acme/model", "--owner", "alice", "--store", store)[1].split()[-1]
    if place[1] is None:
        sha = say("import", folder, "--as", "acme/model", "--store", store)[1].split()[-1]
    (folder / "config.json").write_text("other")
    say("import", folder, "--as", "acme/model", "--store", store)
    assert say("export", "acme/model", tmp_path / "files", "--revision", sha, "--store", store)[0] == 0
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == LARGE
    assert (tmp_path / "files" / "config.json").read_text() == "{}"
    assert (tmp_path / "files" / "sub" / "notes.txt").read_text() == "deep"
    assert "Invalid rev" in say("export", "acme/model", tmp_path / "x", "--revision", "none", "--store", store)[1]


def test_a_cache(say: Say, tmp_path: Path) -> None:
    """Made by the official client, links and all."""
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    for name in ("one", "two"):
        hub.ask("POST", "/api/repos/create", {"name": name})
    commit(hub, "alice/one", {"a.txt": b"1"})
    client = Client(hub.server, tmp_path / "home")
    client.run(
        "api.upload_file(path_or_fileobj=b'w' * 5000, path_in_repo='w.bin', repo_id='alice/two')\n"
        "snapshot_download('alice/one'), snapshot_download('alice/two')"
    )
    client.close()
    hub.close()
    store = tmp_path / "store"
    code, said = say("import", tmp_path / "home", "--store", store)
    assert code == 0 and [line.split()[0] for line in said.splitlines()] == ["alice/one", "alice/two"]
    say("export", "alice/two", tmp_path / "files", "--revision", "main", "--store", store)
    assert (tmp_path / "files" / "w.bin").read_bytes() == b"w" * 5000
    one = tmp_path / "home" / "hub" / "models--alice--one"
    assert say("import", one, "--as", "me/renamed", "--store", store)[1].startswith("me/renamed ")
    assert "several" in say("import", tmp_path / "home" / "hub", "--as", "a/b", "--store", store)[1]


@pytest.fixture
def filled(tmp_path: Path, folder: Path, say: Say) -> Path:
    """A store with one model, and with what a server leaves."""
    store = tmp_path / "filled" / "store"
    store.parent.mkdir()
    assert say("import", folder, "--as", "me/model", "--store", store)[0] == 0
    return store


def _git(store: Path) -> Path:
    return next((store / "repos").iterdir())


def _large(store: Path) -> Path:
    return next((store / "objects").glob("*/*/*"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def _other_blob(store: Path) -> None:
    """Another object's bytes under an object's name: whole, and wrong."""
    one, other = sorted((_git(store) / "objects").glob("??/*"))[:2]
    one.chmod(0o600)
    one.write_bytes(other.read_bytes())


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "large object changed": (lambda store: _flip(_large(store)), "has other bytes: their SHA-256"),
    "large object cut": (lambda store: _large(store).write_bytes(LARGE[:10]), "has 10 bytes, not 50000"),
    "large object gone": (lambda store: _large(store).unlink(), "is missing; send the file again"),
    "git object gone": (lambda store: sorted((_git(store) / "objects").glob("??/*"))[0].unlink(), "is missing"),
    "git object changed": (lambda store: _flip(sorted((_git(store) / "objects").glob("??/*"))[0]), "fault: model me"),
    "git object swapped": (_other_blob, "fault: model me/model"),
    "main gone": (lambda store: (_git(store) / "refs" / "heads" / "main").unlink(), "refs/heads/main is missing"),
    "main leads nowhere": (
        lambda store: (_git(store) / "refs" / "heads" / "main").write_text("1" * 40 + "\n"),
        f"commit {'1' * 40} is missing",
    ),
    "repository gone": (lambda store: shutil.rmtree(_git(store)), "its git repository is gone"),
    "stranger among objects": (
        lambda store: (_large(store).parent / "x").write_text("x"),
        "is no large object",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_check_finds(filled: Path, say: Say, name: str) -> None:
    assert say("fsck", "--store", filled) == (0, "0 faults\n")
    harm, words = FAULTS[name]
    harm(filled)
    code, said = say("fsck", "--store", filled)
    assert code == 1 and words in said, said
    code, said = say("fsck", "--json", "--store", filled)
    found = json.loads(said)["faults"]
    assert code == 1 and any(words in fault["line"] for fault in found) and not any(f["repaired"] for f in found)


def test_a_check_finds_what_was_left_and_removes_it(filled: Path, say: Say) -> None:
    left = [_git(filled) / "refs" / "heads" / "main.lock", filled / "incoming" / "tmp123", filled / "xorbs" / "ab"]
    filled.joinpath("xorbs").mkdir(exist_ok=True)
    for path in left:
        path.write_bytes(b"x")
    (filled / "repos" / ("0" * 32 + ".git")).mkdir()
    orphan = filled / "objects" / "2d" / "71" / "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x")
    code, said = say("fsck", "--store", filled)
    assert code == 1 and "3 faults" in said, said
    for words in ("main.lock: a lock", "tmp123: an upload", "belongs to no repository", "left over: xorbs/ab"):
        assert words in said
    assert all(path.exists() for path in left)
    code, said = say("fsck", "--repair", "--store", filled)
    assert code == 0 and said.count("repaired: ") == 4 and "left over: objects/2d71" in said
    assert not any(path.exists() for path in left)
    assert say("fsck", "--store", filled)[0] == 0


def test_a_damaged_large_file_can_be_sent_again(filled: Path, folder: Path, say: Say) -> None:
    _flip(_large(filled))
    code, said = say("fsck", "--repair", "--store", filled)
    assert code == 1 and "put aside" in said and len(list((filled / "damaged").iterdir())) == 1
    assert "is missing" in say("fsck", "--store", filled)[1]
    assert say("import", folder, "--as", "me/model", "--store", filled)[0] == 0
    assert say("fsck", "--store", filled) == (0, "0 faults\n")


def test_a_check_beside_a_server_lets_it_work(filled: Path, say: Say) -> None:
    hub = Hub(filled.parent)
    (filled / "incoming" / "being-sent").write_bytes(b"x")
    assert say("fsck", "--repair", "--store", filled) == (0, "0 faults\n")
    assert (filled / "incoming" / "being-sent").exists()
    old = time.time() - 7200
    os.utime(filled / "incoming" / "being-sent", (old, old))
    _large(filled).unlink()
    code, said = say("fsck", "--store", filled)
    assert code == 1 and "an upload that never ended" in said and "is missing" in said
    assert hub.ask("POST", "/api/repos/create", {"name": "after"}).status == 200
    hub.close()
    assert "no store" in say("fsck", "--store", filled / "repos")[1]


def test_only_who_can_read_the_store_may_ask_for_this(filled: Path, say: Say) -> None:
    hub = Hub(filled.parent)
    control = filled / "control.json"
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    for headers in ({"user": "alice"}, {"user": None}, {"token": "x.y"}):
        for verb in ("fsck", "import", "export"):
            assert hub.ask("POST", f"/_control/{verb}", {"repair": False}, **headers).status == 401
    token = json.loads(control.read_text())["token"]
    assert hub.ask("POST", "/_control/fsck", {"repair": False}, token=token).json() == {"result": []}
    assert hub.ask("POST", "/_control/other", {}, token=token).status == 404
    os.kill(hub.server._process.pid, signal.SIGKILL)
    hub.server._process.wait()
    hub.server.stop()
    assert control.exists() and say("fsck", "--store", filled)[0] == 0  # it left its file, and answers no more
    again = Hub(filled.parent)
    again.close()
    assert not control.exists()


def test_help_names_every_command(say: Say) -> None:
    code, said = say("--help")
    assert code == 0
    for name in ("serve", "run", "import", "export", "fsck", "user", "token", "org"):
        assert f"\n  {name} " in said
    assert say()[0] == 2 and say("nonsense")[0] == 2
