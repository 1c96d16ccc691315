"""Plain HTTP: ranges, headers, refusals, and many writers at once."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any
from urllib.parse import quote

import pytest

from tests.hubserver.harness import Answer, Hub, commit


DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def repo(hub: Hub) -> str:
    """A repository with an ordinary and a large file of the same content."""
    assert hub.ask("POST", "/api/repos/create", {"name": "http", "organization": "acme"}).status == 200
    assert commit(hub, "acme/http", {"f.txt": DATA, "sub/g.txt": b"g", "zero": b""}).status == 200
    oid = hashlib.sha256(DATA).hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(DATA)}]}
    action = hub.ask("POST", "/acme/http.git/info/lfs/objects/batch", body).json()["objects"][0]["actions"]["upload"]
    assert hub.ask("PUT", action["href"].removeprefix(hub.server.endpoint), DATA, user=None).status == 200
    line = {"key": "lfsFile", "value": {"path": "f.bin", "algo": "sha256", "oid": oid, "size": len(DATA)}}
    lines = [json.dumps({"key": "header", "value": {"summary": "large"}}), json.dumps(line)]
    assert hub.ask("POST", "/api/models/acme/http/commit/main", "\n".join(lines).encode()).status == 200
    return "acme/http"


@pytest.mark.parametrize("name", ["f.txt", "f.bin"])
def test_ranges(hub: Hub, repo: str, name: str) -> None:
    path = f"/{repo}/resolve/main/{name}"
    size = len(DATA)
    for text, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=10000-", 10000, size),
        ("bytes=10000-99999999", 10000, size),
        ("bytes=-5", size - 5, size),
        (f"bytes=-{size * 2}", 0, size),
    ):
        part = hub.ask("GET", path, Range=text)
        assert (part.status, part.body) == (206, DATA[start:end]), text
        assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        head = hub.ask("HEAD", path, Range=text)
        assert (head.status, head.headers["Content-Length"], head.body) == (206, str(end - start), b"")
    for text in ("bytes=5-2", "bytes=-", "bytes=a-b", "pages=1-2", "bytes=0-1,3-4"):
        whole = hub.ask("GET", path, Range=text)
        assert (whole.status, len(whole.body)) == (200, size), text
    for text in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
        refused = hub.ask("GET", path, Range=text)
        assert (refused.status, refused.headers["Content-Range"]) == (416, f"bytes */{size}"), text
    etag = hub.ask("HEAD", path).headers["ETag"]
    assert hub.ask("GET", path, If_None_Match=etag).status == 304
    assert hub.ask("GET", path, Range="bytes=0-9", If_Range=etag).status == 206
    assert hub.ask("GET", path, Range="bytes=0-9", If_Range='"other"').status == 200


def test_headers(hub: Hub, repo: str) -> None:
    sha = hub.ask("GET", f"/api/models/{repo}").json()["sha"]
    plain = hub.ask("HEAD", f"/{repo}/resolve/main/f.txt").headers
    large = hub.ask("HEAD", f"/{repo}/resolve/main/f.bin").headers
    assert plain["X-Repo-Commit"] == large["X-Repo-Commit"] == sha
    assert plain["Content-Length"] == large["Content-Length"] == large["X-Linked-Size"] == str(len(DATA))
    assert len(plain["ETag"]) == 42 and large["ETag"] == large["X-Linked-Etag"] and len(large["ETag"]) == 66
    assert plain["X-Linked-Etag"] is None and large["X-Xet-Hash"] is None
    assert hub.ask("GET", f"/{repo}/raw/main/f.bin").body.startswith(b"version https://git-lfs")
    assert hub.ask("GET", f"/{repo}/raw/main/f.txt").body == DATA
    assert hub.ask("GET", f"/{repo}/resolve/main/zero").body == b""
    assert hub.ask("GET", f"/{repo}/resolve/main/zero", Range="bytes=0-0").status == 416
    for revision in ("HEAD", sha, "refs%2Fheads%2Fmain", "refs/heads/main"):
        assert hub.ask("GET", f"/{repo}/resolve/{revision}/sub/g.txt").body == b"g"
    assert hub.ask("GET", "/ACME/HTTP/resolve/main/sub%2Fg.txt").body == b"g"
    assert hub.ask("GET", f"/models/{repo}/resolve/main/sub/g.txt").body == b"g"
    assert hub.ask("GET", f"/api/models/{repo}/revision/HEAD").json()["sha"] == sha


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/models/acme/none", 404, "RepoNotFound"),
        ("GET", "/api/models/gpt2", 404, "RepoNotFound"),
        ("GET", "/api/models/gpt2/tree/main", 404, "RepoNotFound"),
        ("HEAD", "/gpt2/resolve/main/config.json", 404, "RepoNotFound"),
        ("GET", "/api/datasets/acme/http", 404, "RepoNotFound"),
        ("GET", "/api/models/acme/http/revision/none", 404, "RevisionNotFound"),
        ("GET", "/acme/http/resolve/none/f.txt", 404, "RevisionNotFound"),
        ("GET", "/acme/http/resolve/" + "0" * 40 + "/f.txt", 404, "RevisionNotFound"),
        ("GET", "/acme/http/resolve/refs%2Fpr%2F9/f.txt", 404, "RevisionNotFound"),
        ("GET", "/acme/http/resolve/..%2F..%2Fetc/passwd", 404, "RevisionNotFound"),
        ("HEAD", "/acme/http/resolve/main/none", 404, "EntryNotFound"),
        ("GET", "/acme/http/resolve/main/sub", 404, "EntryNotFound"),
        ("GET", "/acme/http/resolve/main/../f.txt", 404, "EntryNotFound"),
        ("GET", "/acme/http/resolve/main/f.txt/x", 404, "EntryNotFound"),
        ("GET", "/acme/http/resolve/main/%ff%00", 404, "EntryNotFound"),
        ("GET", "/api/models/acme/http/tree/main/none", 404, "EntryNotFound"),
        ("GET", "/api/models/acme/http/safetensors-metadata/none.json", 404, "EntryNotFound"),
        ("GET", "/api/models/acme/http/safetensors-metadata/f.txt", 400, None),
        ("GET", "/api/spaces", 501, "NotImplemented"),
        ("POST", "/api/collections", 501, "NotImplemented"),
        ("GET", "/spaces/acme/x/resolve/main/f", 501, "NotImplemented"),
        ("GET", "/api/models/acme/http/xet-read-token/main", 501, "NotImplemented"),
        ("DELETE", "/api/models/acme/http/like", 501, "NotImplemented"),
        ("DELETE", "/api/models/gpt2/like", 404, "RepoNotFound"),
        ("POST", "/acme/http.git/git-receive-pack", 403, None),
        ("GET", "/nowhere", 404, None),
        ("GET", "/_nothing/at/all/here", 404, None),
        ("GET", "/api/models/acme/http/unknown/route/here", 404, None),
        ("DELETE", "/api/models/acme/http", 405, None),
        ("GET", "/api/models?limit=-1", 400, None),
        ("GET", "/api/models?sort=nonsense", 400, None),
        ("GET", "/api/models/acme/http/tree/main?cursor=x", 400, None),
        ("POST", "/_signed/complete/x.y", 401, None),
        ("PUT", "/_signed/object/e30.00", 401, None),
    ],
)
def test_refusals(hub: Hub, repo: str, method: str, path: str, status: int, code: str | None) -> None:
    answer = hub.ask(method, path)
    assert (answer.status, answer.headers["X-Error-Code"]) == (status, code), answer.body
    assert answer.headers["X-Request-Id"] and answer.headers["X-Error-Message"]
    if method != "HEAD":
        assert answer.json()["error"]
    if code == "EntryNotFound":
        assert len(answer.headers["X-Repo-Commit"]) == 40


@pytest.mark.parametrize("header", ["X_Request_Id", "X_Amzn_Trace_Id"])
def test_a_request_keeps_the_name_that_its_client_gave(hub: Hub, header: str) -> None:
    named = hub.ask("GET", "/api/models", **{header: "Root=1-67891233;a.b"})
    assert named.headers["X-Request-Id"] == "Root=1-67891233;a.b"
    for refused in ("x" * 201, "<b>", "a b", "\xe9"):
        made = hub.ask("GET", "/api/models", **{header: refused}).headers["X-Request-Id"]
        assert len(made) == 32 and int(made, 16)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../x",
        "..\\ddd",
        "a\\b",
        "/abs",
        "a//b",
        "a/",
        ".",
        "./a",
        ".git/config",
        "a/.GIT/x",
        "",
        "a\nb",
        "\0",
    ],
)
def test_paths_that_are_refused(hub: Hub, repo: str, path: str) -> None:
    assert commit(hub, repo, {path: b"x"}).status == 422
    asked = {"files": [{"path": path, "size": 1, "sample": ""}]}
    assert hub.ask("POST", f"/api/models/{repo}/preupload/main", asked).status == 422


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b'{"key": "header"}',
        b'{"key": "header", "value": {"summary": "s"}}',
        b'{"key": "file", "value": {"path": "x", "content": "eA==", "encoding": "base64"}}',
        b'{"key": "header", "value": {"summary": ""}}\n{"key": "deletedFile", "value": {"path": "f.txt"}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "x", "content": 3}}',
        b'{"key": "header", "value": {"summary": "s"}}\n'
        b'{"key": "file", "value": {"path": "x", "content": "?", "encoding": "base64"}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "lfsFile", "value": {"path": "x", "algo": "md5"}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "launch", "value": {"path": "x"}}',
        b'{"key": "header", "value": {"summary": "\\ud800"}}\n{"key": "deletedFile", "value": {"path": "f.txt"}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "\\ud800", "content": ""}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "sub", "content": "x"}}',
        b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"path": "f.txt/x", "content": "x"}}',
    ],
)
def test_commits_that_are_refused(hub: Hub, repo: str, body: bytes) -> None:
    before = hub.ask("GET", f"/api/models/{repo}").json()["sha"]
    answer = hub.ask("POST", f"/api/models/{repo}/commit/main", body)
    assert answer.status == 400 and answer.json()["error"]
    assert hub.ask("GET", f"/api/models/{repo}").json()["sha"] == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/repos/create", b"{"),
        ("/api/repos/create", b"[]"),
        ("/api/repos/create", b'{"name": ""}'),
        ("/api/repos/create", b'{"name": 3}'),
        ("/api/repos/create", b'{"name": "a b"}'),
        ("/api/repos/create", b'{"name": "a--b"}'),
        ("/api/repos/create", b'{"name": "..", "organization": ".."}'),
        ("/api/repos/create", b'{"name": "a/b/c"}'),
        ("/api/repos/create", b'{"name": "x.git"}'),
        ("/api/repos/create", b'{"name": "x", "visibility": "hidden"}'),
        ("/api/repos/create", b'{"name": "\\ud800"}'),
        ("/api/repos/move", b'{"fromRepo": "acme/http", "toRepo": "nowhere"}'),
        ("/api/models/acme/http/preupload/main", b'{"files": 3}'),
        ("/api/models/acme/http/preupload/main", b'{"files": [{"path": "x", "size": 1, "sample": "?"}]}'),
        ("/api/models/acme/http/paths-info/main", b"\xff\xfe"),
        ("/acme/http.git/info/lfs/objects/batch", b'{"operation": "upload", "objects": [{"oid": "x", "size": 1}]}'),
        ("/api/models/acme/http/discussions", b'{"title": []}'),
    ],
)
def test_bodies_that_are_refused(hub: Hub, repo: str, path: str, body: bytes) -> None:
    answer = hub.ask("POST", path, body)
    assert answer.status == 400 and answer.json()["error"], answer.body


def test_odd_requests(hub: Hub, repo: str) -> None:
    for host in ("[bad", "a b", "x/y", "é"):
        assert hub.ask("GET", "/api/models", Host=host).status == 400
    assert hub.ask("GET", "/api/models?%ff=%00&limit=1").status == 200
    assert hub.ask("GET", "/api/models", token="é").status == 401
    wrong = hub.ask("GET", "/api/models", user=None, Authorization="Basic YTpi")
    assert wrong.status == 401 and wrong.headers["X-Error-Message"] == "Invalid credentials in Authorization header"


@pytest.mark.slow
def test_readers_of_a_repository_that_is_deleted(hub: Hub) -> None:
    statuses: list[int] = []

    def read() -> None:
        while not statuses or statuses[-1] == 200:
            statuses.append(hub.ask("GET", "/api/models/alice/brief/tree/main?recursive=true").status)

    for _ in range(3):
        statuses.clear()
        hub.ask("POST", "/api/repos/create", {"name": "brief"})
        commit(hub, "alice/brief", {f"{number}/f.txt": b"x" for number in range(40)})
        reader = threading.Thread(target=read)
        reader.start()
        assert hub.ask("DELETE", "/api/repos/delete", {"name": "brief"}).status == 200
        reader.join()
        assert statuses[-1] == 404


def test_only_one_of_many_writers_wins(hub: Hub) -> None:
    hub.ask("POST", "/api/repos/create", {"name": "race"})
    parent = hub.ask("GET", "/api/models/alice/race").json()["sha"]
    answers: list[Answer] = []

    def write(number: int, **header: Any) -> None:
        answers.append(commit(hub, "alice/race", {f"{number}.txt": b"%d" % number}, **header))

    def together(**header: Any) -> list[int]:
        answers.clear()
        threads = [threading.Thread(target=write, args=(number,), kwargs=header) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(answer.status for answer in answers)

    assert together(parentCommit=parent) == [200] + [412] * 11
    assert len(hub.ask("GET", "/api/models/alice/race/commits/main").json()) == 2
    # Without a parent all of them succeed, one after the other, and nothing is lost.
    assert together() == [200] * 12
    history = hub.ask("GET", "/api/models/alice/race/commits/main").json()
    assert len(history) == 14 and {a.json()["commitOid"] for a in answers} <= {c["id"] for c in history}
    files = [entry["path"] for entry in hub.ask("GET", "/api/models/alice/race/tree/main").json()]
    assert len(files) == 13


def test_one_of_many_creators_wins(hub: Hub) -> None:
    statuses: list[int] = []

    def create() -> None:
        statuses.append(hub.ask("POST", "/api/repos/create", {"name": "once", "organization": "many"}).status)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 7
    known = len(hub.ask("GET", "/api/models?limit=1000").json())
    assert len(list((hub.folder / "store" / "repos").iterdir())) == known


def test_yaml_of_cards(hub: Hub, repo: str) -> None:
    def check(text: str, kind: str = "model") -> tuple[int, dict[str, Any]]:
        answer = hub.ask("POST", "/api/validate-yaml", {"content": text, "repoType": kind})
        return answer.status, answer.json()

    assert check("---\nlicense: mit\n---\n# x") == (200, {"errors": [], "warnings": []})
    status, body = check("# no front matter")
    assert status == 200 and "empty or missing yaml metadata" in body["warnings"][0]["message"]
    status, body = check("---\nbase_model: [./local]\nmodel-index: [{results: []}]\n---\n")
    assert status == 400 and [e["message"].split(" ")[0] for e in body["errors"]] == [
        '"base_model"',
        '"model-index[0].name"',
    ]
    refused = commit(hub, repo, {"README.md": b"---\nlicense: {a: b}\n---\n"})
    assert refused.status == 400 and '"license" must be' in refused.json()["error"]
    assert commit(hub, repo, {"sub/README.md": b"---\nlicense: {a: b}\n---\n"}).status == 200


@pytest.mark.slow
def test_odd_names_survive(hub: Hub) -> None:
    hub.ask("POST", "/api/repos/create", {"name": "odd"})
    names = ["ü/é 100%.txt", "a+b&c=d?e#f.txt", "tree/main/x", "%2F", "x;y", "[1].txt", "'q'.txt"]
    assert commit(hub, "alice/odd", {name: name.encode() for name in names}).status == 200
    for name in names:
        assert hub.ask("GET", f"/alice/odd/resolve/main/{quote(name)}").body == name.encode()
        assert hub.ask("GET", f"/alice/odd/resolve/main/{quote(name, safe='')}").body == name.encode()
    listed = [e["path"] for e in hub.ask("GET", "/api/models/alice/odd/tree/main?recursive=true").json()]
    assert set(names) <= set(listed)
    form = "&".join(f"paths={quote(name, safe='')}" for name in names).encode()
    kind = "application/x-www-form-urlencoded"
    found = hub.ask("POST", "/api/models/alice/odd/paths-info/main", form, Content_Type=kind).json()
    assert [entry["path"] for entry in found] == names
