"""Methods of other packages: three, installed by entry point, keep the contract and merge as built-in ones do."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfmerge import methods
from hfmerge.engine import partition
from hfmerge.methods import AdditiveFold, Block, Site, method, option, registry
from hfmerge.methods.declare import cited
from hfmerge.task_vector import Dense, LowRank
from tests.fixtures import tiny
from tests.fixtures.launching import ROOT, torchrun
from tests.fixtures.pretended import ON, beside


PLUGINS = sorted((Path(__file__).parents[1] / "plugins").glob("*.py"))
NAMES = [path.stem for path in PLUGINS]
FILE = "fisher.safetensors"
MODELS = ("m1", "m2", "a0")
"""Two full models and an adapter; it changes matrices alone."""

WORKER = """
import json, sys
from hfmerge.cli import main
from hfmerge.engine import partition
partition.TILE = partition._CHUNK = int(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    code = main(arguments)
    if code:
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip makes of a package with the three plug-ins: modules, and a folder that says what they are."""
    folder = tmp_path_factory.mktemp("site")
    for path in PLUGINS:
        (folder / path.name).write_bytes(path.read_bytes())
    facts = folder / "trials-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: trials\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "\n".join(["[hfmerge.methods]", *(f"{name} = {name}:{name}" for name in NAMES)])
    )
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plug-ins, in this process, which looks for methods once, and in those that it starts."""
    methods._installed.cache_clear()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))
    yield site
    methods._installed.cache_clear()
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, full models and an adapter of it, each with Fisher information of its own."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in (1, 2, 3):
        tiny.save(tiny.fine_tune(base, i), root / f"m{i}")
    tiny.adapter(root / "a0", tiny.attention(), 1, rank=2)
    for seed, name in enumerate(("m1", "m2", "m3", "a0")):
        generator = torch.Generator().manual_seed(seed)
        shapes = {key: value.shape for key, value in tiny.tensors(root / "base").items()}
        values = {key: torch.randn(shape, generator=generator).square() for key, shape in shapes.items()}
        save_file(values, root / name / FILE)
    return root


def command(root: Path, out: Path, name: str, *flags: str, models: tuple[str, ...] = MODELS) -> list[str]:
    given = [str(root / model) for model in models]
    return ["merge", *given, "--base", str(root / "base"), "--method", name, "--output", str(out), "--quiet", *flags]


def merged(root: Path, out: Path, name: str, *flags: str, models: tuple[str, ...] = MODELS) -> dict[str, Tensor]:
    tiny.done(*command(root, out, name, *flags, models=models))
    return tiny.tensors(out)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_a_plug_in_has_at_most_25_lines_of_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            documented |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    lines = [line.strip() for i, line in enumerate(text.splitlines(), 1) if i not in documented]
    assert 10 < sum(bool(line) and not line.startswith("#") for line in lines) <= 25


def test_plug_ins_are_found_by_their_entry_points(installed: Path) -> None:
    assert {*NAMES} <= {entry.name for entry in metadata.entry_points(group="hfmerge.methods")}
    assert {*NAMES} <= {*registry()}
    listed = tiny.done("methods").out
    assert all(f"{name}: " in listed for name in NAMES)


@pytest.mark.slow
def test_plug_ins_keep_the_contract_of_methods(installed: Path) -> None:
    """The suite as it is: it runs over the registry."""
    suite = ["-p", "no:cacheprovider", "tests/methods/test_methods.py", "-k", " or ".join(NAMES)]
    call = [sys.executable, "-m", "pytest", *suite]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 30 * len(NAMES), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tile"), [(1, 16), (2, 16), (2, 1 << 18)])
def test_tiles_and_processes_do_not_show_in_the_bytes(
    installed: Path, root: Path, tmp_path: Path, world: int, tile: int
) -> None:
    """Full models are visited in rows of a tile, or whole; and so they are beside an adapter, which is read whole."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    cases = [(name, models) for name in NAMES for models in (MODELS, ("m1", "m2", "m3"))]
    calls = [command(root, tmp_path / f"{name}-{models[-1]}", name, models=models) for name, models in cases]
    arguments = [str(script), str(tile), json.dumps(calls)]
    if world == 1:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    else:
        process = torchrun(world, *arguments, env={"PYTHONPATH": os.environ["PYTHONPATH"]})
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    for name, models in cases:
        merged(root, tmp_path / f"plain-{name}-{models[-1]}", name, models=models)
        assert tiny.files(tmp_path / f"{name}-{models[-1]}") == tiny.files(tmp_path / f"plain-{name}-{models[-1]}")


def test_small_tiles_are_really_cut(root: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfmerge.engine.planner import make_plan
    from hfmerge.recipe.overrides import apply_overrides

    models = [str(root / name) for name in ("m1", "m2")]
    plan = make_plan(apply_overrides(None, models=models, base=str(root / "base"), method="trial_dare"))
    assert all(chunk.rows is None for chunk in partition.chunks(plan, plan.params))
    monkeypatch.setattr(partition, "TILE", 16)
    monkeypatch.setattr(partition, "_CHUNK", 16)
    assert sum(chunk.rows is not None for chunk in partition.chunks(plan, plan.params)) > 20


def changes(root: Path, name: str) -> dict[str, Tensor]:
    base, model = tiny.tensors(root / "base"), tiny.tensors(root / name)
    return {key: (model[key] - base[key]).double() for key in base}


def test_dare_keeps_each_change_or_drops_it(installed: Path, root: Path, tmp_path: Path) -> None:
    base, own = tiny.tensors(root / "base"), changes(root, "m1")
    quarter = ("--option", "density=0.25")
    one = merged(root, tmp_path / "one", "trial_dare", *quarter, models=("m1",))
    kept = total = 0
    for key, tau in own.items():
        share = ((one[key] - base[key]).double() / tau)[tau.abs() > 1e-4]
        near = (share.abs() < 1e-2) | ((share - 4.0).abs() < 4e-2)
        assert bool(near.all()), key
        kept, total = kept + int((share > 1.0).sum()), total + share.numel()
    assert abs(kept / total - 0.25) < 4.0 * (0.25 * 0.75 / total) ** 0.5
    other = merged(root, tmp_path / "other", "trial_dare", *quarter, "--option", "seed=1", models=("m1",))
    assert any(not torch.equal(one[key], other[key]) for key in base)


def test_dare_draws_anew_for_each_model_and_parameter(installed: Path, root: Path, tmp_path: Path) -> None:
    base = tiny.tensors(root / "base")
    masks = []
    for name in ("m1", "m2"):
        out = merged(root, tmp_path / name, "trial_dare", models=(name,))
        keys = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
        masks += [(out[key] - base[key]).abs() > 1e-4 for key in keys]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert 0.3 < float((first == second).float().mean()) < 0.7


@pytest.mark.slow
def test_a_model_leaves_dare_as_if_it_had_never_been_there(installed: Path, root: Path, tmp_path: Path) -> None:
    """What is dropped of a model follows from the model, and not from its place or from its folder's name."""
    merged(root, tmp_path / "left", "trial_dare", models=("m1", "m2", "m3"))
    tiny.done("unmerge", tmp_path / "left", "--remove", root / "m1", "--quiet")
    never = merged(root, tmp_path / "never", "trial_dare", models=("m2", "m3"))
    assert all(torch.equal(value, never[key]) for key, value in tiny.tensors(tmp_path / "left").items())
    (root / "m2").rename(root / "renamed")
    try:
        again = merged(root, tmp_path / "again", "trial_dare", models=("renamed", "m3"))
    finally:
        (root / "renamed").rename(root / "m2")
    assert all(torch.equal(value, never[key]) for key, value in again.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_gives_the_same_bytes(installed: Path, root: Path, tmp_path: Path, name: str) -> None:
    merged(root, tmp_path / "out", name)
    assert "same bytes" in tiny.done("verify", tmp_path / "out", "--replay").out


def test_fisher_is_the_weighted_average_of_the_models(installed: Path, root: Path, tmp_path: Path) -> None:
    base = tiny.tensors(root / "base")
    out = merged(root, tmp_path / "out", "fisher", models=("m1", "m2", "m3"))
    models = [tiny.tensors(root / name) for name in ("m1", "m2", "m3")]
    shares = [load_file(root / name / FILE) for name in ("m1", "m2", "m3")]
    for key in base:
        total = sum(share[key].double() * model[key].double() for share, model in zip(shares, models, strict=True))
        expected = total / sum(share[key].double() for share in shares)
        torch.testing.assert_close(out[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_files_beside_the_weights_are_materials(installed: Path, root: Path, tmp_path: Path) -> None:
    """They stand in the ledger by digest; where one changes, the merge cannot be made again."""
    merged(root, tmp_path / "out", "fisher")
    entry = json.loads((tmp_path / "out" / "merge_history" / "0001.json").read_text())
    assert all(FILE in model["files"] for model in entry["materials"]["models"])
    assert FILE not in entry["materials"]["base"]["files"]
    before = (root / "m2" / FILE).read_bytes()
    try:
        tiny_change = {key: value + 1.0 for key, value in load_file(root / "m2" / FILE).items()}
        save_file(tiny_change, root / "m2" / FILE)
        failed = tiny.cli("verify", tmp_path / "out", "--replay")
        assert failed.code != 0 and "m2" in failed.out + failed.err
    finally:
        (root / "m2" / FILE).write_bytes(before)


def test_faults_of_files_beside_the_weights_are_told_by_the_plan(installed: Path, root: Path, tmp_path: Path) -> None:
    failed = tiny.cli(*command(root, tmp_path / "out", "fisher", "--option", "information=other.safetensors"))
    assert failed.code != 0 and "has no other.safetensors" in failed.err and not (tmp_path / "out").exists()
    key, before = "model.layers.0.mlp.up_proj.weight", (root / "m2" / FILE).read_bytes()
    values = load_file(root / "m2" / FILE)
    try:
        for wrong in ({**values, key: values[key][:3]}, {k: v for k, v in values.items() if k != key}):
            save_file({k: v.contiguous() for k, v in wrong.items()}, root / "m2" / FILE)
            failed = tiny.cli(*command(root, tmp_path / "out", "fisher"))
            assert failed.code != 0 and f"{FILE}: {key} of shape" in failed.err
    finally:
        (root / "m2" / FILE).write_bytes(before)


def test_trial_tsv_is_what_the_paper_says(installed: Path, root: Path, tmp_path: Path) -> None:
    """Algorithm 1 of arXiv 2412.00081, transcribed: the polar factors by full decompositions."""
    base, taus = tiny.tensors(root / "base"), [changes(root, name) for name in ("m1", "m2", "m3")]
    out = merged(root, tmp_path / "out", "trial_tsv", models=("m1", "m2", "m3"))
    for key, origin in base.items():
        own = [tau[key] for tau in taus]
        expected = sum(own) / 3
        if "_proj" in key or key == "lm_head.weight":
            count = min(origin.shape) // 3
            found = [torch.linalg.svd(tau, full_matrices=False) for tau in own]
            p, _, q = torch.linalg.svd(torch.cat([u[:, :count] for u, _, _ in found], 1), full_matrices=False)
            r, _, w = torch.linalg.svd(torch.cat([v[:count] for _, _, v in found]), full_matrices=False)
            expected = p @ q @ torch.diag(torch.cat([s[:count] for _, s, _ in found])) @ r @ w
        torch.testing.assert_close(out[key].double() - origin.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_trial_tsv_takes_matrices_apart_on_the_device(installed: Path, root: Path, tmp_path: Path) -> None:
    run, saw = beside(tmp_path, [[*command(root, tmp_path / "there", "trial_tsv"), *ON]])
    assert run.code == 0, run.err
    assert saw["done"]["aten::_linalg_svd"] > 20 and saw["places"] == ["pretend:0"] and saw["left"] == 0 < saw["most"]
    here = merged(root, tmp_path / "here", "trial_tsv")
    assert all(torch.equal(value, here[key]) for key, value in tiny.tensors(tmp_path / "there").items())


# Declarations


def block(site: Site, weights: tuple[float, ...] = (1.0,)) -> Block:
    shape = site.shape or ()
    return Block([Dense(torch.zeros(shape))] * len(weights), weights, lambda: torch.zeros(shape), None, site)


def drawn(rows: slice, *, seed: int = 0, pin: str = "a", key: str = "x") -> Tensor:
    count = len(range(*rows.indices(40)))
    here = block(Site(key, (count, 7), first=7 * (rows.start or 0), pin=lambda model: pin))
    return here.uniform(seed, here.models[0])


def test_numbers_are_drawn_by_their_place_alone() -> None:
    whole = drawn(slice(0, 40))
    assert whole.dtype == torch.float32 and bool(((whole >= 0.0) & (whole < 1.0)).all())
    assert abs(float(whole.mean()) - 0.5) < 4.0 / (12 * 280) ** 0.5
    for step in (1, 3, 16):
        pieces = [drawn(slice(at, min(at + step, 40))) for at in range(0, 40, step)]
        assert torch.equal(torch.cat(pieces), whole)
    for other in (drawn(slice(0, 40), seed=1), drawn(slice(0, 40), pin="b"), drawn(slice(0, 40), key="y")):
        assert float((other == whole).float().mean()) < 0.02


def test_numbers_stay_what_they_are() -> None:
    """They are part of the bytes of a merge."""
    expected = [0.6653337478637695, 0.24029147624969482, 0.3978579044342041]
    assert drawn(slice(0, 40)).reshape(-1)[:3].tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_elements_is_drawn(share: float) -> None:
    here = block(Site("x", (200, 300), pin=lambda model: "a"))
    values = here.bernoulli(share, 3, here.models[0])
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(values.mean()) - share) <= 4.0 * (share * (1.0 - share) / 60_000) ** 0.5


def test_a_block_outside_of_a_merge_says_so() -> None:
    here = block(Site("x", (2, 2)))
    with pytest.raises(LookupError, match="in a merge"):
        here.uniform(0, here.models[0])
    with pytest.raises(LookupError, match="in a merge"):
        here.models[0].tensor("file")


def test_factors_of_an_adapter_may_stay_factors() -> None:
    @method("longest", source="arXiv:2311.03099", laws=())
    def longest(block: Block) -> tuple[Tensor, Tensor]:
        """Of adapters the one of the greatest rank."""
        return max((m.factors for m in block.models if m.factors is not None), key=lambda found: found[0].shape[1])

    taus = [LowRank(torch.ones(4, k), torch.ones(k, 3)) for k in (1, 2)]
    change = longest().combine(taus, [1.0, 1.0], lambda: torch.zeros(4, 3), None)
    assert isinstance(change, LowRank) and change.rank == 2
    with pytest.raises(Exception, match="longest returned a change of shape"):
        longest().combine(taus, [1.0, 1.0], lambda: torch.zeros(4, 5), None)


def test_faults_of_a_declaration_are_told_where_it_stands() -> None:
    with pytest.raises(TypeError, match="keyword parameters"):
        method("one", source="arXiv:2311.03099")(lambda block, density: None)
    with pytest.raises(TypeError, match="no attribute arty"):
        method("one", source="arXiv:2311.03099", arty=(2, 2))
    with pytest.raises(TypeError, match="has a `measure`"):
        method("two", source="arXiv:2311.03099", needs="model")
    with pytest.raises(ValueError, match="no key of citations.bib"):
        method("three", source="a paper")


def test_a_class_is_declared_like_a_function() -> None:
    """What a declaration leaves out is the default, or what the class says, and not its base's."""

    @method("mean", source="arXiv:2311.03099", needs="elements", default_norm="mean", version=3)
    @dataclass(frozen=True)
    class Mean(AdditiveFold):
        arity: ClassVar[tuple[int, int | None]] = (2, None)

        def read_out(self, sums: Mapping[str, Tensor], weights: Sequence[float], *, matrix: bool) -> Tensor:
            return sums["S"] / len(weights)

    @method("half", source="arXiv:2311.03099", needs="elements")
    @dataclass(frozen=True)
    class Half(Mean):
        pass

    assert (Mean.name, Mean.version, Mean.default_norm, Mean.arity) == ("mean", 3, "mean", (2, None))
    assert (Half.name, Half.version, Half.default_norm, Half.arity) == ("half", 1, "none", (1, None))
    change = Mean().emit(Mean().step(None, Dense(torch.ones(2)), 1.0, matrix=False), [1.0, 1.0], matrix=False)
    assert change.to_dense().tolist() == [0.5, 0.5]


def test_options_have_bounds_and_a_line_of_help() -> None:
    @method("bounded", source="arXiv:2311.03099")
    def bounded(block: Block, *, share_kept: float = option(0.5, 0.0, 1.0), seed: int = 0) -> Tensor:
        """Nothing."""
        return torch.zeros(block.shape)

    share, seed = dataclasses.fields(bounded)
    assert share.metadata == {"help": "share kept", "minimum": 0.0, "maximum": 1.0}
    assert (seed.metadata["help"], seed.default) == ("seed", 0) and bounded(seed=3).seed == 3  # type: ignore[call-arg]


def test_citations_come_from_one_file_or_from_the_declaration() -> None:
    assert cited("tang2025opcm").url == "https://arxiv.org/abs/2501.09522"
    made = cited("A Title, with a comma, arXiv:2311.03099")
    assert (made.title, made.url) == ("A Title, with a comma", "https://arxiv.org/abs/2311.03099")
    assert "title  = {A Title, with a comma}" in made.bibtex


FAULTY = {
    "no_source": 'from hfmerge.methods import method\n@method("no_source", source="own work")\n'
    "def no_source(block): ...\n",
    "no_module": "import a_module_that_is_not_there\n",
    "no_method": "def no_method(block):\n    return block\n",
    "of_another_name": 'from hfmerge.methods import method\n@method("else", source=None)\n'
    "def of_another_name(block): ...\n",
}


@pytest.fixture
def beside_faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plug-ins that cannot be used, and one without a publication that can."""
    facts = tmp_path / "site" / "broken-1.0.dist-info"
    facts.mkdir(parents=True)
    own = 'from hfmerge.methods import method\n@method("own", source=None)\ndef own(block):\n    """The sum."""\n'
    for name, code in {**FAULTY, "own": own + "    return sum(m.weight * m.tau for m in block.models)\n"}.items():
        (facts.parent / f"{name}.py").write_text(code)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    lines = [f"{name} = {name}:{name}" for name in (*FAULTY, "own")]
    (facts / "entry_points.txt").write_text("\n".join(["[hfmerge.methods]", *lines]))
    methods._installed.cache_clear()
    monkeypatch.syspath_prepend(facts.parent)
    yield
    methods._installed.cache_clear()
    for name in (*FAULTY, "own"):
        sys.modules.pop(name, None)


def test_a_faulty_plug_in_stops_only_who_asks_for_it(beside_faulty: None, root: Path, tmp_path: Path) -> None:
    listed = tiny.done("methods")
    assert "own: The sum." in listed.out and not any(f"\n{name}:" in listed.out for name in FAULTY)
    told = [line for line in listed.err.splitlines() if "the package broken brings it" in line]
    assert [line.split(": ")[1] for line in told] == list(FAULTY)
    tiny.done(*command(root, tmp_path / "out", "linear"))
    tiny.done(*command(root, tmp_path / "own", "own"))
    assert "bibtex" not in (tmp_path / "own" / "README.md").read_text()
    for name in FAULTY:
        failed = tiny.cli(*command(root, tmp_path / name, name))
        assert failed.code == 1 and "the package broken brings it, and it cannot be used" in failed.err
        assert "Traceback" not in failed.err and len(failed.err.splitlines()) == 1
