"""The sweep over all types of transformers (`make sweep`): writes docs/architectures.md; no merge may be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from tests.fixtures.processes import Forked
from tests.sweep.page import PAGE, Row, render


SECONDS = 150
"""That one type may take."""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_type_is_merged_or_refused(tmp_path: Path) -> None:
    known = sorted(transformers.CONFIG_MAPPING.keys())
    asked = os.environ.get("SWEEP", "").split()
    rows = [probe(kind, tmp_path / "models") for kind in asked or known]
    if not asked:
        PAGE.write_text(render(rows, transformers.__version__), encoding="utf-8")
    wrong = [row for row in rows if row.verdict == "failing"]
    assert not wrong, wrong


def probe(kind: str, folder: Path) -> Row:
    """The verdict on one type, from a process of its own with a limit on its memory and time."""
    folder.mkdir()
    said = folder / "verdict.json"
    process = Forked("-m", "tests.sweep.probe", kind, str(folder))
    try:
        printed, _ = process.communicate(SECONDS)
        if not said.is_file():
            return Row(kind, "", "failing", f"the process ended with {process.returncode}: {printed[-100:]}")
        return Row(kind, *json.loads(said.read_text(encoding="utf-8")))
    except subprocess.TimeoutExpired:
        return Row(kind, "", "failing", f"takes more than {SECONDS} seconds")
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)
