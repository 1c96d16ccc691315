"""What people see of a merge under way, on a terminal and off it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.fixtures import tiny


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    for seed in (1, 2):
        tiny.save(tiny.fine_tune(base, seed), root / f"m{seed}")
    words = [sys.executable, "-m", "hfmerge", "merge", "--base", root / "base", "--method", "linear"]
    return [str(word) for word in (*words, root / "m1", root / "m2", "--output", root)]


def test_bytes_parameters_and_the_time_left_on_a_terminal(command: list[str], tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    process = subprocess.Popen(
        [*command[:-1], str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=end, env=environment
    )
    os.close(end)
    said = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        said += more
    os.close(terminal)
    assert process.wait() == 0
    count = len(tiny.tensors(tmp_path / "out"))
    last = said.decode().replace("\r", "\n").split("\n")
    lines = [line for line in last if "parameters" in line]
    assert any(f"{count}/{count} parameters" in line for line in lines), said
    # bytes done and in all, time taken and left, rate
    assert any(re.search(r"100%.*[0-9.]+k?/[0-9.]+k.*\[\d+:\d+<\d+:\d+, .*B/s", line) for line in lines), said


def test_nothing_of_it_in_a_file(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*command[:-1], str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert "parameters" not in done.stderr and "\r" not in done.stderr
