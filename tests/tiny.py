"""Helpers of the tests: tiny random models, fine-tunes, adapters and tokenizers on disk, and ways to run hfmerge."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import multiprocessing.process
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from fixtures import processes
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from hfmerge.cli.main import main
from hfmerge.hashing import sha256_file


WORDS = 48
"""Rows of the embeddings of language models."""

_TEXT = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {
    **_TEXT,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_CLIP_TEXT = {
    **_TEXT,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "projection_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CLIP_VISION = {**_VISION, "intermediate_size": 32, "projection_dim": 8}
_T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_WHISPER = {
    "vocab_size": WORDS,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 8,
    "max_target_positions": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**_TEXT, "intermediate_size": 32, "max_position_embeddings": 16}),
    "vit": ("ViTConfig", {**_VISION, "intermediate_size": 32}),
    "dinov2": ("Dinov2Config", {**_VISION, "mlp_ratio": 2}),
    "clip": ("CLIPConfig", {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 8}),
    "clip_text": ("CLIPTextConfig", _CLIP_TEXT),
    "clip_vision": ("CLIPVisionConfig", _CLIP_VISION),
    "t5": ("T5Config", _T5),
    "whisper": ("WhisperConfig", _WHISPER),
    "llama": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": WORDS,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def config(kind: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of one of `CONFIGS`."""
    name, values = CONFIGS[kind]
    result: PreTrainedConfig = getattr(transformers, name)(**copy.deepcopy({**values, **changes}))
    return result


def build(title: str, settings: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of a transformers class; every parameter, biases and norms too, is off its initial value."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, title)(settings)
    disturb(model, seed, 0.2)
    return model.eval()


def disturb(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Add seeded noise to every parameter in place."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def fine_tune(model: PreTrainedModel, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """A copy of a model with seeded noise on every parameter."""
    tuned = copy.deepcopy(model)
    disturb(tuned, seed, scale)
    return tuned


def with_head(title: str, base: PreTrainedModel, seed: int, labels: Sequence[str]) -> PreTrainedModel:
    """A fine-tune of `base` as another class with a classification head of its own."""
    settings = copy.deepcopy(base.config)
    settings.id2label = dict(enumerate(labels))
    settings.label2id = {label: i for i, label in enumerate(labels)}
    model = build(title, settings, seed)
    mine = model.base_model.state_dict()
    held = {name: value for name, value in base.base_model.state_dict().items() if name in mine}
    model.base_model.load_state_dict({**mine, **held})
    disturb(model, seed, 0.05)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """`save_pretrained` into a folder."""
    model.save_pretrained(folder, **options)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Stored key -> tensor of all weight files in the root of a folder."""
    result: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            result |= {key: handle.get_tensor(key) for key in handle.keys()}
    return result


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    """Change the tensors of a weight file in place."""
    with safe_open(folder / file, "pt") as handle:
        held = {key: handle.get_tensor(key).clone() for key in handle.keys()}
    change(held)
    save_file(held, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file in place; None removes one."""
    data = json.loads((folder / file).read_text())
    data |= changes
    data = {key: value for key, value in data.items() if value is not None}
    (folder / file).write_text(json.dumps(data))


def adapter(
    folder: Path,
    targets: Mapping[str, tuple[int, int]],
    seed: int,
    *,
    rank: int = 2,
    alpha: int = 4,
    saved: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Path:
    """A LoRA adapter in PEFT's format.

    Args:
        targets: module path -> (out, in) of its weight.
        saved: module parameter path -> whole tensor, as `modules_to_save` stores it.
        settings: more keys of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    for path, (rows, columns) in targets.items():
        held[f"base_model.model.{path}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
        held[f"base_model.model.{path}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=generator)
    held |= {f"base_model.model.{name}": tensor.clone() for name, tensor in (saved or {}).items()}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({path.rpartition(".")[2] for path in targets})
    data = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


def attention(kind: str = "llama") -> dict[str, tuple[int, int]]:
    """Targets of an adapter on a tiny Llama-like model: query and output projections."""
    prefix = {"llama": "model.layers", "qwen3": "model.layers"}[kind]
    return {f"{prefix}.{i}.self_attn.{name}": (16, 16) for i in range(2) for name in ("q_proj", "o_proj")}


@dataclass(frozen=True)
class Run:
    """What one command gave: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def cli(*arguments: object) -> Run:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Run(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Run:
    """Run the command line in this process and insist on success."""
    run = cli(*arguments)
    assert run.code == 0, run.err
    return run


def only_leftovers(run: Run) -> bool:
    """Whether the merge is as it should be, and `verify` names what the killed run left beside it."""
    faults = [line for line in run.out.splitlines() if line.startswith("FAIL ")]
    return run.code == 1 and bool(faults) and all("left beside the folder by a killed run" in line for line in faults)


def start(*arguments: object, code: str | None = None, **environment: str) -> processes.Forked:
    """Run the command line, or a piece of Python with its arguments, in a forked process of its own."""
    script = ["-m", "hfmerge"] if code is None else ["-c", code]
    return processes.Forked(*script, *map(str, arguments), env=environment, together=False)


def finish(process: subprocess.Popen[str] | processes.Forked, timeout: float = 240) -> Run:
    """Wait for a child process."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Run(process.returncode, out, err)


def files(folder: Path, *, states: bool = True) -> dict[str, str]:
    """Path -> digest of what a merge produces: everything but ledger, card and licence list."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("README.md", "LICENSE.md")
        and path.parent.name != "merge_history"
        and (states or path.parent.name != "merge_state")
    }


@contextlib.contextmanager
def elsewhere() -> Iterator[Path]:
    """As on another machine: nothing is noted in this user's home of where merged folders lie.

    Gives the folder of such notes. What was noted before is there again afterwards.
    """
    notes = Path(os.environ["HF_HOME"]) / "hfmerge" / "places"
    aside = notes.with_name("places-aside")
    notes.mkdir(parents=True, exist_ok=True)
    notes.rename(aside)
    try:
        yield notes
    finally:
        shutil.rmtree(notes, ignore_errors=True)
        aside.rename(notes)


def states(folder: Path) -> list[str]:
    """Names of the kept state files."""
    return sorted(path.name for path in (folder / "merge_state").glob("*.safetensors"))


def everything(folder: Path) -> dict[str, str]:
    """Path -> digest of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def tokenizer(folder: Path, tokens: Sequence[str]) -> Path:
    """Save a word-level tokenizer whose ids are the places in `tokens`; the first is the unknown word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    raw = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    raw.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=tokens[0]).save_pretrained(folder)
    return folder


def noted(journal: Path) -> int:
    """Lines of a run's journal: finished steps of all its processes and attempts."""
    try:
        return sum(path.read_bytes().count(b"\n") for path in journal.glob("*.jsonl"))
    except FileNotFoundError:  # the run has just come to its end
        return 0


@dataclass(frozen=True)
class Child:
    """A command that runs in a process of its own and may be held at a given point.

    Attributes:
        process: it.
        ready: a file that it creates when it is held.
        go: a file at whose sight it goes on.
        log: what it printed.
    """

    process: multiprocessing.process.BaseProcess
    ready: Path
    go: Path
    log: Path

    def wait_until_held(self) -> None:
        """Wait until the command has come to the point where it is held."""
        for _ in range(6000):
            if self.ready.exists():
                return
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.01)
        raise AssertionError("the command never came to its point")

    def signal(self, number: int) -> None:
        """Send a signal and let the command go on."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.go.touch()

    def end(self) -> Run:
        """Wait for the end; a killed process has its negative signal as exit code."""
        self.go.touch()
        self.process.join(60)
        assert self.process.exitcode is not None
        return Run(self.process.exitcode, "", self.log.read_text())


def fork(
    folder: Path,
    arguments: Sequence[object],
    *,
    hold: str = "",
    steps: int = 0,
    limit: int = 0,
    env: Mapping[str, str] | None = None,
) -> Child:
    """Run a command in a process of its own, forked from a server that has imported everything once.

    Args:
        folder: for the files by which it is held, and its output.
        hold: "write": in the middle of the weights; "rename": when the old folder is away, the new one not yet there.
        steps: hold it before it notes another step, once its journal has so many of all processes; 0: nowhere.
        limit: greatest length of a file in bytes, as `ulimit -f` sets it.
        env: set in its environment, before the command looks at it.
    """
    name = f"child-{len(list(folder.glob('child-*.log')))}"
    ready, go, log = (folder / f"{name}.{suffix}" for suffix in ("ready", "go", "log"))
    log.touch()
    words = [str(argument) for argument in arguments]
    process = processes.CONTEXT.Process(target=_forked, args=(words, hold, steps, limit, env or {}, ready, go, log))
    process.start()
    return Child(process, ready, go, log)


def _forked(
    arguments: list[str],
    hold: str,
    steps: int,
    limit: int,
    env: Mapping[str, str],
    ready: Path,
    go: Path,
    log: Path,
) -> None:
    import resource

    from hfmerge.checkpoint.writer import SafetensorsWriter
    from hfmerge.engine import workspace
    from hfmerge.engine.journal import Finished, Journal, Key

    def held() -> None:
        ready.touch()
        for _ in range(6000):
            if go.exists():
                return
            time.sleep(0.01)

    os.environ.update(env)
    # a shell without job control has what it runs in the background ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if hold == "write":
            write, seen = SafetensorsWriter.write, itertools.count()

            def slow(self: SafetensorsWriter, *given: Any) -> memoryview:
                data = write(self, *given)
                if next(seen) == 5:
                    held()
                return data

            SafetensorsWriter.write = slow  # type: ignore[method-assign]
        if hold == "rename":
            rename = os.rename

            def late(source: Path, target: Path) -> None:
                if Path(source).name.endswith("-partial"):
                    held()
                rename(source, target)

            workspace.os.rename = late  # type: ignore[attr-defined]
        if steps:
            note = Journal.note

            def paused(self: Journal, key: Key, done: Finished) -> None:
                if noted(self.folder) >= steps:
                    held()
                note(self, key, done)

            Journal.note = paused  # type: ignore[method-assign]
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main(arguments)
    sys.exit(code)
