"""Sources that were deleted, gated, squashed, or uploaded anew: found out before any work, with what remains."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.checkpoint.model import Model
from hfmerge.errors import CorruptFileError
from hfmerge.hub.reference import FileInfo, ModelRef, Snapshot
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.entry import Material
from hfmerge.lifecycle.missing_sources import check_unchanged
from tests.fixtures import tiny
from tests.fixtures.hub import HOME, USERS
from tests.fixtures.shell import Shell


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    return root


@pytest.fixture(scope="module")
def maker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The machine that merges, and so has everything in its cache; this process has nothing of it in its own."""
    with Shell(**hub.env(tmp_path_factory.mktemp("maker"))) as shell:
        yield shell


@pytest.fixture
def ids(root: Path, maker: Shell, request: pytest.FixtureRequest) -> list[str]:
    """Fresh repositories of base and models, which tests may spoil, and a merge of three on the Hub: its ID first."""
    space = "v" + "".join(c for c in request.node.name.removeprefix("test_") if c.isalnum())[:24]
    names = ("base", "m0", "m1", "m2", "m3")
    for name in names:
        import_folder(os.environ["HF_ENDPOINT"], USERS["me"], root / name, f"{space}/{name}")
    models = [f"{space}/{name}" for name in names[1:4]]
    maker.done("merge", *models, "--base", f"{space}/base", "--method", "opcm", "--push-to", f"{space}/merged")
    return [f"{space}/{name}" for name in ("merged", *names)]


def changes(merged: str, *arguments: object, by: Callable[..., tiny.Run] = tiny.cli) -> str:
    """What a change that must fail says, in one line; the published merge stays."""
    before = HfApi().model_info(merged).sha
    run = by(*arguments, "--push-to", merged)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1, run.err
    assert HfApi().model_info(merged).sha == before
    return run.err


def test_a_deleted_model(ids: list[str], maker: Shell, tmp_path: Path) -> None:
    merged, _, m0, m1, m2, m3 = ids
    commit = HfApi().model_info(m1).sha
    HfApi().delete_repo(m1)
    for command in (("add", merged, m3), ("unmerge", merged, "--remove", m0)):
        text = changes(merged, *command)
        assert f"{m1}@{commit[:8]} can no longer be read from the Hub" in text
        assert f"`hfmerge unmerge {merged} --remove {m1}`, which does not read it" in text
        assert f"`hfmerge replace {merged} {m1} MODEL`" in text and "HF_HOME" in text
        assert "restore" not in text  # there is no earlier step
    replay = tiny.cli("verify", merged, "--replay")
    assert replay.code == 1 and f"{m1}@{commit[:8]} can no longer be read" in replay.out
    assert tiny.cli("verify", merged).code == 0
    # the machine that merged has it in its cache, which holds that very commit
    run = maker.done("unmerge", merged, "--remove", m0, "--output", tmp_path / "cached")
    assert f"{m1}@{commit[:8]} is gone from the Hub; the copy in this machine's cache is used" in run.err
    # the ways that were named
    tiny.done("unmerge", merged, "--remove", m1, "--output", tmp_path / "without")
    tiny.done("replace", merged, m1, m3, "--output", tmp_path / "other")
    tiny.done("unmerge", merged, "--remove", m1, "--push-to", merged)
    # nobody can read it any more, so whoever brings it back says that it may be published
    restore = ("restore", merged, "--step", "1")
    assert f"--publish-private {m1}" in changes(merged, *restore)
    tiny.done(*restore, "--push-to", merged, "--publish-private", m1)
    assert "`hfmerge restore" in changes(merged, "add", merged, m3)


def test_a_model_that_was_made_anew_is_found_again_by_its_digests(ids: list[str], root: Path) -> None:
    merged, _, _, m1, _, m3 = ids
    HfApi().delete_repo(m1)
    HfApi().create_repo(m1)
    HfApi().upload_folder(repo_id=m1, folder_path=root / "m1")
    now = HfApi().model_info(m1).sha
    text = changes(merged, "add", merged, m3)
    way = f"hfmerge replace {merged} {m1} {m1}@{now}"
    assert f"`{way}`, which has the same files" in text
    products = hfmerge.history(merged)[-1].entry.products
    tiny.done(*way.split()[1:], "--push-to", merged)
    assert hfmerge.history(merged)[-1].entry.products == products
    tiny.done("add", merged, m3, "--push-to", merged)


def test_a_base_that_was_made_anew_under_the_same_name(ids: list[str], root: Path) -> None:
    merged, base, _, _, _, m3 = ids
    api = HfApi()
    api.delete_repo(base)
    text = changes(merged, "add", merged, m3)
    assert f"{base}@" in text and "can no longer be read" in text and "`hfmerge rebase" not in text
    api.create_repo(base)
    api.upload_folder(repo_id=base, folder_path=root / "m2")  # other weights
    assert "`hfmerge rebase" not in changes(merged, "add", merged, m3)
    api.upload_folder(repo_id=base, folder_path=root / "base")
    text = changes(merged, "add", merged, m3)
    assert f"`hfmerge rebase {merged} --base {base}@{api.model_info(base).sha}`, which has the same files" in text


def test_a_model_that_was_gated(ids: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    merged, _, m0, m1, _, _ = ids
    HfApi().update_repo_settings(m1, gated="manual")
    monkeypatch.setenv("HF_TOKEN", USERS["other"])
    run = tiny.cli("unmerge", merged, "--remove", m0, "--output", tmp_path / "out")
    assert run.code == 1 and f"{m1}@" in run.err and "gated" in run.err and "You can use: " in run.err
    assert not (tmp_path / "out").exists()


def test_a_cache_that_holds_only_a_part(ids: list[str]) -> None:
    merged, _, _, m1, _, m3 = ids
    info = HfApi().model_info(m1)
    tiny.done("plan", m1, "--base", ids[1], "--method", "linear")  # reads config.json and a header
    HfApi().delete_repo(m1)
    held = sorted(path.name for path in Path(HOME).rglob(f"*{info.sha}/*"))
    assert "config.json" in held and "model.safetensors" not in held
    text = changes(merged, "add", merged, m3)
    assert (
        f"{m1}@{info.sha[:8]} can no longer be read from the Hub" in text
        and "not in the cache of this machine" in text
    )


def test_a_copy_in_the_cache_is_compared_with_the_ledger(
    ids: list[str], maker: Shell, tmp_path_factory: pytest.TempPathFactory
) -> None:
    merged, _, _, m1, _, m3 = ids
    HfApi().delete_repo(m1)
    (weights,) = tmp_path_factory.getbasetemp().rglob(f"models--{m1.replace('/', '--')}/snapshots/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    text = changes(merged, "add", merged, m3, by=maker.run)
    assert "model.safetensors is not the file that was merged" in text


def test_other_bytes_under_the_same_commit() -> None:
    """What no honest Hub gives: the commit is there, and lists another digest."""
    place, commit = ModelRef("org/a", "org/a", "0" * 40, None), "0" * 40
    files = {"config.json": "1" * 64, "model.safetensors": "2" * 64}
    material = Material("org/a", commit, None, "full", 1.0, files)

    def source(digest: str) -> Model:
        infos = {name: FileInfo(9, value) for name, value in {**files, "model.safetensors": digest}.items()}
        return Model("org/a", Snapshot(place, "org/a", commit, None, infos), "full", {}, None, {})

    assert check_unchanged(material, source("2" * 64)) == []
    with pytest.raises(CorruptFileError, match="org/a@00000000: model.safetensors is not the file that was merged"):
        check_unchanged(material, source("3" * 64))


def test_a_base_folder_with_other_weights_under_the_same_name(root: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(root / "base", tmp_path / "base"))
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", root / "m1", "--base", base, "--method", "linear", "--output", out)
    shutil.copyfile(root / "m3" / "model.safetensors", base / "model.safetensors")
    before = tiny.everything(out)
    run = tiny.cli("add", out, root / "m2")
    assert run.code == 1 and "base@" in run.err and "are not those that were merged" in run.err
    assert tiny.everything(out) == before
    tiny.done("rebase", out, "--base", base)  # which says that this is what is wanted
    tiny.done("add", out, root / "m2")
    assert tiny.done("verify", out, "--replay").code == 0
