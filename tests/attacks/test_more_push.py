"""More attacks on pushes and on repeated commands: what they delete, what they publish, what they believe."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import HfApi

from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.card import BEGIN
from tests.fixtures import tiny
from tests.fixtures.hub import USERS


pytestmark = pytest.mark.slow


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


# cards of strangers


@pytest.mark.parametrize("repo", ["[1]", "{a: 1}", "12", "2026-01-01"])
def test_a_card_whose_repository_is_no_name(changed: Path, tmp_path: Path, repo: str) -> None:
    """The front matter of a stranger's card gives a list as the name of the repository, and `verify` breaks."""
    out = shutil.copytree(changed / "out", tmp_path / "out")
    card = out / "README.md"
    card.write_text(card.read_text().replace("\nhfmerge:\n", f"\nhfmerge:\n  repo: {repo}\n", 1))
    run = tiny.cli("verify", out)
    assert run.code == 1 and "FAIL card: README.md: `hfmerge` is" in run.out, run


@pytest.mark.parametrize("text", ["<!-- hfmerge:figures:begin -->", "\0"], ids=["markers", "zeros"])
def test_a_card_that_keeps_a_change_busy(changed: Path, tmp_path: Path, text: str) -> None:
    """A stranger's card of half a megabyte: markers without end are searched for ever, zeros become copies of a block.

    Markers took time that grows with their square; each zero was replaced by the whole new block.
    """
    out = shutil.copytree(changed / "out", tmp_path / "out")
    card = out / "README.md"
    card.write_text(card.read_text() + text * (500_000 // len(text)))
    start = time.monotonic()
    tiny.done("add", out, changed / "a", "--source", f"base={changed / 'base'}", "--source", f"b={changed / 'b'}")
    assert time.monotonic() - start < 10
    written = card.read_text()
    assert written.count(BEGIN) == 1 and len(written) < 600_000
    assert written.endswith(text * (500_000 // len(text)))


def test_a_card_whose_tags_are_no_texts(changed: Path, tmp_path: Path) -> None:
    """A stranger's card gives lists and mappings as tags, which break every change of the merge."""
    out = shutil.copytree(changed / "out", tmp_path / "out")
    card = out / "README.md"
    card.write_text(re.sub("(?m)^tags:$", "tags:\n- [1]\n- {a: b}\n- mine", card.read_text(), count=1))
    tiny.done("add", out, changed / "a", "--source", f"base={changed / 'base'}", "--source", f"b={changed / 'b'}")
    front = card.read_text().partition("\n---\n")[0]
    assert "- mine" in front and "[1]" not in front and "a: b" not in front


# pushes


def test_a_private_repository_by_the_folder_of_its_cache(hub: HubServer, changed: Path, tmp_path: Path) -> None:
    """The user gives the snapshot of a private repository in their cache as a folder, and the merge becomes public."""
    api = HfApi()
    api.create_repo("me/cached-secret", private=True)
    api.upload_folder(repo_id="me/cached-secret", folder_path=changed / "b")
    snapshot = api.snapshot_download("me/cached-secret", cache_dir=tmp_path / "cache")
    models = ("merge", changed / "a", snapshot, "--base", changed / "base", "--method", "linear")
    run = tiny.done(*models, "--push-to", "me/cached-new")
    assert api.model_info("me/cached-new").private and "me/cached-secret" in run.err
    api.create_repo("me/cached-public")
    run = tiny.cli(*models, "--push-to", "me/cached-public")
    assert run.code == 1 and "--publish-private me/cached-secret" in run.err, run.err
    tiny.done(*models, "--output", tmp_path / "out")
    run = tiny.cli("push", tmp_path / "out", "me/cached-public")
    assert run.code == 1 and "--publish-private me/cached-secret" in run.err, run.err
    tiny.done("push", tmp_path / "out", "me/cached-public", "--publish-private", "me/cached-secret")


def test_a_card_at_the_target_that_is_no_text(hub: HubServer, changed: Path) -> None:
    """The card of the repository that is pushed to is no UTF-8: found out before any work, and in one line."""
    api = HfApi()
    api.create_repo("me/latin")
    line = {"path": "README.md", "content": base64.b64encode(b"caf\xe9").decode(), "encoding": "base64"}
    body = [{"key": "header", "value": {"summary": "a card"}}, {"key": "file", "value": line}]
    headers = {"Authorization": f"Bearer {USERS['me']}", "Content-Type": "application/x-ndjson"}
    address = f"{hub.endpoint}/api/models/me/latin/commit/main"
    urlopen(Request(address, "\n".join(map(json.dumps, body)).encode(), headers)).close()
    models = ("merge", changed / "a", changed / "b", "--base", changed / "base", "--method", "linear")
    run = tiny.cli(*models, "--push-to", "me/latin")
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, run.err
    assert "me/latin: the README.md there cannot be kept" in run.err and "merging" not in run.out
