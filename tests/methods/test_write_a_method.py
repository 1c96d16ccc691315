"""The page on writing a method: its code blocks run in their order, in an empty folder, as a reader runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "write-a-method.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The reader's: this Python, hfmerge as it is here, packages into a folder of their own, and no index to ask."""
    tools, packages = tmp_path / "tools", tmp_path / "packages"
    tools.mkdir()
    for name, module in (("hfmerge", "hfmerge"), ("pip", "pip"), ("python", "")):
        run = f'exec "{sys.executable}" ' + (f"-m {module} " if module else "")
        (tools / name).write_text(f'#!/bin/sh\n{run}"$@"\n')
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]),
        "PIP_TARGET": str(packages),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        # pip reads it the other way round: this is `--no-build-isolation`
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HFMERGE": str(ROOT),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_blocks_of_the_page_run_in_order(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    kinds = []
    for kind, text in blocks():
        kinds.append(kind)
        named = re.match(r"# (\S+\.(?:py|toml))\n", text)
        if named is not None:
            (folder / named[1]).write_text(text, encoding="utf-8")
            continue
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        if "verify" in text:
            assert "same bytes" in done.stdout
        if "pytest" in text:
            assert int(done.stdout.split(" passed")[0].split()[-1]) >= 30
    assert kinds.count("python") == 5 and kinds.count("bash") == 4 and kinds.count("toml") == 1
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "share of each change that is kept" in (tmp_path / "packages" / "my_dare.py").read_text()


def test_the_page_names_every_law_and_need() -> None:
    from typing import get_args

    from hfmerge.methods.base import Law, Needs

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{word}` |" in text for word in (*get_args(Law), *get_args(Needs)))
