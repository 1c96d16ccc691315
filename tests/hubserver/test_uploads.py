"""The ways files travel: Xet as by default, LFS in one piece and in parts, downloads through a second port."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfmerge.hubserver.xorb import chunk_hash, hash_text
from tests.hubserver.harness import Client, Hub


pytestmark = pytest.mark.slow
# Bytes that do not compress, bytes that do, and floats: all compression schemes of Xet.
_MAKE = """
import array, hashlib, random
def make(path, seed, size):
    source = random.Random(seed)
    data = source.randbytes(size // 3) + bytes(size // 3)
    floats = array.array("f", (source.gauss(0, 1) for _ in range(50_000))).tobytes()
    data += (floats * (size // len(floats) + 1))[: size - len(data)]
    Path(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest()
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server with small parts and a second port."""
    made = Hub(tmp_path_factory.mktemp("parts"), part_size=1 << 20, cdn=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def lfs_client(parts: Hub) -> Iterator[Client]:
    """The official client without Xet."""
    made = Client(parts.server, parts.folder / "home", HF_HUB_DISABLE_XET="1")
    yield made
    made.close()


def test_xet_by_default(client: Client, hub: Hub, tmp_path: Path) -> None:
    start = len(hub.log())
    client.run(
        _MAKE
        + """
api.create_repo("xet/a")
api.create_repo("xet/b")
source = Path(folder)
sizes = {"one.bin": 9_000_001, "two.safetensors": 3_000_002}
sums = {name: make(source / name, name, size) for name, size in sizes.items()}
Path(source / "sub").mkdir()
(source / "sub/same.bin").write_bytes((source / "one.bin").read_bytes())
api.upload_folder(repo_id="xet/a", folder_path=source)
for name, digest in sums.items():
    assert hashlib.sha256(Path(hf_hub_download("xet/a", name)).read_bytes()).hexdigest() == digest
info = {e.path: e for e in api.list_repo_tree("xet/a", recursive=True)}
assert info["one.bin"].lfs.sha256 == info["sub/same.bin"].lfs.sha256 == sums["one.bin"]
assert info["one.bin"].xet_hash is None
# Bytes in memory, and a part of a file that was sent before, to another repository.
middle = (source / "one.bin").read_bytes()[1_000_000:8_000_000]
api.upload_file(path_or_fileobj=middle, path_in_repo="cut.bin", repo_id="xet/b")
assert Path(hf_hub_download("xet/b", "cut.bin")).read_bytes() == middle
# An open file goes the old way even here.
with (source / "two.safetensors").open("rb") as file:
    api.upload_file(path_or_fileobj=file, path_in_repo="two.bin", repo_id="xet/b")
assert hashlib.sha256(Path(hf_hub_download("xet/b", "two.bin")).read_bytes()).hexdigest() == sums["two.safetensors"]
""",
        folder=str(tmp_path),
    )
    paths = [r["path"] for r in hub.log()[start:] if r["status"] == 200]
    assert sum("/v1/xorbs/" in path for path in paths) >= 1
    assert sum(path.endswith("/v1/shards") for path in paths) == 2
    assert sum(path.startswith("/_signed/object/") for path in paths) == 1
    # No download told the client about Xet.
    assert not any("xet-read-token" in r["path"] for r in hub.log())


def test_lfs_basic_multipart_and_cdn(lfs_client: Client, parts: Hub, tmp_path: Path) -> None:
    lfs_client.run(
        _MAKE
        + """
api.create_repo("lfs/a", repo_type="dataset")
source = Path(folder)
sums = {name: make(source / name, name, size) for name, size in (("small.bin", 700_000), ("large.bin", 3_500_000))}
(source / "plain.txt").write_text("text")
options = {"repo_id": "lfs/a", "repo_type": "dataset"}
first = api.upload_folder(folder_path=source, **options)
assert api.upload_folder(folder_path=source, **options).oid == first.oid
for name, digest in sums.items():
    assert hashlib.sha256(Path(hf_hub_download(filename=name, **options)).read_bytes()).hexdigest() == digest
assert Path(hf_hub_download(filename="plain.txt", **options)).read_text() == "text"
# What the repository has is not sent again, even under another name.
api.upload_file(path_or_fileobj=source / "large.bin", path_in_repo="again.bin", **options)
# Another repository must be sent it: to know a hash is not to have the file.
api.create_repo("lfs/b")
api.upload_file(path_or_fileobj=source / "small.bin", path_in_repo="s.bin", repo_id="lfs/b")
api.upload_folder(folder_path=source, repo_id="lfs/a", repo_type="dataset", create_pr=True, path_in_repo="pr")
""",
        folder=str(tmp_path),
    )
    log = parts.log()
    sent = [r["path"].split("/")[2] for r in log if r["path"].startswith("/_signed/")]
    assert sorted(sent) == ["complete"] + ["object"] * 2 + ["part"] * 4
    assert not any("/cas/" in r["path"] or "xet" in r["path"] for r in log)
    main = log[0]["port"]
    cdn = [r for r in log if r["port"] != main]
    assert [r["status"] for r in cdn] == [200, 200] and sorted(r["bytes"] for r in cdn) == [700_000, 3_500_000]
    assert not any(r["authorization"] for r in cdn), "the token went to another origin"
    assert (
        sum(r["bytes"] for r in log if r["port"] == main and "/resolve/" in r["path"] and r["method"] == "GET") < 2000
    )


def test_second_port_serves_nothing_else(parts: Hub, lfs_client: Client) -> None:
    lfs_client.run("""
api.create_repo("lfs/c")
api.upload_file(path_or_fileobj=bytes(range(256)), path_in_repo="b.bin", repo_id="lfs/c")
""")
    redirect = parts.ask("GET", "/lfs/c/resolve/main/b.bin", user=None)
    assert redirect.status == 302 and redirect.headers["X-Linked-Size"] == "256"
    location = redirect.headers["Location"]
    endpoint, path = location[: location.index("/cdn/")], location[location.index("/cdn/") :]
    assert endpoint != parts.server.endpoint
    part = parts.ask("GET", path, user=None, endpoint=endpoint, Range="bytes=10-19")
    assert (part.status, part.body) == (206, bytes(range(10, 20)))
    assert parts.ask("GET", path[:-1] + ("0" if path[-1] != "0" else "1"), user=None, endpoint=endpoint).status == 401
    assert parts.ask("GET", "/api/whoami-v2", endpoint=endpoint).status == 404
    assert parts.ask("GET", "/lfs/c/resolve/main/b.bin", user=None, endpoint=endpoint).status == 404
    assert parts.ask("GET", path, user=None).status == 404


def _batch(hub: Hub, repo: str, data: bytes, **more: Any) -> dict[str, Any]:
    oid = hashlib.sha256(data).hexdigest()
    body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [{"oid": oid, "size": len(data)}]}
    answer = hub.ask("POST", f"/{repo}.git/info/lfs/objects/batch", {**body, **more})
    assert answer.status == 200, answer.body
    return dict(answer.json()["objects"][0])


def test_lfs_refuses_what_was_not_announced(parts: Hub, lfs_client: Client) -> None:
    lfs_client.run('api.create_repo("lfs/d"); api.create_repo("lfs/e")')
    small, large = b"small" * 10, bytes(2_500_000)
    action = _batch(parts, "lfs/d", small)["actions"]
    path = action["upload"]["href"].removeprefix(parts.server.endpoint)
    assert parts.ask("PUT", path, b"other" * 10, user=None).status == 400
    assert parts.ask("PUT", path, small + b"x", user=None).status == 400
    assert parts.ask("PUT", path, small[:-1], user=None).status == 400
    verify = action["verify"]["href"].removeprefix(parts.server.endpoint)
    announced = {"oid": hashlib.sha256(small).hexdigest(), "size": len(small)}
    assert parts.ask("POST", verify, announced).status == 404
    assert parts.ask("PUT", path, small, user=None).status == 200
    assert parts.ask("POST", verify, announced).status == 200
    assert parts.ask("POST", verify, {**announced, "size": 1}).status == 404
    assert "actions" not in _batch(parts, "lfs/d", small) and "actions" in _batch(parts, "lfs/e", small)
    # A commit in another repository may not take the object by its hash, nor lie about its size.
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": announced["oid"]}}
    head = {"key": "header", "value": {"summary": "s"}}
    body = "\n".join(map(json.dumps, [head, line])).encode()
    refused = parts.ask("POST", "/api/models/lfs/e/commit/main", body)
    assert refused.status == 400 and "was not uploaded to lfs/e" in refused.json()["error"]
    assert parts.ask("POST", "/api/models/lfs/d/commit/main", body).status == 200
    line["value"]["size"] = 7
    body = "\n".join(map(json.dumps, [head, line])).encode()
    assert parts.ask("POST", "/api/models/lfs/d/commit/main", body).status == 400
    # Parts: a wrong entity tag, then the right ones.
    upload = _batch(parts, "lfs/d", large)["actions"]["upload"]
    assert upload["header"].pop("chunk_size") == str(1 << 20) and len(upload["header"]) == 3
    tags = []
    for number, href in upload["header"].items():
        piece = large[(int(number) - 1) << 20 : int(number) << 20]
        sent = parts.ask("PUT", href.removeprefix(parts.server.endpoint), piece, user=None)
        tags.append({"partNumber": int(number), "etag": sent.headers["ETag"]})
    finish = upload["href"].removeprefix(parts.server.endpoint)
    wrong = [*tags[:2], {"partNumber": 3, "etag": '"' + "0" * 64 + '"'}]
    assert parts.ask("POST", finish, {"parts": wrong}, user=None).status == 400
    assert parts.ask("POST", finish, {"parts": tags[:2]}, user=None).status == 400
    assert parts.ask("POST", finish, {"parts": tags}, user=None).status == 200
    assert list((parts.folder / "store" / "incoming").iterdir()) == []


def test_xet_tokens_and_hashes(hub: Hub, client: Client) -> None:
    client.run('api.create_repo("xet/mine"); api.create_repo("bob/his", token="hf_bob")')
    assert hub.ask("GET", "/api/models/bob/his/xet-write-token/main").status == 403
    assert hub.ask("GET", "/api/models/xet/mine/xet-write-token/main", user=None).status == 401
    granted = hub.ask("GET", "/api/models/xet/mine/xet-write-token/main")
    session = granted.json()
    assert granted.headers["X-Xet-Access-Token"] == session["accessToken"]
    cas = session["casUrl"].removeprefix(hub.server.endpoint)
    chunk = b"hello"
    xorb = bytes([0, len(chunk), 0, 0, 0, len(chunk), 0, 0]) + chunk
    name = hash_text(chunk_hash(chunk))
    post = {"token": session["accessToken"]}
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{'0' * 64}", xorb, **post).status == 400
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb[:-1], **post).status == 400
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", b"", **post).status == 400
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/..%2F..%2Fx", xorb, **post).status == 400
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb).status == 401  # the user's token is no Xet token
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb, user=None).status == 401
    assert hub.ask("POST", f"/cas/other/v1/xorbs/default/{name}", xorb, **post).status == 400
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb, **post).json() == {"was_inserted": True}
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{name}", xorb, **post).json() == {"was_inserted": False}
    assert hub.ask("POST", f"{cas}/v1/shards", b"x" * 96, **post).status == 400
    assert hub.ask("POST", f"{cas}/v2/shards", b"", **post).status == 404


def test_shards_are_checked(hub: Hub, client: Client) -> None:
    client.run('api.create_repo("xet/shards")')
    session = hub.ask("GET", "/api/models/xet/shards/xet-write-token/main").json()
    cas = session["casUrl"].removeprefix(hub.server.endpoint)
    post = {"token": session["accessToken"]}
    chunk = b"the content of a file"
    raw_hash = chunk_hash(chunk)
    xorb = bytes([0, len(chunk), 0, 0, 0, len(chunk), 0, 0]) + chunk
    assert hub.ask("POST", f"{cas}/v1/xorbs/default/{hash_text(raw_hash)}", xorb, **post).status == 200

    def shard(content: bytes, size: int, end: int, xorb_hash: bytes) -> bytes:
        digest = hashlib.sha256(content).digest()
        swapped = b"".join(digest[i : i + 8][::-1] for i in range(0, 32, 8))
        head = bytes(32) + struct.pack("<2Q", 2, 0)
        file = bytes(32) + struct.pack("<2IQ", 1 << 30, 1, 0)
        entry = xorb_hash + struct.pack("<4I", 0, size, 0, end)
        return head + file + entry + swapped + bytes(16) + b"\xff" * 32 + bytes(16)

    def status(*arguments: Any) -> int:
        return hub.ask("POST", f"{cas}/v1/shards", shard(*arguments), **post).status

    assert status(b"something else", len(chunk), 1, raw_hash) == 400
    assert status(chunk, len(chunk) + 1, 1, raw_hash) == 400
    assert status(chunk, len(chunk), 2, raw_hash) == 400
    assert status(chunk, len(chunk), 1, bytes(32)) == 400
    assert hub.ask("POST", f"{cas}/v1/shards", shard(chunk, len(chunk), 1, raw_hash)[:-48], **post).status == 400
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": hashlib.sha256(chunk).hexdigest()}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s"}}, line])).encode()
    assert hub.ask("POST", "/api/models/xet/shards/commit/main", body).status == 400
    assert status(chunk, len(chunk), 1, raw_hash) == 200
    assert hub.ask("POST", "/api/models/xet/shards/commit/main", body).status == 200
    assert hub.ask("GET", "/xet/shards/resolve/main/x.bin").body == chunk
