"""Kept copies of sources: they give the files back byte for byte, and a merge lives on when its sources are gone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from safetensors.torch import save_file

import hfmerge
from hfmerge.checkpoint.archive import Manifest, read_manifest, unpack
from hfmerge.checkpoint.describe import describe
from hfmerge.checkpoint.reader import Reader
from hfmerge.errors import CorruptFileError
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.entry import Entry, archive_file
from tests.fixtures import tiny
from tests.fixtures.hub import HOME, USERS
from tests.fixtures.launching import crew, start, succeed
from tests.fixtures.shell import Shell


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
        (root / f"m{i}" / "README.md").write_text(f"---\nlicense: mit\n---\nModel {i}.\n")
    return root


@pytest.fixture(scope="module")
def maker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The machine that merges, and so has everything in its cache; this process has nothing of it in its own."""
    with Shell(**hub.env(tmp_path_factory.mktemp("maker"))) as shell:
        yield shell


@pytest.fixture
def ids(root: Path, maker: Shell, request: pytest.FixtureRequest) -> list[str]:
    """Fresh repositories, which tests may spoil, and a merge of three with their copies on the Hub: its ID first."""
    space = "k" + "".join(c for c in request.node.name.removeprefix("test_") if c.isalnum())[:24]
    names = ("base", "m0", "m1", "m2", "m3")
    for name in names:
        import_folder(os.environ["HF_ENDPOINT"], USERS["me"], root / name, f"{space}/{name}")
    models = [f"{space}/{name}" for name in names[1:4]]
    flags = ("--base", f"{space}/base", "--method", "opcm", "--keep-sources", "--push-to", f"{space}/merged")
    maker.done("merge", *models, *flags)
    return [f"{space}/{name}" for name in ("merged", *names)]


def entry_of(folder: Path) -> Entry:
    return hfmerge.history(folder)[-1].entry


def last(merged: str) -> Entry:
    return hfmerge.history(merged)[-1].entry


def copies(entry: Entry) -> list[str]:
    """Paths of the copies that an entry names: the base's, then the models'."""
    return [archive_file(str(one.kept)) for one in (entry.base, *entry.models)]


def on_branch(merged: str) -> list[str]:
    files = HfApi().list_repo_files(merged, revision="merge-state")
    return sorted(name for name in files if name.startswith("merge_state/sources/"))


def in_folder(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "merge_state/sources").iterdir())


def cached(repo_id: str) -> list[Path]:
    """Files of a model in this process's cache."""
    return sorted((Path(HOME) / "hub" / f"models--{repo_id.replace('/', '--')}").glob("snapshots/*/*"))


def kept_merge(out: Path, base: Path, *models: object, method: str = "task_arithmetic") -> Entry:
    tiny.done("merge", *models, "--base", base, "--method", method, "--keep-sources", "--output", out)
    return entry_of(out)


def restored(archive: Path, place: Path, base: Path) -> Manifest:
    """Unpack all of an archive into a folder; what is beneath an adapter into `+`."""
    manifest = read_manifest(archive)
    targets = {name: place / (f"+/{name[1:]}" if name.startswith("+") else name) for name in manifest.files}
    with Reader(describe(str(base), allow_pickle=True)) as reader:
        unpack(archive, manifest, targets, lambda: reader)
    return manifest


# the archive


def dtypes(folder: Path, dtype: str) -> Path:
    import torch

    tiny.edit(folder, lambda held: held.update({k: v.to(getattr(torch, dtype)) for k, v in held.items()}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_come_back_byte_for_byte(root: Path, tmp_path: Path, dtype: str) -> None:
    """A model whose tensors are those of the base but for one that is in another dtype and one in another file."""
    import torch

    base, m0 = (dtypes(Path(shutil.copytree(root / name, tmp_path / name)), dtype) for name in ("base", "m0"))
    tiny.edit(m0, lambda held: held.update({"embeddings.LayerNorm.bias": held["embeddings.LayerNorm.bias"].double()}))
    tiny.tokenizer(m0, ["[UNK]", "a", "b"])
    sharded = tmp_path / "m1"
    model = tiny.fine_tune(tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1)), 9)
    tiny.save(model.to(getattr(torch, dtype)), sharded, max_shard_size="4KB")
    (m0 / "notes.txt").write_text("not needed")
    entry = kept_merge(tmp_path / "out", base, m0, sharded)
    for name, file, folder in zip(("base", "m0", "m1"), copies(entry), (base, m0, sharded), strict=True):
        manifest = restored(tmp_path / "out" / file, tmp_path / "back" / name, base)
        wanted = {k: v for k, v in tiny.everything(folder).items() if k != "notes.txt"}
        assert tiny.everything(tmp_path / "back" / name) == wanted
        assert (manifest.base is None) == (name == "base")
        pairs = [tensor for tensors in manifest.against.values() for tensor in tensors]
        assert name == "base" or ("embeddings.LayerNorm.bias" in pairs) == (name == "m1") and len(pairs) > 10
    assert len(list(sharded.glob("*.safetensors"))) > 1


def test_adapters_and_what_is_beneath_them(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    folders = {
        "base": tiny.save(base, tmp_path / "base"),
        "a": tiny.adapter(tmp_path / "a", tiny.attention(), 1),
        "other": tiny.save(tiny.fine_tune(base, 1), tmp_path / "other"),
        "b": tiny.adapter(tmp_path / "b", tiny.attention(), 2, saved={"lm_head.weight": base.lm_head.weight.data + 1}),
    }
    pair = f"{folders['other']}+{folders['b']}"
    entry = kept_merge(tmp_path / "out", folders["base"], folders["a"], pair)
    _, a, b = copies(entry)
    assert restored(tmp_path / "out" / a, tmp_path / "back/a", folders["base"]).base is None
    manifest = restored(tmp_path / "out" / b, tmp_path / "back/b", folders["base"])
    assert manifest.base == entry.base.identity and set(manifest.against) >= {"+model.safetensors"}
    for name, place in (("a", "a"), ("other", "b/+")):
        assert tiny.everything(tmp_path / "back" / place) == tiny.everything(folders[name])
    own = {name: digest for name, digest in tiny.everything(tmp_path / "back/b").items() if name[0] != "+"}
    assert own == tiny.everything(folders["b"])
    # both of the pair are gone, and the base too
    before = tiny.files(tmp_path / "out")
    for folder in folders.values():
        shutil.rmtree(folder)
    assert tiny.done("verify", tmp_path / "out", "--replay").code == 0
    tiny.done("unmerge", tmp_path / "out", "--remove", "a")
    assert entry_of(tmp_path / "out").models[0].identity == entry.models[1].identity
    assert entry_of(tmp_path / "out").models[0].beneath == entry.models[1].beneath
    assert tiny.files(tmp_path / "out") != before and len(in_folder(tmp_path / "out")) == 2


def test_a_fine_tune_takes_less_room_than_it_has_bytes(tmp_path: Path) -> None:
    """Copies are packed against the base: a small change of large weights leaves signs, exponents and first digits."""
    base = tiny.build("BertModel", tiny.config("bert", hidden_size=64, intermediate_size=256))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1, 0.0005), tmp_path / "near")
    tiny.save(tiny.fine_tune(base, 2, 5.0), tmp_path / "far")
    flags = ("--base", tmp_path / "base", "--method", "linear", "--keep-sources")
    plan = tiny.done("plan", tmp_path / "near", tmp_path / "far", *flags, "--json").json["estimate"]
    out = tmp_path / "out"
    entry = kept_merge(out, tmp_path / "base", tmp_path / "near", tmp_path / "far", method="linear")
    whole, near, far = ((out / file).stat().st_size for file in copies(entry))
    assert near < 0.75 * whole and near < 0.8 * far
    assert whole + near + far <= plan["sources"] <= 3.2 * (tmp_path / "base/model.safetensors").stat().st_size
    assert plan["disk"] >= plan["sources"] + plan["output"]
    text = tiny.done("plan", tmp_path / "near", tmp_path / "far", *flags).out
    assert "sources  copies are kept beside the state and published with it: at most" in text


def test_equal_sources_give_equal_archives_on_any_number_of_processes(root: Path, tmp_path: Path) -> None:
    command = ["merge", str(root / "m0"), str(root / "m1"), "--base", str(root / "base"), "--method", "linear"]
    command += ["--keep-sources", "--output"]
    two = crew(2, "-m", "hfmerge", *command, str(tmp_path / "two"))
    tiny.done(*command, tmp_path / "one")
    succeed(two)
    assert in_folder(tmp_path / "one") == in_folder(tmp_path / "two") == sorted(copies(entry_of(tmp_path / "one")))
    assert tiny.files(tmp_path / "one") == tiny.files(tmp_path / "two")
    assert tiny.done("verify", tmp_path / "two").code == 0


def test_the_benchmark_works(root: Path) -> None:
    process = start("-m", "benchmarks.kept_sources", str(root / "base"), str(root / "m0"), together=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    base, m0 = map(json.loads, out.splitlines())
    assert base["tensors against the base"] == 0 < m0["tensors against the base"] and 0 < m0["ratio"] < 1.1


# sources that are gone


def test_all_sources_are_deleted_from_the_hub(ids: list[str], root: Path, tmp_path: Path) -> None:
    merged, base, m0, m1, m2, m3 = ids
    before = last(merged)
    assert sorted(copies(before)) == on_branch(merged)
    for repo_id in (base, m0, m1, m2):
        HfApi().delete_repo(repo_id)
        assert not cached(repo_id)
    # nobody can read them any more, so whoever publishes what they went into says that it may be
    allowed = [word for name in (base, m1, m2) for word in ("--publish-private", name)]
    run = tiny.done("unmerge", merged, "--remove", m0, "--push-to", merged, *allowed)
    assert f"{m1}@" in run.err and "is gone; the copy of it that the merge keeps is used, from" in run.err
    middle = last(merged)
    assert middle.base == before.base
    assert [m.identity for m in middle.models] == [m.identity for m in before.models[1:]]
    assert [m.kept for m in middle.models] == [m.kept for m in before.models[1:]]
    # the copy of the model that left is gone with it
    assert on_branch(merged) == sorted(copies(middle)) and copies(before)[1] not in on_branch(merged)
    tiny.done("add", merged, m3, "--push-to", merged, *allowed)
    assert on_branch(merged) == sorted(copies(last(merged)))
    report = tiny.done("verify", merged, "--replay")
    assert "with the same bytes" in report.out and "has its digest (by LFS id, as the Hub lists it)" in report.out
    never = tmp_path / "never"
    flags = ("--base", root / "base", "--method", "opcm", "--output", never)
    tiny.done("merge", *(root / name for name in ("m1", "m2", "m3")), *flags)
    assert last(merged).products == entry_of(never).products
    # what came back is what was there, and the Hub's cache knows nothing of it
    for material, name in zip((before.base, *before.models[1:]), ("base", "m1", "m2"), strict=True):
        place = Path(HOME) / "hfmerge/kept" / str(material.kept) / "own" / material.name.replace("/", "--")
        held = {path.name: path.read_bytes() for path in place.iterdir()}
        assert held == {path.name: path.read_bytes() for path in (root / name).iterdir()}
        assert not cached(material.name)


def test_an_adapter_and_what_is_beneath_it_are_deleted_from_the_hub(maker: Shell, tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "other")
    tiny.adapter(tmp_path / "a", tiny.attention(), 1)
    tiny.adapter(tmp_path / "b", tiny.attention(), 2)
    names = ("base", "other", "a", "b")
    for name in names:
        import_folder(os.environ["HF_ENDPOINT"], USERS["me"], tmp_path / name, f"beneath/{name}")
    flags = ("--base", "beneath/base", "--method", "linear", "--keep-sources", "--push-to", "beneath/merged")
    maker.done("merge", "beneath/a", "beneath/other+beneath/b", *flags)
    for name in names:
        HfApi().delete_repo(f"beneath/{name}")
    assert "with the same bytes" in tiny.done("verify", "beneath/merged", "--replay").out
    tiny.done("unmerge", "beneath/merged", "--remove", "beneath/a", "--output", tmp_path / "out")
    before, after = last("beneath/merged"), entry_of(tmp_path / "out")
    assert (after.base, after.models[0].identity) == (before.base, before.models[1].identity)
    assert after.models[0].beneath == before.models[1].beneath
    assert not any(cached(f"beneath/{name}") for name in names)


def test_another_folder_and_another_repository_get_the_copies_too(ids: list[str], tmp_path: Path) -> None:
    merged, base, m0, m1, m2, m3 = ids
    tiny.done("unmerge", merged, "--remove", m2, "--output", tmp_path / "out", "--push-to", f"{merged}-2")
    entry = entry_of(tmp_path / "out")
    assert in_folder(tmp_path / "out") == on_branch(f"{merged}-2") == sorted(copies(entry))
    for repo_id in (base, m0, m1, m2):
        HfApi().delete_repo(repo_id)
    # a folder without its copies finds them where it was pushed to
    shutil.rmtree(tmp_path / "out/merge_state")
    tiny.done("add", tmp_path / "out", m3)
    assert tiny.done("verify", tmp_path / "out", "--replay").code == 0


def test_a_gated_model(ids: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    merged, _, m0, m1, _, _ = ids
    HfApi().update_repo_settings(m1, gated="manual")
    monkeypatch.setenv("HF_TOKEN", USERS["other"])
    run = tiny.done("unmerge", merged, "--remove", m0, "--output", tmp_path / "out")
    assert f"{m1}@" in run.err and "the copy of it that the merge keeps is used" in run.err
    assert tiny.done("verify", tmp_path / "out", "--replay").code == 0


def test_the_branch_holds_what_the_present_step_names(ids: list[str]) -> None:
    merged, _, m0, _, _, _ = ids
    before = last(merged)
    tiny.done("unmerge", merged, "--remove", m0, "--push-to", merged)
    assert len(on_branch(merged)) == 3
    stray = archive_file("0" * 64)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=stray, repo_id=merged, revision="merge-state")
    run = tiny.cli("verify", merged)
    assert run.code == 1 and stray in run.out and "a copy of a source that the ledger does not know" in run.out
    # the branch goes with the last step, not with earlier ones
    assert tiny.cli("verify", f"{merged}@step-0001").code == 0
    # going back brings the copies back with all else
    tiny.done("restore", merged, "--step", "1", "--push-to", merged)
    assert on_branch(merged) == sorted(copies(before)) and last(merged).models == before.models
    assert tiny.done("verify", merged).code == 0


@pytest.fixture
def folders(root: Path, tmp_path: Path) -> Path:
    """Folders to spoil: base, models, and a merge of three of them, `out`."""
    shutil.rmtree(Path(HOME) / "hfmerge/kept", ignore_errors=True)  # what other tests unpacked of the same models
    for name in ("base", "m0", "m1", "m2", "m3"):
        shutil.copytree(root / name, tmp_path / name)
    kept_merge(tmp_path / "out", tmp_path / "base", *(tmp_path / name for name in ("m0", "m1", "m2")), method="opcm")
    return tmp_path


def test_folders_that_are_gone(folders: Path, root: Path) -> None:
    out, before = folders / "out", entry_of(folders / "out")
    assert in_folder(out) == sorted(copies(before))
    for name in ("base", "m0", "m1"):
        shutil.rmtree(folders / name)
    tiny.edit(folders / "m2", lambda held: held.update({"pooler.dense.bias": held["pooler.dense.bias"] + 1}))
    run = tiny.done("unmerge", out, "--remove", "m1")
    assert "m0@" in run.err and "the copy of it that the merge keeps is used" in run.err
    after = entry_of(out)
    assert [m.identity for m in after.models] == [before.models[0].identity, before.models[2].identity]
    assert in_folder(out) == sorted(copies(after)) and len(in_folder(out)) == 3
    tiny.done("add", out, folders / "m3")
    assert tiny.done("verify", out, "--replay").code == 0
    never = folders / "never"
    flags = ("--base", root / "base", "--method", "opcm", "--output", never)
    tiny.done("merge", *(root / name for name in ("m0", "m2", "m3")), *flags)
    assert tiny.files(never) == {k: v for k, v in tiny.files(out).items() if "/sources/" not in k}
    # an unpacked copy that somebody changed is unpacked anew
    (bad,) = (Path(HOME) / "hfmerge/kept" / str(before.models[0].kept)).rglob("model.safetensors")
    bad.write_bytes(b"")
    assert tiny.done("verify", out, "--replay").code == 0


def test_a_new_base_packs_the_copies_anew(folders: Path) -> None:
    out, before = folders / "out", entry_of(folders / "out")
    tiny.done("rebase", out, "--base", folders / "m3")
    after = entry_of(out)
    assert after.base.name == "m3" and not {*copies(before)} & {*copies(after)}
    assert in_folder(out) == sorted(copies(after))
    for name in ("base", "m0", "m1", "m2", "m3"):
        shutil.rmtree(folders / name)
    assert tiny.done("verify", out, "--replay").code == 0


def test_reorder_and_replace_keep_the_copies_of_models_that_stay(folders: Path) -> None:
    out, before = folders / "out", entry_of(folders / "out")
    times = {path: path.stat().st_mtime_ns for path in (out / "merge_state/sources").iterdir()}
    shutil.rmtree(folders / "m0")
    tiny.done("reorder", out, "m2", "m0", "m1")
    assert [m.kept for m in entry_of(out).models] == [before.models[i].kept for i in (2, 0, 1)]
    tiny.done("replace", out, "m1", folders / "m3")
    assert [m.kept for m in entry_of(out).models[:2]] == [before.models[i].kept for i in (2, 0)]
    assert in_folder(out) == sorted(copies(entry_of(out))) and len(times) == len(in_folder(out))
    assert tiny.done("verify", out, "--replay").code == 0


# copies that are not there, or not whole


def test_a_corrupt_copy_is_named(folders: Path) -> None:
    out, before = folders / "out", entry_of(folders / "out")
    file = archive_file(str(before.models[0].kept))
    data = bytearray((out / file).read_bytes())
    data[len(data) // 2] ^= 1
    (out / file).write_bytes(data)
    run = tiny.cli("verify", out)
    assert run.code == 1 and file in run.out
    shutil.rmtree(folders / "m0")
    files = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "m1")
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1 and f"{file} is corrupt" in run.err
    assert "--source m0=FOLDER" in run.err and tiny.everything(out) == files
    # the model itself can be taken out, and another run makes a corrupt copy of what is still there anew
    tiny.done("unmerge", out, "--remove", "m0")
    assert tiny.done("verify", out).code == 0
    (out / archive_file(str(before.models[1].kept))).write_bytes(b"")
    tiny.done("add", out, folders / "m3")
    assert tiny.done("verify", out).code == 0
    # one that the ledger does not name
    (out / file).write_bytes(data)
    run = tiny.cli("verify", out)
    assert run.code == 1 and f"{file}: a copy of a source that the ledger does not know" in run.out + run.err


def test_a_copy_that_the_hub_lost(ids: list[str]) -> None:
    merged, base, m0, m1, _, m3 = ids
    file = archive_file(str(last(merged).models[1].kept))
    HfApi().delete_file(file, merged, revision="merge-state")
    assert "not published" in tiny.done("verify", merged).out
    HfApi().delete_repo(m1)
    run = tiny.cli("add", merged, m3, "--push-to", merged)
    assert run.code == 1 and len(run.err.strip().splitlines()) == 1
    assert f"{m1}@" in run.err and "its kept copy cannot take its place" in run.err
    assert f"an intact {file}, its kept copy" in run.err and f"--remove {m1}`, which does not read it" in run.err


def test_archives_that_somebody_made_up(root: Path, tmp_path: Path) -> None:
    import zipfile

    def made(name: str, manifest: Any) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("manifest.json", json.dumps(manifest))
        return tmp_path / name

    good = {"schema": "hfmerge/kept/1", "base": None, "files": {}, "against": {}}
    assert read_manifest(made("good", good)).files == {}
    for name in ("../out", "/out", "+../out", "a//b", "a/./b", "", "a\\b"):
        files = {name: {"size": 1, "sha256": "0" * 64}}
        with pytest.raises(CorruptFileError, match="must (be a path inside|not be empty)"):
            read_manifest(made("bad", {**good, "files": files}))
    for manifest in ({}, [], {**good, "schema": "hfmerge/kept/9"}, {**good, "files": {"a": 1}}):
        with pytest.raises(CorruptFileError):
            read_manifest(made("bad", manifest))
    (tmp_path / "none").write_bytes(b"no zip")
    with pytest.raises(CorruptFileError, match="not a kept copy of a source"):
        read_manifest(tmp_path / "none")
    # the base is another one than it was packed with
    entry = kept_merge(tmp_path / "out", root / "base", root / "m0")
    archive = tmp_path / "out" / copies(entry)[1]
    with pytest.raises(CorruptFileError, match="model.safetensors unpacks to other bytes than were packed"):
        restored(archive, tmp_path / "back", root / "m1")
    assert not list((tmp_path / "back").rglob("*model.safetensors*"))


# what is asked for, and what is not


def test_nothing_is_kept_unasked(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", "--base", root / "base", "--method", "linear", "--output", out)
    text = (out / "merge_history/0001.json").read_text()
    assert "kept" not in json.loads(text)["materials"]["base"] and "keep_sources" not in text
    assert not (out / "merge_state/sources").exists()
    assert "copies are kept" not in tiny.done("plan", root / "m0", "--base", root / "base", "--method", "linear").out


def test_recipe_and_flag(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = {"base": str(root / "base"), "models": [str(root / "m0")], "method": "linear", "keep_sources": True}
    recipe.write_text(json.dumps(data))
    assert hfmerge.load_recipe(recipe).keep_sources
    out = tmp_path / "out"
    tiny.done("merge", recipe, "--output", out)
    assert entry_of(out).settings["keep_sources"] is True and len(in_folder(out)) == 2
    run = tiny.cli("merge", recipe, "--stream", "--output", tmp_path / "no")
    assert run.code == 1 and "stream: copies of the sources are kept" in run.err
    run = tiny.cli("add", out, root / "m1", "--stream")
    assert run.code == 1 and "leave stream out" in run.err
    recipe.write_text(json.dumps({**data, "keep_sources": "maybe"}))
    assert "keep_sources" in tiny.cli("plan", recipe).err


def test_pickled_weights_and_tied_copies(tmp_path: Path) -> None:
    import torch

    base = tiny.build("Qwen3ForCausalLM", tiny.config("qwen3"))
    tiny.save(base, tmp_path / "base")
    for i, name in enumerate(("pickled", "stored")):
        tiny.save(tiny.fine_tune(base, i + 1), tmp_path / name)
    weights = tiny.tensors(tmp_path / "pickled")
    torch.save(weights, tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/model.safetensors").unlink()
    weights = tiny.tensors(tmp_path / "stored")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "stored/model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    flags = ("--base", tmp_path / "base", "--method", "linear", "--keep-sources", "--allow-pickle", "--output", out)
    tiny.done("merge", tmp_path / "pickled", tmp_path / "stored", *flags)
    for name, file in zip(("pickled", "stored"), copies(entry_of(out))[1:], strict=True):
        manifest = restored(out / file, tmp_path / "back" / name, tmp_path / "base")
        assert tiny.everything(tmp_path / "back" / name) == tiny.everything(tmp_path / name)
    assert manifest.against["model.safetensors"]["lm_head.weight"] == "model.embed_tokens.weight"
    for name in ("base", "pickled", "stored"):
        shutil.rmtree(tmp_path / name)
    assert tiny.done("verify", out, "--replay", "--allow-pickle").code == 0
