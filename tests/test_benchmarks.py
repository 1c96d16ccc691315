"""Every benchmark runs, in sizes that measure nothing; many small tensors cost no more each than few."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfmerge import merge
from hfmerge.recipe.recipe import parse_recipe
from tests.fixtures import tiny


pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "startup": ((), "`--help`, whole command"),
    "linear": (("--methods", "ties"), "ties, peak memory"),
    "elements": ((), "`ties`: trim, elect, average"),
    "opcm": (("--kinds", "bert", "--models", "2"), "of it eigenvectors in float64"),
    "spectral": ((), "randomized projection of 320 x 300: deviation, `code`"),
    "lora": (("--adapters", "2"), "difference to the dense path"),
    "reversal": ((), "2 adapters, opcm: unmerge number 1, subtract"),
    "evaluation": (("--rows", "64"), "from files to the score"),
    "scaling": (("--parts", "copying"), "linear, 4 models, whole command; `cat` beside"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_works(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    words, row = SCRIPTS[name]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--no-peers", "--runs", "1", *words],
        cwd=ROOT,
        env={**os.environ, "BENCHMARKS_CACHE": str(tmp_path_factory.getbasetemp() / "benchmarks")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "| figure | hfmerge | peer | ratio | goal | met |" in done.stdout
    assert row in done.stdout


def test_all_benchmarks_are_run_by_one_command() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--date" in done.stdout
    text = (ROOT / "benchmarks" / "__main__.py").read_text(encoding="utf-8")
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def parser()" in path.read_text("utf-8")}
    assert scripts == set(SCRIPTS)
    assert all(f'"{name}"' in text for name in scripts)


def test_the_process_that_starts_the_benchmarks_is_small() -> None:
    """What a parent holds, its children are said to have held."""
    code = "import sys, benchmarks.__main__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_many_small_tensors_cost_no_more_each_than_few(tmp_path: Path) -> None:
    """Processor time of whole merges of mixtures of experts; anything quadratic in tensors would cost four times."""
    each = []
    for layers in (2, 8):
        settings = tiny.config("qwen3_moe", num_experts=64, num_hidden_layers=layers)
        base = tiny.build("Qwen3MoeForCausalLM", settings)
        models = [base, tiny.fine_tune(base, 1), tiny.fine_tune(base, 2)]
        folders = [str(tiny.save(model, tmp_path / f"{layers}-{i}")) for i, model in enumerate(models)]
        seconds = []
        for run in range(2):
            recipe = parse_recipe({"base": folders[0], "models": folders[1:], "method": "linear"}, "test")
            start = time.process_time()
            merge(recipe, output=tmp_path / f"out-{layers}-{run}")
            seconds.append(time.process_time() - start)
        count = len(tiny.tensors(Path(folders[0])))
        assert count > 190 * layers
        each.append(min(seconds) / count)
    assert each[1] <= 2.0 * each[0]
