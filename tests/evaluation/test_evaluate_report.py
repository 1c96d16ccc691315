"""By ID against a Hub: data sets of every form, offline, gated and odd ones; results in cards, folders and PRs."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, model_info
from huggingface_hub.repocard_data import model_index_to_eval_results

import hfmerge
from hfmerge.errors import AccessError, HfMergeError, NotFoundError, PushError, UnsupportedError
from hfmerge.evaluation.evaluator import Settings
from hfmerge.evaluation.report import push_results, write_results
from hfmerge.evaluation.suite import Suite, load_suite, ready_suites
from hfmerge.experiments.continual.config import Variant
from hfmerge.experiments.continual.run import Experiment, run_continual
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.card import parse_card
from hfmerge.ledger.card_sections import carried_scores, part, with_scores, without_scores
from hfmerge.recipe.recipe import load_recipe
from tests.fixtures import evaluating, launching, tiny


pytestmark = pytest.mark.slow
LABELS = ["cold", "warm", "hot"]
FRESH = Settings(cache=False)
DASHES = "---\n# --- mine ---\ntitle: one --- two\nwords: |\n  a\n  --- b\n---\n# My model\n\nMy own words.\n"
HUMAN = "---\n# a remark\nlicense: mit   # another\nlanguage: [en]\n---\n# My model\n\nMy own words.\n"


@dataclass(frozen=True)
class World:
    """A Hub with a base, two classifiers (one with a card of people) and a data set with named labels."""

    server: HubServer
    api: HfApi
    root: Path
    rows: Sequence[dict[str, Any]]

    def data(self, name: str, files: dict[str, str], **settings: Any) -> str:
        """Make a data set repository."""
        self.api.create_repo(f"tests/{name}", repo_type="dataset", exist_ok=True)
        adds = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
        commit = self.api.create_commit(f"tests/{name}", adds, commit_message="data", repo_type="dataset").oid
        if settings:
            self.api.update_repo_settings(f"tests/{name}", repo_type="dataset", **settings)
        return str(commit)

    def suite(self, path: Path, **changes: Any) -> Path:
        task = {"name": "heat", "kind": "text-classification", "dataset": "tests/heat", "text": "text",
                "label": "label", **changes}  # fmt: skip
        return evaluating.suite(path, task, name="heat-suite")


@pytest.fixture(scope="module")
def world(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("report")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for seed, name in enumerate(("one", "two")):
        tiny.save(tiny.with_head("BertForSequenceClassification", base, seed, LABELS), root / name)
    (root / "one" / "README.md").write_text(HUMAN)
    for name in ("base", "one", "two"):
        tiny.tokenizer(root / name, evaluating.TOKENS)
        import_folder(hub.endpoint, "hf_test_token_of_me", root / name, f"tests/heat-{name}")
    made = World(hub, HfApi(), root, evaluating.labelled(root / "rows.jsonl", LABELS, 40, 1))
    names = {str(i): label for i, label in enumerate(LABELS)}
    features = [
        {"name": "text", "dtype": "string"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
    ]
    splits = {"configs": [{"config_name": "default", "data_files": [{"split": "test", "path": "rows.csv"}]}]}
    card = yaml.safe_dump({**splits, "dataset_info": {"features": features}})
    table = "text,label\n" + "".join(f"{row['text']},{LABELS.index(row['label'])}\n" for row in made.rows)
    bench = {"name": "Heat", "tasks": [{"id": "heat_test", "config": "default", "split": "test"}]}
    made.data("heat", {"README.md": f"---\n{card}---\n", "rows.csv": table, "eval.yaml": yaml.safe_dump(bench)})
    return made


def alone(world: World, name: str) -> float:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(world.root / name)
    return evaluating.accuracy(model, world.rows)


def test_data_by_id_is_pinned_and_its_label_names_count(world: World, tmp_path: Path) -> None:
    commit = world.api.dataset_info("tests/heat").sha
    matrix = hfmerge.evaluate(["tests/heat-one"], world.suite(tmp_path / "suite.yaml"), settings=FRESH)
    assert matrix.scores[0][0] is not None and matrix.scores[0][0].value == pytest.approx(alone(world, "one"))
    assert (matrix.tasks[0].dataset, matrix.tasks[0].commit) == ("tests/heat", commit)
    assert matrix.models[0].commit == model_info("tests/heat-one").sha
    older = world.suite(tmp_path / "suite.yaml", dataset=f"tests/heat@{commit}", stream=True, limit=7)
    streamed = hfmerge.evaluate(["tests/heat-one"], older, settings=FRESH).scores[0][0]
    assert streamed is not None and streamed.n == 7


def test_a_stream_is_read_no_further_than_its_sample(
    world: World, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in world.rows)
    world.data("heat-large", {f"test-{i}.jsonl": text for i in range(14)})
    monkeypatch.setattr("hfmerge.evaluation.data.BUFFER", 20)
    suite = world.suite(tmp_path / "suite.yaml", dataset="tests/heat-large", stream=True, limit=10)
    first, again = (hfmerge.evaluate(["tests/heat-one"], suite, settings=FRESH).scores[0][0] for _ in range(2))
    assert first is not None and first.n == 10 and first == again
    logs = tmp_path_factory.getbasetemp().glob("hub-end-to-end*/requests.jsonl")
    requests = [line for log in logs for line in log.read_text().splitlines()]
    lines = [line for line in requests if "heat-large/resolve" in line and '"GET"' in line]
    assert 0 < len({name for line in lines for name in re.findall(r"test-\d+\.jsonl", line)}) < 14


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_other_forms_of_data_by_id(form: str, world: World, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(list(world.rows))
    path = tmp_path / f"test.{form}"
    rows.to_parquet(str(path)) if form == "parquet" else rows.to_json(str(path))
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    path.rename(folder / "data" / path.name)
    import_folder(world.server.endpoint, "hf_test_token_of_me", folder, f"tests/heat-{form}", repo_type="dataset")
    suite = world.suite(tmp_path / "suite.yaml", dataset=f"tests/heat-{form}")
    found = hfmerge.evaluate(["tests/heat-one"], suite, settings=FRESH).scores[0][0]
    assert found is not None and found.value == pytest.approx(alone(world, "one"))


def test_data_sets_that_are_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "suite.yaml"
    rows = "".join(json.dumps(row) + "\n" for row in world.rows)
    world.data("script", {"script.py": "import datasets\n"})
    world.data("gated", {"test.jsonl": rows}, gated="manual")
    cases: list[tuple[dict[str, Any], type[HfMergeError], str]] = [
        ({"dataset": "tests/nothing"}, NotFoundError, "no such repository"),
        ({"dataset": "tests/heat@nowhere"}, NotFoundError, "no such branch"),
        ({"dataset": "tests/script"}, UnsupportedError, "made by a script"),
        ({"split": "tset"}, HfMergeError, 'no split tset; did you mean "test"'),
        ({"config": "other"}, HfMergeError, "not loaded: .*other"),
    ]
    for changes, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            hfmerge.evaluate(["tests/heat-one"], world.suite(suite, **changes), settings=FRESH)
        assert "\n" not in str(caught.value) and "heat" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_test_token_of_other")
    with pytest.raises(AccessError, match="heat.*gated"):
        hfmerge.evaluate(["tests/heat-one"], world.suite(suite, dataset="tests/gated"), settings=FRESH)


OFFLINE = """
import json, sys
import hfmerge
from hfmerge.errors import OfflineError
from hfmerge.evaluation.evaluator import Settings
matrix = hfmerge.evaluate(["tests/heat-one"], sys.argv[1], settings=Settings(cache=False))
try:
    hfmerge.evaluate(["tests/heat-one"], sys.argv[2])
except OfflineError as error:
    print(json.dumps([matrix.scores[0][0].value, str(error)]))
"""


def test_offline_the_cache_is_enough_and_never_another_commit(world: World, tmp_path: Path) -> None:
    suite = world.suite(tmp_path / "suite.yaml")
    online = hfmerge.evaluate(["tests/heat-one"], suite, settings=FRESH).scores[0][0]
    other = world.suite(tmp_path / "other.yaml", dataset=f"tests/heat@{'1' * 40}")
    run = tiny.finish(tiny.start(suite, other, code=OFFLINE, HF_HUB_OFFLINE="1"))
    assert run.code == 0, run.err
    assert online is not None and run.json[0] == online.value
    assert "not in the local cache" in run.json[1]


def test_results_go_into_the_card_of_people_and_leave_their_words(world: World, tmp_path: Path) -> None:
    suite = world.suite(tmp_path / "suite.yaml")
    for _ in range(2):
        pushed = tiny.done(
            "evaluate", "tests/heat-one", "tests/heat-two", "--suite", suite, "--push-to", "tests/heat-one"
        )
    text = Path(world.api.hf_hub_download("tests/heat-one", "README.md")).read_text(encoding="utf-8")
    assert "pushed to" in pushed.out and text.count("## Results") == 1
    assert text.startswith("---\n# a remark\nlicense: mit   # another\nlanguage: [en]\nmodel-index:\n")
    assert (
        "# My model\n\nMy own words.\n" in text and "| **tests/heat-one** |" in text and "| tests/heat-two |" in text
    )
    found = model_index_to_eval_results(parse_card(text)[0]["model-index"])[1]
    assert len(found) == 1 and found[0].metric_value == pytest.approx(alone(world, "one"))
    assert (found[0].task_type, found[0].dataset_type) == ("text-classification", "tests/heat")
    assert found[0].dataset_revision == world.api.dataset_info("tests/heat").sha
    path = world.api.hf_hub_download("tests/heat-one", ".eval_results/hfmerge-heat-suite.yaml")
    entry = yaml.safe_load(Path(path).read_text())[0]
    assert entry["dataset"]["task_id"] == "heat_test" and entry["value"] == pytest.approx(alone(world, "one"))
    # a sample is no entry of a leaderboard
    sampled = hfmerge.evaluate(["tests/heat-two"], suite, settings=Settings(limit=5))
    push_results(sampled, "tests/heat-two")
    assert not any(".eval_results" in name for name in world.api.list_repo_files("tests/heat-two"))


def test_a_pull_request_and_refusals_to_push(world: World, tmp_path: Path) -> None:
    suite = world.suite(tmp_path / "suite.yaml")
    run = tiny.done(
        "evaluate", "tests/heat-two", "--suite", suite, "--push-to", "tests/heat-two", "--create-pr", "--json"
    )
    number = int(run.json["pushed"]["pull_request"].rpartition("/")[2])
    assert "## Results" in ModelCard.load(world.api.hf_hub_download(
        "tests/heat-two", "README.md", revision=f"refs/pr/{number}")).content  # fmt: skip
    matrix = hfmerge.evaluate(["tests/heat-two"], suite)
    with pytest.raises(PushError, match="not among the models"):
        push_results(matrix, "tests/heat-one")
    world.api.create_repo("tests/heat-moved")
    world.api.upload_folder(repo_id="tests/heat-moved", folder_path=world.root / "two")
    matrix = hfmerge.evaluate(["tests/heat-moved"], suite)
    world.api.upload_file(repo_id="tests/heat-moved", path_or_fileobj=b"hello", path_in_repo="notes.md")
    push_results(matrix, "tests/heat-moved")
    world.api.upload_folder(repo_id="tests/heat-moved", folder_path=world.root / "one", allow_patterns="*.safetensors")
    with pytest.raises(PushError, match="other weights"):
        push_results(matrix, "tests/heat-moved")


def test_a_merge_keeps_results_until_its_weights_change(world: World, tmp_path: Path) -> None:
    suite = world.suite(tmp_path / "suite.yaml", head="tests/heat-one")
    out = tmp_path / "merged"
    tiny.done("merge", "tests/heat-one", "--base", "tests/heat-base", "--method", "linear", "--output", out)
    card = out / "README.md"
    card.write_text(card.read_text() + "\nWords of a person.\n")
    tiny.done("evaluate", out, "--suite", suite, "--write-card")
    assert hfmerge.verify(out).ok and part(card.read_text(), "results")
    matrix = hfmerge.evaluate([out], suite)
    assert matrix.models[0].kind == "merge"
    before = card.read_text()
    write_results(matrix, out, "merged")
    assert card.read_text() == before
    hfmerge.push(out, "tests/heat-merged")
    published = ModelCard.load("tests/heat-merged").content
    assert part(published, "results") == part(card.read_text(), "results")
    assert parse_card(published)[0]["model-index"][0]["results"] and hfmerge.verify("tests/heat-merged").ok
    tiny.done("evaluate", "tests/heat-merged", "--suite", suite, "--push-to", "tests/heat-merged")
    assert ".eval_results/hfmerge-heat-suite.yaml" in world.api.list_repo_files("tests/heat-merged")
    assert hfmerge.verify("tests/heat-merged").ok
    # other weights: scores of the former ones are gone, words of people are not
    hfmerge.add(out, ["tests/heat-two"], push_to="tests/heat-merged")
    for text in (card.read_text(), ModelCard.load("tests/heat-merged", ignore_metadata_errors=False).content):
        assert part(text, "results") is None and "model-index" not in parse_card(text)[0]
    assert "Words of a person." in card.read_text()
    assert ".eval_results/hfmerge-heat-suite.yaml" not in world.api.list_repo_files("tests/heat-merged")
    assert hfmerge.verify(out).ok and hfmerge.verify("tests/heat-merged").ok


ENTRY = {"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"},
         "metrics": [{"type": "accuracy", "value": 0.5, "args": {"tool": "hfmerge 1"}}]}  # fmt: skip


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# Only words\n",
        HUMAN,
        DASHES,
        "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: t}\n"
        "    dataset: {name: e, type: e}\n    metrics:\n    - {type: f1, value: 1}\ntags: [x]\n---\ntext\n",
        "---\nmodel-index: [{name: mine, results: []}]\nlicense: mit\n---\n",
        "---\n'model-index': []\n---\ntext\n",
        "---\r\nlicense: mit\r\n---\r\ntext\r\n",
    ],
)
def test_scores_come_and_go_without_a_trace(card: str) -> None:
    body = "## Results\n\n| a |\n|---|"
    text = with_scores(card, body, [ENTRY], "m")
    assert part(text, "results") == body and with_scores(text, body, [ENTRY], "m") == text
    front = parse_card(text)[0]
    assert [r for model in front["model-index"] for r in model["results"]][-1] == ENTRY
    assert carried_scores(text, card) == text
    gone = without_scores(text)
    assert part(gone, "results") is None
    kept, had = parse_card(gone), parse_card(card)
    assert (kept[0].get("model-index") or None) == (
        [m for m in had[0].get("model-index") or [] if m["results"]] or None
    )
    assert {k: v for k, v in kept[0].items() if k != "model-index"} == {
        k: v for k, v in had[0].items() if k != "model-index"
    }
    assert "".join(kept[2]).strip() == "".join(had[2]).strip()
    if card in (HUMAN, DASHES):
        assert gone.startswith(card.partition("# My")[0])


def test_a_card_whose_front_matter_cannot_be_read() -> None:
    with pytest.raises(HfMergeError, match="not YAML"):
        with_scores("---\n: : :\n- x\n---\n", "b", [ENTRY], "m")
    with pytest.raises(HfMergeError, match="not a list"):
        with_scores("---\nmodel-index: 3\n---\n", "b", [ENTRY], "m")


CLIP_TASKS = ["mnist", "svhn", "dtd", "stanford-cars", "pcam", "fer2013", "food101", "cifar100"]
"""Among them those with a configuration, a split, columns or label types of their own."""


def test_the_clip_suites_run_on_stand_ins_under_their_own_ids(world: World, tmp_path: Path) -> None:
    """Tiny data sets with the columns, splits and numbers of classes that the suite expects, and a tiny CLIP."""
    import datasets
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    suite = load_suite("clip-20").select(CLIP_TASKS)
    for task in suite.tasks:
        count = len(task.classes or ())
        values = [0, count - 1, count // 2]
        kind: Any = datasets.Value("bool") if task.name == "pcam" else datasets.Value("int64")
        pictures = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in values]
        rows = datasets.Dataset.from_dict(
            {str(task.image): pictures, str(task.label): [bool(v) if task.name == "pcam" else v for v in values]},
            features=datasets.Features({str(task.image): datasets.Image(), str(task.label): kind}),
        )
        folder = tmp_path / task.name
        (folder / (task.config or "data")).mkdir(parents=True)
        rows.to_parquet(str(folder / (task.config or "data") / f"{task.split}.parquet"))
        if task.config:
            files = [{"split": task.split, "path": f"{task.config}/{task.split}.parquet"}]
            front = yaml.safe_dump({"configs": [{"config_name": task.config, "data_files": files}]})
            (folder / "README.md").write_text(f"---\n{front}---\n")
        repo_id, _, revision = task.dataset.partition("@")
        assert revision == "main"
        world.api.create_repo(repo_id, repo_type="dataset")
        world.api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder)
    clip = tiny.save(tiny.build("CLIPModel", tiny.config("clip")), tmp_path / "clip")
    tiny.tokenizer(clip, evaluating.TOKENS)
    tiny.edit_config(clip, file="tokenizer_config.json", model_max_length=16, pad_token="[PAD]")
    shape = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **shape}))
    world.api.create_repo("openai/clip-vit-base-patch32")
    tower = world.api.upload_folder(repo_id="openai/clip-vit-base-patch32", folder_path=clip).oid
    import transformers

    vision = tiny.save(transformers.CLIPModel.from_pretrained(clip).vision_model, tmp_path / "vision")
    for name in CLIP_TASKS[:3]:
        world.api.create_repo(f"tanganke/clip-vit-base-patch32_{name}")
        world.api.upload_folder(repo_id=f"tanganke/clip-vit-base-patch32_{name}", folder_path=vision)
        tiny.save(tiny.fine_tune(transformers.CLIPVisionModel.from_pretrained(vision), len(name), 0.2), vision)
    matrix = hfmerge.evaluate(["tanganke/clip-vit-base-patch32_mnist"], "clip-20", tasks=CLIP_TASKS, settings=FRESH)
    assert [score.n for score in matrix.scores[0] if score is not None] == [3] * len(CLIP_TASKS)
    assert [f"{task.dataset}@main" for task in matrix.tasks] == [task.dataset for task in suite.tasks]
    # which commits `main` was is in the results, and pinned they ask for the same
    assert {task.head_commit for task in matrix.tasks} == {tower}
    tiny.done("suites", "--pin", _shorter(tmp_path / "short.yaml", suite), "--output", tmp_path / "pinned.yaml")
    snapshot = load_suite(tmp_path / "pinned.yaml")
    assert [t.dataset for t in snapshot.tasks] == [f"{task.dataset}@{task.commit}" for task in matrix.tasks]
    assert {task.head for task in snapshot.tasks} == {f"openai/clip-vit-base-patch32@{tower}"}
    assert [replace(p, dataset="", head="") for p in snapshot.tasks] == [
        replace(t, dataset="", head="") for t in suite.tasks
    ]
    full = hfmerge.evaluate(["openai/clip-vit-base-patch32"], "clip-8", tasks=["mnist", "dtd"], settings=FRESH)
    # the vision tower of the stand-in is the stand-in's own, so the scores agree
    tasks = [task.name for task in matrix.tasks]
    assert full.scores[0] == tuple(matrix.scores[0][tasks.index(name)] for name in ("mnist", "dtd"))
    # the continual experiment of the paper, on three of its eight models
    recipe = load_recipe(launching.ROOT / "evaluation" / "experiments" / "clip-8" / "opcm.yaml")
    models = tuple(m for m in recipe.models if m.model.rpartition("_")[2] in CLIP_TASKS[:3])
    asked = Experiment((Variant("opcm", replace(recipe, models=models), {}),), load_suite("clip-8"), orders=1)
    data = run_continual(asked, tmp_path / "continual")
    assert [model["task"] for model in data["models"]] == ["svhn", "mnist", "dtd"]
    assert all(removal["identical"] for removal in data["variants"][0]["orders"][0]["removals"])
    assert data["models"][1]["alone"]["value"] == full.scores[0][0].value  # type: ignore[union-attr]


def _shorter(path: Path, suite: Suite) -> Path:
    """A suite file with some tasks of clip-20."""
    names = [task.name for task in suite.tasks]
    shutil.copy(ready_suites()["clip-20"], path.with_name("clip-20.yaml"))
    path.write_text(json.dumps({"name": "short", "extends": "clip-20.yaml", "tasks": names}))
    return path


class _Reader(HTMLParser):
    """What somebody without a browser finds in a page: cells of tables, and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self._cell = True
            self.cells.append("")
        if tag == "img":
            self.pictures.append(str(dict(attrs)["src"]))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data


def test_a_reader_without_a_browser_sees_table_and_pictures(world: World, tmp_path: Path) -> None:
    """The card as anybody gets it over HTTP, rendered as Markdown, and every picture that it shows."""
    from markdown_it import MarkdownIt
    from PIL import Image

    out = tmp_path / "merged"
    models = ["tests/heat-one", "tests/heat-two"]
    tiny.done("merge", *models, "--base", "tests/heat-base", "--method", "opcm", "--output", out)
    suite = world.suite(tmp_path / "suite.yaml", head="tests/heat-one")
    scores = tiny.done("evaluate", out, *models, "--suite", suite, "--output", tmp_path / "scores", "--write-card")
    tiny.done("inspect", out, "--output", tmp_path / "inspection.json")
    tiny.done("plot", tmp_path / "inspection.json", tmp_path / "scores.json", "--card", out)
    hfmerge.push(out, "tests/heat-shown")
    assert hfmerge.verify("tests/heat-shown").ok

    def got(name: str) -> bytes:
        with urllib.request.urlopen(f"{world.server.endpoint}/tests/heat-shown/resolve/main/{name}") as answer:
            assert answer.status == 200
            return bytes(answer.read())

    text = got("README.md").decode("utf-8").partition("\n---\n")[2]
    page = _Reader()
    page.feed(MarkdownIt("commonmark").enable("table").render(text))
    value = hfmerge.evaluation.results.load_results(tmp_path / "scores.json").score("merged", "heat")
    assert value is not None and f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]" in page.cells
    assert {"merged", *models} <= set(page.cells) and "| merged |" in scores.out
    assert {"task_vector_cosine", "kept_energy_per_layer", "accuracy_matrix"} <= {Path(p).stem for p in page.pictures}
    for name in page.pictures:
        with Image.open(io.BytesIO(got(name))) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
        ElementTree.fromstring(got(name.replace(".png", ".svg")))


def test_the_import_of_real_models_says_when_it_skips(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.import_bench", str(tmp_path / "nothing")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=launching.ROOT)
    assert run.returncode == 0 and run.stdout.startswith("skipped: ")
