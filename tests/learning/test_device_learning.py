"""Whole models on an accelerator, pretended: weights are learned and suites are run there as they are on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import launching, tiny
from tests.fixtures.pretended import CODE, ON, beside
from tests.learning.test_learning import record
from tests.learning.test_learning_kinds import KINDS, build
from tests.lifecycle import test_check_removal
from tests.lifecycle.test_check_removal import world


pytestmark = pytest.mark.slow
__all__ = ["world"]
PLAIN: dict[str, Any] = {"rows": 16, "length": 10, "held_out": 0.25, "generator": "unigram"}
"""Rows that do not follow from a model, so that they are the same on every device."""
LEARN = {"steps": 8, "rate": 0.05, "batch": 12, "every": 4, "ewc": 1.0}
CASES = {
    "pictures": ("images", "mdm_oc", {**PLAIN, "generator": "noise"}),
    "continued texts": ("causal", "mdm_oc_subspace", PLAIN),
    "sampled texts": ("causal", "gram", {**PLAIN, "generator": "sampled"}),
    "gaps": ("masked", "mdm_oc_iso", PLAIN),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Models by what they do."""
    root = tmp_path_factory.mktemp("kinds")
    return {kind: build(KINDS[kind], root / kind) for kind, _, _ in CASES.values()}


def asked(models: dict[str, Path], place: Path, method: str, replay: dict[str, Any], names: str = "one two") -> Path:
    data = {
        "base": str(models["base"]), "models": [str(models[name]) for name in names.split()],
        "method": method, "learn": {**LEARN, "replay": replay},
    }  # fmt: skip
    place.write_text(json.dumps(data), encoding="utf-8")
    return place


def merge(recipe: Path, out: Path, *flags: str) -> list[str]:
    return ["merge", str(recipe), "--output", str(out), "--quiet", *flags]


def life(models: dict[str, Path], recipe: Path, out: Path, *flags: str) -> list[list[str]]:
    """A merge, one model more, one less."""
    return [
        merge(recipe, out, *flags),
        ["add", str(out), str(models["twin"]), "--quiet", *flags],
        ["unmerge", str(out), "--remove", str(models["one"]), "--quiet", *flags],
    ]


@pytest.mark.parametrize("case", CASES)
def test_weights_learned_there_are_those_of_the_cpu(
    kinds: dict[str, dict[str, Path]], tmp_path: Path, case: str
) -> None:
    kind, method, replay = CASES[case]
    models, there, here = kinds[kind], tmp_path / "there", tmp_path / "here"
    recipe = asked(models, tmp_path / "recipe.yaml", method, replay)
    # made in the order of arrival, as an unmerge makes it
    never = merge(asked(models, tmp_path / "never.yaml", method, replay, "two twin"), tmp_path / "never", *ON)
    run, saw = beside(tmp_path, [*life(models, recipe, there, *ON), never])
    assert run.code == 0, run.err
    assert saw["places"] == ["pretend:0"] and saw["left"] == 0 < saw["most"], "all memory is given back"
    assert saw["precisions"] == ["highest"] and saw["after"] == "high", "no TF32"
    assert False not in saw["orders"], "gradients are summed in one order"
    learned = record(there).learned
    assert learned is not None and learned.device == "Pretended 1" and learned.how.endswith("on Pretended 1")
    same = [tiny.tensors(folder) for folder in (there, tmp_path / "never")]
    assert all(value.equal(same[1][key]) for key, value in same[0].items()), "what left has left no trace"
    if case != "sampled texts":
        for call in life(models, recipe, here):
            tiny.done(*call)
        alone = record(here).learned
        assert alone is not None and alone.device == "cpu"
        assert [row["sha256"] for row in alone.replay] != [] and len(alone.curve) == len(learned.curve)
        for (_, _, one, _), (_, _, other, _) in zip(learned.curve, alone.curve, strict=True):
            assert one == pytest.approx(other, rel=1e-3)


def test_processes_share_a_device_where_there_is_but_one(kinds: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    recipe = asked(kinds["causal"], tmp_path / "recipe.yaml", "mdm_oc", PLAIN)
    calls = json.dumps([merge(recipe, tmp_path / "two", *ON)])
    launching.succeed(launching.crew(2, "-c", CODE, str(tmp_path / "of-two"), "devices=1", "--", calls))
    saw = [json.loads((tmp_path / f"of-two.{rank}").read_text()) for rank in (0, 1)]
    assert [each["places"] for each in saw] == [["pretend:0"]] * 2
    run, _ = beside(tmp_path, [merge(recipe, tmp_path / "one", *ON)])
    assert run.code == 0, run.err
    assert tiny.tensors(tmp_path / "one").keys() == tiny.tensors(tmp_path / "two").keys()
    weights = [[model.weight for model in record(tmp_path / name).models] for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("free", [2_000, 20_000, 60_000, 120_000, 700_000])
def test_where_there_is_no_room_it_says_what_to_lower(
    kinds: dict[str, dict[str, Path]], tmp_path: Path, free: int
) -> None:
    """While models are read and built, make their rows, and learn."""
    recipe = asked(kinds["causal"], tmp_path / "recipe.yaml", "mdm_oc", PLAIN)
    run, _ = beside(tmp_path, [merge(recipe, tmp_path / "out", *ON)], free=free)
    assert run.code == 1 and "Traceback" not in run.err
    last = run.err.strip().splitlines()[-1]
    assert "out of memory; lower batch (now 12) or replay.batch_size (now 32), or set checkpointing" in last, last
    assert not (tmp_path / "out").exists()


def test_another_device_is_told_and_learns_from_the_start(kinds: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    models, out = kinds["images"], tmp_path / "out"
    recipe = asked(models, tmp_path / "recipe.yaml", "mdm_oc", CASES["pictures"][2])
    calls = [merge(recipe, out, *ON), ["add", str(out), str(models["twin"]), "--quiet"]]
    run, _ = beside(tmp_path, calls)
    assert run.code == 0, run.err
    assert (
        "learning on the CPU, which gives one result on machines of a kind; --device pretend would be faster"
        in run.err
    )
    assert "were learned on Pretended 1, and now on cpu" in run.err
    # killed there, begun again here
    _, saw = beside(tmp_path, [merge(recipe, tmp_path / "whole", *ON)])
    killed, _ = beside(tmp_path, [merge(recipe, tmp_path / "killed", *ON)], die=saw["times"] * 3 // 4)
    assert killed.code == -9 and (tmp_path / ".killed.hfmerge-journal" / "learning-steps.json").exists()
    again = tiny.done(*merge(recipe, tmp_path / "killed"))
    assert "were made by a run that was interrupted" not in again.err
    tiny.done(*merge(recipe, tmp_path / "here"))
    assert tiny.files(tmp_path / "killed") == tiny.files(tmp_path / "here")


def test_never_merged_is_made_on_the_device_of_the_removal(world: Path, tmp_path: Path) -> None:
    """Eigenvalues there differ from the CPU's, so that bytes show where a merge was made."""
    models = [str(world / name) for name in test_check_removal.ALL]
    calls = [
        ["merge", *models, "--base", str(world / "base"), "--method", "opcm", "--output", str(tmp_path / "out"),
         "--quiet", *ON],
        ["unmerge", str(tmp_path / "out"), "--remove", "mood", "--check", str(world / "suite.yaml"), "--json", *ON],
    ]  # fmt: skip
    run, _ = beside(tmp_path, calls, company=1)
    assert run.code == 0, run.err
    told = json.loads(run.out[run.out.index("{") :])["check"]
    assert told["identical"] is True and told["distance"] == 0.0


def test_suites_are_run_there(world: Path, tmp_path: Path) -> None:
    call = ["evaluate", str(world / "mood"), str(world / "topic"), "--suite", str(world / "suite.yaml"), "--json",
            "--head", f"mood={world / 'mood'}", "--head", f"topic={world / 'topic'}", "--no-cache"]  # fmt: skip
    scores = []
    for flags in ([], ["--device", "cpu"], [*ON]):
        run, saw = beside(tmp_path, [[*call, *flags]])
        assert run.code == 0, run.err
        assert saw["places"] == ([] if "cpu" in flags else ["pretend:0"]) and saw["left"] == 0
        scores.append([[cell["value"] for cell in row] for row in json.loads(run.out)["scores"]])
    assert scores[0] == scores[1] == scores[2]
    for free in (2_000, 40_000):
        run, _ = beside(tmp_path, [call], free=free)
        assert run.code == 1 and "Traceback" not in run.err
        assert "mood: out of memory; lower --batch-size (now 32), or say --dtype bfloat16" in run.err, run.err
