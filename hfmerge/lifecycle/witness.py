"""A witness: an append-only log of what was verified and certified, each record naming the SHA-256 of the one before.

The log shows its owner that somebody rewrote the ledger of a published merge. The new ledger may have a correct chain,
but the log names a digest that is not in it. The log has one JSON object per line, keys sorted:

    schema       hfmerge/log/1
    number       1 for the first
    previous     SHA-256 of the line before, without its end; null for the first
    time         UTC
    did          verified; certified; accepted: verified, and a history that was rewritten was taken as the true one
    merge        name; place (see `seen`); commit, null for a folder
    ledger       file, SHA-256 and step of the last entry
    certificate  SHA-256 of the certificate that was made or checked; null

The chain shows that a record was changed, left out or inserted. It does not show that the end was cut off or that the
whole log was rewritten. The head shows that: it is the digest of the last line. The user's home keeps the head, and
`verify` prints it. Writers take turns by a lock on the file. A killed writer leaves a line without an end; the next
writer repairs it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hfmerge.errors import LedgerError, OutputError
from hfmerge.hashing import sha256_bytes
from hfmerge.ledger.entry import LEDGER_FOLDER
from hfmerge.ledger.repository import Merged
from hfmerge.ledger.seen import digests_of, first_apart, may_be_older, place_of, recall_seen, remember_steps
from hfmerge.validation.limits import LOG_BYTES, LOG_LINE
from hfmerge.validation.strict_json import read_json, read_limited_stream


_SCHEMA = "hfmerge/log/1"
DID = ("verified", "certified", "accepted")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """One record of a log; see the module's docstring."""

    number: int
    previous: str | None
    time: str
    did: str
    merge: dict[str, Any]
    ledger: dict[str, Any]
    certificate: str | None

    def to_line(self) -> bytes:
        """The record as its line, without the end."""
        value = {"schema": _SCHEMA, **asdict(self)}
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Inverse of `to_line`.

        Raises:
            ValueError, KeyError, TypeError: not a record as hfmerge writes one.
        """
        raw = read_json(line, LOG_LINE)
        if raw.pop("schema") != _SCHEMA:
            raise ValueError(f"is not of the schema {_SCHEMA}")
        record = cls(**raw)
        merge, ledger = record.merge, record.ledger
        step = ledger["step"]
        good = (
            {*merge} == {"name", "place", "commit"}
            and all(isinstance(merge[key], str) for key in ("name", "place"))
            and (merge["commit"] is None or re.fullmatch("[0-9a-f]{40}", merge["commit"]))
            and {*ledger} == {"file", "sha256", "step"}
            and type(record.number) is type(step) is int
            and step > 0
            and ledger["file"] == f"{LEDGER_FOLDER}/{step:04d}.json"
            and _SHA256.fullmatch(ledger["sha256"])
            and record.did in DID
            and (record.certificate is None or _SHA256.fullmatch(record.certificate))
            and datetime.strptime(record.time, "%Y-%m-%dT%H:%M:%SZ")
        )
        if not good or record.to_line() != line:
            raise ValueError("is not a record as hfmerge writes one")
        return record


@dataclass(frozen=True)
class Log:
    """A log that was read from its file.

    Attributes:
        path: its file.
        records: whole records, oldest first, their chain checked.
        head: SHA-256 of the last line; None of an empty log.
        whole: bytes of the file that are whole lines.
        torn: bytes behind them.
        missing_end: what is torn is a whole record that lacks nothing but the end of its line; it is in `records`.
    """

    path: Path
    records: tuple[Record, ...]
    head: str | None
    whole: int
    torn: bytes = b""
    missing_end: bool = False

    def problem(self, merged: Merged) -> str | None:
        """What the log knows of a merge that does not hold of it now, in words; None if all holds."""
        mine = [record for record in self.records if record.merge["place"] == place_of(merged.snapshot)]
        last = max((i for i, record in enumerate(mine) if record.did == "accepted"), default=0)
        seen = {(record.ledger["step"], record.ledger["sha256"]): record for record in reversed(mine[last:])}
        apart = first_apart(seen, digests_of(merged), older=may_be_older(merged.snapshot))
        if apart is None:
            return None
        step, then, now = apart
        record = seen[step, then]
        found = f"it has {now[:12]}... now" if now else f"the ledger ends with step {len(merged.entries)} now"
        return (
            f"the history was rewritten at step {step} or before: record {record.number} of {self.path}, of "
            f"{record.time}, knows step {step} with the digest {then[:12]}..., and {found}"
        )

    def summary(self, merged: Merged) -> str:
        """The log in a few words."""
        mine = [record for record in self.records if record.merge["place"] == place_of(merged.snapshot)]
        torn = f"; {self._repair()}" if self.torn else ""
        return f"{len(self.records)} records hold, {len(mine)} of them of this merge{torn}"

    def _repair(self) -> str:
        what = (
            "was incomplete and was completed"
            if self.missing_end
            else f"was incomplete ({len(self.torn)} bytes) and was deleted"
        )
        return f"its last line {what}"


def read_log(path: str | Path) -> Log:
    """Read a log and check its chain. A file that does not exist is an empty log.

    Raises:
        LedgerError: a record was changed or is missing; names it. OutputError: the file cannot be read.
    """
    file = Path(path).expanduser()
    if not file.exists():
        return _checked(file, b"")
    with _held(file, fcntl.LOCK_SH) as handle:
        return _checked(file, _bytes(file, handle))


def append(path: str | Path, merged: Merged, did: str, *, certificate: str | None = None) -> str:
    """Check the log again and add a record about a merge; gives in words what was added.

    Args:
        did: one of `DID`. "accepted" makes earlier records of the merge invalid.
        certificate: SHA-256 of the certificate that was made or checked.

    Raises:
        LedgerError: the log is broken, or knows another history. OutputError: the file cannot be written.
    """
    file = Path(path).expanduser()
    snapshot, last = merged.snapshot, merged.last
    with _held(file, fcntl.LOCK_EX) as handle:
        log = _checked(file, _bytes(file, handle))
        if did != "accepted" and (problem := log.problem(merged)) is not None:
            raise LedgerError(f"{snapshot.label}: {problem}.")
        record = Record(
            number=len(log.records) + 1,
            previous=log.head,
            time=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            did=did,
            merge={"name": snapshot.name, "place": place_of(snapshot), "commit": snapshot.commit},
            ledger={"file": last.file, "sha256": digests_of(merged)[-1], "step": last.step},
            certificate=certificate,
        )
        line = _line(record)
        _write(file, handle, log, line + b"\n")
        note = remember_steps(_place(file), {record.number: sha256_bytes(line)})
    kept = f"; {note}" if note is not None else ""
    return f"{log.summary(merged)}; record {record.number} was added, and the head is {sha256_bytes(line)}{kept}"


def _line(record: Record) -> bytes:
    try:
        line = record.to_line()
        LOG_LINE.check(len(line))
    except ValueError as error:
        raise LedgerError(
            f"{record.merge['name']!r}: cannot be named in a log ({error}); rename the folder."
        ) from error
    return line


def _write(file: Path, handle: int, log: Log, data: bytes) -> None:
    """Repair an unfinished last line and add a whole line; if that fails, add nothing."""
    end = log.whole + (len(log.torn) if log.missing_end else 0)
    data = b"\n" + data if log.missing_end else data
    try:
        os.ftruncate(handle, end)
        written = 0
        while written < len(data):
            written += os.pwrite(handle, data[written:], end + written)
        os.fsync(handle)
        if end == 0:
            _sync_folder(file.absolute().parent)
    except OSError as error:
        os.ftruncate(handle, end)
        raise OutputError(f"{file}: the log cannot be written ({error.strerror}); nothing was added.") from error


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file outlive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _held(file: Path, how: int) -> Iterator[int]:
    """Open the log's file under a lock; a missing file is created if it is to be written."""
    writes = how == fcntl.LOCK_EX
    if file.exists() and not file.is_file():
        raise OutputError(f"{file}: is not a regular file; choose another one for the log.")
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY, 0o600)
    except OSError as error:
        todo = "choose a file that can be written" if writes else "choose a file that can be read"
        raise OutputError(f"{file}: cannot be opened as a log ({error.strerror}); {todo}.") from error
    try:
        fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)


def _bytes(file: Path, handle: int) -> bytes:
    try:
        LOG_BYTES.check(os.fstat(handle).st_size)
        with open(handle, "rb", closefd=False) as reader:
            return read_limited_stream(reader, LOG_BYTES)
    except ValueError as error:
        raise LedgerError(f"{file}: {error}; begin another log.") from error
    except OSError as error:
        raise OutputError(f"{file}: cannot be read as a log ({error.strerror}).") from error


def _checked(file: Path, data: bytes) -> Log:
    """The log in a file's bytes, after all its records, their chain and the head that was seen before were checked."""
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    lines = data[:whole].split(b"\n")[:-1]
    records: list[Record] = []
    head: str | None = None
    for number, line in enumerate(lines, 1):
        records.append(_next(file, line, number, head))
        head = sha256_bytes(line)
    missing_end = False
    if torn:
        try:
            LOG_LINE.check(len(torn))
        except ValueError as error:
            raise LedgerError(f"{file}: what follows record {len(records)} {error}; it is not a record.") from error
        try:
            records.append(_next(file, torn, len(records) + 1, head))
            head, missing_end = sha256_bytes(torn), True
        except LedgerError:
            pass  # the first part of a record
    digests = [*(record.previous for record in records[1:]), head] if records else []
    seen = recall_seen(_place(file))
    apart = first_apart(seen.steps.items(), [str(one) for one in digests], older=False) if seen is not None else None
    if apart is not None:
        what = "is another one now" if apart[2] is not None else f"is missing: the log ends with record {len(records)}"
        raise LedgerError(f"{file}: record {apart[0]}, which was written here, {what}; restore the log from a copy.")
    return Log(file, tuple(records), head, whole, torn, missing_end)


def _next(file: Path, line: bytes, number: int, previous: str | None) -> Record:
    """The record of a line, which must be this one and follow the one before.

    Raises:
        LedgerError: it is not.
    """
    try:
        record = Record.from_line(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"{file}: line {number} is not a record of the log ({error}); it was changed.") from error
    if (record.number, record.previous) != (number, previous):
        raise LedgerError(
            f"{file}: record {number} does not follow record {number - 1}; one of the two was changed, or records "
            "between them are missing."
        )
    return record


def _place(file: Path) -> str:
    """The name under which the log's own head is remembered."""
    return f"log:{sha256_bytes(os.path.realpath(file).encode('utf-8', 'surrogateescape'))}"
