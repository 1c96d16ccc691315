"""Several processes give the bytes of one, for every method; a lost process stops the others."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hfmerge.engine.ranks import Ranks, assign_owners
from hfmerge.errors import HfMergeError, Problem, RecipeError
from hfmerge.methods import registry
from tests.fixtures import tiny
from tests.fixtures.launching import crew, succeed, torchrun


pytestmark = pytest.mark.slow
FULL = ("m0", "m1", "m2")
FLAGS: dict[str, tuple[str, ...]] = {
    name: ("--method", name, "--state", "all") for name, method in registry().items() if method.arity[1] is None
}
FLAGS["ties over the model"] = ("--method", "ties", "--option", "scope=model", "--norm", "mean")
FLAGS["mdm_oc over the model"] = ("--method", "mdm_oc", "--option", "scope=model")
FLAGS["files of another size"] = ("--method", "linear", "--out-shard-size", "10KB")
FLAGS["slerp"] = ("--method", "slerp")

WORKER = """
import json, os, sys
import torch
from hfmerge.cli import main
from hfmerge.engine.ranks import current_ranks
ranks = current_ranks()
assert ranks.world == int(sys.argv[1]), ranks
def patience():
    # no name may hold the group when the interpreter ends: its threads would outlive the group's end
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    return group.options._timeout.total_seconds()
assert patience() >= 12 * 3600, "shorter than a large decomposition may take"
for arguments in json.loads(sys.argv[2]):
    code = main(arguments)
    if code:
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base", max_shard_size="20KB")
    for i, name in enumerate(FULL, 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    tiny.adapter(root / "a0", tiny.attention(), 1, rank=2)
    return root


def command(root: Path, out: Path, title: str) -> list[list[str]]:
    models = [str(root / name) for name in FULL[: registry()[FLAGS[title][1]].arity[1]]]
    calls = [["merge", *models, "--base", str(root / "base"), "--output", str(out), *FLAGS[title], "--quiet"]]
    if title != "slerp":
        calls.append(["add", str(out), str(root / "a0"), "--quiet"])
    return calls


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of every file that one process writes, by variant."""
    folder = tmp_path_factory.mktemp("alone")
    for title in FLAGS:
        for arguments in command(root, folder / title.replace(" ", "-"), title):
            tiny.done(*arguments)
    return {title: tiny.files(folder / title.replace(" ", "-")) for title in FLAGS}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_same_bytes_for_every_method(root: Path, alone: dict[str, dict[str, str]], tmp_path: Path, world: int) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    calls = [call for title in FLAGS for call in command(root, tmp_path / title.replace(" ", "-"), title)]
    out = succeed(crew(world, str(script), str(world), json.dumps(calls)))
    for title, expected in alone.items():
        assert tiny.files(tmp_path / title.replace(" ", "-")) == expected, title
    assert out.count("merge (step 1)") == len(FLAGS)


def test_errors_of_a_plan_reach_every_process_and_are_printed_once(root: Path, tmp_path: Path) -> None:
    calls = [
        [
            "merge",
            str(root / "m0"),
            "--base",
            str(root / "nothing"),
            "--method",
            "opcm",
            "--output",
            str(tmp_path / "o"),
        ]
    ]
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    process = torchrun(2, str(script), "2", json.dumps(calls))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("no such folder") >= 1 and 'Traceback (most recent call last):\n  File "' + str(script) not in out
    assert not (tmp_path / "o").exists()


def test_a_killed_process_stops_the_others_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    # rank 1 dies in the middle of the first pass, as if killed from outside
    script.write_text(
        "import os, signal\n"
        "from hfmerge.engine.tasks import Visit\n"
        "merge = Visit.merge\n"
        "def dying(self, *args, **options):\n"
        "    if self.files.ranks.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return merge(self, *args, **options)\n"
        "Visit.merge = dying\n" + WORKER,
        encoding="utf-8",
    )
    calls = command(root, tmp_path / "out", "opcm")[:1]
    began = time.monotonic()
    process = torchrun(2, str(script), "2", json.dumps(calls))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 110, out
    assert not (tmp_path / "out").exists()
    again = tiny.done(*calls[0])
    assert again.code == 0 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_shares_are_balanced_and_deterministic() -> None:
    costs = [float(cost) for cost in (100, 1, 1, 50, 50, 3, 97, 2)]
    for world in (1, 2, 3, 5):
        owners = assign_owners(costs, world)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(world)]
        assert owners == assign_owners(costs, world)
        assert max(loads) <= sum(costs) / world + max(costs)
    assert assign_owners(costs, 1) == [0] * len(costs)


def test_one_process_needs_no_group() -> None:
    ranks = Ranks()
    assert ranks.gather(3) == [3] and ranks.together(lambda: 4) == [4] and ranks.on_main(lambda: 5) == 5
    with pytest.raises(HfMergeError, match="no"):
        ranks.each(lambda: (_ for _ in ()).throw(HfMergeError("no")))


def test_recipe_errors_survive_the_way_between_processes() -> None:
    import pickle

    error = RecipeError([Problem("base", "missing"), Problem("models[0]", "missing")], "recipe.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.problems == error.problems
