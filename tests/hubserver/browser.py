"""A real browser without a window, if this machine has one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Browser:
    """Opens one address at a time, each with a new and empty profile."""

    def __init__(self, program: str, folder: Path):
        self._program = program
        self._folder = folder
        self._count = 0

    def dom(self, url: str) -> str:
        """The page as it is after it was loaded and its scripts, if any, were run."""
        self._count += 1
        profile = self._folder / f"profile-{self._count}"
        command = [self._program, *_FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=90)
        shutil.rmtree(profile, ignore_errors=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def browser(folder: Path) -> Browser:
    """Chromium; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(names)} is installed")
    made = Browser(program, folder)
    proof = folder / "proof.html"
    proof.write_text("<title>before</title><script>document.title = 'it runs scripts'</script>")
    assert "it runs scripts" in made.dom(proof.as_uri()), "this browser would not show that a script ran"
    return made
