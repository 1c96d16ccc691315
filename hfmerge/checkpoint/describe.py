"""Makes a source from a reference: pins it, reads its small files and the headers of its weights, but no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hfmerge.checkpoint import other_forms
from hfmerge.checkpoint.headers import FLOATS, OTHERS, TensorEntry, pickle_entries, read_header
from hfmerge.checkpoint.model import Model
from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.checkpoint.streaming.session import Streaming, ranged_file, remote_header
from hfmerge.errors import CorruptFileError, NotFoundError, OfflineError, SourceError, UnsupportedError
from hfmerge.hub.download import cached, fetch, model_folders, pin, show_some
from hfmerge.hub.ranges import Traffic
from hfmerge.hub.reference import Snapshot, parse_ref
from hfmerge.validation.limits import TENSORS
from hfmerge.validation.values import folder_name
from hfmerge.validation.wording import parameter


MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The weight files of a sentence-transformers module; it reads the first that is there."""


def describe(
    ref: str,
    *,
    allow_pickle: bool = False,
    base: Model | None = None,
    streaming: Streaming | None = None,
    copies: Mapping[str, Path] | None = None,
    beside: Sequence[str] = (),
    modules: bool = True,
) -> Model:
    """Pin a reference and read its small files and headers; weights stay where they are.

    Args:
        ref: as in a recipe.
        allow_pickle: accept `.bin` checkpoints (fetched whole, since a pickle has no header; unpickled
            `weights_only`).
        base: the merge's base. If a `base+adapter` names the same base, it is not read again.
        streaming: session that streams weights that are not in the cache; None: weights are downloaded.
        copies: see `pin`.
        beside: safetensors files of the model that are read beside its weights.
        modules: also describe the weights of the sentence-transformers modules that `modules.json` names.

    Raises:
        SourceError: with the file and the remedy.
    """
    places = parse_ref(ref)
    snapshot = pin(places[-1], copies)
    if snapshot.folder is not None and snapshot.commit is None:
        try:
            folder_name(snapshot.name)  # the ledger knows the folder by it
        except ValueError as error:
            raise SourceError(f"{ref}: {error}; rename the folder.") from error
    source = _describe_pinned(ref, snapshot, allow_pickle, streaming)
    if modules:
        source = _with_modules(source, allow_pickle, streaming)
    source = replace(source, beside={file: _beside(snapshot, file) for file in beside})
    if len(places) == 1:
        return source
    if source.kind != "adapter":
        raise SourceError(f"{ref}: {source.snapshot.label} is a full model, and only an adapter can follow the `+`.")
    beneath = pin(places[0], copies)
    if base is not None and (beneath.name, beneath.commit, beneath.folder) == (
        base.snapshot.name,
        base.snapshot.commit,
        base.snapshot.folder,
    ):
        return source
    under = _describe_pinned(places[0].text, beneath, allow_pickle, streaming)
    if modules:
        under = _with_modules(under, allow_pickle, streaming)
    if under.kind != "full":
        raise SourceError(f"{ref}: {under.snapshot.label} is itself an adapter; write `model+adapter`.")
    return replace(source, beneath=under)


def _describe_pinned(ref: str, snapshot: Snapshot, allow_pickle: bool, streaming: Streaming | None) -> Model:
    names = snapshot.files
    if "adapter_config.json" in names:
        if any(name in names for name in ("model.safetensors", "model.safetensors.index.json")):
            raise UnsupportedError(
                f"{snapshot.label}: holds an adapter and a full model; keep one of them per revision or folder."
            )
        config = read_snapshot_json(snapshot, "config.json") if "config.json" in names else {}
        adapter = read_snapshot_json(snapshot, "adapter_config.json")
        tensors, pickled, streams = _headers(snapshot, "adapter_model", allow_pickle, streaming)
        return Model(ref, snapshot, "adapter", config, adapter, tensors, pickled, streams=streams)
    if "config.json" not in names:
        known = other_forms.of_files(names, "model")
        raise UnsupportedError(
            f"{snapshot.label}: neither config.json nor adapter_config.json; "
            f"{_where_models_lie(snapshot) or known or 'not a model that transformers or peft can load'}."
        )
    config = read_snapshot_json(snapshot, "config.json")
    if config.get("quantization_config"):
        raise UnsupportedError(f"{snapshot.label}: {other_forms.of_quantisation(config['quantization_config'])}.")
    stem = (
        "model" if any(n in names for n in ("model.safetensors", "model.safetensors.index.json")) else "pytorch_model"
    )
    tensors, pickled, streams = _headers(snapshot, stem, allow_pickle, streaming)
    return Model(ref, snapshot, "full", config, None, tensors, pickled, streams=streams)


def _where_models_lie(snapshot: Snapshot) -> str:
    """The folders that hold a model, where the place itself is none; "" if there are none."""
    there = model_folders(snapshot.files)
    if not there:
        return ""
    place = snapshot.name if snapshot.commit is not None else snapshot.ref.text.rstrip("/")
    return f"its models lie in {show_some(there)}; name one, as in {place}/{there[0]}"


def _with_modules(source: Model, allow_pickle: bool, streaming: Streaming | None) -> Model:
    """A model with the weights of its sentence-transformers modules, each tensor under `folder/name`."""
    snapshot = source.snapshot
    if "modules.json" not in snapshot.files:
        return source
    paths = [str(module.get("path") or "") for module in read_snapshot_json(snapshot, "modules.json")]
    tensors, renamed, streams = dict(source.tensors), dict(source.renamed), list(source.streams)
    folders: list[str] = []
    pickled = source.pickled
    for file in sorted(snapshot.files):
        folder, _, name = file.rpartition("/")
        inside = any(path and f"{folder}/".startswith(f"{path}/") for path in paths)
        if not inside or name not in MODULE_WEIGHTS or folder in folders:
            continue
        binary = name == MODULE_WEIGHTS[1]
        if binary and not allow_pickle:
            raise UnsupportedError(
                f"{snapshot.label}: modules.json names {folder}, whose weights are pickled ({name}); convert them to "
                f"safetensors, or pass {parameter('allow_pickle', True)} if you trust the author."
            )
        entries, streamed = _entries(snapshot, file, binary, streaming)
        for key, entry in entries.items():
            tensors[f"{folder}/{key}"] = replace(entry, file=file)
            renamed[f"{folder}/{key}"] = key
        pickled |= binary
        folders.append(folder)
        streams += [file] if streamed else []
    return replace(
        source, tensors=tensors, renamed=renamed, modules=tuple(folders), pickled=pickled, streams=tuple(streams)
    )


def _headers(
    snapshot: Snapshot, stem: str, allow_pickle: bool, streaming: Streaming | None
) -> tuple[dict[str, TensorEntry], bool, tuple[str, ...]]:
    """Tensors of a checkpoint from its headers, in stored order, whether it is pickled, and the files streamed."""
    for suffix, pickled in (("safetensors", False), ("bin", True)):
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if single in snapshot.files:  # loaders read this file first
            weight_map, files = None, [single]
            if index in snapshot.files and {*read_snapshot_json(snapshot, index)["weight_map"].values()} != {single}:
                raise UnsupportedError(
                    f"{snapshot.label}: holds {single} and {index}, which names other files; transformers would load "
                    f"{single} alone. Keep one of the two, in a folder or revision of its own."
                )
        elif index in snapshot.files:
            weight_map = read_snapshot_json(snapshot, index)["weight_map"]
            if not weight_map:
                raise CorruptFileError(f"{snapshot.label}: {index} has an empty weight_map; upload it again.")
            files = sorted(set(weight_map.values()))
            if missing := [file for file in files if file not in snapshot.files]:
                _check_online(snapshot, missing[0])
                raise CorruptFileError(
                    f"{snapshot.label}: {index} names {missing[0]}, which is not there; upload it again."
                )
        else:
            continue
        if pickled and not allow_pickle:
            raise UnsupportedError(
                f"{snapshot.label}: only pickled weights ({files[0]}); convert them to safetensors, or pass "
                f"{parameter('allow_pickle', True)} if you trust the author."
            )
        tensors: dict[str, TensorEntry] = {}
        streams: list[str] = []
        for file in files:
            entries, streamed = _entries(snapshot, file, pickled, streaming)
            if streamed:
                streams.append(file)
            for key, entry in entries.items():
                if weight_map is None or weight_map.get(key) == file:
                    tensors[key] = entry
        if weight_map is not None and (lost := [key for key in weight_map if key not in tensors]):
            raise CorruptFileError(f"{snapshot.label}: {weight_map[lost[0]]} lacks {lost[0]}, which {index} promises.")
        try:
            TENSORS.check(len(tensors))
        except ValueError as error:
            raise CorruptFileError(f"{snapshot.label}: {error}.") from error
        for key, entry in tensors.items():
            if entry.dtype not in FLOATS and entry.dtype not in OTHERS:
                raise UnsupportedError(f"{snapshot.label}: {key} is {entry.dtype}: quantised weights are not merged.")
        if known := other_forms.of_names(tensors):
            raise UnsupportedError(f"{snapshot.label}: {known}.")
        return tensors, pickled, tuple(streams)
    _check_online(snapshot, f"{stem}.safetensors")
    if known := other_forms.of_files(snapshot.files, stem.removeprefix("pytorch_")):
        raise UnsupportedError(f"{snapshot.label}: {known}.")
    held = [name for name in snapshot.files if name.endswith((".safetensors", ".bin"))]
    what = f"only {', '.join(held[:3])}" if held else "no weights"
    wanted = stem.removeprefix("pytorch_")
    raise UnsupportedError(f"{snapshot.label}: {what}; a {wanted}.safetensors or its index is needed.")


def _beside(snapshot: Snapshot, file: str) -> Mapping[str, TensorEntry]:
    """What a safetensors file holds that the method reads beside the weights."""
    if file not in snapshot.files:
        _check_online(snapshot, file)
        raise NotFoundError(
            f"{snapshot.label}: has no {file}, which the method reads beside the weights; put it there."
        )
    return _entries(snapshot, file, False, None)[0]


def _check_online(snapshot: Snapshot, file: str) -> None:
    """Check that the Hub was asked for a file that the cache does not hold.

    Raises:
        OfflineError: the Hub could not be asked. NotFoundError: it no longer has the commit.
    """
    if snapshot.vanished:
        raise NotFoundError(
            f"{snapshot.label}: the Hub no longer has this repository or commit, and {file} is not in the cache."
        )
    if snapshot.offline:
        raise OfflineError(
            f"{snapshot.label}: {file} is not in the local cache and the Hub cannot be reached; run once online, or "
            "unset HF_HUB_OFFLINE."
        )


def _entries(
    snapshot: Snapshot, file: str, pickled: bool, streaming: Streaming | None
) -> tuple[Mapping[str, TensorEntry], bool]:
    """What one weight file holds, and whether it is to be streamed: one on the Hub, not in the cache."""
    where = f"{snapshot.label}: {file}"
    path = cached(snapshot, file)
    if pickled:
        if path is None and streaming is not None:
            raise UnsupportedError(
                f"{where} is pickled, and a pickle cannot be read in pieces; run without {parameter('stream', True)}, "
                "or convert it to safetensors."
            )
        return pickle_entries(path or fetch(snapshot, file), file, where), False
    if path is not None:
        return read_header(path, where).entries, False
    # only what has a digest of its content on the Hub is streamed; the rest is small
    if streaming is not None and snapshot.files[file].sha256 is not None:
        return streaming.open(snapshot, file).header.entries, True
    return remote_header(ranged_file(snapshot, file, Traffic()), file)[0].entries, False
