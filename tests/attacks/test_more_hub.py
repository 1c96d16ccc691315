"""More attacks by small files of models, and on the Hub on loopback."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import tiny


pytestmark = pytest.mark.slow
MODULES = {f"encoder.layer.0.attention.self.{name}": (16, 16) for name in ("query", "key", "value")}


@pytest.mark.parametrize("pattern", ["(.*" + "a?" * 300 + ")x{}", "no[.]such.module{}", "no.such.module{}"])
def test_ten_thousand_patterns(tmp_path: Path, pattern: str) -> None:
    """The attacker's adapter gives ranks by as many patterns as are allowed, each of which is worth some work."""
    tiny.save(tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1)), tmp_path / "base")
    tiny.adapter(tmp_path / "a", MODULES, 3)
    patterns = {pattern.format(i): 2 for i in range(10_000)}
    tiny.edit_config(tmp_path / "a", "adapter_config.json", rank_pattern=patterns, alpha_pattern=patterns)
    start = time.process_time()  # not slower on a machine that others use
    run = tiny.cli("plan", tmp_path / "a", "--base", tmp_path / "base", "--method", "linear")
    assert time.process_time() - start < 20
    if pattern == "no.such.module{}":  # no attack: names of modules, as adapters have them
        assert run.code == 0, run.err
    else:
        assert run.code == 1 and "steps of matching; the limit is" in run.err, run.err


PLOT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from hfmerge.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line with bounds on memory and time, so that an attack that succeeds ends with an error."""


def _matrix(rows: int, columns: int, label: str = "m{}") -> dict[str, Any]:
    models = [{"label": label.format(i)} for i in range(rows)]
    tasks = [{"name": f"t{i}", "metric": "accuracy"} for i in range(columns)]
    return {"schema": 1, "models": models, "tasks": tasks, "scores": [[None] * columns] * rows, "notes": []}


@pytest.mark.parametrize("kind", ["cells", "names", "lines"])
def test_results_that_make_a_picture_without_end(tmp_path: Path, kind: str) -> None:
    """Results of a stranger, of some hundred kilobytes, ask for a picture of gigabytes, or one that takes a minute."""
    curve = [[i, 0.1, None, [1.0] * 8000] for i in range(10)]
    learned = {"curve": curve, "groups": ["g"]}
    data = {
        "cells": _matrix(200, 200),
        "names": _matrix(2, 2, "{}" + "y" * 1_000_000),
        "lines": {"kind": "learning", "schema": 1, "models": [f"m{i}" for i in range(8000)], "learned": learned},
    }[kind]
    (tmp_path / "results.json").write_text(json.dumps(data))
    run = tiny.finish(tiny.start("plot", tmp_path / "results.json", "--output", tmp_path, code=PLOT), timeout=250)
    assert run.code == 0, run.err
    assert sum(path.stat().st_size for path in tmp_path.glob("*.png")) < 2_000_000
