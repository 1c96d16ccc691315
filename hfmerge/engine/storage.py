"""Finds out which machines share a disk, and divides the weight files: without a shared disk, each makes whole files.

If all processes see one disk (one machine, or a file system that all mount), this module changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hfmerge.checkpoint.writer import header_bytes
from hfmerge.engine.device import Device
from hfmerge.engine.environment import differences, environment
from hfmerge.engine.partition import Chunk, cost
from hfmerge.engine.plan import Param, Plan, folder_of
from hfmerge.engine.ranks import Ranks, assign_owners
from hfmerge.errors import HfMergeError, OutputError
from hfmerge.hashing import canonical_json, sha256_bytes


STORAGE = ("auto", "shared", "local")
"""Values of `storage`: find out whether the machines share the output's disk; they do; they do not."""
LOOK = 3.0
"""Seconds that a process looks for the file another has written; network file systems show it late."""


def find_disks(ranks: Ranks, place: Path, storage: str) -> Ranks:
    """The same processes with a note on which of them write to one disk.

    Args:
        place: folder of rank 0 in which it would write, or which it would make.
        storage: one of `STORAGE`; "auto": rank 0 writes a file there and the others look for it.

    Raises:
        HfMergeError: not one of `STORAGE`. OutputError: rank 0 cannot write there.
    """
    if storage not in STORAGE:
        raise HfMergeError(f"storage {storage!r}: choose {', '.join(STORAGE)}.")
    if ranks.world == 1 or storage == "shared":
        return ranks
    # torchrun numbers the machines by their launchers; another launcher leaves the host's name to tell them apart
    names = ranks.gather(os.environ.get("GROUP_RANK") or socket.gethostname())
    machines = sorted(set(names), key=names.index)
    if len(machines) == 1 or (storage == "auto" and _all_see(ranks, place)):
        return ranks
    return dataclasses.replace(ranks, disks=tuple(machines.index(name) for name in names))


def _all_see(ranks: Ranks, place: Path) -> bool:
    mark = ranks.on_main(lambda: _mark(place))
    try:
        return all(ranks.gather(_appears(mark)))
    finally:
        if ranks.main:
            mark.unlink(missing_ok=True)


def _mark(place: Path) -> Path:
    folder = next(one for one in (place.absolute(), *place.absolute().parents) if one.is_dir())
    mark = folder / f".hfmerge-{secrets.token_hex(16)}"
    try:
        mark.touch(exist_ok=False)
    except OSError as error:
        raise OutputError(f"{place}: cannot write there: {error.strerror}.") from error
    return mark


def _appears(mark: Path) -> bool:
    end = time.monotonic() + LOOK
    while not mark.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def disk_of_files(plan: Plan, ranks: Ranks) -> dict[str, int]:
    """The disk on which each weight file of the output is made, balanced by cost; equal on every rank.

    Files with tensors tied to one another go together, since one visit writes both.
    """
    files = list(dict.fromkeys(param.file for param in plan.params))
    if ranks.disk_count == 1:
        return dict.fromkeys(files, 0)
    group = {file: file for file in files}
    at = {param.key: param.file for param in plan.params}
    for param in plan.params:
        if param.owner is not None:
            one, other = group[param.file], group[at[param.owner]]
            group = {file: one if name == other else name for file, name in group.items()}
    costs = dict.fromkeys(group.values(), 0.0)
    for param in plan.params:
        costs[group[param.file]] += cost(plan, Chunk(param)) if param.touched else float(param.slot.nbytes)
    owners = dict(zip(costs, assign_owners(list(costs.values()), ranks.disk_count), strict=True))
    return {file: owners[group[file]] for file in files}


def own_params(plan: Plan, ranks: Ranks) -> tuple[Param, ...]:
    """The parameters whose files are made on this process's disk."""
    at = disk_of_files(plan, ranks)
    return tuple(param for param in plan.params if at[param.file] == ranks.disk)


def for_machines(plan: Plan, ranks: Ranks, device: Device | None = None) -> Plan:
    """The plan as several machines can carry it out: without a common disk no state is kept, since it is one file.

    Args:
        device: what computes in this process; None: the CPU.

    Raises:
        HfMergeError: a machine sees other models than rank 0, as folders of one name may differ.
    """
    if ranks.world == 1:
        return plan
    warnings = list(plan.warnings)
    everyone = ranks.gather((environment(device), _fingerprint(plan)))
    for rank, (there, fingerprint) in enumerate(everyone):
        if fingerprint != everyone[0][1]:
            raise HfMergeError(
                f"process {rank} finds other models than process 0 under the same names; put the same folders on all "
                "machines, or name models by Hub ID."
            )
        if apart := differences(there, everyone[0][0]):
            warnings.append(
                f"process {rank} computes with {apart[0]} for process 0: a replay on one machine may differ in the "
                "last bits."
            )
    if ranks.disk_count == 1:
        return dataclasses.replace(plan, warnings=tuple(warnings))
    if plan.keep:
        warnings.append(
            "the machines share no disk, so the carried state is not kept; `add` and `unmerge` will read the sources "
            "of all models since the last kept one."
        )
    idle = ranks.disk_count - len(set(disk_of_files(plan, ranks).values()))
    if idle:
        warnings.append(
            f"{idle} of {ranks.disk_count} machines have nothing to do: the base has too few weight files."
        )
    others = sum(p.slot.nbytes for p in plan.params) - sum(p.slot.nbytes for p in own_params(plan, ranks))
    need = plan.estimate
    # copies of sources are made on rank 0's disk
    here = need.sources if ranks.disk == 0 else 0
    disk = max(0, need.disk - need.state - others - need.sources + here)
    estimate = dataclasses.replace(need, output=need.output - others, state=0, disk=disk, sources=here)
    return dataclasses.replace(plan, keep=(), estimate=estimate, warnings=tuple(warnings))


def _fingerprint(plan: Plan) -> str:
    """A digest of everything that machines must agree on; paths and caches may differ."""
    params = [
        [p.key, p.file, p.slot.dtype, list(p.slot.shape), p.mode, p.owner, list(p.ranks), p.vocab_axis]
        for p in plan.params
    ]
    heads = [[model, head.slug, list(head.labels)] for model, head in plan.heads]
    sources = [[s.name, s.snapshot.commit] for s in (plan.base, *(delta.source for delta in plan.deltas))]
    prior = plan.prior.count if plan.prior else 0
    return sha256_bytes(canonical_json([params, heads, sources, list(plan.side_files), prior, list(plan.keep)]))


@contextlib.contextmanager
def stand_ins(plan: Plan, folder: Path, ranks: Ranks) -> Iterator[None]:
    """While the block runs, rank 0's folder has the headers of the weight files that other machines made."""
    made: list[Path] = []
    try:
        if ranks.main:
            at = disk_of_files(plan, ranks)
            for file, slots in plan.slots().items():
                if at[file] != ranks.disk:
                    header, _ = header_bytes(slots, {"format": "pt"}, folder_of(file))
                    path = folder / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "xb") as handle:
                        made.append(path)
                        handle.write(header)
                        # a hole: it has the length that readers check, and takes no space
                        handle.truncate(len(header) + sum(slot.nbytes for slot in slots.values()))
        yield
    finally:
        for path in made:
            path.unlink()
