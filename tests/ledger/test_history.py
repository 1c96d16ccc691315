"""`history` as table, tree and JSON, with who and when from the Hub's commits; `diff` of steps and of merges."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.errors import HfMergeError
from hfmerge.hashing import sha256_file
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import tiny
from tests.fixtures.shell import Shell, upload


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 50, 0.01), root / "base2")
    for i in range(4):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    return root


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps: merge, add, replace, reorder, unmerge, rebase."""
    out = tmp_path_factory.mktemp("made") / "merged"
    flags = ("--base", root / "base", "--method", "opcm", "--option", "alpha=0.4", "--output", out)
    tiny.done("merge", root / "m0", root / "m1", *flags)
    tiny.done("add", out, root / "m2", "--weight", "0.5")
    tiny.done("replace", out, "m1", root / "m3")
    tiny.done("reorder", out, "m2", "m0", "m3")
    tiny.done("unmerge", out, "--remove", "m0")
    tiny.done("rebase", out, "--base", root / "base2")
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "merged"))


def entry(out: Path, step: int) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "merge_history" / f"{step:04d}.json").read_bytes())
    return found


def norm(out: Path, step: int, name: str) -> str:
    models = entry(out, step)["materials"]["models"]  # type: ignore[index]
    return f"{next(m['squared_norm'] for m in models if m['name'] == name) ** 0.5:.4g}"


def test_the_table_has_method_norms_and_digests(out: Path) -> None:
    lines = [re.split(r"\s{2,}", line) for line in tiny.done("history", out).out.splitlines()]
    assert lines[0] == ["step", "action", "digest", "method", "norm", "models (norm)"]
    verbs = ["merge", "add", "replace", "reorder", "unmerge", "rebase"]
    for step, verb in enumerate(verbs, 1):
        line, scalars = lines[step], entry(out, step)["byproducts"]["scalars"]  # type: ignore[index]
        digest = sha256_file(out / "merge_history" / f"{step:04d}.json")[:12]
        assert line[:3] == [str(step), verb, digest] and line[4] == f"{scalars['merged_norm']:.4g}"
        assert line[3].startswith("opcm alpha=0.4 ") and line[3].endswith("norm=mean")
    assert lines[1][5] == f"m0 ({norm(out, 1, 'm0')}), m1 ({norm(out, 1, 'm1')})"
    assert lines[3][5] == f"m1, m3 ({norm(out, 3, 'm3')})"
    assert lines[5][5] == "m0" and lines[6][5] == "base2"


def test_the_tree_tells_what_joined_and_left(out: Path) -> None:
    text = tiny.done("history", out, "--graph").out
    lines = text.splitlines()
    assert re.fullmatch(r"o  base@[0-9a-f]{8}", lines[0])
    titles = [line for line in lines if line.startswith("*")]
    assert [title.split()[1:3] for title in titles] == [
        ["1", "merge"], ["2", "add"], ["3", "replace"], ["4", "reorder"], ["5", "unmerge"], ["6", "rebase"],
    ]  # fmt: skip
    parts = re.split(r"(?m)^\*.*$", text)[1:]
    signs = [re.findall(r"(?m)^\|    ([-+~]) (m\d)@", part) for part in parts]
    assert signs == [[("+", "m0"), ("+", "m1")], [("+", "m2")], [("-", "m1"), ("+", "m3")], [], [("-", "m0")], []]
    assert re.search(r"\|    order m2@\w+, m0@\w+, m3@\w+", parts[3])
    assert re.search(r"\|    base base@\w+ -> base2@\w+", parts[5])
    assert ", weight 0.5" in parts[1]
    for step, part in enumerate(parts, 1):
        assert f"({entry(out, step)['action']['how']})" in part  # type: ignore[index]


def test_history_as_json_and_from_python(out: Path) -> None:
    data = tiny.done("history", out, "--json").json
    assert data["entries"] == [entry(out, step) for step in range(1, 7)]
    steps = hfmerge.history(out)
    assert data["steps"] == [step.to_dict() for step in steps]
    assert [step["when"] for step in data["steps"]] == [None] * 6 and steps[0].commit is None
    assert list(steps[1].norms) == [f"{m}@{label}" for m, label in (label.split("@") for label in steps[1].norms)]
    assert steps[5].digest == sha256_file(out / "merge_history" / "0006.json")


@pytest.fixture(scope="module")
def published(root: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A merge by "me", a commit of other files, a pull request by "other" that adds a model, and an add by "me"."""
    home = tmp_path_factory.mktemp("home")
    upload(hub, home, {f"hist/{name}": root / name for name in ("base", "m0", "m1", "m2")})
    method = hfmerge.MethodChoice("linear", {}, "none")
    entry = hfmerge.ModelEntry("hist/m0")
    hfmerge.merge(hfmerge.Recipe(base="hist/base", models=(entry,), method=method, push_to="hist/merged"))
    api = HfApi()
    api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id="hist/merged")
    with Shell(**{**hub.env(home), "HF_TOKEN": hub.tokens["other"]}) as other:
        other.done("add", "hist/merged", "hist/m1", "--push-to", "hist/merged", "--create-pr")
    assert [step.commit and step.commit.authors for step in hfmerge.history("hist/merged@refs/pr/1")] == [
        ("me",), ("other",),
    ]  # fmt: skip
    api.merge_pull_request("hist/merged", 1)
    hfmerge.add("hist/merged", ["hist/m2"], push_to="hist/merged")
    return "hist/merged"


def test_who_and_when_come_from_the_commits_that_brought_the_entries(published: str) -> None:
    commits = {commit.commit_id: commit for commit in HfApi().list_repo_commits(published)}
    steps = hfmerge.history(published)
    assert len(steps) == 3 and len(commits) > 3
    for step in steps:
        assert step.commit is not None
        commit = commits[step.commit.oid]
        assert f"step {step.entry.step})" in commit.title
        assert (step.commit.date, list(step.commit.authors)) == (commit.created_at, commit.authors)
    lines = [re.split(r"\s{2,}", line) for line in tiny.done("history", published).out.splitlines()]
    assert lines[0][5:7] == ["when", "who"] and [line[6] for line in lines[1:4]] == ["me", "other", "me"]
    when = datetime.datetime.strptime(lines[1][5], "%Y-%m-%d %H:%M")
    assert abs((when - datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)).total_seconds()) < 3600
    assert "  me  20" in tiny.done("history", published, "--graph").out
    # an earlier revision has its own steps only
    assert len(hfmerge.history(f"{published}@step-0001")) == 1


@pytest.mark.slow
def test_the_hub_out_of_reach_leaves_who_and_when_open(
    published: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Shell(**hub.env(tmp_path / "home")) as online:
        online.done("history", published)
    with Shell(**{**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}) as offline:
        run = offline.done("history", published)
    assert "authors and dates are not known" in run.err and "when" not in run.out.splitlines()[0]


def test_diff_of_two_steps(out: Path) -> None:
    added = hfmerge.diff(out, 1, 2)
    assert [model.name for model in added.added] == ["m2"] and not added.removed and added.order is None
    assert added.products == {"model.safetensors": "changed"} and "merged" in added.norms
    replaced = hfmerge.diff(out, 2, 3)
    assert [(a.name, b.name) for a, b in replaced.replaced] == [("m1", "m3")] and not replaced.added
    reordered = hfmerge.diff(out, 3, 4)
    assert reordered.order == (("m0", "m3", "m2"), ("m2", "m0", "m3"))
    assert [model.name for model in hfmerge.diff(out, 4, 5).removed] == ["m0"]
    rebased = hfmerge.diff(out)
    assert rebased.base is not None and [base.name for base in rebased.base] == ["base", "base2"]
    assert len(rebased.norms) >= 3 and rebased.to_dict() == hfmerge.diff(out, -2, -1).to_dict()
    whole = hfmerge.diff(out, 1, -1)
    assert [(a.name, b.name) for a, b in whole.replaced] == [("m0", "m2"), ("m1", "m3")]
    assert [weight for _, weight in whole.weights] == [1.0]
    same = hfmerge.diff(out, 3, 3)
    assert same.same and not same.norms and not same.method


def test_diff_on_the_command_line(out: Path, root: Path, tmp_path: Path) -> None:
    text = tiny.done("diff", out).out
    assert re.search(r"~ base      base@\w{8} -> base2@\w{8}", text) and "~ file      model.safetensors" in text
    assert tiny.done("diff", out, "-2", "-1").out == text == tiny.done("diff", out, "5", "6").out
    data = tiny.done("diff", out, "1", "3", "--json").json
    assert data["before"] == 1 and data["after"] == 3
    assert [name.partition("@")[0] for name in (*data["removed"], *data["added"])] == ["m1", "m3", "m2"]
    other = tmp_path / "other"
    flags = ("--base", root / "base2", "--method", "ties", "--dtype", "bfloat16", "--output", other)
    tiny.done("merge", root / "m2", root / "m3", *flags)
    text = tiny.done("diff", out, other).out
    for words in ("~ method    name: opcm -> ties", "~ method    alpha: 0.4 -> None", "~ method    norm: mean -> none",
                  "~ setting   dtype: None -> bfloat16", "~ weight    m2@"):  # fmt: skip
        assert words in text, text
    twin = Path(shutil.copytree(out, tmp_path / "twin"))
    assert "= all files have the same bytes" in tiny.done("diff", out, twin).out
    for steps, words in (
        (("7", "1"), "has no step 7; its ledger has steps 1 to 6"),
        (("0", "1"), "has no step 0"),
        (("-7", "1"), "has no step -7"),
        (("1", other), "two steps by number, or a second merge"),
        ((tmp_path / "nowhere",), "no such folder"),
    ):
        run = tiny.cli("diff", out, *steps)
        assert run.code == 1 and words in run.err, run.err
    with pytest.raises(HfMergeError, match="has only one step"):
        hfmerge.diff(other)


def test_a_subtraction_is_told_apart_from_a_removal(out: Path) -> None:
    tiny.done("unmerge", out, "--remove", "m2", "--mode", "subtract")
    found = hfmerge.diff(out)
    assert [model.name for model in found.subtracted] == ["m2"] and not found.removed
    assert re.search(r"~ model     m2@\w{8}: approximately subtracted", tiny.done("diff", out).out)
    assert re.search(r"\|    ~ m2@\w{8}  approximately subtracted", tiny.done("history", out, "--graph").out)
