"""Merges of merges: what is in them is known through all levels, and a model can be taken out of an inner one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.errors import HfMergeError
from hfmerge.hashing import sha256_file
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.entry import Entry, contained
from hfmerge.ledger.repository import note_places, open_merged
from tests.fixtures import tiny
from tests.fixtures.shell import upload


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five fine-tunes and an adapter of a base; two merges of them, one of the two merged again."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i in range(5):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    targets = {name: size for name, size in tiny.attention().items() if ".0." in name}
    tiny.adapter(root / "a0", targets, 9)
    merge(root, root / "inner", "m0", "m1")
    merge(root, root / "middle", str(root / "inner"), "m2")
    return root


def merge(root: Path, out: Path, *models: str, method: str = "opcm") -> Path:
    flags = ("--base", root / "base", "--method", method, "--output", out)
    tiny.done("merge", *[root / model for model in models], *flags)
    return out


def last(out: Path) -> Entry:
    return open_merged(str(out)).last


def names(entry: Entry) -> list[str]:
    return [identity.partition("@")[0] for identity in contained(entry)]


def test_a_merge_in_a_merge_brings_its_ledger_by_digest(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", "middle", "m3")
    entry = last(out)
    middle, plain = entry.models
    assert middle.ledger == sha256_file(root / "middle" / "merge_history" / "0001.json")
    assert [identity.partition("@")[0] for identity in middle.contains] == ["base", "inner", "m0", "m1", "m2"]
    assert names(entry) == ["base", "middle", "inner", "m0", "m1", "m2", "m3"]
    assert plain.ledger is None and not plain.contains and not {"ledger", "contains"} & {*plain.to_dict()}
    assert Entry.from_bytes(entry.to_bytes(), "here") == entry
    # what was taken out of the inner merge before is not in it
    inner = Path(shutil.copytree(root / "inner", tmp_path / "inner"))
    tiny.done("unmerge", inner, "--remove", "m0")
    assert names(last(merge(root, tmp_path / "less", str(inner), "m3"))) == ["base", "inner", "m1", "m3"]


def test_what_lies_beneath_an_adapter_and_in_the_base_counts_too(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", f"{root / 'inner'}+{root / 'a0'}", "m3")
    entry = last(out)
    assert names(entry) == ["base", "a0", "inner", "m0", "m1", "m3"] and entry.models[0].ledger is None
    flags = ("--base", root / "inner", "--method", "linear", "--output", tmp_path / "on")
    tiny.done("merge", root / "middle", *flags)
    assert names(last(tmp_path / "on"))[:4] == ["inner", "base", "m0", "m1"]
    for name, words in (("inner", "lies beneath the adapter a0@"), ("m0", "lies in a merge beneath the adapter a0@")):
        run = tiny.cli("unmerge", out, "--remove", name)
        assert run.code == 1 and words in run.err, run.err


def test_the_tree_shows_the_merge_as_a_branch(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", "middle", "m3")
    text = tiny.done("history", out, "--graph").out
    ledger = sha256_file(root / "middle" / "merge_history" / "0001.json")[:12]
    assert f"itself a merge, ledger {ledger}, of" in text
    branch = text.partition("itself a merge")[2].partition("+ m3@")[0]
    assert [line.split()[-1].partition("@")[0] for line in branch.splitlines()[1:6]] == [
        "base", "inner", "m0", "m1", "m2",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opcm", "linear"])
def test_unmerge_reaches_into_a_merge(root: Path, tmp_path: Path, method: str) -> None:
    out = merge(root, tmp_path / "out", "m3", "inner", "m4", method=method)
    run = tiny.done("unmerge", out, "--remove", "m0")
    derived = tmp_path / "inner-without-m0"
    assert tiny.files(derived, states=False) == tiny.files(merge(root, tmp_path / "alone", "m1"), states=False)
    fresh = merge(root, tmp_path / "fresh", "m3", str(derived), "m4", method=method)
    assert tiny.files(out, states=False) == tiny.files(fresh, states=False)
    entry = last(out)
    assert (entry.step, entry.action, entry.subjects) == (2, "unmerge", ("m0",))
    assert names(entry) == ["base", "m3", "inner-without-m0", "m1", "m4"]
    assert "the same merge without it" in run.out and str(tmp_path) not in entry.to_bytes().decode()
    assert entry.models[1].ledger == sha256_file(derived / "merge_history" / "0002.json")
    assert tiny.done("verify", out, "--replay").code == 0
    # the merge that was merged is as it was
    assert names(last(root / "inner")) == ["base", "m0", "m1"]


@pytest.mark.slow
def test_through_two_levels_and_from_everywhere(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", "middle", "m0", "m3")
    tiny.done("unmerge", out, "--remove", "m0")
    entry = last(out)
    assert names(entry) == ["base", "middle-without-m0", "middle-without-m0-inner", "m1", "m2", "m3"]
    inner = merge(root, tmp_path / "inner1", "m1")
    middle = merge(root, tmp_path / "middle1", str(inner), "m2")
    assert tiny.files(tmp_path / "middle-without-m0", states=False) == tiny.files(middle, states=False)
    assert tiny.files(out, states=False) == tiny.files(
        merge(root, tmp_path / "fresh", str(middle), "m3"), states=False
    )
    assert tiny.done("verify", out, "--replay").code == 0


def test_a_merge_of_which_nothing_is_left_leaves_as_a_whole(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", "inner", "m3")
    before = {path.name for path in tmp_path.iterdir()}
    tiny.done("unmerge", out, "--remove", "m0", "--remove", "m1")
    assert tiny.files(out, states=False) == tiny.files(merge(root, tmp_path / "fresh", "m3"), states=False)
    assert {path.name for path in tmp_path.iterdir()} == before | {"fresh"}
    assert last(out).subjects == ("m0", "m1")


def test_what_stands_in_the_way_is_named_and_nothing_changes(root: Path, tmp_path: Path) -> None:
    for name in ("inner", "m1"):
        shutil.copytree(root / name, tmp_path / name)
    tuned = Path(shutil.copytree(root / "inner", tmp_path / "tuned"))

    def nudge(held: dict[str, object]) -> None:
        held["model.norm.weight"] += 1  # type: ignore[operator]

    tiny.edit(tuned, nudge)
    out = merge(root, tmp_path / "out", str(tuned), "m3")
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "m0")
    assert run.code == 1 and "model.safetensors is not what its ledger gives (tuned since?)" in run.err
    assert "unmerge tuned as a whole" in run.err and tiny.everything(out) == before

    places = {"m0": root / "m0", "m1": tmp_path / "m1", "base": root / "base"}
    inner = last(tmp_path / "inner")
    known = {one.identity: str(places[one.name]) for one in (inner.base, *inner.models)}
    note_places(inner, tmp_path / "inner", known)
    out = merge(root, tmp_path / "out2", str(tmp_path / "inner"), "m3")
    before = tiny.everything(out)
    shutil.rmtree(tmp_path / "m1")
    run = tiny.cli("unmerge", out, "--remove", "m0")
    assert run.code == 1 and "m0: cannot be taken out of inner@" in run.err
    assert "m1: was merged from the folder" in run.err and "which is gone" in run.err
    shutil.rmtree(tmp_path / "inner")
    run = tiny.cli("unmerge", out, "--remove", "m0")
    assert run.code == 1 and "m0: is a part of the merge inner@" in run.err and "cannot be read" in run.err
    assert tiny.everything(out) == before and not (tmp_path / "inner-without-m0").exists()
    # the inner merge as a whole can still leave
    tiny.done("unmerge", out, "--remove", "inner")


def test_a_source_whose_ledger_is_broken_is_a_model_like_any_other(root: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(root / "middle", tmp_path / "broken"))
    path = broken / "merge_history" / "0001.json"
    path.write_bytes(path.read_bytes().replace(b"opcm", b"opcn") + b" ")
    flags = ("--base", root / "base", "--method", "linear", "--output", tmp_path / "out")
    run = tiny.done("merge", broken, root / "m3", *flags)
    assert "warning: broken: treated as a single model, because its ledger cannot be read" in run.err
    assert names(last(tmp_path / "out")) == ["base", "broken", "m3"]


@pytest.fixture(scope="module")
def hubbed(root: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    upload(hub, tmp_path_factory.mktemp("home"), {f"nest/{n}": root / n for n in ("base", "m0", "m1", "m2", "m3")})
    on_hub("nest/inner", "nest/m0", "nest/m1", "nest/m2")


def on_hub(repo_id: str, *models: str) -> hfmerge.MergeResult:
    entries = tuple(hfmerge.ModelEntry(model) for model in models)
    method = hfmerge.MethodChoice("opcm", {"alpha": 0.5, "variant": "code"}, "mean")
    return hfmerge.merge(hfmerge.Recipe(base="nest/base", models=entries, method=method, push_to=repo_id))


@pytest.mark.slow
def test_on_the_hub_the_inner_merge_goes_where_it_is_told(hubbed: None) -> None:
    on_hub("nest/outer", "nest/inner", "nest/m3")
    assert names(hfmerge.history("nest/outer")[-1].entry) == [
        "nest/base", "nest/inner", "nest/m0", "nest/m1", "nest/m2", "nest/m3",
    ]  # fmt: skip
    with pytest.raises(HfMergeError, match="say where that goes with `inner_to='org/name'`"):
        hfmerge.unmerge("nest/outer", "nest/m1", push_to="nest/outer")
    result = hfmerge.unmerge("nest/outer", "nest/m1", push_to="nest/outer", inner_to="nest/inner-less")
    assert names(result.entry) == ["nest/base", "nest/inner-less", "nest/m0", "nest/m2", "nest/m3"]
    assert hfmerge.verify("nest/inner-less", replay=True).ok
    report = hfmerge.verify("nest/outer", replay=True)
    assert report.ok, report.culprits
    less = on_hub("nest/inner-fresh", "nest/m0", "nest/m2")
    assert less.entry.products == hfmerge.history("nest/inner-less")[-1].entry.products


@pytest.mark.slow
def test_an_inner_merge_that_went_on_without_the_model_is_taken_as_it_is(hubbed: None) -> None:
    on_hub("nest/own", "nest/m0", "nest/m1")
    on_hub("nest/later", "nest/own", "nest/m3")
    taken = hfmerge.unmerge("nest/own", "nest/m0", push_to="nest/own")
    assert taken.pushed is not None
    result = hfmerge.unmerge("nest/later", "nest/m0", push_to="nest/later", inner_to="nest/nowhere")
    assert result.entry.models[0].identity == f"nest/own@{taken.pushed.commit}"
    assert not HfApi().repo_exists("nest/nowhere")
    fresh = on_hub("nest/later-fresh", "nest/own", "nest/m3")
    assert result.entry.products == fresh.entry.products
