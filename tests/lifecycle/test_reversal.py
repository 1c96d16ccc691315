"""`add` and `unmerge` give the bytes of the merge that took, or never saw, those models: products and kept states."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hfmerge.methods import AdditiveFold, FoldMethod, registry
from tests.fixtures import launching, tiny


FULL = ("m0", "m1", "m2", "m3")
LORA = ("a0", "a1", "a2")
VARIANTS: dict[str, tuple[str, ...]] = {
    name: ("--method", name) for name, method in registry().items() if method.arity == (1, None)
}
"""Every method of any number of models as it is, and some with options."""
VARIANTS |= {
    "opcm, the paper's variant": ("--method", "opcm", "--option", "variant=paper", "--norm", "none"),
    "linear of mean norm": ("--method", "linear", "--norm", "mean"),
    "ties over the model": ("--method", "ties", "--option", "scope=model", "--norm", "mean"),
}
FOLDS = [name for name, flags in VARIANTS.items() if issubclass(registry()[flags[1]], FoldMethod)]
ADDITIVE = [name for name, flags in VARIANTS.items() if issubclass(registry()[flags[1]], AdditiveFold)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, four fine-tunes of it and three adapters of other ranks."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i, name in enumerate(FULL, 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    for i, name in enumerate(LORA, 1):
        tiny.adapter(root / name, tiny.attention(), i, rank=i)
    return root


def merge(root: Path, out: Path, models: Sequence[str], *flags: str) -> Path:
    tiny.done("merge", *[root / model for model in models], "--base", root / "base", "--output", out, *flags)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_adding_equals_merging_all_at_once(root: Path, tmp_path: Path, variant: str) -> None:
    flags = (*VARIANTS[variant], "--state", "all")
    whole = tiny.files(merge(root, tmp_path / "whole", FULL, *flags))
    grown = merge(root, tmp_path / "grown", FULL[:1], *flags)
    first = tiny.done("add", grown, root / "m1")
    tiny.done("add", grown, root / "m2", root / "m3")
    assert tiny.files(grown) == whole
    if variant in FOLDS:
        assert "continued from the kept state after model 1; 1 of 2 models read" in first.out
        # of an additive fold the last state is as good as all
        assert len(tiny.states(grown)) == (1 if variant in ADDITIVE else 4)
    else:
        assert "needs all models at once" in first.out and not tiny.states(grown)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_model_can_be_taken_out_again(root: Path, tmp_path: Path, variant: str) -> None:
    """From kept states and, without any, from the sources: the same bytes, those of the merge that never saw it."""
    flags = VARIANTS[variant]
    models = FULL[:3]
    kept = merge(root, tmp_path / "kept", models, *flags, "--state", "all")
    bare = merge(root, tmp_path / "bare", models, *flags, "--state", "none")
    assert tiny.files(kept, states=False) == tiny.files(bare)
    for k, gone in enumerate(models):
        rest = [model for model in models if model != gone]
        never = merge(root, tmp_path / f"never-{gone}", rest, *flags, "--state", "all")
        out = tmp_path / f"without-{gone}"
        run = tiny.done("unmerge", kept, "--remove", gone, "--output", out)
        assert tiny.files(out) == tiny.files(never)
        if variant in ADDITIVE:
            assert "subtracted from the exact sums of the kept state after model 3" in run.out
        elif variant in FOLDS:
            how = {0: "no kept state fits", 1: "after model 1; 1 of 2 models read", 2: "no model is read"}[k]
            assert how in run.out
    assert tiny.files(kept, states=False) == tiny.files(bare)
    tiny.done("unmerge", bare, "--remove", "m2")
    assert tiny.files(bare) == tiny.files(tmp_path / "never-m2", states=False)


@pytest.mark.slow
def test_several_models_leave_at_once_and_come_back_last(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", FULL, "--method", "opcm", "--state", "2")
    tiny.done("unmerge", out, "--remove", "m1", "--remove", "m3")
    assert tiny.files(out) == tiny.files(
        merge(root, tmp_path / "two", ("m0", "m2"), "--method", "opcm", "--state", "2")
    )
    tiny.done("add", out, root / "m1")
    three = merge(root, tmp_path / "three", ("m0", "m2", "m1"), "--method", "opcm", "--state", "2")
    assert tiny.files(out) == tiny.files(three)
    assert tiny.done("verify", out, "--replay").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opcm", "linear", "ties"])
def test_weights_and_both_kinds_of_model(root: Path, tmp_path: Path, method: str) -> None:
    models, weights = ("m0", "a2", "m1", "a1"), ("0.5", "2", "1.25", "-0.25")
    flags = ("--method", method, "--state", "all")

    def weighted(out: Path, which: Sequence[int]) -> Path:
        given = [part for i in which for part in ("--weight", weights[i])]
        return merge(root, out, [models[i] for i in which], *flags, *given)

    out = weighted(tmp_path / "out", (0, 1))
    tiny.done("add", out, root / "m1", root / "a1", "--weight", "1.25", "--weight=-0.25")
    assert tiny.files(out) == tiny.files(weighted(tmp_path / "whole", (0, 1, 2, 3)))
    for gone in range(4):
        rest = [i for i in range(4) if i != gone]
        tiny.done("unmerge", out, "--remove", models[gone], "--output", tmp_path / f"without-{gone}")
        assert tiny.files(tmp_path / f"without-{gone}") == tiny.files(weighted(tmp_path / f"never-{gone}", rest))


@pytest.mark.slow
def test_an_adapter_on_another_fine_tune_takes_both_changes(root: Path, tmp_path: Path) -> None:
    pair = f"m3+{root / 'a1'}"
    flags = ("--method", "opcm", "--state", "all")
    out = merge(root, tmp_path / "out", ("m0", pair, "m1"), *flags)
    tiny.done("unmerge", out, "--remove", "m0")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", (pair, "m1"), *flags))
    tiny.done("unmerge", out, "--remove", "a1")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "last", ("m1",), *flags))


@pytest.mark.slow
def test_the_state_of_adapters_stays_factored_and_small(root: Path, tmp_path: Path) -> None:
    flags = ("--method", "opcm", "--state", "all")
    out = merge(root, tmp_path / "out", LORA, *flags)
    assert len(tiny.states(out)) == 3
    ranks = []
    for name in tiny.states(out):
        with safe_open(out / "merge_state" / name, "pt") as state:
            keys = list(state.keys())
            shapes = {key: tuple(state.get_slice(key).get_shape()) for key in keys}
        assert len(keys) == 8 and all(key.endswith((".up", ".down")) for key in keys)
        (rank,) = {shape[1] for key, shape in shapes.items() if key.endswith(".up")}
        assert all(shape == ((16, rank) if key.endswith(".up") else (rank, 16)) for key, shape in shapes.items())
        ranks.append(rank)
        elements = 4 * 2 * 16 * rank  # of at most 8 bytes, and a header
        assert (out / "merge_state" / name).stat().st_size < 8 * elements + 1500
    assert sorted(ranks) == [1, 3, 6]
    for gone in LORA:
        rest = [model for model in LORA if model != gone]
        tiny.done("unmerge", out, "--remove", gone, "--output", tmp_path / f"without-{gone}")
        never = merge(root, tmp_path / f"never-{gone}", rest, *flags)
        assert tiny.files(tmp_path / f"without-{gone}") == tiny.files(never)
    grown = merge(root, tmp_path / "grown", LORA[:2], *flags)
    tiny.done("add", grown, root / "a2")
    assert tiny.files(grown) == tiny.files(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "gram", "iso_c", "mdm_oc_iso"])
def test_an_exact_sum_of_adapters_is_their_factors(root: Path, tmp_path: Path, method: str) -> None:
    """Each as it came, one after the other: leaving and coming back takes no arithmetic at all."""
    flags = ("--method", method)
    out = merge(root, tmp_path / "out", LORA, *flags)
    (name,) = tiny.states(out)
    with safe_open(out / "merge_state" / name, "pt") as state:
        ranks = {key.rpartition(":")[2]: state.get_slice(key).get_shape() for key in state.keys() if "0.self" in key}
    rows = 32 if method == "mdm_oc_iso" else 16
    assert ranks == {
        f"T{i}{end}": [rows, i] if end == ".up" else [i, 16] for i in (1, 2, 3) for end in (".up", ".down")
    }
    for gone in LORA:
        rest = [model for model in LORA if model != gone]
        run = tiny.done("unmerge", out, "--remove", gone, "--output", tmp_path / f"without-{gone}")
        assert "left out of the factors" in run.out
        never = merge(root, tmp_path / f"never-{gone}", rest, *flags)
        assert tiny.files(tmp_path / f"without-{gone}") == tiny.files(never)
    grown = merge(root, tmp_path / "grown", LORA[:2], *flags)
    tiny.done("add", grown, root / "a2")
    assert tiny.files(grown) == tiny.files(out)


@pytest.mark.slow
def test_factors_become_dense_when_their_ranks_fill_the_matrix(root: Path, tmp_path: Path) -> None:
    """Ranks 9 and 8 of 16 x 16 matrices: factored after the first model, dense after the second."""
    for name, seed, rank in (("b0", 5, 9), ("b1", 6, 8)):
        tiny.adapter(tmp_path / name, tiny.attention(), seed, rank=rank)
    models = (str(tmp_path / "b0"), str(tmp_path / "b1"), "a0")
    flags = ("--method", "opcm", "--state", "all")
    out = merge(root, tmp_path / "out", models, *flags)
    forms = {}
    for name in tiny.states(out):
        with safe_open(out / "merge_state" / name, "pt") as state:
            forms[len(list(state.keys()))] = all(key.endswith((".up", ".down")) for key in state.keys())
    assert forms == {8: True, 4: False}
    tiny.done("unmerge", out, "--remove", "b1")
    never = merge(root, tmp_path / "never", (models[0], "a0"), *flags)
    assert tiny.files(out) == tiny.files(never)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "counts"), [("none", []), ("last", [4]), ("all", [1, 2, 3, 4]), ("2", [2, 4]), ("3", [3, 4])]
)
def test_which_states_are_kept(root: Path, tmp_path: Path, state: str, counts: list[int]) -> None:
    flags = ("--method", "opcm", "--state", state)
    out = merge(root, tmp_path / "out", FULL, *flags)
    record = json.loads((out / "merge_history" / "0001.json").read_text())
    kept = record["byproducts"]["states"]
    assert [item["count"] for item in kept] == counts
    assert tiny.states(out) == sorted(f"{item['sha256']}.safetensors" for item in kept)
    assert [(out / "merge_state" / f"{item['sha256']}.safetensors").stat().st_size for item in kept] == [
        item["nbytes"] for item in kept
    ]
    tiny.done("unmerge", out, "--remove", "m2")
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", ("m0", "m1", "m3"), *flags))


@pytest.mark.slow
def test_states_that_hold_a_removed_model_are_gone(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", FULL, "--method", "opcm", "--state", "all")
    before = tiny.states(out)
    tiny.done("unmerge", out, "--remove", "m1")
    # only the state after m0 never held m1
    first = merge(root, tmp_path / "first", ("m0",), "--method", "opcm", "--state", "all")
    assert [name for name in before if name in tiny.states(out)] == tiny.states(first)
    assert len(tiny.states(out)) == 3


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
@pytest.mark.parametrize("verb", ["add", "unmerge"])
def test_a_bad_state_is_passed_over_with_a_warning(root: Path, tmp_path: Path, how: str, verb: str) -> None:
    flags = ("--method", "opcm", "--state", "last")
    out = merge(root, tmp_path / "out", FULL[:3], *flags)
    (state,) = (out / "merge_state").glob("*.safetensors")
    damage(state) if how == "corrupt" else state.unlink()
    if verb == "add":
        run = tiny.done("add", out, root / "m3")
        assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", FULL, *flags))
        assert f"{state.name} is {how}; the sources are read instead." in run.err
        assert "merged again from all 4 pinned sources" in run.out
    else:
        run = tiny.done("unmerge", out, "--remove", "m2")
        assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", FULL[:2], *flags))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_the_next_older_state_serves_when_the_nearest_is_bad(root: Path, tmp_path: Path, how: str) -> None:
    flags = ("--method", "opcm", "--state", "all")
    out = merge(root, tmp_path / "out", FULL, *flags)
    record = json.loads((out / "merge_history" / "0001.json").read_text())
    bad = next(item["sha256"] for item in record["byproducts"]["states"] if item["count"] == 2)
    state = out / "merge_state" / f"{bad}.safetensors"
    damage(state) if how == "corrupt" else state.unlink()
    run = tiny.done("unmerge", out, "--remove", "m2")
    assert f"{state.name} is {how}" in run.err
    assert "continued from the kept state after model 1; 2 of 3 models read" in run.out
    assert tiny.files(out) == tiny.files(merge(root, tmp_path / "never", ("m0", "m1", "m3"), *flags))


def test_a_bad_state_that_would_only_be_carried_along_is_told(root: Path, tmp_path: Path) -> None:
    out = merge(root, tmp_path / "out", FULL[:3], "--method", "opcm", "--state", "all")
    record = json.loads((out / "merge_history" / "0001.json").read_text())
    bad = next(item["sha256"] for item in record["byproducts"]["states"] if item["count"] == 1)
    damage(out / "merge_state" / f"{bad}.safetensors")
    run = tiny.done("add", out, root / "m3")
    assert f"{bad}.safetensors (after model 1) is missing or corrupt" in run.err
    counts = json.loads((out / "merge_history" / "0002.json").read_text())["byproducts"]["states"]
    assert [item["count"] for item in counts] == [2, 3, 4]
    assert tiny.done("verify", out, "--replay").code == 0


def test_a_state_of_another_version_of_the_method_is_not_continued(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = merge(root, tmp_path / "out", FULL[:2], "--method", "linear", "--state", "all")
    monkeypatch.setattr(registry()["linear"], "version", 99)
    run = tiny.done("add", out, root / "m2")
    assert "merged again from all 3 pinned sources (no kept state fits)" in run.out
    assert json.loads((out / "merge_history" / "0002.json").read_text())["method"]["version"] == 99


CHILD = """
import json, os, sys
from pathlib import Path
root, out, cores = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
from tests.lifecycle import test_reversal
import torch
print(json.dumps([torch.get_num_threads(), test_reversal.digests(root, out)]))
"""


def digests(root: Path, out: Path) -> dict[str, dict[str, str]]:
    """Digests of the files of a few merges and of what they are without their second model."""
    found = {}
    for flags in (("opcm", "--state", "all"), ("linear", "--norm", "mean")):
        folder = merge(root, out / flags[0], FULL[:3], "--method", *flags)
        found[flags[0]] = tiny.files(folder)
        tiny.done("unmerge", folder, "--remove", "m1")
        found[f"{flags[0]} without m1"] = tiny.files(folder)
    return found


@pytest.mark.slow
def test_threads_cores_and_hash_seeds_do_not_show_in_the_bytes(tmp_path: Path) -> None:
    """Matrices large enough that the libraries would share them out among threads if they were let."""
    settings = tiny.config("qwen3", hidden_size=128, intermediate_size=224, head_dim=64, num_hidden_layers=1)
    base = tiny.build("Qwen3ForCausalLM", settings)
    tiny.save(base, tmp_path / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), tmp_path / f"m{i}")
    children = [
        launching.start(
            "-c", CHILD, str(tmp_path), str(tmp_path / f"out-{threads}"), str(cores), together=False,
            env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONHASHSEED": seed},
        )
        for threads, cores, seed in (("2", 2, "1"), ("4", 1, "4242"))
    ]  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = digests(tmp_path, tmp_path / "out-here")
    finally:
        torch.set_num_threads(before)
    runs = [tiny.finish(child) for child in children]
    for run in runs:
        assert run.code == 0, run.err
    (two, first), (_, second) = (run.json for run in runs)
    assert two == 2 or len(os.sched_getaffinity(0)) == 1
    assert first == second == here
    assert len({json.dumps(value, sort_keys=True) for value in here.values()}) == 4
