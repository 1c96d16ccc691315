"""Everything that can be wrong: exit code 1, one line that names culprit and remedy, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fixtures import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes and two adapters; tests change copies only."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base")
    for i in range(3):
        tiny.save(tiny.fine_tune(base, i + 1), root / f"m{i}")
    for i in range(2):
        tiny.adapter(root / f"a{i}", tiny.attention(), i + 1)
    return root


@pytest.fixture
def bad(root: Path, tmp_path: Path) -> Path:
    """A copy of a fine-tune to spoil, in a folder of its own."""
    return Path(shutil.copytree(root / "m1", tmp_path / "in" / "bad"))


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def arguments(root: Path, *models: object, out: object, base: object = "base", method: str = "linear") -> list[object]:
    where = root / base if isinstance(base, str) else base
    return ["merge", *models, "--base", where, "--method", method, "--output", out]


def refused(tmp_path: Path, *command: object, lines: int = 1) -> str:
    """The error of a command that fails: `lines` lines, nothing on standard output, and no file made or changed."""
    before = tiny.everything(tmp_path), listing(tmp_path)
    run = tiny.cli(*command)
    assert run.code == 1, run
    assert run.out == "" and run.err.startswith("hfmerge: ") and run.err.endswith("\n")
    assert len(run.err.splitlines()) == lines, run.err
    assert (tiny.everything(tmp_path), listing(tmp_path)) == before
    return run.err


def merge_refused(root: Path, tmp_path: Path, *models: object, **settings: Any) -> str:
    flags = settings.pop("flags", ())
    lines = settings.pop("lines", 1)
    command = arguments(root, *models, out=settings.pop("out", tmp_path / "out"), **settings)
    return refused(tmp_path, *command, *flags, lines=lines)


class Fault(NamedTuple):
    """How to spoil a fine-tune, and what the error must say."""

    spoil: Callable[[Path], object]
    says: Sequence[str]


WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def cut(length: int) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:length] if length else data + b"\0" * 8)

    return spoil


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], object]:
    """Rewrite the header of the weight file, the data untouched."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        held = json.loads(data[8 : 8 + length])
        change(held)
        text = json.dumps(held).encode()
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def put(name: str, value: float) -> Callable[[Path], object]:
    def change(held: dict[str, Tensor]) -> None:
        held[name].view(-1)[3] = value

    return lambda folder: tiny.edit(folder, change)


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: tiny.edit(folder, lambda held: held.pop(name))


def shards(folder: Path) -> list[Path]:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    tiny.save(model, folder, max_shard_size="8KB")
    return sorted(folder.glob("*-of-*.safetensors"))


def without_a_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def with_a_truncated_shard(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-4])


def with_a_shard_that_lacks_a_tensor(folder: Path) -> None:
    path = shards(folder)[0]
    held = load_file(path)
    held.pop(next(iter(held)))
    save_file(held, path, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def rename_weights(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def eight_bits(folder: Path) -> None:
    def change(held: dict[str, Tensor]) -> None:
        held[NORM] = held[NORM].to(torch.float8_e4m3fn)

    tiny.edit(folder, change)


def model(title: str, kind: str, **changes: Any) -> Callable[[Path], object]:
    """Put another model into the folder."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny.save(tiny.build(title, tiny.config(kind, **changes)), folder)

    return spoil


FAULTS = {
    "empty": Fault(
        cut(4), [f"/{'bad'}: {WEIGHTS} is not a safetensors file, or is truncated (4 bytes)", "get it again"]
    ),
    "truncated in the header": Fault(cut(300), [f"{WEIGHTS}", "is truncated", "get it again"]),
    "truncated in the data": Fault(cut(-1), [f"{WEIGHTS} is truncated or overlong"]),
    "overlong": Fault(cut(0), [f"{WEIGHTS} is truncated or overlong"]),
    "a pointer": Fault(
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        [f"{WEIGHTS} is a Git-LFS pointer", "git lfs pull"],
    ),
    "another dtype in the header": Fault(header(lambda h: h[NORM].update(dtype="F64")), [WEIGHTS, NORM]),
    "another shape in the header": Fault(header(lambda h: h[NORM].update(shape=[17])), [WEIGHTS, NORM]),
    "an unknown dtype": Fault(header(lambda h: h[NORM].update(dtype="Q7")), [f"{NORM} is Q7"]),
    "overlapping tensors": Fault(header(lambda h: h[NORM].update(data_offsets=[0, 64])), [f"{WEIGHTS}: broken"]),
    "a gap between tensors": Fault(header(lambda h: h.pop(NORM)), [f"{WEIGHTS}: broken", "does not follow"]),
    "a header that is a list": Fault(
        lambda f: (f / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"[1,2,3] "), [f"{WEIGHTS}: broken"]
    ),
    "NaN": Fault(put(NORM, float("nan")), [WEIGHTS, NORM, "1 NaN or Inf of 16", "--allow-nonfinite", "`exclude`"]),
    "Inf": Fault(put(NORM, float("-inf")), [WEIGHTS, NORM, "1 NaN or Inf of 16", "--allow-nonfinite"]),
    "NaN in a matrix": Fault(
        put("model.layers.0.self_attn.q_proj.weight", float("nan")),
        ["self_attn.q_proj.weight holds 1 NaN or Inf of 256"],
    ),
    "another architecture": Fault(model("BertModel", "bert"), ["is a bert model", "a llama one"]),
    "a relative": Fault(model("Qwen3ForCausalLM", "qwen3"), ["is a qwen3 model", "a llama one"]),
    "another hidden size": Fault(
        model("LlamaForCausalLM", "llama", hidden_size=32),
        ["q_proj.weight is (16, 32)", "not a fine-tune of this base"],
    ),
    "another width": Fault(
        model("LlamaForCausalLM", "llama", intermediate_size=32), ["mlp.", "(32, 16)", "not a fine-tune of this base"]
    ),
    "fewer layers": Fault(model("LlamaForCausalLM", "llama", num_hidden_layers=1), ["another number of layers"]),
    "more layers": Fault(model("LlamaForCausalLM", "llama", num_hidden_layers=3), ["another number of layers"]),
    "a missing shard": Fault(
        without_a_shard, ["model.safetensors.index.json names model-00002-of-", "upload it again"]
    ),
    "a truncated shard": Fault(with_a_truncated_shard, ["model-00002-of-", "is truncated or overlong"]),
    "a shard that lacks a tensor": Fault(with_a_shard_that_lacks_a_tensor, ["model-00001-of-", "lacks", "promises"]),
    "an index that is no JSON": Fault(
        lambda f: (shards(f), (f / "model.safetensors.index.json").write_text("{")),
        ["index.json cannot be used: is not JSON"],
    ),
    "an index without a map": Fault(
        lambda f: (shards(f), (f / "model.safetensors.index.json").write_text('{"weight_map": []}')),
        ["index.json cannot be used: weight_map: must be a mapping"],
    ),
    "a missing tensor": Fault(drop(NORM), [f"lacks {NORM}", "LlamaForCausalLM"]),
    "no weights": Fault(lambda f: (f / WEIGHTS).unlink(), ["no weights", "model.safetensors or its index is needed"]),
    "only GGUF": Fault(rename_weights("model.Q4_K_M.gguf"), ["only model.Q4_K_M.gguf"]),
    "weights of another name": Fault(rename_weights("consolidated.safetensors"), ["only consolidated.safetensors"]),
    "pickled": Fault(pickled, ["only pickled weights (pytorch_model.bin)", "--allow-pickle"]),
    "quantised": Fault(
        lambda f: tiny.edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), ["quantised with gptq"]
    ),
    "F8": Fault(eight_bits, [NORM, "F8_E4M3", "quantised"]),
    "no configuration": Fault(lambda f: (f / "config.json").unlink(), ["neither config.json nor adapter_config.json"]),
    "a broken configuration": Fault(
        lambda f: (f / "config.json").write_text("{"), ["config.json cannot be used: is not JSON"]
    ),
    "a configuration that is a list": Fault(
        lambda f: (f / "config.json").write_text("[]"), ["config.json cannot be used: must be a mapping"]
    ),
    "a configuration of another model": Fault(
        lambda f: tiny.edit_config(f, intermediate_size=40), ["mlp.", "does it belong to these weights?"]
    ),
    "an unknown class": Fault(
        lambda f: tiny.edit_config(f, architectures=["NoSuchModel"], model_type="nosuch"), ["nosuch"]
    ),
    "two models in one": Fault(
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), ["an adapter and a full model"]
    ),
    "an empty folder": Fault(lambda f: (shutil.rmtree(f), f.mkdir()), ["neither config.json nor adapter_config.json"]),
    "no folder": Fault(shutil.rmtree, ["no such folder"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_spoilt_source(name: str, root: Path, tmp_path: Path, bad: Path) -> None:
    """Nearly all is seen in headers, before the work; NaN while it is under way."""
    FAULTS[name].spoil(bad)
    message = merge_refused(root, tmp_path, root / "m0", bad)
    for part in [str(bad), *FAULTS[name].says]:
        assert part in message, message


@pytest.mark.parametrize("name", ["truncated in the data", "NaN", "a missing tensor", "quantised", "no folder"])
def test_a_spoilt_base(name: str, root: Path, tmp_path: Path, bad: Path) -> None:
    FAULTS[name].spoil(bad)
    message = merge_refused(root, tmp_path, root / "m0", base=bad)
    for part in [str(bad), *FAULTS[name].says[:1]]:
        assert part in message, message


@pytest.mark.slow
def test_any_flipped_bit_of_a_header_is_refused_or_harmless(root: Path, tmp_path: Path, bad: Path) -> None:
    """Harmless: in the free text beside `format`. Otherwise one line, from the plan alone."""
    path = bad / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    harmless = range(data.index(b'"__metadata__"'), data.index(b"}", data.index(b'"__metadata__"')))
    accepted = []
    for at in [*range(8), *range(8, 8 + length, 37)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        run = tiny.cli("plan", root / "m0", bad, "--base", root / "base", "--method", "linear")
        if run.code == 0:
            accepted.append(at)
        else:
            assert run.code == 1 and len(run.err.splitlines()) == 1 and str(bad) in run.err, run.err
    assert all(at in harmless or data[at : at + 1] == b" " for at in accepted), [
        data[at - 9 : at + 9] for at in accepted
    ]


def test_all_faults_of_all_sources_are_told_at_once(root: Path, tmp_path: Path, bad: Path) -> None:
    other = Path(shutil.copytree(root / "m2", tmp_path / "in" / "other"))
    drop(NORM)(bad)
    (other / WEIGHTS).write_bytes(b"short")
    message = merge_refused(root, tmp_path, root / "m0", bad, other, tmp_path / "none", lines=4)
    head, *rest = message.splitlines()
    assert head == "hfmerge: recipe: 3 problems, nothing downloaded"
    for i, (line, place) in enumerate(zip(sorted(rest), (bad, other, tmp_path / "none"), strict=True), 1):
        assert line.startswith(f"  models[{i}]") and str(place) in line


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "opcm", "ties", "task_arithmetic"])
def test_allow_nonfinite_goes_on(root: Path, tmp_path: Path, bad: Path, value: float, method: str) -> None:
    put(NORM, value)(bad)
    out = tmp_path / "out"
    flags = ("--allow-nonfinite", "--state", "all", "--norm", "mean")
    tiny.done(*arguments(root, root / "m0", bad, out=out, method=method), *flags)
    merged = tiny.tensors(out)
    # in TIES no threshold lets a NaN pass
    wrong = [] if method == "ties" and value != value else [3]
    assert (~merged[NORM].isfinite()).nonzero().flatten().tolist() == wrong
    assert all(bool(tensor.isfinite().all()) for name, tensor in merged.items() if name != NORM)
    base = tiny.tensors(root / "base")
    assert not any(torch.equal(merged[name], base[name]) for name in merged)
    assert tiny.done("verify", out, "--replay").code == 0
    tiny.done("unmerge", out, "--remove", "bad")
    tiny.done(*arguments(root, root / "m0", out=tmp_path / "never", method=method), *flags)
    assert tiny.files(out) == tiny.files(tmp_path / "never")


def test_a_matrix_with_nan_cannot_be_taken_apart(root: Path, tmp_path: Path, bad: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    put(name, float("nan"))(bad)
    message = merge_refused(root, tmp_path, root / "m0", bad, method="opcm", flags=["--allow-nonfinite"])
    assert f"{bad}: {name} holds NaN or Inf" in message and "`exclude`" in message
    flags = ("--allow-nonfinite", "--exclude", name)
    tiny.done(*arguments(root, root / "m0", bad, out=tmp_path / "out", method="opcm"), *flags)
    assert torch.equal(tiny.tensors(tmp_path / "out")[name], tiny.tensors(root / "base")[name])


@pytest.mark.slow
def test_a_result_that_does_not_fit_its_dtype(root: Path, tmp_path: Path, bad: Path) -> None:
    put(NORM, 1e6)(bad)
    message = merge_refused(root, tmp_path, root / "m0", bad)
    assert NORM in message and "exact up to" in message and "`grid`" in message
    message = merge_refused(root, tmp_path, root / "m0", bad, flags=["--dtype", "float16", "--option", "grid=20"])
    assert NORM in message and "do not fit float16" in message and "wider dtype" in message


def test_squares_beyond_float32(tmp_path: Path) -> None:
    """Finite weights whose norm float32 cannot hold are merged like any others, if not as exact sums."""
    base = tiny.build("LlamaForCausalLM", tiny.config("llama", vocab_size=80))
    tiny.save(base, tmp_path / "in" / "base")
    huge = tiny.save(tiny.fine_tune(base, 1), tmp_path / "in" / "huge")
    put("lm_head.weight", 1e30)(huge)
    out, base_folder = tmp_path / "opcm", tmp_path / "in" / "base"
    tiny.done(*arguments(tmp_path, huge, base=base_folder, out=out, method="opcm"), "--norm", "mean")
    merged, tuned = tiny.tensors(out), tiny.tensors(huge)
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in tuned)
    message = refused(tmp_path, *arguments(tmp_path, huge, base=base_folder, out=tmp_path / "linear"))
    assert "lm_head.weight" in message and "exact up to" in message


def test_pickled_weights_are_read_when_allowed(root: Path, tmp_path: Path, bad: Path) -> None:
    pickled(bad)
    tiny.done(*arguments(root, root / "m0", bad, out=tmp_path / "out"), "--allow-pickle")
    tiny.done(*arguments(root, root / "m0", root / "m1", out=tmp_path / "plain"))
    ours, theirs = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    message = refused(tmp_path, "unmerge", tmp_path / "out", "--remove", "m0")
    assert "only pickled weights" in message and "--allow-pickle" in message
    tiny.done("unmerge", tmp_path / "out", "--remove", "m0", "--allow-pickle")


class Evil:
    """Runs a command when it is unpickled by somebody careless."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("content", ["code", "text", "list"])
def test_a_pickle_of_anything_but_tensors_is_refused(content: str, root: Path, tmp_path: Path, bad: Path) -> None:
    (bad / WEIGHTS).unlink()
    path = bad / "pytorch_model.bin"
    if content == "text":
        path.write_text("no pickle")
    else:
        torch.save({"x": Evil()} if content == "code" else [1, 2], path)
    message = merge_refused(root, tmp_path, root / "m0", bad, flags=["--allow-pickle"])
    assert str(bad) in message and "pytorch_model.bin" in message


def spoil_adapter(folder: Path, change: Callable[[dict[str, Tensor]], object], **settings: Any) -> None:
    def edit(held: dict[str, Tensor]) -> None:
        change(held)

    tiny.edit(folder, edit, "adapter_model.safetensors")
    tiny.edit_config(folder, "adapter_config.json", **settings)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTER_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, Any], list[str]]] = {
    "of a wider base": (
        lambda h: h.update({f"{QUERY}.lora_A.weight": torch.zeros(2, 32)}),
        {},
        ["the adapter changes (16, 32), the base has (16, 16)", "another base"],
    ),
    "of a deeper base": (
        lambda h: h.update(
            {key.replace("layers.0", "layers.7"): h[key].clone() for key in list(h) if "layers.0" in key}
        ),
        {},
        ["model.layers.7.self_attn", "which the base LlamaForCausalLM does not have"],
    ),
    "without B": (lambda h: h.pop(f"{QUERY}.lora_B.weight"), {}, ["no lora_B beside it", "incomplete"]),
    "without A": (lambda h: h.pop(f"{QUERY}.lora_A.weight"), {}, ["no lora_A beside it", "incomplete"]),
    "of two ranks": (lambda h: h.update({f"{QUERY}.lora_B.weight": torch.zeros(16, 3)}), {}, ["rank 2, B has rank 3"]),
    "of another rank than configured": (lambda h: h, {"r": 4}, ["says r = 4, the file holds 2"]),
    "DoRA": (lambda h: h, {"use_dora": True}, ["lora_magnitude_vector is missing", "incomplete"]),
    "fast PiSSA": (lambda h: h, {"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "at random", "convert it"]),
    "IA3": (lambda h: h, {"peft_type": "IA3"}, ["is no part of a IA3 adapter", "peft_type"]),
    "prompts": (lambda h: h, {"peft_type": "PROMPT_TUNING"}, ["a PROMPT_TUNING adapter", "no weight", "leave it out"]),
    "NaN": (
        lambda h: h[f"{QUERY}.lora_A.weight"].fill_(float("nan")),
        {},
        ["NaN or Inf", "adapter_model.safetensors"],
    ),
    "of nothing": (lambda h: h.clear(), {}, ["changes no parameter of the base"]),
}


@pytest.mark.parametrize("name", ADAPTER_FAULTS)
def test_a_spoilt_adapter(name: str, root: Path, tmp_path: Path) -> None:
    change, settings, says = ADAPTER_FAULTS[name]
    bad = Path(shutil.copytree(root / "a0", tmp_path / "in" / "bad"))
    spoil_adapter(bad, change, **settings)
    message = merge_refused(root, tmp_path, root / "m0", bad)
    for part in [str(bad), *says]:
        assert part in message, message


def test_adapters_in_places_of_full_models(root: Path, tmp_path: Path) -> None:
    message = merge_refused(root, tmp_path, root / "m0", base="a0")
    assert "a0 is an adapter; name the full model it was trained on" in message
    message = merge_refused(root, tmp_path, f"{root / 'm0'}+{root / 'm1'}")
    assert "only an adapter can follow the `+`" in message
    message = merge_refused(root, tmp_path, f"{root / 'a0'}+{root / 'a1'}")
    assert "is itself an adapter" in message


METHODS: dict[str, tuple[list[str], list[str]]] = {
    "an unknown method": (["--method", "ocpm"], ["method", '"ocpm" is not a method', 'did you mean "opcm"?']),
    "an unknown option": (
        ["--method", "opcm", "--option", "alhpa=1"],
        ["method.alhpa", "unknown option of opcm", 'did you mean "alpha"?'],
    ),
    "an option out of range": (["--method", "opcm", "--option", "alpha=2"], ["method.alpha", "must be at most 1.0"]),
    "an option of another type": (["--method", "ties", "--option", "density=much"], ["method.density", "a number"]),
    "an option that is none": (["--method", "opcm", "--option", "alpha"], ['"alpha" is not of the form name=value']),
    "a wrong choice": (["--method", "opcm", "--option", "variant=cod"], ["method.variant", 'did you mean "code"?']),
    "a wrong norm": (["--method", "opcm", "--norm", "maen"], ["method.norm", 'did you mean "mean"?']),
    "a wrong dtype": (["--method", "opcm", "--dtype", "bf16"], ["dtype", 'did you mean "bfloat16"?']),
    "a wrong state": (["--method", "opcm", "--state", "0"], ["state", "a positive whole number"]),
    "too few weights": (["--method", "opcm", "--weight", "1"], ["1 given for 2 models"]),
    "weights that vanish": (["--method", "linear", "--weight", "1", "--weight=-1"], ["weights sum to zero"]),
    "a weight that is none": (["--method", "linear", "--weight", "1", "--weight", ".nan"], ["weight", "finite"]),
    "no method": ([], ["method", "is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_recipe_on_the_command_line(name: str, root: Path, tmp_path: Path) -> None:
    flags, says = METHODS[name]
    command = ["merge", root / "m0", root / "m1", "--base", root / "base", "--output", tmp_path / "out", *flags]
    message = refused(tmp_path, *command)
    for part in ["command line", *says]:
        assert part in message, message


def test_a_wrong_recipe_file(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {root / 'base'}\nmodles: [{root / 'm0'}]\nmethod: {{name: opcm, alhpa: 1}}\noutput: out\n"
    )
    message = refused(tmp_path, "merge", recipe, lines=4)
    assert message.splitlines()[0] == f"hfmerge: {recipe}: 3 problems, nothing downloaded"
    assert 'did you mean "models"?' in message and 'did you mean "alpha"?' in message
    recipe.write_text("base: [\n")
    assert "not valid YAML" in refused(tmp_path, "merge", recipe) and not (tmp_path / "out").exists()
    assert "cannot be read" in refused(tmp_path, "merge", tmp_path / "none.yaml")


def test_no_place_for_the_result(root: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "merge", root / "m0", "--base", root / "base", "--method", "linear")
    assert "neither `output` nor `push_to`" in message


def test_the_same_model_twice(root: Path, tmp_path: Path) -> None:
    message = merge_refused(root, tmp_path, root / "m0", root / "m1", root / "m0")
    assert "models[2]" in message and "is models[0] again" in message
    message = merge_refused(root, tmp_path, root / "m0", f"{root}/m1/../m0")
    assert "models[1]" in message and "is models[0] again" in message


def test_patterns_that_match_nothing_or_everything(root: Path, tmp_path: Path) -> None:
    flags = ("--exclude", "*.qproj.*", "--include", "model.*", "--include", "*.nothing")
    run = tiny.done(*arguments(root, root / "m0", out=tmp_path / "out"), *flags)
    assert "warning: pattern '*.qproj.*' matches no parameter." in run.err
    assert "warning: pattern '*.nothing' matches no parameter." in run.err and "'model.*'" not in run.err
    merged, base, tuned = (tiny.tensors(folder) for folder in (tmp_path / "out", root / "base", root / "m0"))
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert torch.allclose(merged[NORM], tuned[NORM], atol=1e-6)
    message = merge_refused(root, tmp_path, root / "m0", out=tmp_path / "none", flags=("--exclude", "*"))
    assert "no model changes any parameter that is merged" in message


def test_a_model_that_is_the_base_changes_nothing(root: Path, tmp_path: Path) -> None:
    """All changes are zero, so there is nothing to bring to any norm."""
    copy = Path(shutil.copytree(root / "base", tmp_path / "in" / "copy"))
    tiny.done(*arguments(root, copy, out=tmp_path / "out", method="opcm"))
    merged, base = tiny.tensors(tmp_path / "out"), tiny.tensors(root / "base")
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_folder_that_is_not_empty(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    message = merge_refused(root, tmp_path, root / "m0")
    assert f"{tmp_path / 'out'}: the folder is not empty" in message and "another --output" in message
    (tmp_path / "out" / "thesis.tex").unlink()
    tiny.done(*arguments(root, root / "m0", out=tmp_path / "out"))


def test_an_output_that_is_a_file_or_below_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "is a file; choose a folder" in merge_refused(root, tmp_path, root / "m0")
    message = merge_refused(root, tmp_path, root / "m0", out=tmp_path / "out" / "below")
    assert "cannot write there" in message


def test_an_output_by_a_link_or_the_current_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tiny.done(*arguments(root, root / "m0", out=tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / WEIGHTS).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny.done(*arguments(root, root / "m0", out="."))
    monkeypatch.chdir(tmp_path)
    assert tiny.files(tmp_path / "here") == tiny.files(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def test_folders_made_for_an_output_that_does_not_come_are_removed(root: Path, tmp_path: Path, bad: Path) -> None:
    put(NORM, float("nan"))(bad)
    (tmp_path / "deep").mkdir()
    merge_refused(root, tmp_path, bad, out=tmp_path / "deep" / "er" / "and" / "deeper")
    tiny.done(*arguments(root, root / "m0", out=tmp_path / "deep" / "er" / "and" / "deeper"))


def test_names_with_signs_that_mean_something_elsewhere(root: Path, tmp_path: Path) -> None:
    odd = tmp_path / "in" / "v1@step+10 ü"
    shutil.copytree(root / "m1", odd)
    out = tmp_path / "out"
    tiny.done(*arguments(root, root / "m0", odd, out=out))
    with tiny.elsewhere():
        sources = [
            part for folder in (root / "base", root / "m0", odd) for part in ("--source", f"{folder.name}={folder}")
        ]
        assert "--source base=FOLDER" in refused(tmp_path, "unmerge", out, "--remove", "m0")
        assert "--source v1@step+10 ü=FOLDER" in refused(tmp_path, "unmerge", out, "--remove", "m0", *sources[:4])
        tiny.done("unmerge", out, "--remove", "m0", *sources, "--output", tmp_path / "kept")
        tiny.done("unmerge", out, "--remove", odd.name, *sources)
        tiny.done(*arguments(root, root / "m0", out=tmp_path / "never"))
        assert tiny.files(out) == tiny.files(tmp_path / "never") != tiny.files(tmp_path / "kept")


def test_too_little_room(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    message = merge_refused(root, tmp_path, root / "m0")
    assert "GB are needed" in message and "make room or choose another disk" in message


@pytest.mark.slow
def test_a_disk_that_fills_up_under_way(root: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same system call fails in the same place."""
    before = listing(tmp_path)
    child = tiny.fork(tmp_path, arguments(root, root / "m0", out=tmp_path / "out"), limit=6000)
    run = child.end()
    assert run.code == 1 and len(run.err.splitlines()) == 1, run.err
    assert "model.safetensors: cannot be written: File too large" in run.err
    assert [name for name in listing(tmp_path) if not name.startswith("child-")] == before


@pytest.mark.slow
def test_a_disk_that_fills_up_at_a_small_file(root: Path, tmp_path: Path) -> None:
    """Here the weights still fit, and the head of a source, written after them, does not."""
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, tmp_path / "in" / "base")
    labels = [f"label {i}" for i in range(1000)]
    tiny.save(tiny.with_head("BertForSequenceClassification", base, 1, labels), tmp_path / "in" / "tuned")
    before = listing(tmp_path)
    command = arguments(root, tmp_path / "in" / "tuned", base=tmp_path / "in" / "base", out=tmp_path / "out")
    run = tiny.fork(tmp_path, command, limit=50_000).end()
    assert run.code == 1 and len(run.err.splitlines()) == 1, run.err
    assert "cannot be written" in run.err
    assert [name for name in listing(tmp_path) if not name.startswith("child-")] == before


@pytest.mark.slow
def test_interrupted_by_hand(root: Path, tmp_path: Path) -> None:
    child = tiny.fork(tmp_path, arguments(root, root / "m0", root / "m1", out=tmp_path / "out"), hold="write")
    child.wait_until_held()
    assert (tmp_path / ".out.hfmerge-partial").is_dir()
    child.signal(signal.SIGINT)
    run = child.end()
    assert run.code == 130 and run.err == "hfmerge: interrupted; nothing was written.\n"
    assert all(name.startswith("child-") for name in listing(tmp_path))


@pytest.mark.slow
def test_killed_and_run_again(root: Path, tmp_path: Path) -> None:
    command = arguments(root, root / "m0", root / "m1", out=tmp_path / "out", method="opcm")
    child = tiny.fork(tmp_path, command, hold="write")
    child.wait_until_held()
    child.signal(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert (tmp_path / ".out.hfmerge-partial").is_dir() and not (tmp_path / "out").exists()
    (tmp_path / ".out.hfmerge-partial" / "model-00009-of-00009.safetensors").write_text("left by the killed run")
    tiny.done(*command)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("child-")) == ["out"]
    tiny.done(*arguments(root, root / "m0", root / "m1", out=tmp_path / "plain", method="opcm"))
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "plain")
    assert tiny.done("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_two_merges_into_one_folder(root: Path, tmp_path: Path) -> None:
    first = tiny.fork(tmp_path, arguments(root, root / "m0", root / "m1", out=tmp_path / "out"), hold="write")
    first.wait_until_held()
    second = tiny.cli(*arguments(root, root / "m2", out=tmp_path / "out"))
    assert second.code == 1 and len(second.err.splitlines()) == 1
    assert f"{tmp_path / 'out'}: another merge is writing this folder; wait for it" in second.err
    assert first.end().code == 0
    names = [
        model["name"]
        for model in tiny.done("history", tmp_path / "out", "--json").json["entries"][0]["materials"]["models"]
    ]
    assert names == ["m0", "m1"] and tiny.done("verify", tmp_path / "out").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("child-")) == ["out"]


@pytest.fixture
def merged(root: Path, tmp_path: Path) -> Path:
    out = tmp_path / "merged"
    tiny.done(*arguments(root, root / "m0", root / "m1", out=out, method="opcm"), "--state", "all")
    return out


@pytest.mark.slow
def test_models_that_are_not_in_the_merge(root: Path, tmp_path: Path, merged: Path) -> None:
    message = refused(tmp_path, "unmerge", merged, "--remove", "m0x")
    assert "m0x: not in this merge, which holds m0, m1. Did you mean m0?" in message
    message = refused(tmp_path, "unmerge", merged, "--remove", "m0", "--remove", "m1")
    assert "holds no other model" in message and "base@" in message
    tiny.done("unmerge", merged, "--remove", "m0")
    assert "holds no other model" in refused(tmp_path, "unmerge", merged, "--remove", "m1")


@pytest.mark.slow
def test_adding_what_cannot_be_added(root: Path, tmp_path: Path, merged: Path, bad: Path) -> None:
    assert "is models[0] again" in refused(tmp_path, "add", merged, root / "m0")
    assert "no such folder" in refused(tmp_path, "add", merged, tmp_path / "none")
    assert "1 given for 2 models" in refused(tmp_path, "add", merged, root / "m2", root / "a0", "--weight", "2")
    assert "finite number" in refused(tmp_path, "add", merged, root / "m2", "--weight", ".nan")
    put(NORM, float("nan"))(bad)
    assert "--allow-nonfinite" in refused(tmp_path, "add", merged, bad)
    message = refused(tmp_path, "add", merged, root / "m2", "--output", root / "base")
    assert "the folder is not empty" in message


def test_folders_that_are_no_merges(root: Path, tmp_path: Path) -> None:
    for verb in (["unmerge", "--remove", "m0"], ["add", root / "m1"], ["history"]):
        message = refused(tmp_path, verb[0], root / "base", *verb[1:])
        assert f"{root / 'base'}: no merge_history/ there; not a merge made by hfmerge." in message
        assert "no such folder" in refused(tmp_path, verb[0], tmp_path / "none", *verb[1:])


@pytest.mark.slow
def test_a_method_of_two_models_stays_one(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    tiny.done(*arguments(root, root / "m0", root / "m1", out=out, method="slerp"))
    assert "slerp takes exactly 2 models, 3 given" in refused(tmp_path, "add", out, root / "m2")
    assert "slerp takes exactly 2 models, 1 given" in refused(tmp_path, "unmerge", out, "--remove", "m0")


@pytest.mark.slow
def test_weights_that_vanish_when_a_model_leaves(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "three"
    flags = ["--weight", "1", "--weight=-1", "--weight", "2"]
    tiny.done(*arguments(root, root / "m0", root / "m1", root / "m2", out=out), *flags)
    assert "weights sum to zero" in refused(tmp_path, "unmerge", out, "--remove", "m2")


@pytest.mark.slow
def test_a_broken_note_of_local_folders(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with tiny.elsewhere() as notes:
        tiny.done(*arguments(root, root / "m0", root / "m1", out=out, method="opcm"))
        (note,) = notes.iterdir()
        note.write_text("{")
        message = refused(tmp_path, "unmerge", out, "--remove", "m0")
    assert f"{note}: cannot be read" in message and "--source NAME=FOLDER" in message


@pytest.mark.slow
def test_a_change_into_its_own_folder_replaces_it(root: Path, tmp_path: Path, merged: Path) -> None:
    tiny.done("unmerge", merged, "--remove", "m1", "--output", f"{tmp_path}/../{tmp_path.name}/merged")
    tiny.done(*arguments(root, root / "m0", out=tmp_path / "never", method="opcm"), "--state", "all")
    assert tiny.files(merged) == tiny.files(tmp_path / "never")


@pytest.mark.slow
def test_files_of_people_outlive_a_change_of_the_folder(root: Path, tmp_path: Path, merged: Path) -> None:
    (merged / ".git").mkdir()
    held = {
        "notes.md": "mine",
        ".git/config": "[core]",
        "figures": None,
        "figures/loss.png": "1,2",
    }
    for name, text in held.items():
        (merged / name).mkdir() if text is None else (merged / name).write_text(text)
    tiny.done("add", merged, root / "m2")
    tiny.done("unmerge", merged, "--remove", "m0")
    assert all((merged / name).read_text() == text for name, text in held.items() if text is not None)
    assert tiny.done("verify", merged).code == 0
    tiny.done("unmerge", merged, "--remove", "m1", "--output", tmp_path / "elsewhere")
    assert not any((tmp_path / "elsewhere" / name).exists() for name in held)


@pytest.mark.slow
def test_a_change_that_is_killed_leaves_the_merge_as_it_was(root: Path, tmp_path: Path, merged: Path) -> None:
    before = tiny.everything(merged)
    child = tiny.fork(tmp_path, ["unmerge", merged, "--remove", "m0"], hold="write")
    child.wait_until_held()
    child.signal(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert tiny.everything(merged) == before and tiny.only_leftovers(tiny.cli("verify", merged))
    tiny.done("unmerge", merged, "--remove", "m0")
    assert tiny.done("verify", merged).code == 0
    tiny.done(*arguments(root, root / "m1", out=tmp_path / "never", method="opcm"), "--state", "all")
    assert tiny.files(merged) == tiny.files(tmp_path / "never")
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("child-"))
    assert names == ["merged", "never"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["verify", "history", "unmerge", "add"])
def test_killed_at_the_very_moment_of_replacing(verb: str, root: Path, tmp_path: Path, merged: Path) -> None:
    """The old folder has its hidden name already, the new one still: the next command puts the old one back."""
    before = tiny.everything(merged)
    child = tiny.fork(tmp_path, ["unmerge", merged, "--remove", "m0"], hold="rename")
    child.wait_until_held()
    child.signal(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert not merged.exists()
    more = {"unmerge": ["--remove", "m0"], "add": [root / "m2"]}.get(verb, [])
    run = tiny.cli(verb, merged, *more)
    assert run.code == 0 or (verb == "verify" and tiny.only_leftovers(run))
    if not more:
        assert tiny.everything(merged) == before
    assert len(list((merged / "merge_history").iterdir())) == (2 if more else 1)
    run = tiny.cli("verify", merged)
    assert run.code == 0 if more else tiny.only_leftovers(run)


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    """`python -m hfmerge` in a process of its own: exit code and streams as in all tests above."""
    children = [
        tiny.start("merge", "org/model", "--method", "opcm", "--output", tmp_path / "out"),
        tiny.start("merge", "--no-such-flag"),
    ]
    wrong, usage = (tiny.finish(child) for child in children)
    assert wrong.code == 1 and wrong.out == ""
    first, *problems = wrong.err.splitlines()
    assert first == "hfmerge: command line: 2 problems, nothing downloaded"
    assert [line.split()[0] for line in problems] == ["base", "models[0]"] and problems[0].endswith(" is missing")
    assert usage.code == 2 and usage.err.startswith("usage: hfmerge") and not (tmp_path / "out").exists()
