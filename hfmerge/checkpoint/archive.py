"""Kept copies of sources: one zip file per model, from which its files are restored byte for byte.

`weights/NAME` is a safetensors file: its header, then each tensor in pieces of whole rows. A piece is XORed with the
same rows of the base's tensor where the model changes one of the same dtype and shape, cut into planes (all first
bytes of its elements, all second bytes, ...), and deflated by run lengths and frequencies alone: a fine-tune leaves
signs, exponents and untouched rows equal, so that planes are zeros or noise, and nothing longer repeats.
`files/NAME` is any other file. A leading `+` marks files of the model beneath an adapter. `manifest.json` comes last.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from hfmerge.checkpoint.headers import TensorEntry, header_length, parse_header, read_header
from hfmerge.checkpoint.model import Model, weight_files
from hfmerge.checkpoint.reader import Reader, Rows
from hfmerge.checkpoint.schema import tensor_name
from hfmerge.checkpoint.side_files import side_files
from hfmerge.checkpoint.writer import bytes_of, disk_errors
from hfmerge.errors import CorruptFileError
from hfmerge.hashing import CHUNK, canonical_json
from hfmerge.hub.download import fetch
from hfmerge.hub.reference import Snapshot
from hfmerge.user_files import private_file, private_folder
from hfmerge.validation.limits import DIRECTORY_BYTES, MANIFEST_BYTES, MB, MEMBERS, UNPACKED
from hfmerge.validation.strict_json import read_json
from hfmerge.validation.values import amount, line, nullable, one_of, plain_text, record, safe_path, sha256, table


if TYPE_CHECKING:
    import numpy as np

_SCHEMA = "hfmerge/kept/1"
MANIFEST = "manifest.json"
_PIECE = 1 << 20
"""Bytes that are cut into planes at a time; of a tensor with longer rows, one row."""
TEXTS = ("README.md", "LICENSE*", "NOTICE*", "merge_history/*.json", "*.index.json")
"""Text files kept beside weights and side files: they describe the model, its licence and its content."""
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Manifest:
    """The manifest of an archive: the files that it holds.

    Attributes:
        base: identity of the model without whose tensors it cannot be unpacked; None if it needs none.
        files: path, with a leading `+` for the model beneath an adapter -> (bytes, SHA-256).
        against: path of a weight file -> its tensor -> the base's stored key it was XORed with.
    """

    base: str | None
    files: Mapping[str, tuple[int, str]]
    against: Mapping[str, Mapping[str, str]]

    def to_bytes(self) -> bytes:
        """The manifest as the archive holds it, in bytes."""
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return canonical_json({"schema": _SCHEMA, "base": self.base, "files": files, "against": self.against})


def kept_files(source: Model, *, remote_code: bool) -> list[str]:
    """The files of a source that are kept: all that a merge reads, or says something about it; in order."""
    snapshot = source.snapshot
    texts = [name for name in snapshot.files if any(PurePosixPath(name).match(p) and _level(name, p) for p in TEXTS)]
    return sorted({*weight_files(source), *side_files(snapshot, remote_code=remote_code), *texts})


def _level(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/")


def write_archive(
    path: Path,
    source: Model,
    against: Mapping[str, Mapping[str, str]],
    base: Reader,
    base_identity: str,
    *,
    remote_code: bool,
) -> Manifest:
    """Write the archive of a source; equal sources and bases give equal bytes where zlib is the same.

    Args:
        against: weight file (`+` for the model beneath) -> its tensor -> the base's stored key of the same dtype and
            shape.
        base: reads the base.
        base_identity: for the manifest.

    Raises:
        SourceError: a file cannot be read. OutputError: the disk refused.
    """
    files: dict[str, tuple[int, str]] = {}
    used: dict[str, dict[str, str]] = {}
    with disk_errors(path), zipfile.ZipFile(private_file(path), "w") as archive:
        for mark, place in (("", source), ("+", source.beneath)):
            for name in kept_files(place, remote_code=remote_code) if place is not None else ():
                assert place is not None
                weights = name.endswith(".safetensors") and name in weight_files(place)
                info = zipfile.ZipInfo(f"{'weights' if weights else 'files'}/{mark}{name}", EPOCH)
                info.compress_type = zipfile.ZIP_STORED if weights else zipfile.ZIP_DEFLATED
                digest = hashlib.sha256()
                with archive.open(info, "w", force_zip64=True) as out:
                    where = f"{place.snapshot.label}: {name}"
                    if weights:
                        pairs = dict(against.get(mark + name, {}))
                        size = _pack(fetch(place.snapshot, name), where, pairs, base, out, digest.update)
                        if pairs:
                            used[mark + name] = pairs
                    else:
                        size = _copy(place.snapshot, name, out, digest.update)
                files[mark + name] = (size, digest.hexdigest())
        manifest = Manifest(base_identity if used else None, files, used)
        info = zipfile.ZipInfo(MANIFEST, EPOCH)
        archive.writestr(info, manifest.to_bytes(), zipfile.ZIP_DEFLATED)
    return manifest


def _copy(snapshot: Snapshot, name: str, out: IO[bytes], note: Callable[[bytes], object]) -> int:
    size = 0
    with open(fetch(snapshot, name), "rb") as file:
        while data := file.read(CHUNK):
            note(data)
            size += out.write(data)
    return size


def _pack(
    path: Path, where: str, pairs: Mapping[str, str], base: Reader, out: IO[bytes], note: Callable[[bytes], object]
) -> int:
    """Write one weight file in the archive's form; its bytes."""
    header = read_header(path, where)
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    size = header.end
    with open(path, "rb") as file:
        head = file.read(header.end)
        note(head)
        out.write(deflate.compress(head))
        for key in sorted(header.entries, key=lambda key: header.offsets[key]):
            entry = header.entries[key]
            for rows, count in _pieces(entry):
                data = file.read(count)
                if len(data) != count:
                    raise CorruptFileError(f"{where}: {key} cannot be read whole; get the file again.")
                note(data)
                size += count
                out.write(deflate.compress(_planes(_xored(data, base, pairs.get(key), rows), entry)))
        out.write(deflate.flush())
    return size


def _pieces(entry: TensorEntry) -> Iterator[tuple[Rows | None, int]]:
    """Rows of a tensor that are packed together (None: all of it), and their bytes."""
    if not entry.nbytes:
        return
    if not entry.shape:
        yield None, entry.nbytes
        return
    each = entry.nbytes // entry.shape[0]
    step = max(1, _PIECE // each)
    for at in range(0, entry.shape[0], step):
        stop = min(at + step, entry.shape[0])
        yield (at, stop), (stop - at) * each


def _xored(data: bytes, base: Reader, key: str | None, rows: Rows | None) -> np.ndarray:
    import numpy as np

    own = np.frombuffer(data, np.uint8)
    if key is None:
        return own
    other = np.frombuffer(bytes_of(base.stored(key, rows)), np.uint8)
    return np.bitwise_xor(own, other)


def _width(entry: TensorEntry) -> int:
    count = math.prod(entry.shape)
    return entry.nbytes // count if entry.nbytes % count == 0 else 1


def _planes(piece: np.ndarray, entry: TensorEntry) -> bytes:
    return piece.reshape(-1, _width(entry)).T.tobytes()


def _elements(planes: bytes, entry: TensorEntry) -> bytes:
    """Inverse of `_planes`."""
    import numpy as np

    return np.frombuffer(planes, np.uint8).reshape(_width(entry), -1).T.tobytes()


_KIND = record(
    {
        "schema": one_of((_SCHEMA,)),
        "base": nullable(line),
        "files": table(
            lambda name: safe_path(line(name).removeprefix("+")), record({"size": amount, "sha256": sha256})
        ),
        "against": table(plain_text, table(tensor_name, tensor_name)),
    }
)


def read_manifest(path: Path) -> Manifest:
    """What an archive, whose digest is known to be right, holds.

    Raises:
        CorruptFileError: it is none of ours, names files outside of its model, or is beyond a limit.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            MEMBERS.check(len(archive.filelist))
            MANIFEST_BYTES.check(archive.getinfo(MANIFEST).file_size)
            data = read_json(archive.read(MANIFEST), MANIFEST_BYTES)
        _KIND(data)
        MEMBERS.check(len(data["files"]))
    except (*_BROKEN, OSError) as error:  # an offset that is none makes the system refuse to go there
        raise CorruptFileError(f"{path}: not a kept copy of a source ({type(error).__name__}: {error}).") from error
    files = {name: (item["size"], item["sha256"]) for name, item in data["files"].items()}
    return Manifest(data["base"], files, data["against"])


_BROKEN = (zipfile.BadZipFile, zlib.error, LookupError, ValueError, RuntimeError, EOFError)
"""Errors that zipfile and readers of its members raise for a file that is no zip file, or an encrypted one."""


def _check_directory(path: Path) -> None:
    """Look at the end of a zip file, as `write_archive` writes it, before its directory is read whole.

    Raises:
        ValueError: it ends otherwise, or its directory is beyond the limit.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 98))
        tail = file.read().rjust(98, b"\0")
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise ValueError("it is not a whole zip file")
    size = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\6\7":  # of more than 4 GB
        size = int.from_bytes(tail[-58:-50], "little")
    DIRECTORY_BYTES.check(size)


def check_total(manifest: Manifest, path: Path, merge: int) -> None:
    """Refuse an archive whose files together are out of all proportion to the merge (of `merge` bytes) it is for.

    Raises:
        CorruptFileError: it declares more.
    """
    total = sum(size for size, _ in manifest.files.values())
    try:
        UNPACKED.check(max(0, total - 16 * merge) // MB)
    except ValueError as error:
        raise CorruptFileError(f"{path}: {error}.") from error


def unpack(path: Path, manifest: Manifest, targets: Mapping[str, Path], base: Callable[[], Reader]) -> None:
    """Restore files of an archive, each whole or not at all.

    Args:
        targets: name in the manifest -> where the file goes.
        base: gives a reader of the manifest's base; asked for only if it is needed.

    Raises:
        CorruptFileError: a restored file is longer than, or differs from, the packed file; names it. OutputError: the
            disk refused.
    """
    with zipfile.ZipFile(path) as archive:
        for name, place in targets.items():
            size, digest = manifest.files[name]
            growing = place.with_name(f".{place.name}.hfmerge-{os.getpid()}")
            found = hashlib.sha256()
            packed = f"weights/{name}" in archive.namelist()
            try:
                with disk_errors(place):
                    private_folder(place.parent)
                    member = archive.open(f"{'weights' if packed else 'files'}/{name}")
                    with member as data, open(private_file(growing), "wb") as out:
                        for piece in _unpacked(data, name, size, manifest, base) if packed else _reads(data, size):
                            found.update(piece)
                            out.write(piece)
                    if found.hexdigest() == digest:
                        os.replace(growing, place)
            except _BROKEN as error:
                raise CorruptFileError(f"{path}: {name} cannot be unpacked ({error}).") from error
            finally:
                growing.unlink(missing_ok=True)
            if found.hexdigest() != digest:
                raise CorruptFileError(
                    f"{path}: {name} unpacks to other bytes than were packed; the base is not {manifest.base}."
                )


def _reads(data: IO[bytes], size: int) -> Iterator[bytes]:
    """The pieces of a file that is to have this size. Raises ValueError where it is longer."""
    while piece := data.read(min(CHUNK, size + 1)):
        size -= len(piece)
        if size < 0:
            raise ValueError("it is longer than the manifest says")
        yield piece


def _unpacked(
    data: IO[bytes], name: str, size: int, manifest: Manifest, base: Callable[[], Reader]
) -> Iterator[bytes]:
    """The pieces of a weight file."""
    inflated = _Inflated(data)
    head = inflated.read(8)
    head += inflated.read(header_length(head, size, name) - 8)
    header = parse_header(head, name, size, name)
    yield head
    pairs = manifest.against.get(name, {})
    for key in sorted(header.entries, key=lambda key: header.offsets[key]):
        entry = header.entries[key]
        if key in pairs:
            other = base().source.tensors[pairs[key]]
            if (other.dtype, other.shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{key} was packed with a tensor of another shape")
        for rows, count in _pieces(entry):
            own = _elements(inflated.read(count), entry)
            yield _xored(own, base(), pairs[key], rows).tobytes() if key in pairs else own


class _Inflated:
    """Reads a deflated stream some bytes at a time."""

    def __init__(self, data: IO[bytes]):
        self._data, self._inflate = data, zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, count: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            ValueError: the stream ends before.
        """
        parts = []
        while count:
            more = self._inflate.unconsumed_tail or self._data.read(CHUNK)
            part = self._inflate.decompress(more, count)
            if not part and not more:
                raise ValueError("it ends too soon")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
