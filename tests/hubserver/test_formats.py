"""The parts without a server: cards, large-file rules, Xet's binary formats, tree edits, signatures."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import lz4.frame
import pytest

from hfmerge.hubserver import xorb
from hfmerge.hubserver.attributes import DEFAULT_ATTRIBUTES, attributes_of, ignored, is_large
from hfmerge.hubserver.blobs import BlobStore
from hfmerge.hubserver.cards import card_tags, front_matter, load_yaml, read_card, relation_of
from hfmerge.hubserver.gitstore import GitStore, parse_pointer, pointer_text
from hfmerge.hubserver.signing import Signer
from hfmerge.hubserver.wire import HubFault


def test_front_matter() -> None:
    assert front_matter("---\na: 1\n---\ntext\n---\n") == "a: 1"
    assert front_matter("\ufeff\n\n---\r\na: 1\r\n---\r\n") == "a: 1"
    assert front_matter("text\n---\na: 1\n---\n") is None and front_matter("---\na: 1\n") is None
    assert front_matter("") is None


def test_yaml_as_the_hub_reads_it() -> None:
    text = "language: no\ndate: 2024-01-01\non: yes\nflag: true\nx: .nan\n1: one\n<<: {merged: 2}"
    assert load_yaml(text) == {
        "language": "no",
        "date": "2024-01-01",
        "on": "yes",
        "flag": True,
        "x": "nan",
        "1": "one",
        "merged": 2,
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: 1\na: 2",
        "a: !!python/object:os.system x",
        "a: &x [*x]",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(f"{c}: &{c} [" + f"*{p}," * 10 + "]" for p, c in zip("abcde", "bcdef", strict=True)),
        "? [a]\n: 1",
        "\x00",
    ],
)
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bad YAML"):
        load_yaml(text)


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("license: 3", '"license" must be a string or an array of strings'),
        ("tags: one", '"tags" must be an array of strings'),
        ("tags: [one, 2]", '"tags" must be an array of strings'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model: [a/b, {x: y}]", '"base_model" must be a string or an array of strings'),
        ("base_model_relation: merged", '"base_model_relation" must be one of'),
        ("library_name: [a]", '"library_name" must be a string'),
        ("new_version: a b", '"new_version" with value "a b" is not valid'),
        ("model-index: {}", '"model-index" must be an array'),
        ("model-index: [{name: a}]", '"model-index[0].results" is required'),
        ("model-index: [{name: a, results: [{task: {}}]}]", '"model-index[0].results[0].task.type" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: t}, metrics: [{type: acc}]}]}]",
            '"model-index[0].results[0].metrics[0].value" is required',
        ),
        ("- a", "the metadata must be a mapping"),
    ],
)
def test_card_errors(yaml: str, error: str) -> None:
    errors = read_card(f"---\n{yaml}\n---\n", "model").errors
    assert any(error in found for found in errors), errors


def test_card_of_a_merge() -> None:
    card = read_card("---\nbase_model: [a/b, c/d]\nlicense: other\ntags: [merge, merge]\n---\n", "model")
    assert not card.errors and not card.warnings
    relation = relation_of(card.data, adapter=False, quantized=False)
    assert relation == "merge"
    assert card_tags(card.data, "model", relation) == [
        *("merge", "base_model:a/b", "base_model:c/d", "base_model:merge:a/b", "base_model:merge:c/d", "license:other")
    ]
    one = {"base_model": "a/b"}
    assert relation_of(one, adapter=False, quantized=False) == "finetune"
    assert relation_of(one, adapter=True, quantized=False) == "adapter"
    assert relation_of(one, adapter=False, quantized=True) == "quantized"
    assert relation_of({**one, "base_model_relation": "merge"}, adapter=True, quantized=True) == "merge"
    assert relation_of({}, adapter=True, quantized=True) is None


def test_large_files() -> None:
    rules = attributes_of(DEFAULT_ATTRIBUTES["model"].encode())
    for path in ("model.safetensors", "a/b/x.bin", "saved_model/a/b", "x.tar.gz", "events.out.tfevents.1"):
        assert is_large(rules, path, 10, b"text"), path
    assert not is_large(rules, "model.safetensors", 0, b"")
    assert not is_large(rules, "config.json", 10, b"{}") and is_large(rules, "log.txt", 10 << 20, b"text")
    assert is_large(rules, "x", 600, b"\0" * 512) and is_large(rules, "x", 600, b"\xff\xfe" + b"a" * 510)
    # A sample that ends inside a character is still text; a file that does is not.
    assert not is_large(rules, "x", 600, b"a" * 511 + b"\xc3") and is_large(rules, "x", 512, b"a" * 511 + b"\xc3")
    own = attributes_of(b"*.png filter=lfs\n*.bin -filter\n")
    assert is_large(own, "i.png", 5, b"text") and not is_large(own, "x.bin", 5, b"text")


def test_ignored_files() -> None:
    rules = b"build/\n*.tmp\n!keep.tmp\n/root.txt\n"
    paths = ["build/x", "a/build/y", "b.tmp", "keep.tmp", "root.txt", "a/root.txt", "c"]
    assert ignored(rules, paths) == dict(zip(paths, [True, True, True, False, True, False, False], strict=True))
    assert not any(ignored(b"", paths).values())


def test_pointers() -> None:
    pointer = parse_pointer(pointer_text("a" * 64, 123))
    assert pointer is not None and (pointer.oid, pointer.size) == ("a" * 64, 123)
    for text in (b"", pointer_text("a" * 64, 1) + b"x", pointer_text("A" * 64, 1), pointer_text("a" * 63, 1)):
        assert parse_pointer(text) is None


def test_hash_text() -> None:
    # The example of the specification.
    assert xorb.hash_text(
        bytes(range(32))
    ) == "07060504030201000f0e0d0c0b0a0908171615141312111f1e1d1c1b1a1918".replace("1312111f", "131211101f")


def test_xorbs() -> None:
    source = random.Random(1)
    contents = [source.randbytes(1000), b"a" * 5000, struct.pack("<1001f", *range(1001)) + b"xyz", b"q"]
    schemes = [0, 1, 2, 2]
    body = b""
    for data, scheme in zip(contents, schemes, strict=True):
        grouped = b"".join(data[lane::4] for lane in range(4)) if scheme == 2 else data
        stored = grouped if scheme == 0 else lz4.frame.compress(grouped)
        body += (
            bytes([0]) + len(stored).to_bytes(3, "little") + bytes([scheme]) + len(data).to_bytes(3, "little") + stored
        )
    chunks = xorb.read_chunks(body)
    assert [xorb.chunk_data(body, chunk) for chunk in chunks] == contents
    nodes = [(xorb.chunk_hash(data), len(data)) for data in contents]
    name = xorb.hash_text(xorb.tree_hash(nodes))
    assert xorb.check_xorb(body, name) == xorb.check_xorb(body + b"XETBLOB and what follows", name)
    damaged = bytearray(body)
    damaged[20] ^= 1
    for bad in (bytes(damaged), body[:-1], body[: len(body) // 2], b"", b"\1" + body[1:]):
        with pytest.raises(ValueError):
            xorb.check_xorb(bad, name)
    # A chunk that would become larger than it says.
    bomb = lz4.frame.compress(bytes(1 << 20))
    header = bytes([0]) + len(bomb).to_bytes(3, "little") + bytes([1]) + (10).to_bytes(3, "little")
    with pytest.raises(ValueError, match="bytes instead of 10"):
        xorb.chunk_data(header + bomb, xorb.read_chunks(header + bomb)[0])


def test_shards_that_are_refused() -> None:
    head = bytes(32) + struct.pack("<2Q", 2, 0)
    for bad in (b"", head, bytes(48), head + bytes(32) + struct.pack("<2IQ", 0, 0, 0), head + b"\xff" * 20):
        with pytest.raises(ValueError):
            xorb.read_shard(bad)
    with pytest.raises(ValueError, match="cut off"):
        xorb.read_shard(head + bytes(32) + struct.pack("<2IQ", 1 << 30, 1 << 31, 0))
    assert xorb.read_shard(head + b"\xff" * 32 + bytes(16)) == []


def test_tree_edits(tmp_path: Path) -> None:
    with GitStore.create(tmp_path / "r.git") as git:
        blob = git.add_blob(b"x")
        editor = git.edit(None)
        for path in ("a/b/c", "a/d", "e"):
            editor.put(path, blob)
        with pytest.raises(NotADirectoryError):
            editor.put("e/f", blob)
        with pytest.raises(IsADirectoryError):
            editor.put("a", blob)
        for path in ("a/none", "none/x", "e/x"):
            with pytest.raises(KeyError):
                editor.remove(path, folder_only=False)
        with pytest.raises(KeyError):
            editor.remove("e", folder_only=True)
        first = git.commit(editor.store(), None, "me", "first\n\nbody")
        editor = git.edit(first)
        editor.remove("a/b/c", folder_only=False)
        editor.remove("e", folder_only=False)
        second = git.commit(editor.store(), first, "me", "second")
        assert [e.path for e in git.entries(first, recursive=True)] == ["a", "a/b", "a/b/c", "a/d", "e"]
        assert [e.path for e in git.entries(second, recursive=True)] == ["a", "a/d"]
        assert [(e.title, e.body, e.author) for e in git.history(second)] == [
            ("second", "", "me"),
            ("first", "body", "me"),
        ]
        changed = git.last_changes(second, ["a", "a/d"])
        assert (changed["a"].oid, changed["a/d"].oid) == (second, first)
        editor = git.edit(second)
        editor.remove("a", folder_only=True)
        third = git.commit(editor.store(), second, "me", "empty")
        assert list(git.entries(third)) == [] and git.resolve(third[:8]) == third and git.resolve("zzzzzzz") is None


def test_objects_are_whole_or_absent(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "objects", tmp_path / "incoming")
    oid = hashlib.sha256(b"data").hexdigest()
    for announced, size in ((oid, 5), ("0" * 64, 4), ("0" * 64, None)):
        with store.receive() as incoming, pytest.raises(ValueError):
            incoming.write(b"data")
            incoming.keep(announced, size)
    assert store.size(oid) is None and list((tmp_path / "incoming").iterdir()) == [] and list(store.all()) == []
    with store.receive() as incoming:
        incoming.write(b"da")
        incoming.write(b"ta")
        incoming.keep(oid, 4)
    assert store.size(oid) == 4 and list(store.all()) == [oid] and list((tmp_path / "incoming").iterdir()) == []


def test_signatures() -> None:
    signer = Signer()
    token, _ = signer.sign("put", {"oid": "x"}, seconds=60)
    assert signer.check("put", token)["oid"] == "x"
    expired, _ = signer.sign("put", {}, seconds=-1)
    for scope, text, status in (
        ("get", token, 403),
        ("put", token + "0", 401),
        ("put", "A" + token, 401),
        ("put", expired, 401),
        ("put", "", 401),
        ("put", "é.é", 401),
        ("put", Signer().sign("put", {}, seconds=60)[0], 401),
    ):
        with pytest.raises(HubFault) as caught:
            signer.check(scope, text)
        assert caught.value.status == status
