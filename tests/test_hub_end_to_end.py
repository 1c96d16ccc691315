"""The main job by Hub ID, with the real client against a real server on loopback, and every refusal."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

import hfmerge
from hfmerge.cli import main
from hfmerge.hashing import sha256_file
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from tests.fixtures.processes import Forked


CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}


@dataclass(frozen=True)
class World:
    """A Hub with a base and three fine-tunes (classifiers with 2, 3 and 4 labels), and the folders they came from."""

    server: HubServer
    api: HfApi
    folders: dict[str, Path]

    @property
    def models(self) -> list[str]:
        return ["org/a", "org/b", "org/c"]


@pytest.fixture(scope="module")
def world(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**CONFIG))
    base.save_pretrained(root / "base")
    (root / "base" / "README.md").write_text(
        "---\nlicense: apache-2.0\npipeline_tag: feature-extraction\n---\n# base\n"
    )
    folders = {"org/base": root / "base"}
    for i, name in enumerate(("a", "b", "c")):
        labels = {j: f"{name}{j}" for j in range(i + 2)}
        config = transformers.BertConfig(**CONFIG, id2label=labels, label2id={v: k for k, v in labels.items()})
        tuned = transformers.BertForSequenceClassification(config)
        tuned.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        tuned.save_pretrained(root / name)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        folders[f"org/{name}"] = root / name
    for repo_id, folder in folders.items():
        import_folder(hub.endpoint, hub.token, folder, repo_id)
    return World(hub, HfApi(), folders)


def merge(world: World, repo_id: str, models: list[str], **options: object) -> hfmerge.MergeResult:
    recipe = hfmerge.Recipe(
        base="org/base",
        models=tuple(hfmerge.ModelEntry(model) for model in models),
        method=hfmerge.MethodChoice("opcm", {"alpha": 0.5, "variant": "code"}, "mean"),
        push_to=repo_id,
        **options,  # type: ignore[arg-type]
    )
    return hfmerge.merge(recipe)


def lfs(world: World, repo_id: str, name: str = "model.safetensors", revision: str = "main") -> str:
    item = next(i for i in world.api.list_repo_tree(repo_id, recursive=True, revision=revision) if i.path == name)
    return str(item.lfs.sha256)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, expect exit code 1, and give what it said on standard error."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    return capsys.readouterr().err.strip()


def child(world: World, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with other variables."""
    environment = {**world.server.env(home), **variables}
    process = Forked("-m", "hfmerge", *arguments, env=environment, together=False)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


@pytest.mark.slow
def test_merge_add_unmerge_by_id_gives_the_bytes_of_never_merged(world: World, tmp_path: Path) -> None:
    first = merge(world, "org/merged", ["org/a", "org/b"])
    assert first.pushed is not None and first.pushed.tag == "step-0001"
    added = hfmerge.add("org/merged", ["org/c"], push_to="org/merged")
    assert added.entry.how.startswith("continued from the kept state after model 2; 1 of 3 models read")
    merge(world, "org/all-at-once", world.models)
    assert lfs(world, "org/merged") == lfs(world, "org/all-at-once")
    removed = hfmerge.unmerge("org/merged", "org/b", push_to="org/merged")
    assert removed.entry.step == 3
    never = merge(world, "org/never", ["org/a", "org/c"], output=str(tmp_path / "never"))
    assert never.folder is not None
    assert lfs(world, "org/merged") == lfs(world, "org/never") == sha256_file(never.folder / "model.safetensors")
    assert lfs(world, "org/merged", revision="step-0001") == lfs(world, "org/merged", revision=first.pushed.commit)
    report = hfmerge.verify("org/merged", replay=True)
    assert report.ok, report.culprits
    assert [tag.name for tag in world.api.list_repo_refs("org/merged").tags] == ["step-0001", "step-0002", "step-0003"]


@pytest.mark.slow
def test_the_published_model_loads_with_every_head(world: World) -> None:
    merge(world, "org/heads", world.models)
    _, info = transformers.BertModel.from_pretrained("org/heads", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, count in (("org/a", 2), ("org/b", 3), ("org/c", 4)):
        model = hfmerge.load_with_head("org/heads", name)
        stored = load_file(world.folders[name] / "model.safetensors")
        assert torch.equal(model.classifier.weight, stored["classifier.weight"])
        assert list(model.config.id2label.values()) == [f"{name[-1]}{i}" for i in range(count)]
    paths = {item.path for item in world.api.list_repo_tree("org/heads", recursive=True)}
    assert "heads/org--a/model.safetensors" in paths
    with pytest.raises(hfmerge.HfMergeError, match=r"no head of org/x; it keeps heads of: org/a, org/b, org/c"):
        hfmerge.load_with_head("org/heads", "org/x")


@pytest.mark.slow
def test_card_metadata_links_all_parents(world: World) -> None:
    result = merge(world, "org/card", ["org/a", "org/b"])
    info = world.api.model_info("org/card", expand=["cardData", "tags"])
    card = info.card_data.to_dict()
    assert card["base_model"] == ["org/base", "org/a", "org/b"] and card["base_model_relation"] == "merge"
    assert card["license"] == "apache-2.0" and card["pipeline_tag"] == "feature-extraction"
    assert "base_model:merge:org/base" in info.tags
    assert card["hfmerge"]["ledger"] == result.entry.file and card["hfmerge"]["repo"] == "org/card"


@pytest.mark.slow
def test_state_lies_on_its_own_branch_and_goes_with_a_removed_model(world: World) -> None:
    merge(world, "org/state", ["org/a", "org/b"], state="all")

    def held() -> list[str]:
        tree = world.api.list_repo_tree("org/state", recursive=True, revision="merge-state")
        return sorted(item.path for item in tree if item.path.endswith(".safetensors"))

    main_files = [item.path for item in world.api.list_repo_tree("org/state", recursive=True)]
    assert not any(path.startswith("merge_state") for path in main_files)
    before = held()
    assert len(before) == 2
    result = hfmerge.unmerge("org/state", "org/b", push_to="org/state")
    assert result.entry.how.startswith("taken from the kept state after model 1")
    assert held() == [result.entry.states[0].file]
    assert [c.detail for c in hfmerge.verify("org/state").checks if c.what == held()[0]] == [
        "has its digest (by LFS id, as the Hub lists it)"
    ]
    broken = [CommitOperationAdd(held()[0], b"other bytes" * 100_000)]
    world.api.create_commit("org/state", broken, commit_message="tamper", revision="merge-state")
    assert held()[0] in " ".join(hfmerge.verify("org/state").culprits)
    assert set(held()) <= set(before)


@pytest.mark.slow
def test_plan_downloads_no_weights(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = child(world, tmp_path / "home", "plan", "--base", "org/base", "--method", "opcm", "--json", *world.models)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["estimate"]["download"] == sum(
        (world.folders[name] / "model.safetensors").stat().st_size for name in ("org/base", *world.models)
    )
    assert not [p for p in (tmp_path / "home").rglob("*.safetensors")]
    assert data["heads"]["org/b"] == ["b0", "b1", "b2"] and data["weights"] == [1.0] * len(world.models)


@pytest.mark.slow
def test_revisions_are_pinned_before_anything_is_read(world: World, tmp_path: Path) -> None:
    old = world.api.model_info("org/c").sha
    world.api.create_tag("org/c", tag="v1", revision=old, exist_ok=True)
    moved = tmp_path / "moved.safetensors"
    tensors = load_file(world.folders["org/c"] / "model.safetensors")
    save_file({key: value + 1.0 for key, value in tensors.items()}, moved, metadata={"format": "pt"})
    world.api.upload_file(path_or_fileobj=str(moved), path_in_repo="model.safetensors", repo_id="org/c")
    try:
        by_tag = merge(world, "org/by-tag", ["org/a", "org/c@v1"])
        by_branch = merge(world, "org/by-branch", ["org/a", "org/c"])
        assert by_tag.entry.models[1].commit == old != by_branch.entry.models[1].commit
        assert lfs(world, "org/by-tag") != lfs(world, "org/by-branch")
        # a branch that moved later changes nothing: the ledger holds the commit
        assert hfmerge.verify("org/by-tag", replay=True).ok
    finally:
        original = world.folders["org/c"] / "model.safetensors"
        world.api.upload_file(path_or_fileobj=str(original), path_in_repo="model.safetensors", repo_id="org/c")


@pytest.mark.slow
def test_uri_and_plain_id_are_the_same_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    text = failure(
        capsys, "plan", "--base", "hf://org/base", "--method", "opcm", "org/a", "hf://models/org/a@main", "org/b"
    )
    assert "models[1]" in text and "again" in text


@pytest.mark.slow
def test_pull_request(world: World) -> None:
    merge(world, "org/pr", ["org/a"])
    before = world.api.model_info("org/pr").sha
    result = hfmerge.add("org/pr", ["org/b"], push_to="org/pr", create_pr=True)
    assert result.pushed is not None and result.pushed.pull_request is not None
    assert world.api.model_info("org/pr").sha == before
    number = int(result.pushed.pull_request.rpartition("/")[2])
    assert hfmerge.verify(f"org/pr@refs/pr/{number}").ok
    world.api.merge_pull_request("org/pr", number)
    assert lfs(world, "org/pr") == result.entry.products["model.safetensors"]
    # the branch of states still holds that of the step before, which may hold a model that left
    assert all("a state that the ledger does not know" in culprit for culprit in hfmerge.verify("org/pr").culprits)
    assert hfmerge.add("org/pr", ["org/b"], push_to="org/pr").repeated
    assert hfmerge.verify("org/pr").ok


@pytest.mark.slow
def test_a_push_race_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(world, "org/race", ["org/a", "org/b"])
    stale = world.api.model_info("org/race").sha
    hfmerge.add("org/race", ["org/c"], push_to="org/race")
    now = world.api.model_info("org/race").sha
    with pytest.raises(hfmerge.HfMergeError, match="holds another merge|main moved"):
        hfmerge.unmerge(f"org/race@{stale}", "org/a", push_to="org/race")
    assert world.api.model_info("org/race").sha == now
    assert hfmerge.verify("org/race").ok


@pytest.mark.slow
def test_a_commit_between_reading_and_pushing_is_a_412(world: World, tmp_path: Path) -> None:
    merge(world, "org/late", ["org/a", "org/b"])
    stale = world.api.model_info("org/late").sha
    world.api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id="org/late")
    now = world.api.model_info("org/late").sha
    with pytest.raises(hfmerge.HfMergeError, match="main moved since"):
        hfmerge.unmerge(f"org/late@{stale}", "org/a", push_to="org/late")
    assert world.api.model_info("org/late").sha == now
    hfmerge.unmerge("org/late", "org/a", push_to="org/late")
    assert "notes.txt" in {item.path for item in world.api.list_repo_tree("org/late", recursive=True)}


@pytest.mark.slow
def test_an_unrelated_repository_is_not_overwritten(world: World) -> None:
    merge(world, "org/mine", ["org/a"])
    with pytest.raises(hfmerge.HfMergeError, match="holds another merge"):
        merge(world, "org/mine", ["org/b"])


@pytest.mark.slow
def test_a_card_written_by_people_keeps_its_words(world: World) -> None:
    merge(world, "org/words", ["org/a"])
    path = world.api.hf_hub_download("org/words", "README.md")
    text = Path(path).read_text(encoding="utf-8") + "\n## Notes\n\nKept.\n"
    world.api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="org/words")
    assert hfmerge.verify("org/words").ok
    hfmerge.add("org/words", ["org/b"], push_to="org/words")
    now = Path(world.api.hf_hub_download("org/words", "README.md", force_download=True)).read_text(encoding="utf-8")
    assert "## Notes\n\nKept." in now and "| add | org/b |" in now
    assert hfmerge.verify("org/words").ok


@pytest.mark.slow
@pytest.mark.parametrize("part", ["weights", "card", "ledger", "config"])
def test_verify_names_what_was_changed_on_the_hub(world: World, part: str, tmp_path: Path) -> None:
    repo_id = f"org/tampered-{part}"
    merge(world, repo_id, ["org/a"])
    name = {"weights": "model.safetensors", "card": "README.md", "ledger": "merge_history/0001.json"}.get(
        part, "config.json"
    )
    data = bytearray(Path(world.api.hf_hub_download(repo_id, name)).read_bytes())
    at = data.find(b"opcm") if part in ("card", "ledger") else len(data) - 3
    data[at] ^= 1
    operations = [CommitOperationAdd(name, bytes(data))]
    try:
        world.api.create_commit(repo_id, operations, commit_message="tamper")
    except HfHubHTTPError:
        pytest.fail("the server refused the tampered file, so nothing was tested")
    report = hfmerge.verify(repo_id)
    assert not report.ok
    assert name.split("/")[-1] in " ".join(report.culprits)
    assert main(["verify", repo_id]) == 1


def private(world: World) -> None:
    world.api.create_repo("org/secret", private=True, exist_ok=True)
    world.api.upload_folder(repo_id="org/secret", folder_path=world.folders["org/a"])
    world.api.create_repo("org/gated", exist_ok=True)
    world.api.upload_folder(repo_id="org/gated", folder_path=world.folders["org/a"])
    world.api.update_repo_settings("org/gated", gated="manual")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("user", "model", "words"),
    [
        ("other", "org/secret", ["org/secret", "no such repository, or a private one", "HF_TOKEN"]),
        ("other", "org/gated", ["org/gated", "gated"]),
        ("nobody", "org/a", ["refused the token"]),
        ("me", "org/nothing-here", ["org/nothing-here", "no such repository"]),
        ("me", "org/a@v99", ["org/a@v99", "no such branch, tag or commit"]),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    world: World, user: str, model: str, words: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    private(world)
    monkeypatch.setenv("HF_TOKEN", world.server.tokens.get(user, "hf_wrong"))
    output = tmp_path / "out"
    text = failure(
        capsys, "merge", "--base", "org/base", "--method", "linear", "--output", str(output), model, "org/b"
    )
    for word in words:
        assert word in text, text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_right_to_push(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    merge(world, "org/theirs", ["org/a"])
    monkeypatch.setenv("HF_TOKEN", world.server.tokens["other"])
    text = failure(capsys, "add", "org/theirs", "org/b", "--push-to", "org/theirs")
    assert "org/theirs: other has no right to write there" in text


@pytest.mark.slow
def test_a_merge_on_the_hub_needs_a_place_for_the_result(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    merge(world, "org/where", ["org/a", "org/b"])
    assert "--push-to org/where" in failure(capsys, "unmerge", "org/where", "--remove", "org/a")


@pytest.mark.slow
def test_offline_with_and_without_cache(world: World, tmp_path: Path) -> None:
    arguments = ["merge", "--base", "org/base", "--method", "opcm", "--quiet", *world.models[:2]]
    without = child(world, tmp_path / "empty", *arguments, "--output", str(tmp_path / "o1"), HF_HUB_OFFLINE="1")
    assert without.returncode == 1 and "not in the local cache" in without.stderr, without.stderr
    assert not (tmp_path / "o1").exists()
    online = child(world, tmp_path / "home", *arguments, "--output", str(tmp_path / "o2"))
    assert online.returncode == 0, online.stderr
    offline = child(world, tmp_path / "home", *arguments, "--output", str(tmp_path / "o3"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert sha256_file(tmp_path / "o2" / "model.safetensors") == sha256_file(tmp_path / "o3" / "model.safetensors")
    unreachable = child(
        world, tmp_path / "home", *arguments, "--output", str(tmp_path / "o4"), HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert unreachable.returncode == 0, unreachable.stderr
    assert sha256_file(tmp_path / "o4" / "model.safetensors") == sha256_file(tmp_path / "o2" / "model.safetensors")


@pytest.mark.slow
def test_weights_on_the_hub_that_are_none(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = (world.folders["org/a"] / "config.json").read_bytes()
    whole = (world.folders["org/a"] / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
    for name, data in (("pointer", pointer), ("short", whole[: len(whole) // 2])):
        world.api.create_repo(f"org/{name}", exist_ok=True)
        operations = [CommitOperationAdd("config.json", config), CommitOperationAdd("model.safetensors", data)]
        world.api.create_commit(f"org/{name}", operations, commit_message="broken")
        text = failure(capsys, "plan", "--base", "org/base", "--method", "linear", f"org/{name}", "org/b")
        assert f"org/{name}@" in text and "model.safetensors" in text and len(text.splitlines()) == 1


@pytest.mark.slow
def test_no_request_failed_on_the_server(
    world: World, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    logs = list(tmp_path_factory.getbasetemp().glob("hub-end-to-end*/requests.jsonl"))
    assert logs
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    rows = [row for row in rows if "/org/" in row["path"]]  # other tests ask for what must fail
    assert len(rows) > 100
    assert not [row for row in rows if row["status"] >= 500]
