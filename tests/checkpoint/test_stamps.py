"""Digests that are remembered: only for a file that nobody can have changed since it was hashed."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hfmerge.digest_cache import SETTLED, remembered_digest
from hfmerge.errors import CorruptFileError
from hfmerge.hashing import sha256_file
from tests.fixtures import tiny


TAKEN: list[str] = []
"""Files of `settled` that a test has had."""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where digests are noted, empty."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    yield tmp_path / "home" / "hfmerge" / "digests"


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files whose times lie back far enough, one for each test."""
    folder = tmp_path_factory.mktemp("settled")
    for i in range(20):
        (folder / f"weights-{i}").write_bytes(b"a" * 1000)
    time.sleep(SETTLED / 1e9 + 0.1)
    yield folder


@pytest.fixture
def old(settled: Path) -> Path:
    """A file that no other test has changed."""
    path = min(path for path in settled.iterdir() if path.name not in TAKEN)
    TAKEN.append(path.name)
    return path


def read(path: Path) -> tuple[str, int]:
    """The digest, and how many bytes were hashed for it."""
    counts: list[int] = []
    return remembered_digest(path, lambda name: sha256_file(name, counts.append)), sum(counts)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_has_not_changed_is_not_read_again(notes: Path, old: Path, tmp_path: Path) -> None:
    assert read(old) == (digest(old), 1000)
    assert read(old) == (digest(old), 0)
    link = tmp_path / "link"
    link.symlink_to(old)
    assert read(link) == (digest(old), 0), "as files lie in the cache of the Hub"
    shutil.rmtree(notes)
    assert read(old) == (digest(old), 1000)


@pytest.mark.parametrize("how", ["content", "times set back", "another file in its place", "shorter"])
def test_what_has_changed_is_read_again(notes: Path, old: Path, tmp_path: Path, how: str) -> None:
    read(old)
    before = old.stat()
    if how == "another file in its place":
        (tmp_path / "other").write_bytes(b"b" * 1000)
        os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(tmp_path / "other", old)
    else:
        with open(old, "r+b") as file:
            file.write(b"b")
            if how == "shorter":
                file.truncate(999)
        if how == "times set back":
            os.utime(old, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert old.stat().st_mtime_ns == before.st_mtime_ns
    assert read(old) == (digest(old), old.stat().st_size)


def test_what_was_changed_a_moment_ago_is_not_remembered(notes: Path, tmp_path: Path) -> None:
    """A second change in the same tick of the clock would show nowhere."""
    path = tmp_path / "new"
    path.write_bytes(b"a")
    assert read(path)[1] == read(path)[1] == 1
    assert not notes.exists()


def test_what_comes_from_the_future_is_not_remembered(notes: Path, old: Path) -> None:
    os.utime(old, (time.time() + 1e6,) * 2)
    assert read(old)[1] == read(old)[1] == 1000


@pytest.mark.parametrize("note", [b"", b"{}", b"[1]", b"\xff", b'["x", 3]', b"[[1, 2], null]"])
def test_a_note_that_cannot_be_read_is_made_anew(notes: Path, old: Path, note: bytes) -> None:
    read(old)
    (path,) = notes.iterdir()
    path.write_bytes(note)
    assert read(old) == (digest(old), 1000) and read(old) == (digest(old), 0)


def test_a_home_that_cannot_be_written_costs_time_only(notes: Path, old: Path) -> None:
    notes.parent.parent.mkdir()
    notes.parent.write_bytes(b"")
    assert read(old) == read(old) == (digest(old), 1000)


@pytest.mark.slow
def test_a_source_that_changes_in_place_shows_in_the_ledger(notes: Path, tmp_path: Path) -> None:
    """Two merges of one folder, whose weights were edited in between without a change of size or of times."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    for i, name in enumerate(("base", "m")):
        tiny.save(tiny.fine_tune(base, i) if i else base, tmp_path / name)
    time.sleep(SETTLED / 1e9 + 0.1)
    weights = tmp_path / "m" / "model.safetensors"
    call = ("merge", "--base", tmp_path / "base", tmp_path / "m", "--method", "linear", "--quiet", "--output")
    tiny.done(*call, tmp_path / "first")
    assert len(list(notes.iterdir())) >= 2
    before, first = weights.stat(), digest(weights)
    with open(weights, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    tiny.done(*call, tmp_path / "second")
    entries = [(tmp_path / name / "merge_history" / "0001.json").read_text() for name in ("first", "second")]
    assert first in entries[0] and digest(weights) in entries[1] and first not in entries[1]


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    """For who merges it see `test_stacking.py`."""
    from hfmerge.checkpoint import digests as digesting
    from hfmerge.checkpoint.describe import describe

    tiny.save(tiny.build("LlamaForCausalLM", tiny.config("llama")), tmp_path / "m")
    source = describe(str(tmp_path / "m"))

    def broken(path: str) -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(CorruptFileError, match="/m: .* cannot be read: Input/output error") as found:
        digesting.digests(source, broken)
    assert "\n" not in str(found.value)
