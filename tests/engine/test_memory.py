"""Memory of a run: bounded by the largest pieces, not by the models; kept below `--max-memory`, on a 1 GB model."""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import hfmerge
from hfmerge.cli import program
from hfmerge.engine.options import parse_size
from hfmerge.engine.threads import overlapped
from hfmerge.errors import HfMergeError
from tests.fixtures import tiny


LIMIT = 512 << 20
HIDDEN, INNER, LAYERS, VOCABULARY = 512, 2048, 110, 16_000


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of 1 GB and two fine-tunes of it, whose values repeat, as writing random ones would take a minute."""
    root = tmp_path_factory.mktemp("gigabyte")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{head}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{head}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{head}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    for seed, name in enumerate(("base", "a", "b")):
        values = 0.02 * torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0))
        values += 0.001 * seed * torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
        held = values.to(torch.bfloat16)
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {key: held[: torch.Size(shape).numel()].reshape(shape).clone() for key, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (root / "base" / "model.safetensors").stat().st_size > 0.95e9
    yield root


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--method", "linear"),
        ("--method", "opcm", "--include", "model.layers.1?.*"),
    ],
    ids=["linear", "opcm"],
)
def test_a_model_of_1_gb_is_merged_in_512_mb(gigabyte: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """The kernel itself refuses more than 512 MiB of data."""
    out = tmp_path / "out"
    models = [str(gigabyte / name) for name in ("a", "b")]
    merge = ["merge", "--base", str(gigabyte / "base"), *words, "--state", "none", "--output", str(out), "--quiet"]
    run = subprocess.run(
        [sys.executable, "-m", "hfmerge", *merge, "--max-memory", "384MiB", *models],
        env={**os.environ, "PYTHONPATH": str(Path(hfmerge.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (out / "model.safetensors").stat().st_size == (gigabyte / "base" / "model.safetensors").stat().st_size


def test_a_bound_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, tmp_path / "base")
    tiny.save(tiny.fine_tune(base, 1), tmp_path / "m0")
    words = ("--base", tmp_path / "base", "--method", "opcm", "--max-memory", "1MB", "--output", tmp_path / "out")
    run = tiny.done("merge", tmp_path / "m0", *words)
    assert "--max-memory cannot be kept: the largest parameter needs about" in run.err


@pytest.mark.parametrize("memory", [None, 100, 30])
def test_results_come_in_order_and_visits_hold_no_more_than_the_bound(memory: int | None) -> None:
    needs = [10, 20, 30, 40, 5, 5, 5, 60]
    lock, held, seen = threading.Lock(), [0], [0]

    def work(at: int) -> int:
        with lock:
            held[0] += needs[at]
            seen[0] = max(seen[0], held[0])
        threading.Event().wait(0.01)
        with lock:
            held[0] -= needs[at]
        return at

    results = list(overlapped(work, range(len(needs)), needs, threads=4, memory=memory))
    assert results == list(range(len(needs)))
    assert memory is None or seen[0] <= max(memory, max(needs))


def test_the_first_failure_of_a_visit_ends_all() -> None:
    begun: list[int] = []

    def work(at: int) -> None:
        begun.append(at)
        if at == 2:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        list(overlapped(work, range(100), [1] * 100, threads=2, memory=None))
    assert len(begun) < 20


@pytest.mark.parametrize(
    ("text", "size"), [("800MB", 800_000_000), ("4 GiB", 4 << 30), ("1.5g", 1_500_000_000), ("512000", 512_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "4 GX", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(HfMergeError, match="is not a size"):
        parse_size(text)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own settings")
@pytest.mark.parametrize("own", [False, True])
def test_who_has_set_up_the_memory_of_glibc_has_decided(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    settings: list[tuple[int, int]] = []
    monkeypatch.setattr(
        program.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *one: settings.append(one))
    )
    if own:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4194304")
    else:
        monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    program.reuse_freed_memory()
    assert [which for which, _ in settings] == ([] if own else [-3, -1])
