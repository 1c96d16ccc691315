"""More attacks by small files of models, and on the Hub on loopback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny


MODULES = {f"encoder.layer.0.attention.self.{name}": (16, 16) for name in ("query", "key", "value")}


@pytest.mark.parametrize("pattern", ["(.*" + "a?" * 300 + ")x{}", "no[.]such.module{}", "no.such.module{}"])
def test_ten_thousand_patterns(tmp_path: Path, pattern: str) -> None:
    """The attacker's adapter gives ranks by as many patterns as are allowed, each of which is worth some work."""
    tiny.save(tiny.build("BertModel", tiny.config("bert", num_hidden_layers=1)), tmp_path / "base")
    tiny.adapter(tmp_path / "a", MODULES, 3)
    patterns = {pattern.format(i): 2 for i in range(10_000)}
    tiny.edit_config(tmp_path / "a", "adapter_config.json", rank_pattern=patterns, alpha_pattern=patterns)
    start = time.monotonic()
    run = tiny.cli("plan", tmp_path / "a", "--base", tmp_path / "base", "--method", "linear")
    assert time.monotonic() - start < 15
    if pattern != "no.such.module{}":
        assert run.code == 1 and "steps of matching; the limit is" in run.err, run.err
