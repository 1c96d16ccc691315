"""Attacks on the Hub on loopback: by people with a token, by people without one, and by slow connections."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lz4.frame
import pytest

from hfmerge.cli import main
from hfmerge.hubserver.database import Database
from hfmerge.hubserver.serve import HubServer
from hfmerge.hubserver.xorb import chunk_hash, hash_text, tree_hash
from tests.hubserver.harness import USERS, Answer, Client, Hub, commit


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server with alice, bob and carol."""
    made = Hub(tmp_path_factory.mktemp("hubsec"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(hub: Hub) -> Iterator[Client]:
    """The official client, as alice."""
    made = Client(hub.server, hub.folder / "home")
    yield made
    made.close()


def _create(hub: Hub, name: str, user: str = "alice", **more: Any) -> str:
    assert hub.ask("POST", "/api/repos/create", {"name": name, **more}, user=user).status == 200
    return name if "/" in name else f"{user}/{name}"


def _upload(hub: Hub, repo: str, files: dict[str, bytes], user: str = "alice") -> dict[str, str]:
    """Send large files by Git-LFS and commit them; returns their object ids."""
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "large files"}}]
    oids = {}
    for path, data in files.items():
        oids[path] = hashlib.sha256(data).hexdigest()
        body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oids[path], "size": len(data)}]}
        batch = hub.ask("POST", f"/{repo}.git/info/lfs/objects/batch", body, user=user).json()
        href = batch["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.server.endpoint)
        assert hub.ask("PUT", href, data, user=None).status == 200
        lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oids[path]}})
    sent = hub.ask("POST", f"/api/models/{repo}/commit/main", _ndjson(lines), user=user)
    assert sent.status == 200, sent.body
    return oids


def _ndjson(lines: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, lines)).encode()


def _safetensors(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def _index(tensor: str, shard: str = "model-00001.safetensors") -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {tensor: shard}}).encode()


def _pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


# Objects of other repositories


@pytest.fixture(scope="module")
def stolen(hub: Hub) -> tuple[str, str, int]:
    """A private model of alice, and a repository of bob that points to its object: name, object id, size."""
    data = _safetensors("secret.weight")
    oid = _upload(hub, _create(hub, "vault", visibility="private"), {"model.safetensors": data})["model.safetensors"]
    repo = _create(hub, "thief", "bob")
    pointer = _pointer(oid, len(data))
    files = {"model-00001.safetensors": pointer, "model.safetensors": pointer}
    files |= {"model.safetensors.index.json": _index("secret.weight"), "README.md": pointer, "config.json": pointer}
    assert commit(hub, repo, files, user="bob").status == 200
    return repo, oid, len(data)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/models/{}/safetensors-metadata/model.safetensors.index.json", None),
        ("GET", "/api/models/{}?blobs=1", None),
        ("GET", "/api/models/{}?expand=safetensors&expand=usedStorage", None),
        ("GET", "/api/models/{}/tree/main", None),
        ("POST", "/api/models/{}/paths-info/main", {"paths": ["model.safetensors"]}),
        ("POST", "/api/models/{}/preupload/main", {"files": [{"path": "model.safetensors", "size": 9, "sample": ""}]}),
        ("GET", "/api/models/{}/lfs-files", None),
        ("GET", "/{}/resolve/main/model.safetensors", None),
        ("HEAD", "/{}/resolve/main/model.safetensors", None),
    ],
)
def test_a_pointer_written_by_hand(
    hub: Hub, stolen: tuple[str, str, int], method: str, path: str, body: dict[str, Any] | None
) -> None:
    """Bob writes a Git-LFS pointer to an object of alice's private model into his own repository, and reads it."""
    repo, oid, size = stolen
    kind = {"Content_Type": "application/json"} if body else {}
    answer = hub.ask(method, path.format(repo), body, user="bob", **kind)
    assert answer.status == (400 if "safetensors-metadata" in path else 200), answer.body
    assert b"secret.weight" not in answer.body and b'"F32"' not in answer.body
    assert b'"sha256"' not in answer.body and b'"lfs": {' not in answer.body
    assert answer.headers["X-Linked-Etag"] is None
    if "resolve" in path:
        assert answer.headers["Content-Length"] == str(len(_pointer(oid, size)))
        assert answer.body == (b"" if method == "HEAD" else _pointer(oid, size))
    if "preupload" in path:
        assert answer.json()["files"][0]["oid"] != oid
    if "usedStorage" in path:
        assert answer.json()["usedStorage"] == 0


def test_objects_are_not_taken_by_their_hash(hub: Hub, stolen: tuple[str, str, int]) -> None:
    """Bob knows the hash of an object of alice's, and commits, copies, duplicates or `uploads` it by that."""
    repo, oid, size = stolen
    head = {"key": "header", "value": {"summary": "s"}}
    for key, value in (
        ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": oid, "size": size}),
        ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": oid}),
        ("copyFile", {"path": "x.bin", "srcRepoId": "alice/vault", "srcPath": "model.safetensors"}),
    ):
        line = {"key": key, "value": value}
        assert hub.ask("POST", f"/api/models/{repo}/commit/main", _ndjson([head, line]), user="bob").status == 400
    files = [{"xetHash": oid, "sha256": oid, "filename": "x.bin"}]
    copy = {"target": {"type": "model", "name": repo}, "files": files}
    assert hub.ask("POST", "/api/models/alice/vault/lfs-files/duplicate", copy, user="bob").status == 404
    assert hub.ask("POST", "/api/models/alice/vault/duplicate", {"repository": "bob/copy"}, user="bob").status == 404
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
    batch = hub.ask("POST", f"/{repo}.git/info/lfs/objects/batch", body, user="bob").json()
    assert "upload" in batch["objects"][0]["actions"], "the object counts as already there"
    check = hub.ask("POST", f"/{repo}.git/info/lfs/verify", {"oid": oid, "size": size}, user="bob")
    assert check.status == 404
    # A pointer with a false length, to an object that the repository does have.
    own = b"own" * 100
    mine = _upload(hub, repo, {"own.bin": own}, "bob")["own.bin"]
    assert commit(hub, repo, {"long.bin": _pointer(mine, 1 << 40)}, user="bob").status == 200
    assert hub.ask("GET", f"/{repo}/resolve/main/long.bin", user="bob").body == _pointer(mine, 1 << 40)
    assert hub.ask("GET", f"/{repo}/resolve/main/own.bin", user="bob").body == own


def _session(hub: Hub, repo: str, user: str) -> tuple[str, str]:
    granted = hub.ask("GET", f"/api/models/{repo}/xet-write-token/main", user=user).json()
    return str(granted["casUrl"]).removeprefix(hub.server.endpoint), str(granted["accessToken"])


def _raw_chunk(data: bytes, size: int | None = None, scheme: int = 0) -> bytes:
    header = bytes([0]) + len(data).to_bytes(3, "little") + bytes([scheme])
    return header + (len(data) if size is None else size).to_bytes(3, "little") + data


def _shard(content: bytes, xorb: bytes, size: int) -> bytes:
    digest = hashlib.sha256(content).digest()
    swapped = b"".join(digest[i : i + 8][::-1] for i in range(0, 32, 8))
    file = bytes(32) + struct.pack("<2IQ", 1 << 30, 1, 0)
    entry = xorb + struct.pack("<4I", 0, size, 0, 1)
    return bytes(32) + struct.pack("<2Q", 2, 0) + file + entry + swapped + bytes(16) + b"\xff" * 32 + bytes(16)


def test_chunks_of_others(hub: Hub) -> None:
    """Bob registers a file made of chunks that alice sent to a private repository, of which he knows the hashes."""
    _create(hub, "xet-a", visibility="private")
    _create(hub, "xet-b", "bob")
    chunk = b"the content of a private file"
    xorb, digest = _raw_chunk(chunk), chunk_hash(chunk)
    theirs, their_token = _session(hub, "alice/xet-a", "alice")
    assert hub.ask("POST", f"{theirs}/v1/xorbs/default/{hash_text(digest)}", xorb, token=their_token).status == 200
    mine, my_token = _session(hub, "bob/xet-b", "bob")
    shard = _shard(chunk, digest, len(chunk))
    assert hub.ask("POST", f"{mine}/v1/shards", shard, token=my_token).status == 400
    assert hub.ask("POST", f"{theirs}/v1/shards", shard, token=my_token).status == 400
    for path in (f"/v1/reconstructions/{hash_text(digest)}", f"/v1/chunks/default/{hash_text(digest)}"):
        assert hub.ask("GET", mine + path, token=my_token).status == 404
    assert hub.ask("POST", f"{theirs}/v1/shards", shard, token=their_token).status == 200


def test_deleted_objects_stay_deleted(hub: Hub) -> None:
    """A large file that was deleted for good is read through model info, which does not ask whether it is linked."""
    repo = _create(hub, "regret")
    oid = _upload(hub, repo, {"model.safetensors": _safetensors("private.weight")})["model.safetensors"]
    assert "safetensors" in hub.ask("GET", f"/api/models/{repo}").json()
    body = {"deletions": {"sha": [oid], "rewriteHistory": False}}
    assert hub.ask("POST", f"/api/models/{repo}/lfs-files/batch", body).status == 200
    assert "safetensors" not in hub.ask("GET", f"/api/models/{repo}").json()
    gone = hub.ask("GET", f"/{repo}/resolve/main/model.safetensors")
    assert (gone.status, gone.headers["X-Error-Code"]) == (404, "EntryNotFound")


# Private and gated repositories, route by route

_SECRET = "xyzzy-plugh"

# What a route gives: `sees` to whoever sees the repository, `text` from its files, `write` to those who may write.
_ROUTES = [
    ("GET", "/api/models/{}", "sees"),
    ("GET", "/api/models/{}?blobs=1", "sees"),
    ("GET", "/api/models/{}/revision/main", "sees"),
    ("GET", "/api/models/{}/revision/refs%2Fpr%2F1", "sees"),
    (
        "GET",
        "/api/models/{}?expand=config&expand=safetensors&expand=evalResults&expand=cardData&expand=siblings",
        "sees",
    ),
    ("GET", "/api/models/{}/tree/main?recursive=1&expand=1", "sees"),
    ("GET", "/api/models/{}/tree/refs%2Fpr%2F1", "sees"),
    ("POST", "/api/models/{}/paths-info/main", "sees"),
    ("GET", "/api/models/{}/refs?include_prs=1", "sees"),
    ("GET", "/api/models/{}/commits/main?expand[]=formatted", "sees"),
    ("GET", "/api/models/{}/commits/refs%2Fpr%2F1", "sees"),
    ("GET", "/api/models/{}/discussions", "sees"),
    ("GET", "/api/models/{}/discussions/1", "sees"),
    ("GET", "/api/models/{}/discussions/1?diff=1", "diff"),
    ("GET", "/api/models/{}/discussions/2?diff=1", "diff"),
    ("GET", "/api/models/{}/auth-check", "text"),
    ("GET", "/{}/resolve/main/secret.txt", "text"),
    ("HEAD", "/{}/resolve/main/secret.txt", "text"),
    ("GET", "/{}/resolve/main/model-00001.safetensors", "text"),
    ("GET", "/{}/resolve/refs%2Fpr%2F1/new.txt", "text"),
    ("GET", "/{}/raw/main/secret.txt", "text"),
    ("GET", "/models/{}/raw/main/secret.txt", "text"),
    ("GET", "/api/models/{}/safetensors-metadata/model.safetensors.index.json", "text"),
    ("GET", "/api/models/{}/auth-check/write", "write"),
    ("GET", "/api/models/{}/xet-write-token/main", "write"),
    ("GET", "/api/models/{}/lfs-files", "write"),
    ("GET", "/api/models/{}/user-access-request/pending", "write"),
]


@pytest.fixture(scope="module")
def guarded(hub: Hub) -> dict[str, str]:
    """A private model and gated ones full of a secret word; carol was let in, and of one bob has asked to be."""
    repos = {"private": _create(hub, "closed", visibility="private")}
    repos |= {"gated": _create(hub, "half-open"), "asked": _create(hub, "asked-for")}
    card = b"---\ntags: [open]\n---\n"
    for repo in repos.values():
        shard = {"model-00001.safetensors": _safetensors(_SECRET)}
        _upload(hub, repo, shard)
        files = {"secret.txt": _SECRET.encode(), "README.md": card, "model.safetensors.index.json": _index(_SECRET)}
        files["config.json"] = json.dumps({"model_type": "bert", "architectures": [_SECRET]}).encode()
        result = {"dataset": {"id": "a/b", "task_id": "t"}, "value": 1, "notes": _SECRET}
        files[".eval_results/x.yaml"] = json.dumps([result]).encode()
        assert commit(hub, repo, files).status == 200
        for number, text in enumerate((_SECRET, f"more {_SECRET}"), start=1):
            lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": f"change {number}"}}]
            for path, data in (("new.txt", text), ("README.md", f"---\npretty_name: {_SECRET}\n---\n")):
                content = base64.b64encode(data.encode()).decode()
                lines.append({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
            opened = hub.ask("POST", f"/api/models/{repo}/commit/main?create_pr=1", _ndjson(lines))
            assert opened.json()["pullRequestUrl"].endswith(f"/discussions/{number}")
    for repo in (repos["gated"], repos["asked"]):
        assert hub.ask("POST", f"/api/models/{repo}/discussions/2/merge", {}).status == 200
        assert commit(hub, repo, {"README.md": card}).status == 200
        assert hub.ask("PUT", f"/api/models/{repo}/settings", {"gated": "manual"}).status == 200
        assert hub.ask("POST", f"/api/models/{repo}/user-access-request/grant", {"user": "carol"}).status == 200
    pending = {"user": "bob", "status": "pending"}
    asked = hub.ask("POST", f"/api/models/{repos['asked']}/user-access-request/handle", pending)
    assert asked.status == 200
    return repos


@pytest.mark.parametrize(("method", "path", "gives"), _ROUTES)
@pytest.mark.parametrize("kind", ["private", "gated", "asked"])
def test_routes_of_private_and_gated_repositories(
    hub: Hub, guarded: dict[str, str], kind: str, method: str, path: str, gives: str
) -> None:
    """Somebody without access asks every route for text of a private or gated repository."""
    address = path.format(guarded[kind])
    body = {"paths": ["secret.txt"]} if method == "POST" else None
    headers = {"Content_Type": "application/json"} if body else {}

    def ask(user: str | None) -> Answer:
        return hub.ask(method, address, body, user=user, **headers)

    # Nobody, bob (who has asked, or not), carol (who was let in, if it is gated).
    outside = {"write": (401, 403, 403), "text": (401, 403, 200)}.get(gives, (200, 200, 200))
    if kind == "private":
        outside = (401, 404, 404)
    for user, status in zip((None, "bob", "carol"), outside, strict=True):
        answer = ask(user)
        assert answer.status == status, (user, answer.body)
        let_in = kind != "private" and user == "carol"
        assert let_in or _SECRET.encode() not in answer.body, f"{user or 'anybody'} reads it"
        if let_in and gives in ("text", "diff") and "auth-check" not in path and method == "GET":
            assert _SECRET.encode() in answer.body
    assert ask("alice").status == 200


def test_the_list_shows_no_text_of_gated_repositories(hub: Hub, guarded: dict[str, str]) -> None:
    """The list of models repeats config.json, of a repository whose files are for some only."""
    wanted = "/api/models?full=1&cardData=1&config=1"
    everything = "/api/models?expand=config&expand=evalResults&expand=safetensors&expand=cardData"
    for user in (None, "bob"):
        for path in (wanted, everything):
            body = hub.ask("GET", path, user=user).body
            assert _SECRET.encode() not in body and guarded["private"].encode() not in body
        assert guarded["gated"].encode() in hub.ask("GET", wanted, user=user).body
    assert _SECRET.encode() in hub.ask("GET", wanted, user="carol").body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("preupload/main", {"files": []}),
        ("commit/main", {"key": "header", "value": {"summary": "s"}}),
        ("branch/b", {}),
        ("tag/main", {"tag": "t"}),
        ("super-squash/main", {}),
        ("lfs-files/batch", {"deletions": {"sha": []}}),
        ("user-access-request/grant", {"user": "bob"}),
        ("user-access-request/handle", {"user": "bob", "status": "accepted"}),
        ("discussions/1/merge", {}),
        ("settings", {"gated": False}),
    ],
)
@pytest.mark.parametrize("kind", ["private", "gated"])
def test_writing_without_the_right(
    hub: Hub, guarded: dict[str, str], kind: str, path: str, body: dict[str, Any]
) -> None:
    """Somebody who was let in to read, or not even that, changes the repository or lets people in."""
    method = "PUT" if path == "settings" else "POST"
    for user, status in ((None, 401), ("bob", 403), ("carol", 403)):
        answer = hub.ask(method, f"/api/models/{guarded[kind]}/{path}", body, user=user)
        assert answer.status == (404 if kind == "private" and user else status), answer.body


# Facts of repositories, and lists of them

_DEEP = b"[" * 100_000 + b"]" * 100_000
_TENSOR = '{"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}'


def _header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(4)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "\\ud800"}'},
        {"config.json": b'{"architectures": [NaN]}'},
        {"config.json": b'{"architectures": [1e400]}'},
        {"config.json": b'{"auto_map": ' + _DEEP + b"}"},
        {"config.json": b'{"auto_map": ' + b"9" * 4000 + b"}"},
        {"config.json": _pointer("ab" * 32, 10)},
        {"README.md": _pointer("ab" * 32, 10)},
        {".eval_results/a.yaml": b"- " * 5000},
        {".eval_results/a.yaml": b"dataset: {id: a, task_id: b}\nvalue: 0x" + b"f" * 50_000},
        {".eval_results/a.yaml": _pointer("ab" * 32, 10)},
        {"model.safetensors": _pointer("ab" * 32, 100)},
        {"model.safetensors": _header('{"a": {"dtype": "\\ud800", "shape": [1], "data_offsets": [0, 4]}}')},
        {"model.safetensors": _header('{"a": ' + _TENSOR % "NaN" + "}")},
        {"model.safetensors": _header('{"a": ' + _TENSOR % ", ".join(["9" * 18] * 400) + "}")},
        {"model.safetensors.index.json": b'{"weight_map": ' + _DEEP + b"}"},
        {"model.safetensors.index.json": b'{"weight_map": {"a": "\\ud800"}}'},
    ],
    ids=lambda files: f"{next(iter(files))}-{next(iter(files.values()))[:24]!r}",
)
def test_one_bad_repository_does_not_spoil_the_list(hub: Hub, files: dict[str, bytes]) -> None:
    """Bob commits a file that cannot be told about in JSON, and nobody gets the list of models any more."""
    repo = "bob/poison"
    hub.ask("POST", "/api/repos/create", {"name": "poison"}, user="bob")
    try:
        assert commit(hub, repo, files, user="bob").status == 200
        listed = hub.ask("GET", "/api/models?full=1&cardData=1&config=1&search=poison", user=None)
        assert listed.status == 200 and [item["id"] for item in listed.json()] == [repo]
        assert hub.ask("GET", f"/api/models/{repo}", user=None).status == 200
        assert hub.ask("GET", f"/api/models/{repo}?expand=evalResults&expand=safetensors", user=None).status == 200
    finally:
        hub.ask("DELETE", "/api/repos/delete", {"name": "poison"}, user="bob")


def test_bodies_that_cannot_be_held(hub: Hub) -> None:
    """A request whose JSON is nested a hundred thousand times makes the server fail instead of refuse."""
    repo = _create(hub, "bodies")
    for path in ("/api/repos/create", "/api/validate-yaml", f"/api/models/{repo}/discussions"):
        assert hub.ask("POST", path, b'{"name": ' + _DEEP + b"}").status == 400
    line = b'{"key": "header", "value": {"summary": "s", "x": ' + _DEEP + b"}}"
    assert hub.ask("POST", f"/api/models/{repo}/commit/main", line).status == 400
    assert hub.ask("POST", f"/api/models/{repo}/discussions", b'{"title": "title", "n": NaN}').status == 400


def test_a_thousand_repositories_are_listed_in_a_second(tmp_path: Path) -> None:
    """Asking for the list makes the server read every file of every repository, each time."""
    hub = Hub(tmp_path)
    _create(hub, "pattern")
    files = {"README.md": b"---\ntags: [x]\n---\n", "config.json": b'{"model_type": "bert"}'}
    commit(hub, "alice/pattern", files)
    _upload(hub, "alice/pattern", {"model.safetensors": _safetensors("w")})
    hub.close()
    _multiply(tmp_path / "store", 999)
    again = Hub(tmp_path)
    # The first list finds out what it was never told: these repositories came without a commit through the server.
    assert len(_ask_slowly(again, "/api/models?limit=1000")) == 1000
    start = time.perf_counter()
    listed = again.ask("GET", "/api/models?limit=1000")
    seconds = time.perf_counter() - start
    again.close()
    assert len(listed.json()) == 1000 and all("bert" in item["tags"] for item in listed.json())
    assert seconds < 1.0, f"{seconds:.2f} s for 1,000 repositories"


def _ask_slowly(hub: Hub, path: str) -> list[Any]:
    parts = urlsplit(hub.server.endpoint)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=120) as connection:
        request = (
            f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USERS['alice']}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    return list(json.loads(answer.partition(b"\r\n\r\n")[2]))


def _multiply(store: Path, count: int) -> None:
    """As many more repositories as asked for, in a store that no server uses; they share the folder of its one."""
    database = Database(store / "hub.sqlite")
    (row,) = database.repos()
    rids = [f"{number:032x}" for number in range(count)]
    for rid in rids:
        (store / "repos" / f"{rid}.git").symlink_to(store / "repos" / f"{row.rid}.git")
    with database.transaction() as connection:
        for rid in rids:
            copied = "INSERT INTO repos SELECT ?, kind, id || ?, key || ?, owner, private, gated, created FROM repos"
            connection.execute(f"{copied} WHERE rid = ?", (rid, rid, rid, row.rid))
            connection.execute("INSERT INTO objects SELECT ?, oid FROM objects WHERE rid = ?", (rid, row.rid))
    database.close()


# Cards


@pytest.mark.parametrize(
    "yaml",
    [
        "\n".join(f"k{number}: 1" for number in range(60_000)),
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 20)),
        "a: " + "{b: " * 500 + "1" + "}" * 500,
        "a: x\n" + "  more text\n" * 120_000,
    ],
    ids=["keys", "aliases", "depth", "length"],
)
def test_cards_beyond_the_limits(hub: Hub, yaml: str) -> None:
    """Anybody, without a token, sends a card whose checking takes minutes or gigabytes."""
    start = time.perf_counter()
    answer = hub.ask("POST", "/api/validate-yaml", {"content": f"---\n{yaml}\n---\n", "repoType": "model"}, user=None)
    assert answer.status == 400 and "bad YAML" in answer.json()["error"]
    assert time.perf_counter() - start < 10


def test_facts_follow_what_is_large(hub: Hub) -> None:
    """Facts that were kept from an earlier commit make a text pass as a pointer, or a large file as a text."""
    repo = _create(hub, "follow")
    data = _safetensors("late.weight")
    pointer = _pointer(hashlib.sha256(data).hexdigest(), len(data))
    files = {"model.safetensors": pointer, "long.txt": b"x" * 1000, "short.txt": b"y"}
    assert commit(hub, repo, files).status == 200
    assert "safetensors" not in hub.ask("GET", f"/api/models/{repo}").json()

    def sizes() -> dict[str, int]:
        told = hub.ask("GET", f"/api/models/{repo}?blobs=1").json()["siblings"]
        return {item["rfilename"]: item["size"] for item in told if item["rfilename"] != ".gitattributes"}

    assert sizes() == {"model.safetensors": len(pointer), "long.txt": 1000, "short.txt": 1}
    _upload(hub, repo, {"copy.safetensors": data})
    assert sizes()["model.safetensors"] == len(data) == sizes()["copy.safetensors"]
    assert "safetensors" in hub.ask("GET", f"/api/models/{repo}").json()
    assert commit(hub, repo, {"long.txt": b"z" * 300}).status == 200
    names = ["model.safetensors", "copy.safetensors", "long.txt", "short.txt"]
    assert sizes() == dict(zip(names, (len(data), len(data), 300, 1), strict=True))


# Bodies, sizes and slow connections


def _connect(hub: Hub) -> socket.socket:
    parts = urlsplit(hub.server.endpoint)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=8)


@pytest.mark.parametrize(
    ("path", "user", "status"),
    [
        ("/api/repos/create", None, 401),
        ("/api/models/alice/waiting/commit/main", None, 401),
        ("/api/models/alice/waiting/commit/main", "bob", 403),
        ("/api/models/alice/waiting/commit/nowhere?create_pr=0", "bob", 403),
        ("/api/models/alice/nothing/commit/main", "bob", 404),
        ("/api/models/alice/waiting/preupload/main", "bob", 403),
        ("/api/models/alice/waiting/settings", "bob", 403),
        ("/api/models/alice/waiting/branch/x", "bob", 403),
        ("/api/models/alice/waiting/lfs-files/batch", "bob", 403),
        ("/api/models/alice/waiting/discussions", None, 401),
        ("/alice/waiting.git/info/lfs/objects/batch", None, 413),
        ("/cas/0/v1/shards", "bob", 401),
        ("/cas/0/v1/xorbs/default/" + "0" * 64, "bob", 401),
        ("/_signed/complete/x.y", None, 401),
        ("/api/models/alice/waiting/preupload/main", "alice", 413),
        ("/api/validate-yaml", None, 413),
    ],
)
def test_rights_come_before_bodies(hub: Hub, path: str, user: str | None, status: int) -> None:
    """Somebody without the right makes the server take in hundreds of megabytes before it says no."""
    hub.ask("POST", "/api/repos/create", {"name": "waiting"})
    method = "PUT" if path.endswith("settings") else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000000\r\n"
    head += f"Authorization: Bearer {USERS[user]}\r\n" if user else ""
    with _connect(hub) as connection:
        connection.sendall(head.encode() + b"\r\n")
        first = connection.recv(4096)
    assert first.startswith(b"HTTP/1.1 %d " % status), first


def test_xorbs_that_swell(hub: Hub) -> None:
    """A writer sends a few megabytes of chunks that decompress to a gigabyte."""
    _create(hub, "swell")
    cas, token = _session(hub, "alice/swell", "alice")
    for count, size in ((20, 15 << 20), (700, 128 << 10), (9000, 1)):
        data = bytes(size)
        packed = lz4.frame.compress(data)
        xorb = _raw_chunk(packed, size, 1) * count
        name = hash_text(tree_hash([(chunk_hash(data), size)] * count))
        answer = hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb, token=token)
        assert answer.status == 400 and "limits" in answer.json()["error"], (count, size)


def test_files_that_swell(hub: Hub) -> None:
    """A writer registers a file of a terabyte with a shard that names one chunk again and again."""
    _create(hub, "huge")
    cas, token = _session(hub, "alice/huge", "alice")
    entry = bytes(32) + struct.pack("<4I", 0, 0xFFFFFFFF, 0, 1)
    file = bytes(32) + struct.pack("<2IQ", 1 << 30, 256, 0) + entry * 256 + bytes(48)
    shard = bytes(32) + struct.pack("<2Q", 2, 0) + file + b"\xff" * 32 + bytes(16)
    answer = hub.ask("POST", f"{cas}/v1/shards", shard, token=token)
    assert answer.status == 400 and "at most" in answer.json()["error"]
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "ab" * 32, "size": 1 << 40}]}
    assert hub.ask("POST", "/alice/huge.git/info/lfs/objects/batch", body).status == 413


def test_failed_uploads_leave_nothing(hub: Hub) -> None:
    """Uploads that fail half-way fill the disk with temporary files."""
    _create(hub, "clean")
    cas, token = _session(hub, "alice/clean", "alice")
    shutil.rmtree(hub.folder / "store" / "xorbs")
    chunk = b"no folder to put me in"
    name = hash_text(chunk_hash(chunk))
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", _raw_chunk(chunk), token=token).status == 200
    assert list((hub.folder / "store" / "incoming").iterdir()) == []


def test_parts_sent_again_and_again(tmp_path: Path) -> None:
    """A writer sends one part of an object many times, each time with other bytes, and never completes it."""
    hub = Hub(tmp_path, part_size=1000)
    _create(hub, "parts")
    body = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": "ab" * 32, "size": 2000}]}
    batch = hub.ask("POST", "/alice/parts.git/info/lfs/objects/batch", body).json()
    href = batch["objects"][0]["actions"]["upload"]["header"]["1"].removeprefix(hub.server.endpoint)
    for number in range(5):
        assert hub.ask("PUT", href, b"%d" % number * 100, user=None).status == 200
    assert len(list((tmp_path / "store" / "incoming").iterdir())) == 1
    hub.close()


def test_slow_requests(hub: Hub) -> None:
    """Somebody opens connections and sends nothing, or a header line now and then, until nobody else gets one."""
    start = time.monotonic()
    silent, slow = _connect(hub), _connect(hub)
    with silent, slow:
        slow.sendall(b"GET /api/models HTTP/1.1\r\nHost: localhost\r\n")
        for number in range(12):
            time.sleep(0.5)
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"X-%d: 1\r\n" % number)
        for connection in (silent, slow):
            connection.settimeout(4)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
    assert time.monotonic() - start < 12


def test_differences_that_take_for_ever(hub: Hub) -> None:
    """A pull request changes every line of a long file, and asking for it keeps the server busy for minutes."""
    repo = _create(hub, "long")
    lines = [b"%d\n" % (number % 400) for number in range(60_000)]
    assert commit(hub, repo, {"a.txt": b"".join(lines)}).status == 200
    content = base64.b64encode(b"".join(reversed(lines))).decode()
    change = {"key": "file", "value": {"path": "a.txt", "content": content, "encoding": "base64"}}
    head = {"key": "header", "value": {"summary": "turned round"}}
    assert hub.ask("POST", f"/api/models/{repo}/commit/main?create_pr=1", _ndjson([head, change])).status == 200
    assert "too long" in hub.ask("GET", f"/api/models/{repo}/discussions/1?diff=1").json()["diff"]


# What the official client asks for


def test_access_requests(client: Client, hub: Hub) -> None:
    """The owner rejects a request by its id, and the server takes the id for nothing and rejects nobody."""
    client.run("""
api.create_repo("alice/asked")
api.update_repo_settings("alice/asked", gated="manual")
import httpx2 as httpx
def ask(token, repo="alice/asked"):
    return httpx.post(f"{api.endpoint}/api/models/{repo}/ask-access", headers={"Authorization": f"Bearer {token}"})
assert httpx.post(f"{api.endpoint}/api/models/alice/asked/ask-access").status_code == 401
for token in ("hf_bob", "hf_carol"):
    assert ask(token).json()["status"] == "pending" and ask(token).json()["status"] == "pending"
bob = HfApi(token="hf_bob")
fails(GatedRepoError, bob.auth_check, "alice/asked")
requests = {r.username: r for r in api.list_pending_access_requests("alice/asked")}
assert sorted(requests) == ["bob", "carol"] and "bob" not in requests["bob"].request_id
api.accept_access_request("alice/asked", request_id=requests["bob"].request_id)
api.reject_access_request("alice/asked", request_id=requests["carol"].request_id, rejection_reason="no")
assert [r.username for r in api.list_accepted_access_requests("alice/asked")] == ["bob"]
assert [r.username for r in api.list_rejected_access_requests("alice/asked")] == ["carol"]
bob.auth_check("alice/asked")
assert ask("hf_carol").json()["status"] == "rejected"
assert fails(HfHubHTTPError, api.accept_access_request, "alice/asked", request_id="0" * 24).response.status_code == 404
api.cancel_access_request("alice/asked", request_id=requests["bob"].request_id)
fails(GatedRepoError, bob.auth_check, "alice/asked")
api.create_repo("alice/automatic")
assert ask("hf_bob", "alice/automatic").status_code == 400
api.update_repo_settings("alice/automatic", gated="auto")
assert ask("hf_bob", "alice/automatic").json()["status"] == "accepted"
bob.auth_check("alice/automatic")
""")


def test_what_the_client_asks_about_storage(client: Client, hub: Hub) -> None:
    """Not an attack: routes that the client asks for and the server lacked."""
    client.run("""
api.create_repo("alice/stored")
api.upload_file(path_or_fileobj=b"x" * 999, path_in_repo="x.bin", repo_id="alice/stored")
api.upload_file(path_or_fileobj=b"y" * 99, path_in_repo="y.bin", repo_id="alice/stored", create_pr=True)
files = {f.filename: f.ref for f in api.list_lfs_files("alice/stored")}
assert files == {"x.bin": "refs/heads/main", "y.bin": "refs/pr/1"}, files
mine = {r.id: r for r in api.list_user_repos()}
assert mine["alice/stored"].storage == 1098 and mine["alice/stored"].visibility == "public"
fails(HfHubHTTPError, lambda: list(HfApi(token=False).list_user_repos()))
""")
    assert hub.ask("GET", "/api/models/alice/stored/commits/main?limit=1").headers["X-Total-Count"] == "2"
    total = hub.ask("GET", "/api/models?author=alice&limit=1")
    assert int(total.headers["X-Total-Count"]) == len(hub.ask("GET", "/api/models?author=alice").json()) > 1


# Tokens and organisations


class Command:
    """`hfmerge hub ...` on one store."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]):
        self._root, self._capsys = root, capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run it, insist on its exit code, return what it printed."""
        self._capsys.readouterr()
        assert main(["hub", *words, "--root", str(self._root)]) == code
        printed = self._capsys.readouterr()
        return (printed.err if code else printed.out).strip()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, on the store of the test."""
    return Command(tmp_path / "store", capsys)


@contextlib.contextmanager
def _served(root: Path, *words: str) -> Iterator[tuple[str, str]]:
    """A server in the foreground: its endpoint, and what it printed before it was ready."""
    command = [sys.executable, "-m", "hfmerge", "hub", "serve", "--root", str(root), "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = ""
        while "export HF_ENDPOINT=" not in printed or ("# user me:" in printed and "HF_TOKEN" not in printed):
            line = process.stdout.readline()
            assert line, printed
            printed += line
        try:
            yield re.findall(r"HF_ENDPOINT=(\S+)", printed)[0], printed
        finally:
            process.terminate()
            process.communicate(timeout=10)


def _who(endpoint: str, token: str) -> tuple[int, Any]:
    parts = urlsplit(endpoint)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as connection:
        head = f"GET /api/whoami-v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_tokens_are_kept_and_hashed(tmp_path: Path, command: Command) -> None:
    """Tokens end with each restart, so people put them where others find them; and whoever reads the store has all."""
    root = tmp_path / "store"
    with _served(root) as (endpoint, printed):
        (token,) = re.findall(r"HF_TOKEN=(hf_\w+)", printed)
        assert _who(endpoint, token)[1]["name"] == "me"
    with _served(root) as (endpoint, printed):
        assert "HF_TOKEN" not in printed and "# users: me" in printed
        assert _who(endpoint, token)[0] == 200
        # More of them, while the server runs.
        other = command("user", "add", "ann")
        reader = command("token", "add", "ann", "--role", "read", "--label", "CI")
        assert _who(endpoint, other)[1]["auth"]["accessToken"]["role"] == "write"
        assert _who(endpoint, reader)[1]["auth"]["accessToken"]["role"] == "read"
        (line,) = [text for text in command("token", "list", "ann").splitlines() if "CI" in text]
        command("token", "revoke", line.split()[0])
        new = command("token", "rotate", "me")
        assert [_who(endpoint, text)[0] for text in (reader, other, token, new)] == [401, 200, 401, 200]
        assert "there is a user ann" in command("user", "add", "ann", code=1)
        assert "not a name" in command("user", "add", "api", code=1)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert not any(text.encode() in path.read_bytes() for path in files for text in (token, other, reader, new))
    assert (root / "people.sqlite").stat().st_mode & 0o077 == 0 and root.stat().st_mode & 0o077 == 0


def test_a_token_to_read_does_not_write(tmp_path: Path, command: Command) -> None:
    """A token that a job has for reading is used to write."""
    writer = command("user", "add", "ann")
    reader = command("token", "add", "ann", "--role", "read")
    hub = Hub(tmp_path)
    assert hub.ask("POST", "/api/repos/create", {"name": "r", "visibility": "private"}, token=writer).status == 200
    for method, path in (
        *(("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", "/api/repos/move")),
        *(("PUT", "/api/models/ann/r/settings"), ("POST", "/api/models/ann/r/commit/main")),
        *(("POST", "/api/models/ann/r/discussions"), ("GET", "/api/models/ann/r/xet-write-token/main")),
        *(("POST", "/ann/r.git/info/lfs/objects/batch"), ("GET", "/api/models/ann/r/auth-check/write")),
    ):
        body: dict[str, Any] = {"name": "r", "operation": "upload", "objects": []}
        answer = hub.ask(method, path, body if method != "GET" else None, token=reader)
        assert answer.status == 403 and "only read" in answer.json()["error"], path
    assert hub.ask("GET", "/ann/r/resolve/main/.gitattributes", token=reader).status == 200
    hub.close()


def test_organisations(tmp_path: Path, command: Command) -> None:
    """Whoever names an organisation may put repositories into it; and its members cannot share them."""
    hub = Hub(tmp_path)
    _create(hub, "acme/model", visibility="private")
    assert hub.ask("POST", "/api/repos/create", {"name": "acme/mine"}, user="bob").status == 403
    assert hub.ask("POST", "/api/repos/move", {"fromRepo": "acme/model", "toRepo": "bob/x"}, user="bob").status == 404
    _create(hub, "loot", "bob")
    assert hub.ask("POST", "/api/repos/move", {"fromRepo": "bob/loot", "toRepo": "acme/x"}, user="bob").status == 403

    def can(user: str) -> list[int]:
        return [
            hub.ask("GET", "/acme/model/resolve/main/.gitattributes", user=user).status,
            commit(hub, "acme/model", {f"{user}.txt": b"x"}, user=user).status,
            hub.ask("POST", "/api/repos/create", {"name": f"acme/{user}-own"}, user=user).status,
            commit(hub, f"acme/{user}-own", {"x.txt": b"x"}, user=user).status,
            hub.ask("PUT", f"/api/organizations/acme/members/{user}", {"role": "admin"}, user=user).status,
        ]

    assert can("bob")[:3] == [404, 404, 403]
    # On the command line, while the server runs; and over HTTP, by an admin.
    command("org", "add", "acme", "bob", "--role", "read")
    assert can("bob")[:3] == [200, 403, 403]
    assert hub.ask("PUT", "/api/organizations/acme/members/bob", {"role": "contributor"}).status == 200
    assert can("bob") == [200, 403, 200, 200, 403]
    assert hub.ask("PUT", "/api/organizations/acme/members/bob", {"role": "write"}).status == 200
    assert can("bob") == [200, 200, 409, 200, 403]
    listed = hub.ask("GET", "/api/models?author=acme", user="bob").json()
    assert {item["id"] for item in listed} == {"acme/model", "acme/bob-own"}
    assert hub.ask("GET", "/api/models?author=acme", user="carol").json()[0]["id"] == "acme/bob-own"
    orgs = hub.ask("GET", "/api/whoami-v2", user="bob").json()["orgs"]
    assert [(org["name"], org["roleInOrg"]) for org in orgs] == [("acme", "write")]
    assert command("org", "list", "acme").split() == ["alice", "admin", "bob", "write"]
    assert hub.ask("GET", "/api/organizations/acme/settings/repositories", user="carol").status == 403
    assert len(hub.ask("GET", "/api/organizations/acme/settings/repositories", user="bob").json()) == 2
    assert hub.ask("DELETE", "/api/organizations/acme/members/alice").status == 400  # the only admin
    assert hub.ask("PUT", "/api/organizations/acme/members/nobody", {"role": "read"}).status == 400
    assert hub.ask("DELETE", "/api/organizations/acme/members/bob", user="carol").status == 403
    assert hub.ask("DELETE", "/api/organizations/acme/members/bob").status == 200
    # Who left has no rights left, not even on what they made.
    assert can("bob")[:2] == [404, 404] and commit(hub, "acme/bob-own", {"y": b"y"}, user="bob").status == 403
    assert hub.ask("POST", "/api/organizations/create", {"name": "alice"}, user="bob").status == 400
    assert hub.ask("POST", "/api/organizations/create", {"name": "acme"}, user="bob").status == 409
    assert hub.ask("POST", "/api/organizations/create", {"name": "new-one"}, user="bob").status == 200
    hub.close()


def test_stores_from_before_organisations(tmp_path: Path) -> None:
    """Not an attack: in a store that knows no organisations yet, people keep what they had."""
    hub = Hub(tmp_path)
    _create(hub, "acme/model", visibility="private")
    _create(hub, "own")
    hub.close()
    (tmp_path / "store" / "people.sqlite").unlink(missing_ok=True)
    again = Hub(tmp_path)
    assert commit(again, "acme/model", {"a": b"a"}).status == 200 == commit(again, "alice/own", {"a": b"a"}).status
    assert again.ask("GET", "/api/whoami-v2").json()["orgs"][0]["name"] == "acme"
    assert again.ask("POST", "/api/repos/create", {"name": "acme/other"}, user="bob").status == 403
    again.close()


def test_a_server_that_others_can_reach_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody serves to a whole network what was made for one machine, without knowing."""
    command = [sys.executable, "-m", "hfmerge", "hub", "serve", "--root", str(tmp_path / "s"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0", "--public"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while "HF_ENDPOINT" not in process.stdout.readline():
            pass
        process.terminate()
        assert "warning: other machines can reach 0.0.0.0" in process.communicate(timeout=10)[1]
    for words in (["--help"], ["serve", "--help"], ["run", "--help"]):
        with contextlib.suppress(SystemExit):
            main(["hub", *words])
        assert "people who trust each other" in " ".join(capsys.readouterr().out.split())


def test_programs_that_start_a_server_do_not_leave_tokens(tmp_path: Path, command: Command) -> None:
    """Each program that starts a server for itself leaves one more token that opens the store for ever."""
    with HubServer(tmp_path / "store") as first:
        token = first.token
        assert _who(first.endpoint, token)[0] == 200
    with HubServer(tmp_path / "store") as second:
        assert _who(second.endpoint, token)[0] == 401
    assert command("token", "list") == ""
