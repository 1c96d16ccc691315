"""Names of models and what they stand for: a reference is parsed, pinned to a commit, and described by its headers.

`org/name`, `org/name@revision`, a folder, an `hf://` URI, or `base+adapter` of any two of these. Nothing here reads
weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfmerge.digest import canonical_json, sha256_bytes, sha256_file
from hfmerge.errors import (
    AccessError,
    CorruptFileError,
    HfMergeError,
    NotFoundError,
    OfflineError,
    SourceError,
    UnsupportedError,
)


LFS_POINTER = b"version https://git-lfs.github.com/spec"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Floating safetensors dtypes that can be merged, with their bytes per element."""
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True)
class Place:
    """Where a model lies, as written: a Hub repository with the asked revision, or a folder."""

    text: str
    repo_id: str | None
    revision: str | None
    folder: Path | None


@dataclass(frozen=True)
class FileInfo:
    """One file of a pinned place: bytes, and the digests known without reading it."""

    size: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of a stored tensor. `dtype` is the safetensors name (`BF16`), `nbytes` its length in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def floating(self) -> bool:
        """True when the tensor can be merged; integer and boolean buffers are copied."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Pinned:
    """A place fixed to one state: a commit on the Hub, or a folder with its files' sizes.

    Attributes:
        name: repository ID, or the folder's own name (never its path).
        commit: 40 hex digits, None for a folder.
        folder: the folder, None on the Hub.
        files: path in the repository -> what is known of the file.
    """

    place: Place
    name: str
    commit: str | None
    folder: Path | None
    files: Mapping[str, FileInfo] = field(repr=False)

    @property
    def label(self) -> str:
        """Short text for messages and tables: `org/name@0123abcd`, or the folder as written."""
        return f"{self.name}@{self.commit[:8]}" if self.commit else self.place.text


@dataclass(frozen=True)
class Source:
    """A model described by its small files and headers: everything a plan needs.

    Attributes:
        ref: as written in the recipe.
        pinned: where it lies.
        kind: "full" or "adapter".
        config: config.json; for an adapter, what its own config.json adds (label names), or {}.
        adapter: adapter_config.json of an adapter.
        tensors: stored key -> header entry.
        beneath: for `base+adapter` on another model than the merge's base: that model.
    """

    ref: str
    pinned: Pinned
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    adapter: Mapping[str, Any] | None = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    pickled: bool = False
    beneath: Source | None = None

    @property
    def name(self) -> str:
        """Repository ID or folder name, the adapter's for an adapter."""
        return self.pinned.name

    @property
    def slug(self) -> str:
        """The name as one path segment: `org--name`."""
        return self.name.replace("/", "--")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored key -> shape."""
        return {key: entry.shape for key, entry in self.tensors.items()}


def parse_ref(text: str) -> list[Place]:
    """The place, or the two places `base+adapter`, that a reference names.

    Raises:
        SourceError: not a folder and not a valid repository ID.
    """
    text = text.strip()
    if "+" in text and not Path(text).expanduser().exists():
        base, _, adapter = text.partition("+")
        return [_parse_place(base), _parse_place(adapter)]
    return [_parse_place(text)]


def _parse_place(text: str) -> Place:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if text.startswith("hf://"):
        try:
            uri = parse_hf_uri(text)
        except HfUriError as error:
            raise SourceError(f"{text}: {error}") from error
        if uri.type != "model" or uri.path_in_repo:
            raise SourceError(f"{text}: name a whole model repository, `hf://org/name@revision`.")
        return Place(text, uri.id, uri.revision, None)
    path = Path(text).expanduser()
    if path.is_dir() or text.startswith((".", "/", "~")):
        return Place(text, None, None, path)
    repo_id, _, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SourceError(f"{text}: neither a folder here nor a Hub ID `org/name[@revision]`.") from error
    return Place(text, repo_id, revision or None, None)


@contextlib.contextmanager
def hub_errors(subject: str) -> Iterator[None]:
    """Re-raise what the Hub client raises as one line that names `subject` and the remedy."""
    import httpx2
    from huggingface_hub import errors as hf

    token = "pass a token that may read it: `hf auth login`, or HF_TOKEN"
    try:
        yield
    except HfMergeError:
        raise
    except hf.GatedRepoError as error:
        raise AccessError(f"{subject}: gated; ask for access on its page, then {token}.") from error
    except hf.RepositoryNotFoundError as error:
        raise NotFoundError(f"{subject}: no such repository, or a private one; check the ID, or {token}.") from error
    except hf.RevisionNotFoundError as error:
        raise NotFoundError(f"{subject}: no such branch, tag or commit in this repository.") from error
    except (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError, hf.RevisionResolutionError) as error:
        if (status := _status_of(error)) in (401, 403):
            raise AccessError(f"{subject}: the Hub refused the token (HTTP {status}); {token}.") from error
        raise OfflineError(
            f"{subject}: not in the local cache and the Hub cannot be reached; run once online, or unset "
            "HF_HUB_OFFLINE."
        ) from error
    except hf.EntryNotFoundError as error:
        raise NotFoundError(f"{subject}: no such file at this revision.") from error
    except hf.HfHubHTTPError as error:
        status = _status_of(error)
        if status in (401, 403):
            raise AccessError(f"{subject}: the Hub refused the token (HTTP {status}); {token}.") from error
        detail = error.server_message or str(error).splitlines()[0]
        raise SourceError(f"{subject}: the Hub answered HTTP {status}: {detail}") from error
    except (httpx2.TransportError, ConnectionError) as error:
        raise OfflineError(f"{subject}: the Hub cannot be reached ({type(error).__name__}); try again.") from error


def _status_of(error: BaseException | None) -> int | None:
    """HTTP status of an error or of what caused it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__ or error.__context__
    return None


def hub_api() -> Any:
    """An `HfApi` that names hfmerge in its requests; the token is whatever the environment gives."""
    from huggingface_hub import HfApi

    from hfmerge.version import __version__

    return HfApi(library_name="hfmerge", library_version=__version__)


def pin(place: Place) -> Pinned:
    """Fix a place to one state: the commit its revision means now, or the files its folder holds now.

    Raises:
        SourceError: missing, private, gated, unreachable, an unknown revision.
    """
    if place.folder is not None:
        if not place.folder.is_dir():
            raise NotFoundError(f"{place.text}: no such folder.")
        files = {
            path.relative_to(place.folder).as_posix(): FileInfo(path.stat().st_size)
            for path in sorted(place.folder.rglob("*"))
            if path.is_file()
        }
        return Pinned(place, place.folder.resolve().name, None, place.folder.resolve(), files)
    import httpx2

    assert place.repo_id is not None
    api = hub_api()
    with hub_errors(place.text):
        commit = api.resolve_revision(place.repo_id, revision=place.revision).resolved
        try:
            files = {
                item.path: FileInfo(item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                for item in api.list_repo_tree(place.repo_id, recursive=True, revision=commit)
                if hasattr(item, "size")
            }
        except (ConnectionError, httpx2.TransportError):
            # offline mode, or no connection: what the cache holds of this commit is all there is
            files = _cached_files(place.repo_id, commit)
            if not files:
                raise
    return Pinned(place, place.repo_id, commit, None, files)


def _cached_files(repo_id: str, commit: str) -> dict[str, FileInfo]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshot = (
        Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    )
    return {
        path.relative_to(snapshot).as_posix(): FileInfo(path.stat().st_size)
        for path in sorted(snapshot.rglob("*"))
        if path.is_file()
    }


def fetch(pinned: Pinned, file: str) -> Path:
    """A file of a pinned place on this machine, downloaded into the Hugging Face cache when it is not there yet.

    Raises:
        SourceError: the file is missing, unreachable, or has another length than the Hub says.
    """
    if pinned.folder is not None:
        return pinned.folder / file
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{pinned.label}: {file}"):
        return Path(hf_hub_download(pinned.name, file, revision=pinned.commit, library_name="hfmerge"))


def cached(pinned: Pinned, file: str) -> Path | None:
    """The file on this machine if it is there already, else None."""
    if pinned.folder is not None:
        return pinned.folder / file
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(pinned.name, file, revision=pinned.commit)
    return Path(found) if isinstance(found, str) else None


def read_json(pinned: Pinned, file: str) -> dict[str, Any]:
    """A small JSON object of a pinned place."""
    path = fetch(pinned, file)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{pinned.label}: {file} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{pinned.label}: {file} holds no JSON object.")
    return value


def describe(ref: str, *, allow_pickle: bool = False, base: Source | None = None) -> Source:
    """Pin a reference and read its small files and headers; weights stay where they are.

    Args:
        ref: as in a recipe.
        allow_pickle: accept `.bin` checkpoints (fetched whole, since a pickle has no header; unpickled
            `weights_only`).
        base: the merge's base: in `base+adapter` it needs no separate reading.

    Raises:
        SourceError: with the file and the remedy.
    """
    places = parse_ref(ref)
    source = _describe_pinned(ref, pin(places[-1]), allow_pickle)
    if len(places) == 1:
        return source
    if source.kind != "adapter":
        raise SourceError(f"{ref}: {source.pinned.label} is a full model, and only an adapter can follow the `+`.")
    beneath = pin(places[0])
    if base is not None and (beneath.name, beneath.commit, beneath.folder) == (
        base.pinned.name,
        base.pinned.commit,
        base.pinned.folder,
    ):
        return source
    under = _describe_pinned(places[0].text, beneath, allow_pickle)
    if under.kind != "full":
        raise SourceError(f"{ref}: {under.pinned.label} is itself an adapter; write `model+adapter`.")
    return replace(source, beneath=under)


def _describe_pinned(ref: str, pinned: Pinned, allow_pickle: bool) -> Source:
    names = pinned.files
    if "adapter_config.json" in names:
        if any(name in names for name in ("model.safetensors", "model.safetensors.index.json")):
            raise UnsupportedError(
                f"{pinned.label}: holds an adapter and a full model; keep one of them per revision or folder."
            )
        config = read_json(pinned, "config.json") if "config.json" in names else {}
        adapter = read_json(pinned, "adapter_config.json")
        tensors, pickled = _headers(pinned, "adapter_model", allow_pickle)
        return Source(ref, pinned, "adapter", config, adapter, tensors, pickled)
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
    tensors, pickled = _headers(pinned, stem, allow_pickle)
    return Source(ref, pinned, "full", config, None, tensors, pickled)


def _headers(pinned: Pinned, stem: str, allow_pickle: bool) -> tuple[dict[str, TensorEntry], bool]:
    """Tensors of a checkpoint from its headers, in stored order, and whether it is pickled."""
    for suffix, pickled in (("safetensors", False), ("bin", True)):
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if index in pinned.files:
            weight_map = read_json(pinned, index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CorruptFileError(f"{pinned.label}: {index} has no weight_map; upload it again.")
            files = sorted({str(file) for file in weight_map.values()})
            if missing := [file for file in files if file not in pinned.files]:
                raise CorruptFileError(
                    f"{pinned.label}: {index} names {missing[0]}, which is not there; upload it again."
                )
        elif single in pinned.files:
            weight_map, files = None, [single]
        else:
            continue
        if pickled and not allow_pickle:
            raise UnsupportedError(
                f"{pinned.label}: only pickled weights ({files[0]}); convert them to safetensors, or pass "
                "--allow-pickle "
                "if you trust the author."
            )
        read = _pickle_entries if pickled else _safetensors_entries
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            for key, entry in read(pinned, file).items():
                if weight_map is None or weight_map.get(key) == file:
                    tensors[key] = entry
        if weight_map is not None and (lost := [key for key in weight_map if key not in tensors]):
            raise CorruptFileError(f"{pinned.label}: {weight_map[lost[0]]} lacks {lost[0]}, which {index} promises.")
        for key, entry in tensors.items():
            if entry.dtype not in FLOATS and entry.dtype not in OTHERS:
                raise UnsupportedError(f"{pinned.label}: {key} is {entry.dtype}: quantised weights are not merged.")
        return tensors, pickled
    held = [
        name for name in pinned.files if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".bin"))
    ]
    what = f"only {', '.join(held[:3])}" if held else "no weights"
    raise UnsupportedError(f"{pinned.label}: {what}; a {stem}.safetensors or its index is needed.")


def _safetensors_entries(pinned: Pinned, file: str) -> dict[str, TensorEntry]:
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    where = f"{pinned.label}: {file}"
    size = pinned.files[file].size
    path = cached(pinned, file)
    if path is not None:
        check_safetensors(path, where)
    try:
        if path is not None:
            meta = parse_local_safetensors_file_metadata(path)
        else:
            with hub_errors(where):
                meta = hub_api().parse_safetensors_file_metadata(pinned.name, file, revision=pinned.commit)
    except (SafetensorsParsingError, ValueError, KeyError, TypeError) as error:
        pointer = " (a Git-LFS pointer?)" if size < 1024 else ""
        raise CorruptFileError(f"{where} is no safetensors file{pointer}; upload it again.") from error
    entries = {}
    for key, info in meta.tensors.items():
        start, stop = info.data_offsets
        entries[key] = TensorEntry(file, info.dtype, tuple(info.shape), stop - start)
        per_element = FLOATS.get(info.dtype) or OTHERS.get(info.dtype)
        if per_element is not None and stop - start != per_element * math.prod(info.shape):
            raise CorruptFileError(
                f"{where}: broken safetensors header: {key} has {stop - start} bytes for {info.dtype} "
                f"{tuple(info.shape)}; get it again."
            )
    end = _end_of_data(
        where, {key: (info.data_offsets[0], info.data_offsets[1]) for key, info in meta.tensors.items()}
    )
    if size < 8 + end:
        raise CorruptFileError(f"{where} is truncated: {size} bytes, its header promises at least {8 + end}.")
    return entries


def safetensors_entries(path: Path) -> dict[str, TensorEntry]:
    """Header entries of a safetensors file on this machine."""
    from huggingface_hub import parse_local_safetensors_file_metadata

    return {
        key: TensorEntry(path.name, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for key, info in parse_local_safetensors_file_metadata(path).tensors.items()
    }


def check_safetensors(path: Path, where: str) -> dict[str, int]:
    """Absolute offset of every tensor of a file, after checking that its header and length agree.

    Raises:
        CorruptFileError: a Git-LFS pointer, no safetensors file, truncated or overlong.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        head = handle.read(8)
        if head == LFS_POINTER[:8]:
            raise CorruptFileError(
                f"{where} is a Git-LFS pointer, not weights; run `git lfs pull` or download it again."
            )
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size, 100_000_000):
            raise CorruptFileError(f"{where} is no safetensors file or is truncated ({size} bytes); get it again.")
        try:
            header = json.loads(handle.read(length))
            offsets = {key: info["data_offsets"] for key, info in header.items() if key != "__metadata__"}
            spans = {key: (int(start), int(stop)) for key, (start, stop) in offsets.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{where}: broken safetensors header; get it again.") from error
    end = _end_of_data(where, spans)
    if 8 + length + end != size:
        raise CorruptFileError(f"{where} is truncated or overlong: {size} bytes, header says {8 + length + end}.")
    return {key: 8 + length + start for key, (start, _) in spans.items()}


def _end_of_data(where: str, spans: Mapping[str, tuple[int, int]]) -> int:
    """Length of the data that tensors from `start` to `stop` fill, which they must without gap or overlap."""
    end = 0
    for key, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end or stop < start:
            raise CorruptFileError(
                f"{where}: broken safetensors header: {key} does not follow the tensor before; get it again."
            )
        end = stop
    return end


def _pickle_entries(pinned: Pinned, file: str) -> dict[str, TensorEntry]:
    state = load_pickle(fetch(pinned, file), f"{pinned.label}: {file}", device="meta")
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
    names |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
    return {
        key: TensorEntry(
            file,
            names.get(str(value.dtype).removeprefix("torch."), str(value.dtype)),
            tuple(value.shape),
            value.numel() * value.element_size(),
        )
        for key, value in state.items()
    }


def load_pickle(path: Path, where: str, device: str) -> dict[str, Any]:
    """State dict of a `.bin` file, unpickled with `weights_only`; `device="meta"` gives shapes without data."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=device != "meta")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CorruptFileError(
            f"{where}: cannot be unpickled as plain weights ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptFileError(f"{where}: not a plain dictionary of tensors.")
    return state


def folder_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 that stands for a folder: of the canonical JSON of its files' digests."""
    return sha256_bytes(canonical_json(dict(files)))


def weight_files(source: Source) -> list[str]:
    """Every file of a source that a merge depends on, in order: configuration first, then weights."""
    small = ["config.json", "adapter_config.json"]
    files = [name for name in small if name in source.pinned.files]
    return files + sorted({entry.file for entry in source.tensors.values()})


def digests(source: Source, progress: Callable[[int], object] | None = None) -> dict[str, str]:
    """SHA-256 of `weight_files`, read from this machine, and compared with what the Hub recorded for them.

    Raises:
        CorruptFileError: a file differs from its LFS digest.
    """
    result = {}
    for file in weight_files(source):
        path = fetch(source.pinned, file)
        result[file] = sha256_file(path, progress)
        recorded = source.pinned.files[file].sha256
        if recorded is not None and recorded != result[file]:
            raise CorruptFileError(
                f"{source.pinned.label}: {file} differs from the Hub's digest ({recorded[:12]}...); delete "
                f"{os.path.realpath(path)} and run again."
            )
    return result


class Digester:
    """Digests of sources, computed on one thread while other work goes on; leaving the `with` block stops it.

    A source is known by its object: ask with the one that `start` got.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hfmerge-digest")
        self._futures: dict[int, tuple[Source, Future[dict[str, str]]]] = {}
        self._stopped = False

    def __enter__(self) -> Digester:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, source: Source) -> None:
        """Begin with a source if all its files are on this machine already; otherwise `result` does it later."""
        places = [place for place in (source, source.beneath) if place is not None]
        here = all(cached(place.pinned, file) is not None for place in places for file in weight_files(place))
        if here and id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))

    def result(self, source: Source) -> Future[dict[str, str]]:
        """Digests of a source's files, those of the model beneath an adapter marked `+`; begun if they were not."""
        if id(source) not in self._futures:
            self._futures[id(source)] = (source, self._pool.submit(self._digests, source))
        return self._futures[id(source)][1]

    def _digests(self, source: Source) -> dict[str, str]:
        found = digests(source, self._tick)
        if source.beneath is not None:
            found |= {f"+{name}": value for name, value in digests(source.beneath, self._tick).items()}
        return found

    def _tick(self, count: int) -> None:
        if self._stopped:
            raise CancelledError
