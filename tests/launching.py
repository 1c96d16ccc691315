"""Helpers of the tests: hfmerge on several processes, started as a launcher starts them."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fixtures.processes import Forked


ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to whoever asks before it is used."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(
    *command: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    together: bool = True,
    before: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start Python with these arguments, through `before`; its standard error comes with its output if `together`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*before, sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        cwd=cwd,
        start_new_session=True,
    )


def torchrun(world: int, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`torchrun` with `world` processes on a free port."""
    place = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return start("-m", "torch.distributed.run", "--nproc_per_node", str(world), *place, *arguments, env=env)


def accelerate(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """`accelerate launch`, standard error apart."""
    return start("-m", "accelerate.commands.launch", *arguments, env=env, cwd=cwd, together=False)


def ranks(
    world: int, *command: str, machines: bool = False, before: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """The processes of a run without a launcher that looks after them, as if it were on a machine that is gone.

    Args:
        machines: as if each were on a machine of its own.
        before: a command that starts each of them.
    """
    return [start(*command, env=env, together=False, before=before) for env in environments(world, machines=machines)]


def crew(world: int, *command: str, env: Mapping[str, str] | None = None) -> list[Forked]:
    """`ranks`, forked from the server of `fixtures.processes`: for tests of several processes, not of their start."""
    return [Forked(*command, env={**rank, **(env or {})}, together=False) for rank in environments(world)]


def succeed(processes: Sequence[Forked], timeout: float = 240) -> str:
    """Wait for processes that must succeed; what all of them printed, one after the other."""
    said = [process.communicate(timeout) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return "".join(out + err for out, err in said)


def environments(world: int, *, machines: bool = False) -> list[dict[str, str]]:
    """What a launcher tells each process of a run; see `ranks`."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": "0" if machines else str(rank),
            "GROUP_RANK": str(rank) if machines else "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": "1" if machines else str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(world)
    ]
