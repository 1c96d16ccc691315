"""`replace`, `reorder` and `rebase` give the bytes of the merge that was asked for that list; `restore` goes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import hfmerge
from hfmerge.errors import HfMergeError
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.shell import upload


METHODS = {
    "opcm": ("--method", "opcm"),
    "linear": ("--method", "linear"),
    "ties": ("--method", "ties", "--norm", "mean"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and another revision of it, four fine-tunes, an adapter."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", num_hidden_layers=1))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 50, 0.01), root / "base2")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    targets = {name: size for name, size in tiny.attention().items() if ".0." in name}
    tiny.adapter(root / "a0", targets, 9)
    return root


def merge(root: Path, out: Path, models: Sequence[str], *flags: str, base: str = "base") -> Path:
    tiny.done("merge", *[root / model for model in models], "--base", root / base, "--output", out, *flags)
    return out


def last(out: Path) -> dict[str, object]:
    entry: dict[str, object] = json.loads(sorted((out / "merge_history").iterdir())[-1].read_bytes())
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_replace_equals_a_merge_with_the_new_model(root: Path, tmp_path: Path, method: str) -> None:
    flags = (*METHODS[method], "--state", "all")
    out = merge(root, tmp_path / "out", ("m0", "m1", "m2"), *flags)
    tiny.done("replace", out, "m1", root / "m3")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "fresh", ("m0", "m3", "m2"), *flags))
    entry = last(out)
    assert entry["step"] == 2 and entry["action"]["type"] == "replace"  # type: ignore[index]
    assert entry["action"]["models"] == ["m1", "m3"]  # type: ignore[index]
    assert "at place 2 of 3" in entry["action"]["how"]  # type: ignore[index]
    assert str(root) not in json.dumps(entry)
    tiny.done("replace", out, "m3", root / "a0", "--weight", "0.5")
    weighted = ("--weight", "1", "--weight", "0.5", "--weight", "1")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "half", ("m0", "a0", "m2"), *flags, *weighted))
    assert tiny.done("verify", out, "--replay").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_reorder_equals_a_merge_in_that_order(root: Path, tmp_path: Path, method: str) -> None:
    flags = (*METHODS[method], "--state", "all")
    out = merge(root, tmp_path / "out", ("m0", "m1", "m2", "m3"), *flags)
    run = tiny.done("reorder", out, "m0", "m1", "m3", "m2")
    if method == "opcm":
        assert "continued from the kept state after model 2; 2 of 4 models read" in run.out
    assert tiny.files(out, states=False) == tiny.files(
        merge(root, tmp_path / "fresh", ("m0", "m1", "m3", "m2"), *flags), states=False
    )
    assert last(out)["action"]["models"] == ["m0", "m1", "m3", "m2"]  # type: ignore[index]
    assert tiny.done("verify", out, "--replay").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rebase_equals_a_merge_on_the_new_base(root: Path, tmp_path: Path, method: str) -> None:
    flags = (*METHODS[method], "--state", "2")
    out = merge(root, tmp_path / "out", ("m0", "m1", "a0"), *flags)
    tiny.done("add", out, root / "m2")  # a state after model 3 is left over, which must not outlive the base
    tiny.done("rebase", out, "--base", root / "base2")
    fresh = merge(root, tmp_path / "fresh", ("m0", "m1", "a0", "m2"), *flags, base="base2")
    assert tiny.files(out) == tiny.files(fresh)
    assert last(out)["action"]["models"] == ["base2"]  # type: ignore[index]
    tiny.done("unmerge", out, "--remove", "m2")
    fresh = merge(root, tmp_path / "three", ("m0", "m1", "a0"), *flags, base="base2")
    assert tiny.files(out, states=False) == tiny.files(fresh, states=False)
    assert tiny.done("verify", out, "--replay").code == 0


def test_what_cannot_be_revised(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", ("m0", "m1", "m2"), "--method", "opcm")
    before = tiny.everything(out)
    cases = [
        (("replace", out, "m9", root / "m3"), "m9: not in this merge, which holds m0, m1, m2. Did you mean"),
        (("replace", out, "m1", root / "m2"), "models[2]"),
        (("replace", out, "m1", root / "nothing"), "no such folder"),
        (("reorder", out, "m1", "m0"), "reorder: name all models in their new order; m2 missing."),
        (("reorder", out, "m1", "m0", "m1"), "reorder: m1 is named twice."),
        (("reorder", out, "m0", "m1", "m2"), "in this order already"),
        (("reorder", out, "m0", "m1", "x"), "x: not in this merge"),
        (("rebase", out, "--base", root / "a0"), "is an adapter; name the full model"),
        (("rebase", out, "--base", root / "nothing"), "no such folder"),
        (("restore", out, "--step", "1"), "is as it was at step 1 already"),
        (("restore", out, "--step", "2"), "has no step 2; its ledger has steps 1 to 1"),
        (("restore", out, "--step", "0"), "has no step 0"),
    ]
    for command, words in cases:
        run = tiny.cli(*command)
        assert run.code == 1 and words in run.err and len(run.err.strip().splitlines()) == 1, (command, run.err)
    assert tiny.everything(out) == before


def test_a_folder_that_was_never_pushed_cannot_be_restored(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", ("m0", "m1"), "--method", "linear")
    tiny.done("add", out, root / "m2")
    before = tiny.everything(out)
    run = tiny.cli("restore", out, "--step", "1")
    assert run.code == 1 and "a folder keeps only its present weights" in run.err and "never pushed" in run.err
    assert tiny.everything(out) == before


@pytest.fixture(scope="module")
def hubbed(root: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models on the Hub as `rev/...`."""
    names = ("base", "base2", "m0", "m1", "m2", "m3")
    upload(hub, tmp_path_factory.mktemp("home"), {f"rev/{name}": root / name for name in names})
    return root


def on_hub(repo_id: str, models: Sequence[str], state: str | int = "all") -> hfmerge.MergeResult:
    recipe = hfmerge.Recipe(
        base="rev/base",
        models=tuple(hfmerge.ModelEntry(f"rev/{model}") for model in models),
        method=hfmerge.MethodChoice("opcm", {"alpha": 0.5, "variant": "code"}, "mean"),
        push_to=repo_id,
        state=state,
    )
    return hfmerge.merge(recipe)


def branch(repo_id: str) -> list[str]:
    from huggingface_hub import HfApi

    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision="merge-state")
    return sorted(item.path for item in tree if item.path.startswith("merge_state/"))


@pytest.mark.slow
def test_restore_on_the_hub_copies_the_commit_and_its_states(hubbed: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    first = on_hub("rev/merged", ("m0", "m1"))
    states = branch("rev/merged")
    card = Path(api.hf_hub_download("rev/merged", "README.md")).read_text() + "\n## Notes\n\nOurs.\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="rev/merged")
    hfmerge.replace("rev/merged", "rev/m0", "rev/m2", push_to="rev/merged")
    assert not {*branch("rev/merged")} & {*states}
    hfmerge.rebase("rev/merged", "rev/base2", push_to="rev/merged")
    result = hfmerge.restore("rev/merged", 1, push_to="rev/merged")
    assert result.folder is None and result.pushed is not None and result.pushed.tag == "step-0004"
    entry = result.entry
    assert (entry.action, entry.restored, entry.subjects) == ("restore", 1, ())
    assert entry.products == first.entry.products and entry.models == first.entry.models
    assert entry.states == first.entry.states and branch("rev/merged") == states
    report = hfmerge.verify("rev/merged", replay=True)
    assert report.ok, report.culprits
    text = Path(api.hf_hub_download("rev/merged", "README.md", force_download=True)).read_text()
    assert "Ours." in text and "| 4 | restore | step 1 |" in text
    title = api.list_repo_commits("rev/merged")[0].title
    assert title == "Restore step 1 with hfmerge (opcm, step 4)"
    # the states are used again, and the chain goes on
    added = hfmerge.add("rev/merged", ["rev/m3"], push_to="rev/merged")
    assert added.entry.how.startswith("continued from the kept state after model 2; 1 of 3 models read")
    whole = on_hub("rev/whole", ("m0", "m1", "m3"))
    assert added.entry.products == whole.entry.products


@pytest.mark.slow
def test_restore_a_folder_from_the_repository_it_was_pushed_to(hubbed: Path, tmp_path: Path) -> None:
    out = merge(hubbed, tmp_path / "out", ("m0", "m1"), "--method", "opcm", "--state", "all")
    first = tiny.files(out)
    tiny.done("push", out, "rev/from-folder")
    tiny.done("add", out, hubbed / "m2", "--push-to", "rev/from-folder")
    (out / "notes.md").write_text("mine")
    tiny.done("unmerge", out, "--remove", "m0")  # not pushed
    run = tiny.done("restore", out, "--step", "1")
    assert "brought back from the commit" in run.out
    assert {name: value for name, value in tiny.files(out).items() if name != "notes.md"} == first
    assert (out / "notes.md").read_text() == "mine"
    # where all its folders lie was noted when it was merged first
    assert tiny.done("verify", out, "--replay").code == 0
    tiny.done("push", out, "rev/from-folder")
    assert hfmerge.verify("rev/from-folder").ok
    run = tiny.cli("restore", out, "--step", "3")  # which is pushed now, but only as an entry of the ledger
    assert run.code == 1 and "of step 3 is not in its history" in run.err


@pytest.mark.slow
def test_restore_into_a_folder_and_another_repository(hubbed: Path, tmp_path: Path) -> None:
    first = on_hub("rev/two", ("m0",))
    hfmerge.add("rev/two", ["rev/m1"], push_to="rev/two")
    run = tiny.cli("restore", "rev/two", "--step", "1")
    assert run.code == 1 and "--push-to rev/two, or --output FOLDER" in run.err
    result = hfmerge.restore("rev/two", 1, output=tmp_path / "out", push_to="rev/copy")
    assert (
        result.entry.products
        == first.entry.products
        == {name: value for name, value in tiny.files(tmp_path / "out", states=False).items()}
    )
    assert hfmerge.verify(tmp_path / "out", replay=True).ok and hfmerge.verify("rev/copy").ok
    assert [entry.entry.action for entry in hfmerge.history("rev/copy")] == ["merge", "add", "restore"]


@pytest.mark.slow
def test_a_squashed_history_has_nothing_to_restore_but_what_a_tag_holds(hubbed: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    first = on_hub("rev/squashed", ("m0", "m1"))
    hfmerge.unmerge("rev/squashed", "rev/m1", push_to="rev/squashed")
    api.super_squash_history("rev/squashed")
    result = hfmerge.restore("rev/squashed", 1, push_to="rev/squashed")
    assert result.entry.products == first.entry.products
    api.super_squash_history("rev/squashed")
    api.delete_tag("rev/squashed", tag="step-0002")
    with pytest.raises(HfMergeError, match="of step 2 is not in its history any more, which was squashed"):
        hfmerge.restore("rev/squashed", 2, push_to="rev/squashed")
    assert hfmerge.verify("rev/squashed").ok


@pytest.mark.slow
def test_restore_as_a_pull_request(hubbed: Path) -> None:
    first = on_hub("rev/asked", ("m0",))
    hfmerge.add("rev/asked", ["rev/m1"], push_to="rev/asked")
    result = hfmerge.restore("rev/asked", 1, push_to="rev/asked", create_pr=True)
    assert result.pushed is not None and result.pushed.pull_request is not None
    number = result.pushed.pull_request.rpartition("/")[2]
    assert hfmerge.verify(f"rev/asked@refs/pr/{number}").ok
    assert [step.entry.action for step in hfmerge.history("rev/asked")] == ["merge", "add"]
    assert result.entry.products == first.entry.products
