"""A dry run says way, cost and place of a change, and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hfmerge
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import pages, tiny
from tests.fixtures.shell import upload


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    models = [root / f"m{i}" for i in range(3)]
    given = ("--base", root / "base", "--method", "opcm", "--state", "all")
    tiny.done("merge", *models, *given, "--output", root / "merged")
    return root


def unchanged(root: Path, *command: object) -> tiny.Run:
    """A dry run that leaves every file as it is."""
    before = tiny.everything(root)
    run = tiny.done(*command, "--dry-run")
    assert tiny.everything(root) == before
    return run


@pytest.mark.slow
def test_every_change_of_a_folder(root: Path) -> None:
    merged, out = root / "merged", root / "other"
    commands = {
        "merge": ("merge", root / "m0", root / "m1", "--base", root / "base", "--method", "linear", "--output", out),
        "add": ("add", merged, root / "m3"),
        "unmerge": ("unmerge", merged, "--remove", "m2"),
        "subtract": ("unmerge", merged, "--remove", "m0", "--mode", "subtract"),
        "replace": ("replace", merged, "m1", root / "m3"),
        "reorder": ("reorder", merged, "m1", "m0", "m2"),
        "rebase": ("rebase", merged, "--base", root / "m3"),
    }
    for action, command in commands.items():
        run = unchanged(root, *command)
        assert run.out.startswith(f"way      {action}: ") and run.out.endswith("dry run: nothing was changed\n")
        assert "\nbytes    read " in run.out and "\nneeds    disk " in run.out
        assert f"\nresult   {out if action == 'merge' else merged}\n" in run.out
    data = unchanged(root, *commands["add"], "--json").json
    assert data["starts"] == 3 and data["models"][-1] == str(root / "m3") and data["need"]["read"] > 0


def test_it_says_whether_a_state_fits(root: Path) -> None:
    last = unchanged(root, "unmerge", root / "merged", "--remove", "m2").out
    first = unchanged(root, "unmerge", root / "merged", "--remove", "m0").out
    assert "\nstate    a kept state holds the first 2\n" in last
    assert "\nstate    no kept state fits; from the base\n" in first


def test_the_advice_on_states_makes_the_next_removal_cheap(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("--base", root / "base", "--method", "opcm")
    models = [root / f"m{i}" for i in range(4)]
    asked = tiny.done("plan", *models, *given).out
    assert "\nstates   --state all keeps a state after each of the 4 models, " in asked
    tiny.done("merge", *models, *given, "--output", out)
    seen = unchanged(root, "unmerge", out, "--remove", "m0").out
    assert "no kept state fits" in seen and "--state all keeps a state after each of the 3 models" in seen
    run = tiny.done("unmerge", out, "--remove", "m0", "--state", "all")
    assert "--state all" not in run.err  # it is followed
    assert len(tiny.states(out)) == 3
    run = tiny.done("unmerge", out, "--remove", "m2")
    assert "continued from the kept state after model 1; 1 of 2 models read" in run.err
    assert "--state" not in run.err
    tiny.done("verify", out, "--replay")
    fresh = tmp_path / "fresh"
    tiny.done("merge", root / "m1", root / "m3", *given, "--output", fresh)
    assert tiny.files(out, states=False) == tiny.files(fresh, states=False)
    assert (
        'state: must be none, last, all or a positive whole number, not "many"'
        in tiny.cli("unmerge", out, "--remove", "m1", "--state", "many").err
    )


def test_the_time_counts_learning(root: Path) -> None:
    def learning(**learn: object) -> float:
        models = [root / f"m{i}" for i in range(2)]
        named = {"learn": learn} if learn else {}
        estimate = hfmerge.plan(base=root / "base", models=models, method="mdm_oc", **named).estimate
        assert estimate.seconds >= estimate.learning
        return estimate.learning

    usual = learning(steps=60)
    assert learning() == 0.0 < usual
    assert learning(steps=120) > usual
    assert learning(steps=60, replay={"rows": 512}) > usual
    assert learning(steps=60, replay={"steps": 24}) > 1.5 * usual
    given = ("--base", root / "base", "--method", "mdm_oc", "--learn", "steps=600000")
    found = tiny.done("plan", root / "m0", root / "m1", *given).out
    assert re.search(r", time about \d+ s, of which \d+ s for learning on the CPU at most\n", found)


def test_the_change_then_reads_what_was_foreseen(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    foreseen = hfmerge.dry_run("unmerge", root / "merged", remove="m1", output=out)
    done = hfmerge.unmerge(root / "merged", remove="m1", output=out)
    assert foreseen.how == done.entry.how and foreseen.folder == str(out)
    assert foreseen.models == tuple(str(root / model.name) for model in done.entry.models)


def test_what_the_change_would_refuse_is_refused(root: Path) -> None:
    given = ("--base", root / "base", "--method", "linear", "--dry-run")
    assert "is not empty" in tiny.cli("merge", root / "m0", root / "m1", *given, "--output", root / "merged").err
    assert "did you mean m2?" in tiny.cli("unmerge", root / "merged", "--remove", "M2", "--dry-run").err
    assert (
        "--check: give it without --dry-run"
        in tiny.cli("unmerge", root / "merged", "--remove", "m2", "--check", "glue", "--dry-run").err
    )
    with pytest.raises(ValueError, match="verify: has no dry run"):
        hfmerge.dry_run("verify", root / "merged")


def test_a_removal_takes_no_guess_and_an_order_may(root: Path, tmp_path: Path) -> None:
    assert "M2: not in this merge; did you mean m2?" in tiny.cli("unmerge", root / "merged", "--remove", "M2").err
    assert "did you mean m0?" in tiny.cli("replace", root / "merged", "org/M0@v1", root / "m3").err
    run = tiny.done("reorder", root / "merged", "M1", "org/m0@main", "m2", "--output", tmp_path / "out")
    assert run.out.index("m1") < run.out.index("m0") < run.out.index("m2")


@pytest.fixture
def published(hub: HubServer, root: Path, tmp_path: Path) -> Iterator[str]:
    pages.clear()
    upload(hub, tmp_path / "home", {f"org/{name}": root / name for name in ("base", "m0", "m1")})
    given = ("--base", "org/base", "--method", "opcm", "--push-to", "org/merged")
    tiny.done("merge", "org/m0", "org/m1", *given, "--commit-message", "Two at once")
    tiny.done("unmerge", "org/merged", "--remove", "org/m1", "--push-to", "org/merged")
    yield "org/merged"
    pages.clear()


@pytest.mark.slow
def test_changes_of_a_repository(published: str, root: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    before = [commit.commit_id for commit in api.list_repo_commits(published)]
    assert "Two at once" in [commit.title for commit in api.list_repo_commits(published)]
    out = tmp_path / "out"
    tiny.done("restore", published, "--step", 1, "--output", out)
    restored = tiny.done("restore", published, "--step", 1, "--push-to", published, "--dry-run")
    assert "brought back from the commit" in restored.out and "org/m1" in restored.out
    pushed = tiny.done("push", out, published, "--dry-run")
    assert pushed.out.startswith("way      push: one commit with step 3") and f"result   {published}" in pushed.out
    purged = tiny.done("purge-history", published, "--dry-run")
    assert "branch main: " in purged.out and purged.out.endswith("dry run: nothing was changed\n")
    tiny.done("add", published, root / "m2", "--push-to", "org/new", "--dry-run")
    assert not api.repo_exists("org/new")
    assert [commit.commit_id for commit in api.list_repo_commits(published)] == before
