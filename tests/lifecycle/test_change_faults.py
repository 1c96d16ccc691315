"""Changes of a merge that go wrong: names that mean nothing or too much, bad states, races, and kills half-way."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

import hfmerge
from hfmerge.errors import LedgerError
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import open_merged
from hfmerge.lifecycle.nested import find_removal
from tests.fixtures import tiny
from tests.fixtures.hub import USERS


pytestmark = pytest.mark.slow
MODELS = ("m0", "m1", "m2", "m3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i, name in enumerate(MODELS):
        tiny.save(tiny.fine_tune(base, i + 1), root / name)
    return root


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(root, tmp_path_factory.mktemp("made") / "merged", *MODELS[:3])


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "merged"))


def merge(root: Path, out: Path, *models: str) -> Path:
    flags = ("--base", root / "base", "--method", "opcm", "--state", "all", "--output", out)
    tiny.done("merge", *[root / model for model in models], *flags)
    return out


def state_after(out: Path, count: int) -> Path:
    states = open_merged(str(out)).last.states
    return out / next(state.file for state in states if state.count == count)


@pytest.mark.parametrize("verb", ["unmerge", "replace", "reorder"])
def test_names_that_mean_nothing(root: Path, out: Path, verb: str) -> None:
    more = {"unmerge": ("--remove", "m_1"), "replace": ("m_1", root / "m3"), "reorder": ("m_1", "m0", "m2")}[verb]
    before = tiny.everything(out)
    run = tiny.cli(verb, out, *more)
    assert run.code == 1 and len(run.err.splitlines()) == 1 and tiny.everything(out) == before
    assert "m_1: not in this merge, which holds m0, m1, m2. Did you mean m1?" in run.err
    assert "Did you mean" not in tiny.cli("unmerge", out, "--remove", "org/nothing-like-it").err


def test_a_name_that_is_there_twice(out: Path) -> None:
    entry = open_merged(str(out)).last
    first = dataclasses.replace(entry.models[0], name="org/x", commit="a1" * 20, digest=None)
    second = dataclasses.replace(first, commit="b2" * 20)
    twice: Entry = dataclasses.replace(entry, models=(first, entry.models[1], second))
    with pytest.raises(
        LedgerError, match="org/x: is in the merge 2 times; name its commit: org/x@a1a1a1a1 or org/x@b2b2"
    ):
        twice.find("org/x")
    assert twice.find("org/x@b2") == 2 and twice.find("org/x@a1a1") == 0
    with pytest.raises(LedgerError, match="not in this merge"):
        twice.find("org/x@c3")


def test_a_name_that_means_several_models_in_inner_merges(root: Path, tmp_path: Path) -> None:
    for folder, source in (("one", "m0"), ("two", "m1")):
        shutil.copytree(root / source, tmp_path / folder / "same")
        merge(root, tmp_path / f"inner-{folder}", str(tmp_path / folder / "same"), "m2")
    out = merge(root, tmp_path / "out", str(tmp_path / "inner-one"), str(tmp_path / "inner-two"), "m3")
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, "--remove", "same")
    assert run.code == 1 and "same: means 2 models in this merge: same@sha256:" in run.err
    assert tiny.everything(out) == before
    entry = open_merged(str(out)).last
    identities = [one for model in entry.models for one in model.contains if one.startswith("same@")]
    removal = find_removal(entry, [identities[1].replace("sha256:", "")[:20]])
    assert removal.within == {1: (identities[1],)} and removal.subjects == ("same",) and not removal.removed
    # the same model in both leaves both
    assert [len(within) for within in find_removal(entry, ["m2"]).within.values()] == [1, 1]


def test_the_last_model_cannot_leave(root: Path, out: Path) -> None:
    before = tiny.everything(out)
    run = tiny.cli("unmerge", out, *[part for name in MODELS[:3] for part in ("--remove", name)])
    assert run.code == 1 and "holds no other model" in run.err and tiny.everything(out) == before


@pytest.mark.parametrize("fault", ["from another merge", "truncated", "empty"])
@pytest.mark.parametrize("verb", ["unmerge", "replace", "reorder"])
def test_a_wrong_state_is_passed_over_with_a_warning(
    root: Path, out: Path, tmp_path: Path, verb: str, fault: str
) -> None:
    """The state after m0, from which all three would go on."""
    more, models = {
        "unmerge": (("--remove", "m1"), ("m0", "m2")),
        "replace": (("m1", root / "m3"), ("m0", "m3", "m2")),
        "reorder": (("m0", "m2", "m1"), ("m0", "m2", "m1")),
    }[verb]
    state = state_after(out, 1)
    if fault == "from another merge":
        other = merge(root, tmp_path / "other", "m3", "m1")
        shutil.copyfile(state_after(other, 1), state)
    else:
        state.write_bytes(state.read_bytes()[: 0 if fault == "empty" else -100])
    run = tiny.done(verb, out, *more)
    assert f"{state.name} is corrupt; the sources are read instead." in run.err
    assert f"merged again from all {len(models)} pinned sources (no kept state fits)" in run.out
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "fresh", *models))


@pytest.mark.parametrize("verb", ["replace", "reorder", "rebase"])
def test_a_change_that_is_killed_leaves_the_folder_as_it_was(root: Path, out: Path, tmp_path: Path, verb: str) -> None:
    shutil.copytree(root / "m3", tmp_path / "base3")
    more = {"replace": ("m0", root / "m3"), "reorder": ("m2", "m1", "m0"), "rebase": ("--base", tmp_path / "base3")}
    before = tiny.everything(out)
    child = tiny.fork(tmp_path, [verb, out, *more[verb]], hold="write")
    child.wait_until_held()
    child.signal(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert tiny.everything(out) == before
    left = tiny.cli("verify", out)
    assert left.code == 1 and left.out.count("FAIL") == left.out.count("left beside the folder by a killed run") == 2
    tiny.done(verb, out, *more[verb])
    assert open_merged(str(out)).last.action == verb and tiny.done("verify", out).code == 0


@pytest.fixture(scope="module")
def hubbed(root: Path, hub: HubServer) -> None:
    for name in ("base", *MODELS):
        import_folder(hub.endpoint, USERS["me"], root / name, f"faults/{name}")


def publish(repo_id: str, *models: str) -> str:
    entries = tuple(hfmerge.ModelEntry(f"faults/{model}") for model in models)
    method = hfmerge.MethodChoice("opcm", {"alpha": 0.5, "variant": "code"}, "mean")
    hfmerge.merge(hfmerge.Recipe("faults/base", entries, method, state="all", push_to=repo_id))
    return repo_id


def heads(repo_id: str) -> dict[str, str]:
    return {branch.name: branch.target_commit for branch in HfApi().list_repo_refs(repo_id).branches}


CHANGES = {
    "unmerge": ("--remove", "faults/m0"),
    "replace": ("faults/m0", "faults/m3"),
    "restore": ("--step", "1"),
}


def test_killed_in_the_middle_the_published_merge_is_untouched(hubbed: None, tmp_path: Path) -> None:
    repo_id = publish("faults/killed", "m0", "m1")
    before = heads(repo_id)
    child = tiny.fork(tmp_path, ["unmerge", repo_id, *CHANGES["unmerge"], "--push-to", repo_id], hold="write")
    child.wait_until_held()
    child.signal(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert heads(repo_id) == before and hfmerge.verify(repo_id).ok
    hfmerge.unmerge(repo_id, "faults/m0", push_to=repo_id)
    assert hfmerge.verify(repo_id, replay=True).ok


@pytest.mark.parametrize("verb", ["unmerge", "replace"])
def test_of_two_people_at_once_the_second_is_told_in_one_line(hubbed: None, tmp_path: Path, verb: str) -> None:
    repo_id = publish(f"faults/race-{verb}", "m0", "m1", "m2")
    start = HfApi().model_info(repo_id).sha
    second = tiny.fork(tmp_path, [verb, repo_id, *CHANGES[verb], "--push-to", repo_id], hold="write")
    second.wait_until_held()
    hfmerge.unmerge(repo_id, "faults/m1", push_to=repo_id)
    before = heads(repo_id)
    run = second.end()
    (line,) = [line for line in run.err.splitlines() if line.startswith(f"hfmerge: {repo_id}")]
    assert run.code == 1 and f"main moved since {start[:8]}; somebody pushed meanwhile" in line
    assert "run the command again" in line and heads(repo_id) == before
    assert hfmerge.verify(repo_id).ok
    tiny.done(verb, repo_id, *CHANGES[verb], "--push-to", repo_id)
    assert hfmerge.verify(repo_id, replay=True).ok


def test_a_stale_restore_is_told_in_one_line(hubbed: None) -> None:
    repo_id = publish("faults/stale", "m0", "m1")
    hfmerge.unmerge(repo_id, "faults/m0", push_to=repo_id)
    stale = HfApi().model_info(repo_id).sha
    hfmerge.add(repo_id, ["faults/m2"], push_to=repo_id)
    before = heads(repo_id)["main"]
    run = tiny.cli("restore", f"{repo_id}@{stale}", "--step", "1", "--push-to", repo_id)
    assert run.code == 1 and "main moved since" in run.err and heads(repo_id)["main"] == before
    assert hfmerge.verify(repo_id).ok


@pytest.mark.parametrize("fault", ["truncated", "from another merge"])
def test_a_wrong_state_on_the_hub_is_passed_over(hubbed: None, fault: str) -> None:
    api, repo_id = HfApi(), publish(f"faults/state-{fault[:4]}", "m0", "m1", "m2")
    entry = open_merged(repo_id).last
    state = next(state.file for state in entry.states if state.count == 1)
    other = next(state.file for state in entry.states if state.count == 2)
    held = api.hf_hub_download(repo_id, other if fault.startswith("from") else state, revision="merge-state")
    data = Path(held).read_bytes()
    wrong = data if fault.startswith("from") else data[:-64]
    api.create_commit(repo_id, [CommitOperationAdd(state, wrong)], commit_message="spoil", revision="merge-state")
    result = hfmerge.unmerge(repo_id, "faults/m1", push_to=repo_id)
    assert result.entry.how == "merged again from all 2 pinned sources (no kept state fits)"
    assert any(f"{state} is corrupt; the sources are read instead." in warning for warning in result.warnings)
    report = hfmerge.verify(repo_id, replay=True)
    assert report.ok, report.culprits
    assert json.loads(result.entry.to_bytes())["action"]["models"] == ["faults/m1"]
