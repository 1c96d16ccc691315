"""More attacks on pushes and on repeated commands: what they delete, what they publish, what they believe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in a folder whose last step took a model out, beside its models."""
    root = tmp_path_factory.mktemp("more-push")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i, name in enumerate(("a", "b")):
        tiny.save(tiny.fine_tune(base, i + 1), root / name)
    flags = ("--base", root / "base", "--method", "task_arithmetic", "--state", "last", "--output", root / "out")
    tiny.done("merge", root / "a", root / "b", *flags)
    tiny.done("unmerge", root / "out", "--remove", "a")
    return root


@pytest.mark.parametrize("target", [".", "mine"])
def test_a_repeated_removal_deletes_nothing_through_a_link(changed: Path, tmp_path: Path, target: str) -> None:
    """In a stranger's clone `merge_state` is a link to the clone, or to notes in it, which a repetition cleans out."""
    out = shutil.copytree(changed / "out", tmp_path / "out")
    shutil.rmtree(out / "merge_state")
    (out / "mine").mkdir()
    (out / "mine" / "notes.md").write_text("months of work")
    before = tiny.everything(out)
    os.symlink(target, out / "merge_state")
    tiny.done("unmerge", out, "--remove", "a")
    assert tiny.everything(out) == before
    assert not (out / "merge_state").is_symlink()


def test_a_link_in_the_place_of_a_leftover_is_named(changed: Path, tmp_path: Path) -> None:
    """A stranger's archive holds a link where a killed run would leave its folder, and a repetition fails unsaid."""
    out = shutil.copytree(changed / "out", tmp_path / "out")
    (tmp_path / "precious").mkdir()
    os.symlink(tmp_path / "precious", tmp_path / ".out.hfmerge-old")
    run = tiny.cli("unmerge", out, "--remove", "a")
    assert run.code == 1 and "is a link" in run.err and len(run.err.strip().splitlines()) == 1, run.err
    assert (tmp_path / "precious").is_dir()
