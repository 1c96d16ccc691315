"""The launch configurations of `recipes/accelerate`, and what happens when a process or a launcher fails."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.fixtures import launching, tiny
from tests.fixtures.processes import Forked


CONFIGS = launching.ROOT / "recipes" / "accelerate"
YAML = {"one_node": (1, 8), "cpu": (1, 2), "two_nodes": (2, 16)}
"""Configuration -> machines and processes."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base", max_shard_size="20KB")
    for i in (1, 2):
        tiny.save(tiny.fine_tune(base, i), root / f"m{i}")
    return root


def merge(root: Path, out: Path) -> list[str]:
    models = [str(root / "m1"), str(root / "m2")]
    return ["merge", *models, "--base", str(root / "base"), "--method", "opcm", "--output", str(out), "--quiet"]


def commands(program: str) -> list[list[str]]:
    """Every command line of a program in the folder's documentation, its placeholders filled in."""
    texts = [CONFIGS / "README.md", *sorted(CONFIGS.glob("*.yaml"))]
    found = []
    for line in "\n".join(path.read_text(encoding="utf-8") for path in texts).splitlines():
        for part in [*line.split("`")[1::2], line.removeprefix("# ")]:
            words = [{"N": "2", "R": "1", "HOST": "host"}.get(word, word) for word in part.split()]
            if words[:1] == [program] and "RECIPE.yaml" in words:
                found.append(words)
    return found


def test_no_configuration_is_forgotten() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == YAML.keys()
    told = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in told for path in CONFIGS.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("name", YAML)
def test_accelerate_knows_every_key(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises on keys it does not know
    assert (config.num_machines, config.num_processes) == YAML[name]
    # of the types for one kind of machine, accelerate starts several processes only for this one
    assert config.distributed_type == "MULTI_GPU" and config.mixed_precision == "no" and not config.debug


def test_documented_commands_are_what_the_launchers_take() -> None:
    launches = commands("accelerate")
    assert len(launches) == 2 * len(YAML)
    for words in launches:
        assert words[1] == "launch"
        args = launch_command_parser().parse_args(words[2:])
        assert args.module and args.training_script == "hfmerge"
        assert (
            args.training_script_args == ["merge", "RECIPE.yaml"]
            and Path(args.config_file).parent.name == "accelerate"
        )
        assert (launching.ROOT / args.config_file).is_file()
    runs = commands("torchrun")
    assert len(runs) == len(YAML)
    for words in runs:
        args = get_args_parser().parse_args(words[1:])
        assert args.module and [args.training_script, *args.training_script_args] == [
            "hfmerge",
            "merge",
            "RECIPE.yaml",
        ]


@pytest.mark.slow
def test_accelerate_launches_two_processes_on_cpu(root: Path, tmp_path: Path) -> None:
    config = str(CONFIGS / "cpu.yaml")
    process = launching.accelerate(
        "--config_file", config, "--module", "hfmerge", *merge(root, tmp_path / "two"), "--json"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["processes"] == 2
    alone = tiny.done(*merge(root, tmp_path / "one"), "--json")
    assert alone.json["processes"] == 1
    assert tiny.files(tmp_path / "two") == tiny.files(tmp_path / "one")


@pytest.mark.slow
def test_accelerate_that_starts_one_process_in_place_of_two_is_refused(root: Path, tmp_path: Path) -> None:
    process = launching.accelerate(
        "--cpu", "--num_processes", "2", "--module", "hfmerge", *merge(root, tmp_path / "out")
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "hfmerge: `accelerate launch` was asked for several processes and started one" in err, err
    assert not (tmp_path / "out").exists()


def test_slurm_script_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node-a; echo node-b")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "PROCESSES": "3"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(CONFIGS / "slurm.sbatch"), "my recipe.yaml", "--quiet"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True, timeout=30)
    words = done.stdout.splitlines()
    assert words[:2] == ["--kill-on-bad-exit=1", "torchrun"]
    args = get_args_parser().parse_args(words[2:])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "3", "c10d")
    assert (args.rdzv_id, args.rdzv_endpoint) == ("123456", "node-a:23456") and args.module
    assert [args.training_script, *args.training_script_args] == ["hfmerge", "merge", "my recipe.yaml", "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_hf_jobs_script_is_what_the_client_takes(tmp_path: Path, nodes: int) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "hfmerge-0.1.0-py3-none-any.whl").touch()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "NODES": str(nodes), "HF_JOBS_FLAGS": "--dry-run", "PATH": path}
    script = ["bash", str(CONFIGS / "hf_jobs.sh"), "--base", "org/base", "--push-to", "org/merged", "org/a"]
    done = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    printed = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  command ")]
    assert len(printed) == nodes and done.stdout.count("Job not submitted") == nodes
    for node, command in enumerate(printed):
        shell = shlex.split(command)
        assert shell[:2] == ["bash", "-c"]
        assert shell[3:] == ["hfmerge", "--base", "org/base", "--push-to", "org/merged", "org/a"]
        words = shell[2].partition("exec torchrun ")[2].replace('"$@"', "X").split()
        args = get_args_parser().parse_args(words)
        assert args.training_script_args == ["merge", "X"] and args.nproc_per_node == "2"
        if nodes > 1:
            assert (args.nnodes, args.node_rank) == (str(nodes), node)
            assert args.master_addr == "${HF_NETWORK_GROUP_PREFIX}node0"


WATCHER = """
import os, signal, sys, time
from hfmerge.engine import watchdog
rank, world, port, token = int(os.environ["RANK"]), 3, int(sys.argv[1]), b"secret"
watchdog.GRACE = 0.5
if rank == 0:
    import socket
    links = watchdog.accept(socket.create_server(("127.0.0.1", port)), token, world)
else:
    for attempt in range(800):
        try:
            links = watchdog.connect("127.0.0.1", port, token, rank)
            break
        except watchdog.HfMergeError:
            time.sleep(0.05)
seen = watchdog.Watch(rank, ["a", "b", "c"], links)
victim = int(sys.argv[2])
if victim < 0:
    time.sleep(0.1 * rank)
    seen.close(orderly=True)
    seen.check()
    sys.exit(0)
time.sleep(0.3)
if rank == victim:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_deep_in_work_are_ended_when_one_is_killed(victim: int) -> None:
    began = time.monotonic()
    crew = launching.crew(3, "-c", WATCHER, str(launching.free_port()), str(victim))
    said = [process.communicate(timeout=60)[1] for process in crew]
    assert time.monotonic() - began < 50
    assert [process.returncode for process in crew] == [-9 if rank == victim else 1 for rank in range(3)]
    line = f"hfmerge: process {victim} of 3 (on {'abc'[victim]}) was killed or lost its connection"
    # rank 0 speaks for all; without it everybody has seen it
    assert [line in text for text in said] == ([True, False, False] if victim else [False, True, True]), said


def test_processes_that_end_in_order_are_not_missed() -> None:
    crew = launching.crew(3, "-c", WATCHER, str(launching.free_port()), "-1")
    said = [process.communicate(timeout=60)[1] for process in crew]
    assert [process.returncode for process in crew] == [0, 0, 0] and not any(said), said


ENDING = """
import atexit, sys
import torch.distributed
from hfmerge.engine.ranks import processes
def last():
    begun = torch.distributed.is_initialized()
    print("begun", begun)
    if begun:
        torch.distributed.destroy_process_group()
atexit.register(last)
if sys.argv[1] == "theirs":
    torch.distributed.init_process_group("gloo")
with processes() as ranks:
    print("heard", ranks.gather(ranks.rank))
"""


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["ours", "theirs"])
def test_the_process_group_ends_before_the_interpreter_does(owner: str) -> None:
    crew = launching.ranks(2, "-c", ENDING, owner)
    said = [process.communicate(timeout=60)[0].splitlines() for process in crew]
    # who has begun it ends it
    assert said == [["heard [0, 1]", f"begun {owner == 'theirs'}"]] * 2
    assert [process.returncode for process in crew] == [0, 0]


DYING = """
import os, signal, sys, time
from hfmerge.cli import main
from hfmerge.engine.tasks import Visit
merge = Visit.merge
def slow(self, *args, **options):
    if self.files.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return merge(self, *args, **options)
Visit.merge = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_other_stops_between_two_parameters(root: Path, tmp_path: Path) -> None:
    crew = launching.crew(2, "-c", DYING, *merge(root, tmp_path / "out"))
    _, said = crew[0].communicate(timeout=60)
    crew[1].communicate(timeout=60)
    assert (crew[0].returncode, crew[1].returncode) == (1, -9)
    assert said.count("process 1 of 2") == 1 and "was killed or lost its connection" in said, said
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    tiny.done(*merge(root, tmp_path / "out"))
    tiny.done(*merge(root, tmp_path / "never-killed"))
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "never-killed")


LATE = """
import sys
from datetime import timedelta
from hfmerge.engine import ranks
from hfmerge.cli import main
ranks.ARRIVAL = timedelta(seconds=2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_whose_fellows_never_come_says_so_and_ends(root: Path, tmp_path: Path) -> None:
    told = {
        "process 0 of 2: not all processes have come": launching.environments(2)[0],
        "process 1 of 2: not all processes have come": launching.environments(2)[1],
        "MASTER_PORT expected, but not set; use `torchrun`": {**launching.environments(2)[0], "MASTER_PORT": ""},
    }
    crew = [Forked("-c", LATE, *merge(root, tmp_path / "out"), env=env, together=False) for env in told.values()]
    for process, words in zip(crew, told, strict=True):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1 and words in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()
