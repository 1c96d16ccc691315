"""Learning that is interrupted, runs into numbers that are none, or out of memory."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hfmerge import merge
from hfmerge.engine.ranks import Ranks
from hfmerge.errors import HfMergeError, NonFiniteError
from hfmerge.learning.learn import learn
from hfmerge.learning.optimise import memory_for
from hfmerge.learning.progress import Progress
from hfmerge.recipe.learning import Learning
from tests.fixtures import tiny
from tests.fixtures.processes import Forked
from tests.learning.test_learning import QUICK, models, planned, recipe, record


pytestmark = pytest.mark.slow
__all__ = ["models"]
LONG: dict[str, Any] = {**QUICK, "steps": 80, "patience": 100}
"""Nothing but the number of steps ends it."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_where_it_stood(models: dict[str, Path], tmp_path: Path) -> None:
    text = json.dumps(recipe(models, learn=LONG).to_dict())
    (tmp_path / "recipe.yaml").write_text(text)
    command = ["-m", "hfmerge", "merge", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "killed")]
    process = Forked(*command)
    steps = tmp_path / ".killed.hfmerge-journal" / "learning-steps.json"
    try:
        for _ in range(6000):
            if process.poll() is not None or (steps.exists() and json.loads(steps.read_bytes())["state"]["step"] >= 8):
                break
            time.sleep(0.01)
    finally:
        process.kill()
        said, _ = process.communicate(timeout=60)
    assert steps.exists(), said
    made = json.loads(steps.read_bytes())["state"]["step"]
    assert 8 <= made < LONG["steps"]
    rows = sorted(steps.parent.glob("learning-replay-*"))
    assert len(rows) == 6, "of each of three models the rows, and which they are"
    known = [(path.stat().st_mtime_ns, path.name) for path in rows]
    done = tiny.finish(Forked(*command, "--resume"))
    assert done.code == 0, done.out
    assert known and re.search(rf"; {made} were made by a run that was interrupted", done.out)
    merge(recipe(models, learn=LONG), output=tmp_path / "whole")
    mine, whole = record(tmp_path / "killed"), record(tmp_path / "whole")
    assert mine.learned == whole.learned and mine.learned is not None and mine.learned.steps == LONG["steps"]
    names = [name for name in contents(tmp_path / "whole") if name.endswith(".safetensors") or "merge_state" in name]
    assert len(names) >= 4
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))


def test_what_is_noted_counts_for_the_same_question_only(models: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(models, learn=LONG)
    _, found = learn(plan, Ranks(), journal=tmp_path)
    told: list[str] = []
    again, same = learn(plan, Ranks(), journal=tmp_path, notify=told.append)
    assert same.optimum is not None and found.optimum is not None
    assert torch.equal(same.optimum.weights, found.optimum.weights) and same.optimum.curve == found.optimum.curve
    assert any("80 were made" in line for line in told)
    assert [a.digest for a in same.replays if a] == [b.digest for b in found.replays if b]
    assert Progress(tmp_path, "another question").steps() is None
    rows = found.replays[0]
    assert rows is not None and plan.recipe.learn is not None
    asked = plan.recipe.learn.replay
    assert Progress(tmp_path, "another question").replay(0, rows.source, asked) is None
    assert Progress(None, "").replay(0, rows.source, asked) is None
    for path in tmp_path.glob("learning-*"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    told.clear()
    _, anew = learn(plan, Ranks(), journal=tmp_path, notify=told.append)
    assert anew.optimum is not None and torch.equal(anew.optimum.weights, found.optimum.weights)
    assert not any("were made by" in line for line in told)


def test_rows_are_kept_on_a_shelf(models: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(models)
    _, found = learn(plan, Ranks(), shelf=tmp_path / "rows")
    shelved = sorted((tmp_path / "rows").iterdir())
    assert len(shelved) == 3
    times = [path.stat().st_mtime_ns for path in shelved]
    _, again = learn(plan, Ranks(), shelf=tmp_path / "rows")
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "rows").iterdir())] == times
    assert [a.digest for a in again.replays if a] == [b.digest for b in found.replays if b]
    other = planned(models, learn={**QUICK, "replay": {**QUICK["replay"], "seed": 5}})
    learn(other, Ranks(), shelf=tmp_path / "rows")
    assert len(list((tmp_path / "rows").iterdir())) == 6, "made otherwise, so other rows"


def test_a_loss_that_is_not_a_number_ends_with_the_best_weights(models: dict[str, Path], tmp_path: Path) -> None:
    wild = {**QUICK, "rate": 1e30, "high": 1e38, "every": 1, "start": 0.5}
    result = merge(recipe(models, learn=wild), output=tmp_path / "out")
    said = [line for line in result.warnings if "not finite" in line]
    assert len(said) == 1 and "No further steps" in said[0] and "smaller rate" in said[0]
    assert re.search(r"\(a, rows \[\d+", said[0]), "which batch"
    learned = record(tmp_path / "out").learned
    assert learned is not None and "stopped early" in learned.how and learned.steps >= 1
    assert all(weight == 0.5 for entry in result.entry.models for weight in [_only(entry.weight)])


def _only(weight: Any) -> float:
    values = {pair[1] for pair in weight.pairs} if hasattr(weight, "pairs") else {weight}
    assert len(values) == 1
    return float(values.pop())


def test_a_start_that_is_not_a_number_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    far = {**QUICK, "high": 1e38, "start": 1e38}
    with pytest.raises(NonFiniteError, match=r"rows held out is not finite \(a, rows \[9, 10, 11\]; b"):
        merge(recipe(models, learn=far), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(HfMergeError, match=r"lower batch \(now 16\) or replay.batch_size \(now 32\), or set check"):
        with memory_for(Learning()):
            torch.empty(1 << 50)
    with pytest.raises(HfMergeError) as caught, memory_for(Learning(checkpointing=True, precision="bfloat16")):
        raise torch.OutOfMemoryError
    assert str(caught.value) == (
        "learn: out of memory; lower batch (now 16) or replay.batch_size (now 32), or use more processes or another "
        "`device`."
    )
    with pytest.raises(RuntimeError, match="size"), memory_for(Learning()):
        torch.zeros(2) + torch.zeros(3)
