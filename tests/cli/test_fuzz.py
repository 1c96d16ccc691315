"""Valid files with something changed at random: every command ends soon, with a result or with one of our errors.

`HFMERGE_FUZZ=2000 pytest tests/cli/test_fuzz.py` tries so many examples of each kind of file, other ones each time;
without it the examples are few, and the same each time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfmerge.checkpoint.archive import read_manifest
from hfmerge.errors import HfMergeError
from tests.fixtures import tiny


MANY = int(os.environ.get("HFMERGE_FUZZ", "0"))
SECONDS = 5.0
"""Of processor time, that a command may take."""
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e300, 2**31, 2**63, 2**64, -(2**80), "", " ", "1", "x", "\n", "\0",
    "..",
    "../../x", "/etc/passwd", "a/b", "a/b/c", "a\\b", "\u202e", "\x1b[31m", "\ud800", "é" * 300, "x" * 20_000,
    "0" * 40, "0" * 64, "A" * 64, "NaN", "*", "[", "(a+)+b", "{{x}}", "a@" + "0" * 40, "a@sha256:" + "0" * 64,
    "~nobody", "a+b", "hf://x", [], {}, [[]], [{}],
    {"": ""}, {"x": None}, [None], ["x", 1], [0, 1], {"0": 0}, [["*", 1.0]], [["x", 1.0], ["*", None]],
    float("nan"), float("inf"), -float("inf"),
]  # fmt: skip

EASY = settings(
    max_examples=MANY or 30,
    derandomize=not MANY,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside of a value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:20]))
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value with one to three changes: something replaced, taken out, put in, renamed, or moved elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        new = copy.deepcopy(draw(st.sampled_from(JUNK)))
        how = draw(st.sampled_from(["replace", "replace", "drop", "add", "rename", "move"]))
        if not path:
            if how == "replace" and draw(st.integers(0, 9)) == 0:
                value = new
            continue
        parent = value
        for part in path[:-1]:
            parent = parent[part]
        key = path[-1]
        if how == "replace":
            parent[key] = new
        elif how == "drop":
            del parent[key]
        elif how == "move":
            other = value
            for part in draw(st.sampled_from(places(value))):
                other = other[part]
            parent[key] = copy.deepcopy(other)
        elif isinstance(parent, dict):
            name = new if isinstance(new, str) else draw(st.sampled_from(["x", "learn", "learned", "kept", "r"]))
            parent[name] = parent.pop(key) if how == "rename" else new
        else:
            parent.insert(key, new)
    return value


def tried(*arguments: object) -> tiny.Run:
    """Run a command; whatever the files say, it ends soon, and with an error of ours if with any."""
    began = time.process_time()
    run = tiny.cli(*arguments)
    assert run.code in (0, 1), run
    assert run.code == 0 or run.err.startswith("hfmerge: ") or "FAIL" in run.out, run
    assert time.process_time() - began < SECONDS, arguments
    return run


def encoded(value: Any) -> bytes:
    """As hfmerge writes JSON, with NaN and halves of surrogate pairs as JSON readers take them."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def canonical(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return encoded(value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune with a head, another in shards, an adapter, and a merge of two with two entries."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 7, ["a", "b"]), root / "headed")
    tiny.save(tiny.fine_tune(base, 2), root / "sharded", max_shard_size="4KB")
    tiny.adapter(
        root / "adapter", {"encoder.layer.0.attention.self.query": (16, 16)}, 1,
        rank_pattern={".*query": 2}, alpha_pattern={"^encoder.layer.0.*": 3.0},
    )  # fmt: skip
    tiny.done("merge", root / "headed", "--base", root / "base", "--method", "opcm", "--output", root / "merged")
    tiny.done("add", root / "merged", root / "sharded")
    for name in ("headed", "sharded", "adapter"):
        tiny.done("plan", root / name, "--base", root / "base", "--method", "opcm")
    return root


@pytest.fixture(scope="module")
def copied(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a folder of `root` in a copy that one example spoils and the next finds as it was but for that file."""
    place = tmp_path_factory.mktemp("spoilt")

    def copy_of(name: str) -> Path:
        if not (place / name).exists():
            shutil.copytree(root / name, place / name)
        return place / name

    return copy_of


Copied = Callable[[str], Path]


def entry(root: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "merged" / "merge_history" / f"{step:04d}.json").read_bytes())
    return found


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_ledger_entries(root: Path, copied: Copied, data: st.DataObject) -> None:
    """The second of two entries, or the first with the second linked to it; the card names the digest of the last."""
    folder, first, second = copied("merged"), entry(root, 1), entry(root, 2)
    if data.draw(st.booleans()):
        second = data.draw(changed(second))
    else:
        first = data.draw(changed(first))
        second["parent"] = hashlib.sha256(canonical(first)).hexdigest()
    card = (root / "merged" / "README.md").read_text()
    old = hashlib.sha256((root / "merged" / "merge_history" / "0002.json").read_bytes()).hexdigest()
    (folder / "README.md").write_text(card.replace(old, hashlib.sha256(canonical(second)).hexdigest()))
    (folder / "merge_history" / "0001.json").write_bytes(canonical(first))
    (folder / "merge_history" / "0002.json").write_bytes(canonical(second))
    if tried("history", folder, "--json").code == 0:
        tried("history", folder)
        tried("verify", folder)
        tried("diff", folder, "1", "2")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_headers(root: Path, copied: Copied, data: st.DataObject) -> None:
    folder = copied("headed")
    header, rest = header_of(root / "headed" / "model.safetensors")
    text = json.dumps(data.draw(changed(header))).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rest)
    tried("plan", folder, "--base", root / "base", "--method", "opcm")


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_indexes(root: Path, copied: Copied, data: st.DataObject) -> None:
    folder, name = copied("sharded"), "model.safetensors.index.json"
    value = json.loads((root / "sharded" / name).read_text())
    (folder / name).write_bytes(encoded(data.draw(changed(value))))
    tried("plan", folder, "--base", root / "base", "--method", "opcm")


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_configurations(root: Path, copied: Copied, data: st.DataObject) -> None:
    folder = copied("headed")
    shutil.copy(root / "headed" / "model.safetensors", folder / "model.safetensors")
    value = json.loads((root / "headed" / "config.json").read_text())
    (folder / "config.json").write_bytes(encoded(data.draw(changed(value))))
    tried("plan", folder, "--base", root / "base", "--method", "opcm")
    shutil.copy(root / "headed" / "config.json", folder / "config.json")


@EASY
@given(data=st.data())
def test_adapter_configurations(root: Path, copied: Copied, data: st.DataObject) -> None:
    folder = copied("adapter")
    value = json.loads((root / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_bytes(encoded(data.draw(changed(value))))
    tried("plan", folder, "--base", root / "base", "--method", "opcm")


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_cards(root: Path, copied: Copied, data: st.DataObject) -> None:
    folder = copied("merged")
    for file in ("0001.json", "0002.json"):
        shutil.copy(root / "merged" / "merge_history" / file, folder / "merge_history" / file)
    _, front, rest = (root / "merged" / "README.md").read_text().split("---\n", 2)
    value = yaml.safe_load(front)
    text = yaml.safe_dump(data.draw(changed(value)), allow_unicode=True)
    if data.draw(st.booleans()):  # a few characters at random places
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(text)))
            text = text[:at] + data.draw(st.sampled_from(list("&*!|>?:-[]{},#%@`'\"\t\n~<= "))) + text[at:]
    (folder / "README.md").write_text(f"---\n{text}---\n{rest}", encoding="utf-8", errors="replace")
    tried("verify", folder)


@EASY
@given(data=st.data())
def test_recipes(root: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    value = {
        "base": str(root / "base"),
        "models": [{"model": str(root / "headed"), "weight": {"encoder.*": 0.5, "*": 1.0}}, str(root / "adapter")],
        "method": {"name": "ties", "density": 0.5, "norm": "mean"},
        "dtype": "float32", "include": ["*"], "exclude": ["x"], "state": "last", "keep_sources": False,
    }  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(data.draw(changed(value)), sort_keys=False, allow_unicode=True), errors="replace")
    tried("plan", path)


@EASY
@given(data=st.data())
def test_manifests(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    value: Any = {
        "schema": "hfmerge/kept/1", "base": "base@sha256:" + "0" * 64,
        "files": {
            "model.safetensors": {"size": 10, "sha256": "1" * 64}, "+config.json": {"size": 2, "sha256": "2" * 64},
        },
        "against": {"model.safetensors": {"a": "b"}},
    }  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "copy.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", encoded(data.draw(changed(value))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_manifest(path)
    except HfMergeError:
        pass


@pytest.mark.slow
@EASY
@given(data=st.data())
def test_heads_and_bases(root: Path, copied: Copied, data: st.DataObject) -> None:
    """The same faults in the base, to which all models are compared, and a merge of it."""
    folder = copied("base")
    value = json.loads((root / "base" / "config.json").read_text())
    (folder / "config.json").write_bytes(encoded(data.draw(changed(value))))
    tried("plan", root / "headed", root / "adapter", "--base", folder, "--method", "ties")
