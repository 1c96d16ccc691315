"""Pictures: the same numbers give the same files, everything shown is there, and a merge's card carries them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.errors import HfMergeError, LedgerError, OutputError
from hfmerge.evaluation.plots import draw_all
from hfmerge.evaluation.plots.embedding import embed
from hfmerge.evaluation.plots.style import short_names
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.card import BEGIN
from hfmerge.ledger.card_sections import linked_files, part, with_part
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe
from tests.fixtures import tiny


NAMES = ("org--enc-mr", "org--enc-sms_spam", "org--enc-ag_news")


def part_of(name: str, scale: float) -> dict[str, Any]:
    return {
        "name": name, "elements": 10, "norms": [scale, 2 * scale, 3 * scale],
        "cosine": [[1.0, 0.2, -0.1], [0.2, 1.0, None], [-0.1, None, 1.0]],
        "sign_conflict": [[0.0] * 3] * 3, "cancelled": 0.1, "interference": [0.0, 0.1, None],
    }  # fmt: skip


INSPECTION = {
    "kind": "inspection", "schema": 1, "base": "b", "models": list(NAMES), "names": list(NAMES), "alpha": 0.5,
    "variant": "code", "whole": part_of("model", 1.0),
    "layers": [part_of(f"encoder.layer.{i}", i + 1.0) for i in range(3)],
    "spectra": [
        {"key": "k", "label": "", "shape": [8, 8], "model": i, "values": [1.0], "stable_rank": 2.0,
         "energy": {"1": 0.3, "4": 0.6, "16": 0.9, "64": 1.0}, "rank90": 16}
        for i in (0, 2)
    ],
    "seconds": 1.0, "warnings": [],
}  # fmt: skip
SCORE = {"value": 0.75, "n": 4, "low": 0.3, "high": 0.9, "metric": "accuracy", "interval": "wilson"}
EVALUATION = {
    "schema": 1, "suite": {"name": "s", "digest": ""}, "settings": {}, "notes": [],
    "models": [{"label": "org/a", "kind": "full", "commit": None, "digest": ""}],
    "tasks": [{"name": "mr", "metric": "accuracy"}, {"name": "wiki", "metric": "perplexity"}],
    "scores": [[SCORE, {**SCORE, "value": 21.0, "metric": "perplexity"}]],
}  # fmt: skip


def shown(path: Path) -> str:
    """Text of an SVG whose letters are paths: matplotlib notes every text in a comment."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first = draw_all([INSPECTION, EVALUATION], tmp_path / "a")
    second = draw_all([INSPECTION, EVALUATION], tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {path.name for path in first} == {
        f"{name}.{suffix}"
        for name in ("task_vector_cosine", "norm_per_layer", "kept_energy_per_layer", "spectra", "accuracy_matrix")
        for suffix in ("png", "svg")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first if path.suffix == ".png")
    assert not any("<dc:date>" in path.read_text() for path in first if path.suffix == ".svg")


@pytest.mark.slow
def test_names_and_numbers_can_be_read(tmp_path: Path) -> None:
    draw_all([INSPECTION, EVALUATION], tmp_path)
    cosine = shown(tmp_path / "task_vector_cosine.svg")
    assert "sms_spam" in cosine and "0.20" in cosine and "-0.10" in cosine.replace("−", "-") and "1.00" not in cosine
    kept = shown(tmp_path / "kept_energy_per_layer.svg")
    assert "encoder.layer" in kept and "alpha 0.5, code" in kept
    matrix = shown(tmp_path / "accuracy_matrix.svg")
    assert "0.75" in matrix and "wiki" not in matrix  # perplexity has another scale


@pytest.mark.slow
def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    for data in ({}, {"schema": 1, "kind": "recipe"}, {**INSPECTION, "schema": 99}, {"schema": [1]}, [1]):
        with pytest.raises(HfMergeError, match="not a result that can be drawn"):
            draw_all([data], tmp_path)  # type: ignore[list-item]
    (tmp_path / "file").touch()
    with pytest.raises(HfMergeError, match="cannot be written"):
        draw_all([EVALUATION], tmp_path / "file")
    (tmp_path / "broken.json").write_text("{")
    run = tiny.cli("plot", tmp_path / "broken.json")
    assert run.code == 1 and "broken.json: cannot be read as JSON" in run.err


def test_short_names_keep_what_differs() -> None:
    assert short_names(["org--minilm-mr", "org--minilm-sms_spam"]) == ["mr", "sms_spam"]
    assert short_names(["a/x-1", "b/x-1"]) == ["a/x-1", "b/x-1"]
    assert short_names(["only-one"]) == ["only-one"]
    assert short_names(["fine-tune", "fine-tune-more"]) == ["tune", "tune-more"]


def test_a_marked_part_comes_and_goes_without_a_trace() -> None:
    card = f"---\na: 1\n---\n\n{BEGIN}\nx\n<!-- hfmerge:end -->\nMy own words.\n"
    once = with_part(card, "figures", "![a](figures/a.png)\n")
    assert part(once, "figures") == "![a](figures/a.png)" and "My own words." in once and part(card, "figures") is None
    twice = with_part(once, "figures", "![b](figures/b.png) and [c](figures/c.svg)")
    assert linked_files(part(twice, "figures"), "figures") == ["figures/b.png", "figures/c.svg"]
    assert with_part(twice, "figures", None) == card == with_part(card, "figures", None)
    assert part(with_part("no block", "figures", "x"), "figures") == "x"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    model = tiny.build("BertModel", tiny.config("bert"))
    base = tiny.save(model, tmp_path / "base")
    tunes = [ModelEntry(str(tiny.save(tiny.fine_tune(model, seed), tmp_path / f"tune-{seed}"))) for seed in (1, 2)]
    choice = MethodChoice("opcm", {"alpha": 0.5, "variant": "code"}, "mean")
    hfmerge.merge(Recipe(str(base), tuple(tunes), choice), output=tmp_path / "merged")
    tiny.save(tiny.fine_tune(model, 3), tmp_path / "tune-3")
    return tmp_path / "merged"


@pytest.mark.slow
def test_a_card_shows_pictures_until_its_models_change(merged: Path, tmp_path: Path) -> None:
    card = merged / "README.md"
    plain = card.read_text()
    run = tiny.done("inspect", merged, "--card", merged)
    text = card.read_text()
    assert "figures/task_vector_cosine.png" in text and f"drawn {card}" in run.out
    assert (merged / "figures" / "kept_energy_per_layer.svg").is_file() and hfmerge.verify(merged).ok
    card.write_text(text + "\nMy own words.\n")
    (merged / "figures" / "mine.png").write_bytes(b"mine")
    # other pictures replace them
    (tmp_path / "scores.json").write_text(json.dumps(EVALUATION))
    tiny.done("plot", tmp_path / "scores.json", "--card", merged)
    names = {path.name for path in (merged / "figures").iterdir()}
    assert names == {"accuracy_matrix.png", "accuracy_matrix.svg", "mine.png"}
    tiny.done("add", merged, tmp_path / "tune-3")
    text = card.read_text()
    assert "hfmerge:figures" not in text and "My own words." in text and hfmerge.verify(merged).ok
    assert [path.name for path in (merged / "figures").iterdir()] == ["mine.png"]
    assert plain.partition(BEGIN)[0].count("hfmerge") == text.partition(BEGIN)[0].count("hfmerge")


def test_pictures_are_put_into_merges_only(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        embed(tmp_path / "nowhere", [EVALUATION])
    with pytest.raises(LedgerError):
        embed(tmp_path / "base", [EVALUATION])
    before = tiny.everything(merged)
    with pytest.raises(HfMergeError, match="not a result"):
        embed(merged, [{}])
    assert tiny.everything(merged) == before


@pytest.mark.slow
def test_pictures_go_to_the_hub_and_leave_with_the_models(hub: HubServer, merged: Path, tmp_path: Path) -> None:
    tiny.done("inspect", merged, "--card", merged)
    tiny.done("push", merged, "me/drawn")
    api = HfApi()

    def card() -> str:
        return Path(api.hf_hub_download("me/drawn", "README.md")).read_text(encoding="utf-8")

    on_hub = api.list_repo_files("me/drawn")
    shown = linked_files(part(card(), "figures"), "figures")
    assert "figures/norm_per_layer.png" in shown and set(shown) <= set(on_hub)
    picture = Path(api.hf_hub_download("me/drawn", "figures/norm_per_layer.png")).read_bytes()
    assert picture == (merged / "figures" / "norm_per_layer.png").read_bytes()
    assert hfmerge.verify("me/drawn").ok
    tiny.done("add", merged, tmp_path / "tune-3", "--push-to", "me/drawn")
    assert not [name for name in api.list_repo_files("me/drawn") if name.startswith("figures/")]
    assert part(card(), "figures") is None and hfmerge.verify("me/drawn").ok
