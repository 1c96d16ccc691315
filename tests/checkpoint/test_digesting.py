"""Digests of large files, hashed in processes of their own: the same ones, whatever becomes of such a process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from hfmerge import hashing
from hfmerge.checkpoint import digests as digesting
from hfmerge.checkpoint.digests import Apart
from hfmerge.hashing import sha256_file
from tests.fixtures import tiny


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every file is large; what is started for them."""
    calls: list[list[str]] = []
    popen = subprocess.Popen

    def told(call: list[str], **options: object) -> object:
        calls.append(call)
        return popen(call, **options)  # type: ignore[call-overload]  # as it was called

    monkeypatch.setattr(digesting, "LARGE", 0)
    monkeypatch.setattr(digesting.subprocess, "Popen", told)
    return calls


def written(folder: Path, name: str = "weights") -> Path:
    path = folder / name
    path.write_bytes(os.urandom(3 * hashing.CHUNK + 5))
    return path


@pytest.mark.parametrize("name", ["weights", "with space", "umläut", os.fsdecode(b"\xff"), "-c"])
def test_the_same_digest(started: list[list[str]], tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Apart().sha256(str(path)) == sha256_file(path) == wanted
    assert len(started) == 1


@pytest.mark.parametrize("why", ["small", "frozen", "embedded"])
def test_some_files_have_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(digesting.subprocess, "Popen", None)
    if why != "small":
        monkeypatch.setattr(digesting, "LARGE", 0)
        monkeypatch.setattr(sys, *(("frozen", True) if why == "frozen" else ("executable", "")), raising=False)
    path = written(tmp_path)
    assert Apart().sha256(str(path)) == sha256_file(path)


@pytest.mark.parametrize("fault", ["killed", "fails", "cannot be started"])
def test_without_its_process_it_is_hashed_here(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = written(tmp_path)
    deaths = {"killed": "import os; print('ab', flush=True); os.kill(os.getpid(), 9)", "fails": "print('ab'); exit(1)"}
    told = digesting.subprocess.Popen

    def broken(call: list[str], **options: object) -> object:
        if fault == "cannot be started":
            raise OSError(12, "Cannot allocate memory")
        return told([sys.executable, "-c", deaths[fault]], **options)  # type: ignore[call-overload]  # as it was called

    monkeypatch.setattr(digesting.subprocess, "Popen", broken)
    assert Apart().sha256(str(path)) == sha256_file(path)


def test_what_cannot_be_read_is_an_error(started: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Apart().sha256(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        Apart().sha256(str(tmp_path / "none"))


def test_closing_gives_up_what_is_being_hashed(started: list[list[str]], tmp_path: Path) -> None:
    endless = tmp_path / "sparse"
    with open(endless, "wb") as file:
        file.truncate(1 << 38)
    apart, raised = Apart(), []

    def hashing() -> None:
        try:
            apart.sha256(str(endless))
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=hashing)
    thread.start()
    while not started:
        time.sleep(0.01)
    time.sleep(0.2)
    apart.close()
    thread.join(10.0)
    assert raised and not thread.is_alive()
    with pytest.raises(CancelledError):
        apart.sha256(str(endless))
    assert len(started) == 1


def test_a_merge_records_the_same_digests(started: list[list[str]], tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    for i, name in enumerate(("base", "m")):
        tiny.save(tiny.fine_tune(base, i) if i else base, tmp_path / name)
    call = ("merge", "--base", tmp_path / "base", tmp_path / "m", "--method", "linear", "--quiet", "--output")
    tiny.done(*call, tmp_path / "out")
    entry = (tmp_path / "out" / "merge_history" / "0001.json").read_text()
    for name in ("base", "m"):
        weights = tmp_path / name / "model.safetensors"
        assert [hashing.__file__, str(weights.resolve())] in [call[-2:] for call in started]
        assert sha256_file(weights) in entry
