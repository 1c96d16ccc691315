"""git itself against the Hub: real clones over HTTP, refused pushes, and the addresses git-lfs asks for."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hubserver.harness import USERS, Client, Hub, commit


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server with a public and a private model, and a data set."""
    made = Hub(tmp_path_factory.mktemp("git"))
    for name, wish in (("open", {}), ("closed", {"visibility": "private"}), ("rows", {"type": "dataset"})):
        made.ask("POST", "/api/repos/create", {"name": name, **wish})
    for name in ("open", "closed"):
        commit(made, f"alice/{name}", {"README.md": b"# one\n", "a/b.txt": b"deep\n"})
        commit(made, f"alice/{name}", {"README.md": b"# two\n"})
    made.ask("POST", "/api/models/alice/open/branch/other", {})
    made.ask("POST", "/api/models/alice/open/tag/main", {"tag": "v1", "message": "with words"})
    yield made
    made.close()


@pytest.fixture(scope="module")
def large(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A large file in both models."""
    data = b"weights" * 10_000
    client = Client(hub.server, tmp_path_factory.mktemp("large") / "home")
    for name in ("open", "closed"):
        client.run(
            "api.upload_file(path_or_fileobj=data.encode(), path_in_repo='model.bin', repo_id=repo)",
            **{"data": data.decode(), "repo": f"alice/{name}"},
        )
    client.close()
    return data


def git(folder: Path, *arguments: str, fails: bool = False, **extra: str) -> str:
    """Run git without anybody's settings; returns all it printed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed here")
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**kept, **quiet, **names, **extra}, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def signed_in(hub: Hub, path: str, user: str = "alice", token: str | None = None) -> str:
    return hub.server.endpoint.replace("http://", f"http://{user}:{token or USERS[user]}@") + path


def test_a_clone_is_the_repository(hub: Hub, large: bytes, tmp_path: Path) -> None:
    git(tmp_path, "clone", f"{hub.server.endpoint}/alice/open", "copy")
    copy = tmp_path / "copy"
    sha = hub.ask("GET", "/api/models/alice/open").json()["sha"]
    assert git(copy, "rev-parse", "HEAD").strip() == sha
    assert git(copy, "branch", "-r").split() == ["origin/HEAD", "->", "origin/main", "origin/main", "origin/other"]
    assert git(copy, "tag", "-n").split() == ["v1", "with", "words"]
    assert git(copy, "fsck", "--strict") == "" or "error" not in git(copy, "fsck", "--strict")
    files = [entry["path"] for entry in hub.ask("GET", "/api/models/alice/open/tree/main?recursive=1").json()]
    for path in files:
        if (copy / path).is_file() and path != "model.bin":
            assert (copy / path).read_bytes() == hub.ask("GET", f"/alice/open/resolve/main/{path}").body
    pointer = f"oid sha256:{hashlib.sha256(large).hexdigest()}\nsize {len(large)}\n"
    assert (copy / "model.bin").read_text().endswith(pointer)
    assert (copy / "a" / "b.txt").read_text() == "deep\n"
    commits = [item["id"] for item in hub.ask("GET", "/api/models/alice/open/commits/main").json()]
    assert git(copy, "log", "--format=%H").split() == commits


def test_a_fetch_brings_what_is_new(hub: Hub, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--depth", "1", f"{hub.server.endpoint}/alice/open.git", "copy")
    copy = tmp_path / "copy"
    assert len(git(copy, "log", "--format=%H").split()) == 1
    git(copy, "fetch", "--unshallow")
    assert len(git(copy, "log", "--format=%H").split()) > 2
    sha = commit(hub, "alice/open", {"new.txt": b"new"}).json()["commitOid"]
    git(copy, "pull")
    assert git(copy, "rev-parse", "HEAD").strip() == sha and (copy / "new.txt").read_text() == "new"
    git(tmp_path, "clone", f"{hub.server.endpoint}/datasets/alice/rows", "rows")
    assert ".gitattributes" in os.listdir(tmp_path / "rows")


def test_a_pull_request_can_be_fetched(hub: Hub, tmp_path: Path) -> None:
    body = {"title": "a pull request", "pullRequest": True}
    number = hub.ask("POST", "/api/models/alice/open/discussions", body, user="bob").json()["num"]
    git(tmp_path, "clone", f"{hub.server.endpoint}/alice/open", "copy")
    git(tmp_path / "copy", "fetch", "origin", f"refs/pr/{number}:pr")
    assert git(tmp_path / "copy", "rev-parse", "pr") == git(tmp_path / "copy", "rev-parse", "HEAD")


def test_a_private_repository_needs_a_token(hub: Hub, large: bytes, tmp_path: Path) -> None:
    git(tmp_path, "clone", signed_in(hub, "/alice/closed"), "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "# two\n"
    git(tmp_path, "clone", f"{hub.server.endpoint}/alice/closed", "no", fails=True)
    assert "not found" in git(tmp_path, "clone", signed_in(hub, "/alice/closed", "bob"), "no", fails=True).lower()
    assert "Authentication" in git(tmp_path, "clone", signed_in(hub, "/alice/closed", token="x"), "no", fails=True)
    assert not (tmp_path / "no").exists()
    hub.ask("PUT", "/api/models/alice/open/settings", {"gated": "manual"})
    said = git(tmp_path, "clone", signed_in(hub, "/alice/open", "bob"), "no", fails=True)
    assert "not in the authorized list" in said
    hub.ask("PUT", "/api/models/alice/open/settings", {"gated": False})


def test_a_moved_repository_is_found(hub: Hub, tmp_path: Path) -> None:
    hub.ask("POST", "/api/repos/create", {"name": "before"})
    hub.ask("POST", "/api/repos/move", {"fromRepo": "alice/before", "toRepo": "alice/after", "type": "model"})
    git(tmp_path, "clone", f"{hub.server.endpoint}/alice/before", "copy")
    assert (tmp_path / "copy" / ".gitattributes").exists()


def test_a_push_is_refused_in_words(hub: Hub, tmp_path: Path) -> None:
    git(tmp_path, "clone", signed_in(hub, "/alice/open"), "copy")
    copy = tmp_path / "copy"
    before = hub.ask("GET", "/api/models/alice/open").json()["sha"]
    (copy / "pushed.txt").write_text("x")
    git(copy, "add", ".")
    git(copy, "commit", "-m", "pushed")
    assert "takes no pushes over git" in git(copy, "push", fails=True)
    assert hub.ask("GET", "/api/models/alice/open").json()["sha"] == before
    for headers in ({}, {"Content_Type": "application/x-git-receive-pack-request"}):
        assert hub.ask("POST", "/alice/open.git/git-receive-pack", b"0000", **headers).status == 403
    assert hub.ask("GET", "/alice/open.git/info/refs").status == 403  # the protocol without a service


def test_what_is_no_request_of_git_is_refused(hub: Hub) -> None:
    kind = {"Content_Type": "application/x-git-upload-pack-request"}
    zipped = gzip.compress(b"\0" * (40 << 20))
    for body in (b"", b"zzzz", b"0000", b"0032want " + b"0" * 40 + b"\n0000", b"ffff", os.urandom(1000), b"0008done"):
        answer = hub.ask("POST", "/alice/open.git/git-upload-pack", body, **kind)
        assert answer.status in (200, 400) and b"PACK" not in answer.body
    assert hub.ask("POST", "/alice/open.git/git-upload-pack", zipped, Content_Encoding="gzip", **kind).status == 413
    assert hub.ask("POST", "/alice/open.git/git-upload-pack", b"x", Content_Encoding="gzip", **kind).status == 400
    assert hub.ask("POST", "/alice/open.git/git-upload-pack", b"0000", Content_Type="text/plain").status == 403
    assert hub.ask("POST", "/alice/open.git/git-upload-pack", b"0" * (9 << 20), **kind).status == 413


def _batch(hub: Hub, repo: str, oid: str, size: int, user: str | None) -> tuple[int, dict[str, object]]:
    body = {"operation": "download", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
    answer = hub.ask("POST", f"/{repo}.git/info/lfs/objects/batch", body, user=user)
    return answer.status, answer.json()


def test_large_files_through_the_batch(hub: Hub, large: bytes) -> None:
    oid = hashlib.sha256(large).hexdigest()
    for repo, user in (("alice/open", None), ("alice/open", "bob"), ("alice/closed", "alice")):
        status, found = _batch(hub, repo, oid, len(large), user)
        action = found["objects"][0]["actions"]["download"]  # type: ignore[index]
        assert status == 200 and action["expires_in"] == 3600
        answer = hub.ask("GET", action["href"].removeprefix(hub.server.endpoint), user=None, Range="bytes=7-13")
        assert answer.status == 206 and answer.body == b"weights" and answer.headers["ETag"] == f'"{oid}"'
    assert _batch(hub, "alice/closed", oid, len(large), "bob")[0] == 404
    assert _batch(hub, "alice/closed", oid, len(large), None)[0] == 401
    assert hub.ask("GET", "/_signed/fetch/e30.00", user=None).status == 401


def test_an_object_of_another_repository_is_not_given(hub: Hub, large: bytes) -> None:
    hub.ask("POST", "/api/repos/create", {"name": "empty"}, user="bob")
    oid = hashlib.sha256(large).hexdigest()
    _, found = _batch(hub, "bob/empty", oid, len(large), "bob")
    assert found["objects"][0]["error"]["code"] == 404  # type: ignore[index]
    _, found = _batch(hub, "alice/open", oid, len(large) + 1, "alice")
    assert "actions" not in found["objects"][0]  # type: ignore[index,operator]
    body: dict[str, object]
    for body in (
        {"objects": 1},
        {"objects": [1]},
        {"objects": [{"oid": "../x", "size": 1}]},
        {"objects": [{}] * 2000},
    ):
        answer = hub.ask("POST", "/alice/open.git/info/lfs/objects/batch", {"operation": "download", **body})
        assert answer.status == 400


def test_git_lfs_brings_the_large_files(hub: Hub, large: bytes, tmp_path: Path) -> None:
    if shutil.which("git-lfs") is None:
        pytest.skip("git-lfs is not installed here")
    git(tmp_path, "clone", signed_in(hub, "/alice/closed"), "copy")
    git(tmp_path / "copy", "lfs", "install", "--local")
    git(tmp_path / "copy", "lfs", "pull")
    assert (tmp_path / "copy" / "model.bin").read_bytes() == large


def test_a_name_and_a_token_count_for_git(hub: Hub, large: bytes) -> None:
    basic = "Basic " + base64.b64encode(f"alice:{USERS['alice']}".encode()).decode()
    body = {"operation": "download", "objects": [{"oid": hashlib.sha256(large).hexdigest(), "size": len(large)}]}
    path = "/alice/closed.git/info/lfs/objects/batch"
    kinds = {"application/vnd.git-lfs+json": 200, "text/plain": 401, "application/json": 401}
    for kind, status in kinds.items():
        answer = hub.ask("POST", path, body, user=None, Authorization=basic, Content_Type=kind)
        assert answer.status == status
