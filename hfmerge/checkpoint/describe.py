"""Makes a source from a reference: pins it, reads its small files and the headers of its weights, but no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hfmerge.checkpoint.headers import FLOATS, OTHERS, TensorEntry, pickle_entries, read_header
from hfmerge.checkpoint.schema import read_json
from hfmerge.checkpoint.source import Source
from hfmerge.checkpoint.streaming.session import Streaming, ranged_file, remote_header
from hfmerge.errors import CorruptFileError, NotFoundError, OfflineError, SourceError, UnsupportedError
from hfmerge.hub.download import cached, fetch, pin
from hfmerge.hub.ranges import Traffic
from hfmerge.hub.reference import Pinned, parse_ref
from hfmerge.validation.limits import TENSORS
from hfmerge.validation.values import folder_name
from hfmerge.validation.wording import parameter


def describe(
    ref: str,
    *,
    allow_pickle: bool = False,
    base: Source | None = None,
    streaming: Streaming | None = None,
    copies: Mapping[str, Path] | None = None,
    beside: Sequence[str] = (),
) -> Source:
    """Pin a reference and read its small files and headers; weights stay where they are.

    Args:
        ref: as in a recipe.
        allow_pickle: accept `.bin` checkpoints (fetched whole, since a pickle has no header; unpickled
            `weights_only`).
        base: the merge's base. If a `base+adapter` names the same base, it is not read again.
        streaming: session that streams weights that are not in the cache; None: weights are downloaded.
        copies: see `pin`.
        beside: safetensors files of the model that are read beside its weights.

    Raises:
        SourceError: with the file and the remedy.
    """
    places = parse_ref(ref)
    pinned = pin(places[-1], copies)
    if pinned.folder is not None and pinned.commit is None:
        try:
            folder_name(pinned.name)  # the ledger knows the folder by it
        except ValueError as error:
            raise SourceError(f"{ref}: {error}; rename the folder.") from error
    source = _describe_pinned(ref, pinned, allow_pickle, streaming)
    source = replace(source, beside={file: _beside(pinned, file) for file in beside})
    if len(places) == 1:
        return source
    if source.kind != "adapter":
        raise SourceError(f"{ref}: {source.pinned.label} is a full model, and only an adapter can follow the `+`.")
    beneath = pin(places[0], copies)
    if base is not None and (beneath.name, beneath.commit, beneath.folder) == (
        base.pinned.name,
        base.pinned.commit,
        base.pinned.folder,
    ):
        return source
    under = _describe_pinned(places[0].text, beneath, allow_pickle, streaming)
    if under.kind != "full":
        raise SourceError(f"{ref}: {under.pinned.label} is itself an adapter; write `model+adapter`.")
    return replace(source, beneath=under)


def _describe_pinned(ref: str, pinned: Pinned, allow_pickle: bool, streaming: Streaming | None) -> Source:
    names = pinned.files
    if "adapter_config.json" in names:
        if any(name in names for name in ("model.safetensors", "model.safetensors.index.json")):
            raise UnsupportedError(
                f"{pinned.label}: holds an adapter and a full model; keep one of them per revision or folder."
            )
        config = read_json(pinned, "config.json") if "config.json" in names else {}
        adapter = read_json(pinned, "adapter_config.json")
        tensors, pickled, streams = _headers(pinned, "adapter_model", allow_pickle, streaming)
        return Source(ref, pinned, "adapter", config, adapter, tensors, pickled, streams=streams)
    if "config.json" not in names:
        raise UnsupportedError(
            f"{pinned.label}: neither config.json nor adapter_config.json; not a model that transformers or peft can "
            "load."
        )
    config = read_json(pinned, "config.json")
    quantised = config.get("quantization_config")
    if quantised:
        how = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise UnsupportedError(
            f"{pinned.label}: quantised with {how}; merge the original weights, or dequantise and save them first."
        )
    stem = (
        "model" if any(n in names for n in ("model.safetensors", "model.safetensors.index.json")) else "pytorch_model"
    )
    tensors, pickled, streams = _headers(pinned, stem, allow_pickle, streaming)
    return Source(ref, pinned, "full", config, None, tensors, pickled, streams=streams)


def _headers(
    pinned: Pinned, stem: str, allow_pickle: bool, streaming: Streaming | None
) -> tuple[dict[str, TensorEntry], bool, tuple[str, ...]]:
    """Tensors of a checkpoint from its headers, in stored order, whether it is pickled, and the files streamed."""
    for suffix, pickled in (("safetensors", False), ("bin", True)):
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if single in pinned.files:  # which loaders read first
            weight_map, files = None, [single]
        elif index in pinned.files:
            weight_map = read_json(pinned, index)["weight_map"]
            if not weight_map:
                raise CorruptFileError(f"{pinned.label}: {index} has an empty weight_map; upload it again.")
            files = sorted(set(weight_map.values()))
            if missing := [file for file in files if file not in pinned.files]:
                _check_online(pinned, missing[0])
                raise CorruptFileError(
                    f"{pinned.label}: {index} names {missing[0]}, which is not there; upload it again."
                )
        else:
            continue
        if pickled and not allow_pickle:
            raise UnsupportedError(
                f"{pinned.label}: only pickled weights ({files[0]}); convert them to safetensors, or pass "
                f"{parameter('allow_pickle', True)} if you trust the author."
            )
        tensors: dict[str, TensorEntry] = {}
        streams: list[str] = []
        for file in files:
            entries, streamed = _entries(pinned, file, pickled, streaming)
            if streamed:
                streams.append(file)
            for key, entry in entries.items():
                if weight_map is None or weight_map.get(key) == file:
                    tensors[key] = entry
        if weight_map is not None and (lost := [key for key in weight_map if key not in tensors]):
            raise CorruptFileError(f"{pinned.label}: {weight_map[lost[0]]} lacks {lost[0]}, which {index} promises.")
        try:
            TENSORS.check(len(tensors))
        except ValueError as error:
            raise CorruptFileError(f"{pinned.label}: {error}.") from error
        for key, entry in tensors.items():
            if entry.dtype not in FLOATS and entry.dtype not in OTHERS:
                raise UnsupportedError(f"{pinned.label}: {key} is {entry.dtype}: quantised weights are not merged.")
        return tensors, pickled, tuple(streams)
    _check_online(pinned, f"{stem}.safetensors")
    held = [
        name for name in pinned.files if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".bin"))
    ]
    what = f"only {', '.join(held[:3])}" if held else "no weights"
    raise UnsupportedError(f"{pinned.label}: {what}; a {stem}.safetensors or its index is needed.")


def _beside(pinned: Pinned, file: str) -> Mapping[str, TensorEntry]:
    """What a safetensors file holds that the method reads beside the weights."""
    if file not in pinned.files:
        _check_online(pinned, file)
        raise NotFoundError(f"{pinned.label}: has no {file}, which the method reads beside the weights; put it there.")
    return _entries(pinned, file, False, None)[0]


def _check_online(pinned: Pinned, file: str) -> None:
    """What the cache does not hold may well be on the Hub.

    Raises:
        OfflineError: the Hub could not be asked. NotFoundError: it no longer has the commit.
    """
    if pinned.gone:
        raise NotFoundError(
            f"{pinned.label}: no such repository or commit on the Hub any more, and {file} is not in the local cache."
        )
    if pinned.offline:
        raise OfflineError(
            f"{pinned.label}: {file} is not in the local cache and the Hub cannot be reached; run once online, or "
            "unset HF_HUB_OFFLINE."
        )


def _entries(
    pinned: Pinned, file: str, pickled: bool, streaming: Streaming | None
) -> tuple[Mapping[str, TensorEntry], bool]:
    """What one weight file holds, and whether it is to be streamed: one on the Hub, not in the cache."""
    where = f"{pinned.label}: {file}"
    path = cached(pinned, file)
    if pickled:
        if path is None and streaming is not None:
            raise UnsupportedError(
                f"{where} is pickled, and a pickle cannot be read in pieces; run without {parameter('stream', True)}, "
                "or convert it to safetensors."
            )
        return pickle_entries(path or fetch(pinned, file), file, where), False
    if path is not None:
        return read_header(path, where).entries, False
    # only what has a digest of its content on the Hub is streamed; the rest is small
    if streaming is not None and pinned.files[file].sha256 is not None:
        return streaming.open(pinned, file).header.entries, True
    return remote_header(ranged_file(pinned, file, Traffic()), file)[0].entries, False
