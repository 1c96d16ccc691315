"""The one executor: visits each output parameter once, folds all models into it, and writes it.

Call sequence of `run`: fetch the files; measure all parameters if the method asks (`Measure`); the first pass of
`scheduler`, which reads base and models for each parameter, folds or combines them, and keeps the carried state
(`tasks`); then, if the recipe's `norm` needs a number over all parameters, a second pass that scales what was kept and
writes it; heads, side files, digests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.behaviour import CHOICES, put_template, take
from hfmerge.checkpoint.digests import Digester, folder_digest
from hfmerge.checkpoint.heads import write_head
from hfmerge.checkpoint.model import Model, weight_files
from hfmerge.checkpoint.reader import Reader
from hfmerge.checkpoint.side_files import copy_side_files
from hfmerge.checkpoint.streaming.session import Streamed, Streaming, take_session, total
from hfmerge.checkpoint.vocabulary import write_tokenizer
from hfmerge.checkpoint.write_digests import Trail
from hfmerge.checkpoint.writer import write_index
from hfmerge.engine.device import device_for, full_float32
from hfmerge.engine.estimate import stream_memory, stream_readers
from hfmerge.engine.journal import Journal, read_past
from hfmerge.engine.options import DEFAULT, RunOptions
from hfmerge.engine.plan import DTYPE_NAMES, KeptState, Plan, folder_of
from hfmerge.engine.ranks import Ranks
from hfmerge.engine.run_files import STATE_FOLDER, RunFiles
from hfmerge.engine.scheduler import Passes
from hfmerge.engine.storage import own_params
from hfmerge.engine.untying import TEXT_SECTION, TIE_FLAG
from hfmerge.errors import CorruptFileError, UnsupportedError
from hfmerge.hashing import sha256_file
from hfmerge.hub.download import fetch
from hfmerge.recipe.chat_template import ChatTemplate


@dataclass(frozen=True)
class Outcome:
    """What a run found out, for the ledger.

    Attributes:
        squared_norms: per model, squared Frobenius norm of its task vector over all merged parameters.
        merged_norm: norm of the merged task vector as written, before the output's rounding.
        scale: factor by which `norm` multiplied the merged task vector of the method.
        changes: tensor -> the largest root mean square of a change in it: the merged change, or a model's change times
            its weight. It has the tensors that some model changes and whose value is finite.
        source_digests: for the base and then each model: file -> SHA-256; None for a model that the prior state holds.
        states: kept states.
        environment: versions, device and arithmetic of the run, for the ledger.
        products: path -> SHA-256 of every written file but the states.
        deviation: greatest relative deviation of an approximate last step from the exact step, over the chunks that
            were compared; None if no chunk was compared.
        dependent: per model, parameters in which its change was left out (see `JointMethod.dependent`).
        reused: number of chunks that an earlier, killed attempt had finished. With two passes a chunk counts twice.
        streamed: bytes and files that all processes streamed from the Hub; None if the plan streams no file.
    """

    squared_norms: tuple[float, ...]
    merged_norm: float
    scale: float
    changes: Mapping[str, float]
    source_digests: tuple[dict[str, str] | None, ...]
    states: tuple[KeptState, ...]
    environment: Mapping[str, Any]
    products: dict[str, str]
    deviation: float | None = None
    dependent: tuple[int, ...] = ()
    reused: int = 0
    streamed: Streamed | None = None


def run(
    plan: Plan,
    folder: Path,
    ranks: Ranks | None = None,
    digester: Digester | None = None,
    *,
    journal: Path | None = None,
    options: RunOptions = DEFAULT,
) -> Outcome:
    """Execute a plan into an empty folder, or into that of an attempt that was killed.

    With several processes, all call `run` with the same plan and the same folder on storage they share, or with one
    folder on each disk (see `storage`), which gets some of the weight files; rank 0's gets all else. Call sequence:
    every rank fetches what is not in its cache; rank 0 lays out the files; every rank visits its own parameters and
    writes them into the shared files, exchanging only sums; digests are divided; rank 0 adds heads and side files. A
    rank that fails makes all fail with its error.

    Args:
        plan: what is computed.
        folder: the folder that gets the output.
        ranks: the processes of the run.
        digester: hashes source files beside the computation.
        journal: folder of the journal of exactly this work (see `journal` and `fingerprint`); a chunk
            that it lists as finished is compared with the files and not computed again. None: nothing is noted, and
            the folder is empty.
        options: how the run uses the machine.

    Raises:
        SourceError, NonFiniteError, OutputError: with file, tensor and model; the folder is then to be thrown away.
    """
    ranks = ranks or Ranks()
    if not plan.recipe.stream:
        return _run(plan, folder, ranks, digester, journal, options, None)
    with contextlib.closing(ranks.each(lambda: take_session(plan.sources))) as streaming:
        unchecked = "several processes read a part of it each" if ranks.world > 1 else ""
        streaming.begin(
            stream_memory(plan), stream_readers(plan), plan.estimate.stream, unchecked=unchecked, show=ranks.main
        )
        outcome = _run(plan, folder, ranks, digester, journal, options, streaming)
        ranks.each(streaming.finish)
        return replace(outcome, streamed=total(ranks.together(streaming.report)))


def _run(
    plan: Plan,
    folder: Path,
    ranks: Ranks,
    digester: Digester | None,
    journal: Path | None,
    options: RunOptions,
    streaming: Streaming | None,
) -> Outcome:
    start = plan.start
    device = ranks.each(
        lambda: device_for(options.device, spectral=plan.method.needs == "matrix", notify=options.notify)
    )
    ranks.each(lambda: _fetch_all(plan) if ranks.leads else None)
    ranks.each(lambda: _fetch_all(plan))
    ranks.on_main(lambda: _check_ties(plan, streaming))
    with _one_thread_each(), contextlib.ExitStack() as stack:
        hashing = digester or stack.enter_context(Digester())
        # results are asked for at the end; a source that differs from its digest then fails the whole run
        wanted = [plan.base, *(delta.source for delta in plan.deltas[start:])]
        crew = ranks.on_disk(ranks.disk)
        mine = {i: hashing.result(one) for i, one in enumerate(wanted) if crew[i % len(crew)] == ranks.rank}
        noted = stack.enter_context(_journal(journal, ranks)) if journal is not None else None
        pin = partial(_pin, plan, hashing)
        files = stack.enter_context(RunFiles(plan, folder, ranks, noted, streaming, pin))
        # no single process sees all bytes of a file that several processes write
        trail = stack.enter_context(Trail(files.outputs)) if ranks.world == 1 else None
        stack.enter_context(full_float32(device.place))
        outcome = Passes(plan, files, ranks, options, device).merge()
        hashed = trail.digests() if trail is not None else {}
        parts = ranks.together(lambda: {i: future.result() for i, future in mine.items()})
        answers = _one_answer(parts, wanted)
    known = tuple(
        answers[0] if i == 0 else answers.get(i - start) if i > start else None for i in range(len(plan.deltas) + 1)
    )
    made = ranks.together(
        lambda: finish_folder(plan, folder, hashed, streaming) if ranks.main else _weight_digests(plan, folder, ranks)
    )
    products = {name: digest for part in made for name, digest in part.items()}
    return Outcome(**outcome, source_digests=known, products=products)


def _pin(plan: Plan, hashing: Digester, model: int) -> str:
    """The commit of a model, or the digest of its folder, as the ledger will record it."""
    source = plan.deltas[model].source
    if source.snapshot.commit is not None:
        return source.snapshot.commit
    files = hashing.result(source).result()
    return folder_digest({name: digest for name, digest in files.items() if not name.startswith("+")})


def _journal(folder: Path, ranks: Ranks) -> contextlib.closing[Journal]:
    """This process's journal; what earlier attempts left is read before any process adds to it."""
    past = ranks.on_main(lambda: read_past(folder))
    return contextlib.closing(ranks.each(lambda: Journal(folder, ranks.rank, past)))


def _one_answer(parts: Sequence[dict[int, dict[str, str]]], sources: Sequence[Model]) -> dict[int, dict[str, str]]:
    """The digests of every source, computed once on each disk.

    Raises:
        CorruptFileError: two machines have different files under one name.
    """
    found: dict[int, dict[str, str]] = {}
    for rank, part in enumerate(parts):
        for i, digests in part.items():
            if found.setdefault(i, digests) != digests:
                name = sorted(name for name in digests if found[i].get(name) != digests[name])[0]
                raise CorruptFileError(
                    f"{sources[i].snapshot.label}: process {rank} has another {name} than process 0; put the same "
                    "files on all machines."
                )
    return found


def _weight_digests(plan: Plan, folder: Path, ranks: Ranks) -> dict[str, str]:
    """Digests of the weight files on this process's disk, from one process a disk."""
    files = sorted({param.file for param in own_params(plan, ranks)}) if ranks.leads else []
    return {file: sha256_file(folder / file) for file in files}


def _fetch_all(plan: Plan) -> None:
    """Download every file the run reads, but those it streams; the Hub client shows its own progress."""
    for source in [plan.base, *(delta.source for delta in plan.read)]:
        for model in (source, source.beneath):
            if model is not None:
                for name in weight_files(model):
                    if name not in model.streams:
                        fetch(model.snapshot, name)
    for name in plan.side_files:
        fetch(plan.base.snapshot, name)


def _check_ties(plan: Plan, streaming: Streaming | None) -> None:
    """Check that stored copies of tied tensors are equal.

    transformers unties copies that differ, and a merge would then lose one of them.

    Raises:
        UnsupportedError: names the model and both tensors.
    """
    checked = [(plan.base, plan.base_layout.tied), *((d.source, d.tied) for d in plan.read)]
    for source, tied in checked:
        with Reader(source, streaming) as reader:
            for copy, owner in tied.items():
                if not reader.equal(copy, owner):
                    raise UnsupportedError(
                        f"{source.snapshot.label}: {copy} differs from {owner}, to which its configuration ties it; "
                        "set `tie_word_embeddings` in its config.json as the weights are, or remove the tensor."
                    )


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each matrix is computed on one core, so that its bytes are the same on every number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finish_folder(
    plan: Plan, folder: Path, hashed: Mapping[str, str], streaming: Streaming | None = None
) -> dict[str, str]:
    """Write heads, side files and the index; then give every file's digest, carried states left out.

    Args:
        plan, folder: of the run.
        hashed: digests of weight files that are known already.
        streaming: holds the files that the plan streams.
    """
    for model, head in plan.heads:
        write_head(head, plan.deltas[model].source, folder, streaming)
    own = [param for param in plan.params if not folder_of(param.file)]
    floats = {param.slot.dtype for param in own if plan.base.tensors[param.key].floating}
    changes: dict[str, Any] = {}
    if len(floats) == 1:
        changes = {"torch_dtype": None, "dtype": DTYPE_NAMES[floats.pop()]}
    if plan.vocabulary is not None and plan.vocabulary.added:
        text = plan.base.config.get("text_config")
        if "vocab_size" not in plan.base.config and isinstance(text, dict):
            changes["text_config"] = {**text, "vocab_size": plan.vocabulary.size}
        else:
            changes["vocab_size"] = plan.vocabulary.size
    if plan.untied:
        changes = {
            **{key: plan.base.config[key] for key in (TIE_FLAG, TEXT_SECTION) if key in plan.base.config},
            **changes,
        }
    code = plan.recipe.trust_remote_code
    copy_side_files(plan.base.snapshot, list(plan.side_files), folder, changes, remote_code=code)
    if plan.vocabulary is not None and plan.vocabulary.added:
        write_tokenizer(plan.vocabulary, plan.base.snapshot, folder)
    chosen = {choice: plan.chosen.get(choice, -1) for choice in CHOICES}
    if "chat_template" not in plan.chosen:
        chosen["chat_template"] = chosen["tokenizer"]
    for choice, at in chosen.items():
        # the base's files are there already, but a template that came with another model's tokenizer has to go
        if at >= 0 or (choice == "chat_template" and chosen["tokenizer"] >= 0):
            take(choice, (plan.base if at < 0 else plan.deltas[at].source).snapshot, folder)
    if isinstance(plan.recipe.chat_template, ChatTemplate):
        put_template(plan.recipe.chat_template.text, folder)
    if len({param.file for param in own}) > 1:
        total = sum(param.slot.nbytes for param in own)
        write_index(folder, {param.key: param.file for param in own}, total)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    products = [name for name in files if not name.startswith(f"{STATE_FOLDER}/")]
    return {name: hashed.get(name) or sha256_file(folder / name) for name in products}
