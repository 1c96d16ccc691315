"""What a model is called and where it lies: folders of a repository, branches, two folders of one name, aliases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

import hfmerge
from hfmerge.errors import RecipeError
from hfmerge.hub.reference import distinct_names, is_identity, parse_ref
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.schema import identity, model_name
from hfmerge.recipe.recipe import parse_recipe
from tests.fixtures import tiny
from tests.fixtures.shell import Shell


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two classifiers that lie in folders of one name."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1))
    tiny.save(base, root / "base")
    for i, place in enumerate(("one", "two", "three")):
        tuned = tiny.with_head("BertForSequenceClassification", base, i + 1, [f"{place}{j}" for j in range(i + 2)])
        tiny.save(tuned, root / place / "checkpoint-100")
    (root / "one" / "checkpoint-100" / "optimizer.bin").write_bytes(b"no part of a model")
    return root


def merge(root: Path, out: Path, *models: object, flags: tuple[object, ...] = ()) -> Path:
    tiny.done("merge", *models, "--base", root / "base", "--method", "opcm", "--output", out, *flags)
    return out


def ledger(folder: Path) -> dict[str, object]:
    return json.loads(sorted((folder / "merge_history").glob("*.json"))[-1].read_bytes())


def heads(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "heads").iterdir())


def test_a_name_that_is_taken_gets_the_next_number() -> None:
    assert distinct_names(["a", "a", "o/a", "a", "A"]) == ["a", "a-2", "o/a", "a-3", "A-4"]
    assert distinct_names(["a", "a", "a-2"]) == ["a", "a-2", "a-2-2"], "a name must stay when a model joins"
    assert distinct_names(["o/a", "o--a"]) == ["o/a", "o--a-2"], "two names must not share a folder"


@pytest.mark.parametrize(
    ("text", "repo", "folder", "revision"),
    [
        ("org/r/checkpoint-100", "org/r", "checkpoint-100", None),
        ("org/r/a/b@v2", "org/r", "a/b", "v2"),
        ("org/r/a@refs/pr/1", "org/r", "a", "refs/pr/1"),
        ("org/r/a/", "org/r", "a", None),
        ("hf://org/r@v2/a/b", "org/r", "a/b", "v2"),
    ],
)
def test_references_into_a_repository(text: str, repo: str, folder: str, revision: str | None) -> None:
    (ref,) = parse_ref(text)
    assert (ref.repo_id, ref.subfolder, ref.revision) == (repo, folder, revision)


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_name_is_not_the_present_folder(text: str) -> None:
    with pytest.raises(hfmerge.HfMergeError, match="name is empty"):
        parse_ref(text)


@pytest.mark.parametrize(
    "text", ["org/r/..", "org/r/../x", "org/r/a//b", "org/r/a\\b", "org/r/./a", "org/r/a/../../b"]
)
def test_a_folder_outside_of_the_repository_is_refused(text: str) -> None:
    with pytest.raises(hfmerge.HfMergeError, match="cannot be a folder"):
        parse_ref(text)
    commit = "1" * 40
    assert not is_identity(f"{text}@{commit}") and is_identity(f"org/r/a@{commit}")
    for check in (model_name, lambda name: identity(f"{name}@{commit}")):
        assert check("org/r/a")
        with pytest.raises(ValueError, match="must be"):
            check(text)


def test_subfolder_and_alias_of_a_recipe() -> None:
    data = {
        "base": {"model": "org/b@v1", "subfolder": "final"},
        "models": [
            {"model": "org/r@main", "subfolder": "checkpoint-100", "alias": "early"},
            {"model": "./runs", "subfolder": "last"},
        ],
        "method": "task_arithmetic",
    }
    recipe = parse_recipe(data, "recipe")
    assert recipe.base == "org/b/final@v1"
    assert [entry.model for entry in recipe.models] == ["org/r/checkpoint-100@main", "./runs/last"]
    assert recipe.models[0].alias == "early" and parse_recipe(recipe.to_dict(), "again") == recipe
    assert "alias: early" in recipe.to_yaml()
    for key, value in (
        ("subfolder", ".."), ("subfolder", "a\\b"), ("subfolder", "/etc"), ("subfolder", "a@b"),
        ("alias", "../x"), ("alias", "a/b"), ("alias", "base"), ("alias", ".x"), ("alias", ""),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=rf"models\[0\]\.{key}"):
            parse_recipe({**data, "models": [{"model": "org/r", key: value}]}, "recipe")
    with pytest.raises(RecipeError, match="base"):
        parse_recipe({**data, "base": {"model": "org/b", "subfolder": "../c"}}, "recipe")


@pytest.mark.slow
def test_two_folders_of_one_name(root: Path, tmp_path: Path) -> None:
    one, two, three = (root / place / "checkpoint-100" for place in ("one", "two", "three"))
    planned = json.loads(tiny.done("plan", one, two, "--base", root / "base", "--method", "opcm", "--json").out)
    assert set(planned["heads"]) == {"checkpoint-100", "checkpoint-100-2"}
    merged = merge(root, tmp_path / "merged", one, two)
    assert heads(merged) == ["checkpoint-100", "checkpoint-100-2"]
    card = (merged / "README.md").read_text()
    assert "| checkpoint-100 | one0, one1 |" in card and "| checkpoint-100-2 | two0, two1, two2 |" in card
    assert tiny.done("verify", merged, "--replay").code == 0
    ambiguous = tiny.cli("unmerge", merged, "--remove", "checkpoint-100")
    assert ambiguous.code == 1 and "is in the merge 2 times; name its commit" in ambiguous.err
    shutil.copytree(merged, tmp_path / "first")
    tiny.done("unmerge", merged, "--remove", "checkpoint-100-2")
    assert tiny.files(merged, states=False) == tiny.files(merge(root, tmp_path / "alone", one), states=False)
    # what is left is called as if the other had never been there
    first = ledger(tmp_path / "first")["materials"]["models"][0]["digest"]  # type: ignore[index]
    tiny.done("unmerge", tmp_path / "first", "--remove", f"checkpoint-100@{first[:10]}")
    never = merge(root, tmp_path / "never", two)
    assert heads(tmp_path / "first") == ["checkpoint-100"]
    assert tiny.files(tmp_path / "first", states=False) == tiny.files(never, states=False)
    assert tiny.done("verify", tmp_path / "first", "--replay").code == 0


@pytest.mark.slow
def test_folders_of_one_name_that_moved(root: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        shutil.copytree(root / place, tmp_path / "in" / place)
    one, two = (tmp_path / "in" / place / "checkpoint-100" for place in ("one", "two"))
    merged = merge(root, tmp_path / "merged", one, two, flags=("--alias", f"late={two}"))
    digests = [model["digest"] for model in ledger(merged)["materials"]["models"]]  # type: ignore[index]
    (tmp_path / "in").rename(tmp_path / "moved")
    one, two = (tmp_path / "moved" / place / "checkpoint-100" for place in ("one", "two"))
    both = tiny.cli("verify", merged, "--replay", "--source", f"checkpoint-100={one}")
    assert both.code == 1 and f"name checkpoint-100@{digests[0][:8]} and checkpoint-100@{digests[1][:8]}" in both.out
    flags = ("--source", f"checkpoint-100@{digests[0][:8]}={one}", "--source", f"late={two}")
    assert tiny.done("verify", merged, "--replay", *flags).code == 0


@pytest.mark.slow
def test_an_alias_names_head_card_and_removal(root: Path, tmp_path: Path) -> None:
    one, two, three = (root / place / "checkpoint-100" for place in ("one", "two", "three"))
    merged = merge(root, tmp_path / "merged", one, two, flags=("--alias", f"early={one}"))
    assert heads(merged) == ["checkpoint-100", "early"]
    card = (merged / "README.md").read_text()
    assert "| early | one0, one1 |" in card and "alias: early" in card and "early: checkpoint-100 (folder)" in card
    assert hfmerge.load_with_head(str(merged), "early").config.num_labels == 2
    tiny.done("add", merged, three, "--alias", f"late={three}")
    assert heads(merged) == ["checkpoint-100", "early", "late"]
    assert [model.get("alias") for model in ledger(merged)["materials"]["models"]] == ["early", None, "late"]  # type: ignore[index]
    assert tiny.done("verify", merged, "--replay").code == 0
    tiny.done("unmerge", merged, "--remove", "early")
    again = tiny.done("unmerge", merged, "--remove", "early")
    assert again.code == 0 and len(list((merged / "merge_history").iterdir())) == 3, (
        "a change that is done is repeated"
    )
    never = merge(root, tmp_path / "never", two, three, flags=("--alias", f"late={three}"))
    assert tiny.files(merged, states=False) == tiny.files(never, states=False)
    tiny.done("replace", merged, "late", one)
    assert ledger(merged)["materials"]["models"][1]["alias"] == "late"  # type: ignore[index]
    assert tiny.done("verify", merged, "--replay").code == 0


@pytest.mark.slow
def test_an_alias_that_is_taken_or_names_no_model(root: Path, tmp_path: Path) -> None:
    one, two = (root / place / "checkpoint-100" for place in ("one", "two"))
    where = ("--base", root / "base", "--method", "opcm", "--output", tmp_path / "out")
    for flags, text in (
        (("--alias", f"checkpoint-100={two}"), "is the name of models[0]; choose another"),
        (("--alias", f"x={one}", "--alias", f"X={two}"), "is the name of models["),
        (("--alias", "x=./other"), "is none of the models"),
        (("--alias", f"../x={one}"), "models[0].alias"),
        (("--alias", "x"), "write NAME=MODEL"),
    ):
        run = tiny.cli("merge", one, two, *where, *flags)
        assert run.code == 1 and text in run.err, run.err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_models_names_them(root: Path, tmp_path: Path) -> None:
    run = tiny.cli("plan", root / "one", "--base", root / "base", "--method", "opcm")
    assert run.code == 1 and 'its models lie in "checkpoint-100"; name one, as in' in run.err
    place = run.err.partition("as in ")[2].strip().rstrip(".")
    assert tiny.done("plan", place, "--base", root / "base", "--method", "opcm").code == 0


@pytest.fixture(scope="module")
def shell(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Path]]:
    home = tmp_path_factory.mktemp("machine")
    with Shell(**hub.env(home)) as one:
        yield one, home


@pytest.fixture(scope="module")
def runs(root: Path, hub: HubServer) -> str:
    """A repository with a base, two checkpoints and an adapter in folders, and other weights on a branch."""
    api = HfApi()
    api.create_repo("places/runs")
    for place in ("one", "two"):
        api.upload_folder(repo_id="places/runs", folder_path=root / place / "checkpoint-100", path_in_repo=place)
    api.upload_folder(repo_id="places/runs", folder_path=root / "base", path_in_repo="models/base")
    api.create_repo("places/branches")
    api.upload_folder(repo_id="places/branches", folder_path=root / "one" / "checkpoint-100")
    api.create_branch("places/branches", branch="late")
    api.upload_folder(repo_id="places/branches", folder_path=root / "two" / "checkpoint-100", revision="late")
    return "places/runs"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["downloaded", "streamed"])
def test_folders_of_a_repository(runs: str, shell: tuple[Shell, Path], root: Path, tmp_path: Path, how: str) -> None:
    by, home = shell
    flags = ("--stream",) if how == "streamed" else ()
    models = (f"{runs}/one", f"{runs}/two")
    commit = HfApi().model_info(runs).sha
    merged = f"places/merged-{how}"
    by.done("merge", *models, "--base", f"{runs}/models/base", "--method", "opcm", "--push-to", merged, *flags)
    by.done("verify", merged, "--replay")
    data = json.loads(Path(HfApi().hf_hub_download(merged, "merge_history/0001.json")).read_bytes())
    assert data["materials"]["base"]["name"] == f"{runs}/models/base"
    assert [(one["name"], one["commit"]) for one in data["materials"]["models"]] == [(m, commit) for m in models]
    assert set(data["materials"]["models"][0]["files"]) == {"config.json", "model.safetensors"}
    card = Path(HfApi().hf_hub_download(merged, "README.md")).read_text()
    assert f"base_model:\n- {runs}\n" in card and f"/{runs}/tree/{commit}/one" in card
    # the same folders on this machine give the same weights
    for name in ("one", "two"):
        shutil.copytree(root / name / "checkpoint-100", tmp_path / name)
    local = merge(root, tmp_path / "local", tmp_path / "one", tmp_path / "two")
    products = ledger(local)["products"]
    assert products["model.safetensors"] == data["products"]["model.safetensors"]  # type: ignore[index]
    held = {path.name for path in home.rglob("models--places--runs/snapshots/*/one/*")}
    assert "config.json" in held and ("model.safetensors" in held or how == "streamed")
    assert "optimizer.bin" not in held, "only what the model needs is downloaded"
    by.done("unmerge", merged, "--remove", f"{runs}/one", "--push-to", merged)
    never = by.done(
        "merge", f"{runs}/two", "--base", f"{runs}/models/base", "--method", "opcm", "--output", tmp_path / "never"
    )
    assert never.code == 0
    data = json.loads(Path(HfApi().hf_hub_download(merged, "merge_history/0002.json")).read_bytes())
    assert data["products"] == ledger(tmp_path / "never")["products"]
    by.done("certify", merged, "--remove", f"{runs}/one", "--output", tmp_path / "certificate.json")
    by.done("replace", merged, f"{runs}/two", f"{runs}/one", "--push-to", merged)
    same = by.run("rebase", merged, "--base", f"{runs}/models/base@main", "--output", tmp_path / "rebased")
    assert same.code == 1 and "is its base already" in same.err
    by.done("rebase", merged, "--base", root / "base", "--output", tmp_path / "rebased")
    by.done("verify", tmp_path / "rebased", "--replay")
    by.done("restore", merged, "--step", "1", "--push-to", merged)
    by.done("verify", merged, "--replay")
    by.done("history", merged)


@pytest.mark.slow
def test_branches_of_a_repository(runs: str, shell: tuple[Shell, Path], tmp_path: Path) -> None:
    by, _ = shell
    by.done(
        "merge", "places/branches", "places/branches@late", "--base", f"{runs}/models/base", "--method", "opcm",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert heads(tmp_path / "out") == ["places--branches", "places--branches-2"]
    by.done("verify", tmp_path / "out", "--replay")
    by.done("unmerge", tmp_path / "out", "--remove", "places/branches-2")
    assert heads(tmp_path / "out") == ["places--branches"]


@pytest.mark.slow
def test_a_folder_that_is_not_there(runs: str, shell: tuple[Shell, Path], tmp_path: Path) -> None:
    by, _ = shell
    for model, text in (
        (f"{runs}/four", 'has no folder four; models lie in "models/base", "one", "two"'),
        (runs, 'its models lie in "models/base", "one", "two"; name one, as in places/runs/models/base'),
    ):
        run = by.run("plan", model, "--base", f"{runs}/models/base", "--method", "opcm")
        assert run.code == 1 and text in run.err, run.err


@pytest.mark.slow
def test_a_merge_of_merges_in_folders(runs: str, shell: tuple[Shell, Path], root: Path, tmp_path: Path) -> None:
    """An inner merge that lies in a folder of a repository, and one of whose models lies in a folder too."""
    by, _ = shell
    base = f"{runs}/models/base"
    by.done("merge", f"{runs}/one", f"{runs}/two", "--base", base, "--method", "opcm", "--output", tmp_path / "inner")
    HfApi().create_repo("places/merges")
    HfApi().upload_folder(repo_id="places/merges", folder_path=tmp_path / "inner", path_in_repo="first")
    outer = tmp_path / "outer"
    by.done("merge", "places/merges/first", "--base", base, "--method", "task_arithmetic", "--output", outer)
    inner = ledger(outer)["materials"]["models"][0]  # type: ignore[index]
    assert [one.partition("@")[0] for one in inner["contains"]] == [base, f"{runs}/one", f"{runs}/two"]
    by.done("unmerge", outer, "--remove", f"{runs}/one")
    changed = ledger(outer)["materials"]["models"][0]  # type: ignore[index]
    assert [one.partition("@")[0] for one in changed["contains"]] == [base, f"{runs}/two"]
    by.done("verify", outer, "--replay")
    run = by.run("add", "places/merges/first", f"{runs}/one")
    assert run.code == 1 and "lies on the Hub; say where the result goes" in run.err


@pytest.mark.slow
def test_a_base_with_an_adapter_is_refused_and_the_advice_works(root: Path, tmp_path: Path) -> None:
    targets = {f"encoder.layer.0.attention.self.{name}": (16, 16) for name in ("query", "value")}
    adapter = tiny.adapter(tmp_path / "adapter", targets, 5)
    one = root / "one" / "checkpoint-100"
    both = f"{root / 'base'}+{adapter}"
    merged = merge(root, tmp_path / "merged", one)
    for run in (
        tiny.cli("plan", one, "--base", both, "--method", "opcm"),
        tiny.cli("rebase", merged, "--base", both),
    ):
        assert run.code == 1 and "base: must be one full model, not base+adapter; merge" in run.err, run.err
    config = {"merge_method": "task_arithmetic", "base_model": both, "parameters": {"weight": 1.0}}
    (tmp_path / "mergekit.yaml").write_text(json.dumps({**config, "models": [{"model": str(one)}]}))
    run = tiny.cli("convert", tmp_path / "mergekit.yaml")
    assert run.code == 1 and "not base+adapter" in run.err, run.err
    # what the message says
    based = tmp_path / "with-adapter"
    tiny.done("merge", adapter, "--base", root / "base", "--method", "linear", "--output", based)
    before, after = tiny.tensors(root / "base"), tiny.tensors(based)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in before:
        down, up = (f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight" for part in "AB")
        change = 2.0 * factors[up] @ factors[down] if up in factors else torch.zeros(())
        assert torch.allclose(after[name], before[name] + change, atol=1e-6), name
    tiny.done("rebase", merged, "--base", based)
    assert ledger(merged)["materials"]["base"]["contains"]  # type: ignore[index]
    assert tiny.done("verify", merged, "--replay").code == 0
    # as a model, base+adapter is taken
    tiny.done("add", merged, both)
    assert tiny.done("verify", merged, "--replay").code == 0
    tiny.done("unmerge", merged, "--remove", "adapter")
