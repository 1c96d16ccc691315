"""An accelerator that is none, for machines without: its tensors lie in the CPU's memory, and are told apart.

As on a real one, tensors of two devices do not meet in an operation, memory ends, and what is on the device has to be
brought back before it is written. Arithmetic is the CPU's, so bytes can be compared.

    python -c CODE REPORT [NAME=VALUE...] -- JSON

runs the command lines in JSON one after another and writes to REPORT what the device saw. Names: `memory`, the bytes
that the device says it has; `free`, those it has; `late`, how many allocations find room before it counts; `die`, the
number of the allocation at which the process is killed; `devices`, how many there are, 2 unless told otherwise (torch
computes gradients on the first alone); `company`: eigenvalues come out a little differently, by how many matrices are
taken apart in one call.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from fixtures.processes import Forked
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


CODE = "import sys; from pretended import main; sys.exit(main())"
ON = ("--device", "pretend")
"""How a command asks for the device."""
NAME = "Pretended 1"
DECOMPOSITIONS = ("aten::_linalg_eigh", "aten::linalg_qr", "aten::linalg_cholesky_ex")


class Memory:
    """What lies on the device, and what was done there."""

    def __init__(self) -> None:
        self.size, self.free, self.late, self.die = 1 << 34, 1 << 34, 0, 0
        self.devices = 2
        self.held: dict[int, list[int]] = {}
        self.now = self.most = self.times = 0
        self.company = 0
        self.done: Counter[str] = Counter()
        self.together: Counter[str] = Counter()
        self.places: set[str] = set()
        self.precisions: set[str] = set()
        self.orders: set[bool] = set()
        self.lock = threading.RLock()

    def take(self, raw: torch.Tensor) -> int:
        """Count a tensor's memory, once for all that share it; the address by which `give` knows it."""
        storage = raw.untyped_storage()
        with self.lock:
            known = self.held.get(storage.data_ptr())
            if known is not None:
                known[0] += 1
                return storage.data_ptr()
            self.times += 1
            if self.times == self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.times > self.late and self.now + storage.nbytes() > self.free:
                raise torch.OutOfMemoryError(f"{storage.nbytes()} bytes more than {self.free - self.now} free ones")
            self.held[storage.data_ptr()] = [1, storage.nbytes()]
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            return storage.data_ptr()

    def give(self, address: int) -> None:
        """A tensor is gone."""
        with self.lock:
            self.held[address][0] -= 1
            if not self.held[address][0]:
                self.now -= self.held.pop(address)[1]


MEMORY = Memory()


class Module:
    """What torch asks of a kind of device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        return None

    def device_count(self) -> int:
        return MEMORY.devices

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=MEMORY.size)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        return None

    def empty_cache(self) -> None:
        MEMORY.done["empty_cache"] += 1


class Pretended(torch.Tensor):
    """A tensor that says it is on the device; `raw` is where it really lies."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device) -> Pretended:
        address = MEMORY.take(raw)
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        self.raw = raw
        weakref.finalize(self, MEMORY.give, address)
        MEMORY.places.add(str(device))
        return self

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name()
        MEMORY.done[name] += 1
        if name == "aten::mm":
            MEMORY.precisions.add(torch.get_float32_matmul_precision())
        if name == "aten::embedding_dense_backward":
            # a sum that real devices make in any order, unless told otherwise
            MEMORY.orders.add(torch.are_deterministic_algorithms_enabled())
        if name == "aten::copy_":
            _raw(args[0]).copy_(_raw(args[1]))
            return args[0]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        # torch lets numbers meet tensors of any device
        places = {str(tensor.device) for tensor in tensors if tensor.dim() or isinstance(tensor, Pretended)}
        if len(places) > 1:
            raise RuntimeError(f"{name}: tensors of {sorted(places)} meet")
        device = next(tensor.device for tensor in tensors if isinstance(tensor, Pretended))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            kwargs["device"] = "cpu"
        elif name == "aten::_to_copy":
            kwargs["device"] = "cpu"
        found = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        if name.startswith(DECOMPOSITIONS) and args[0].dim() == 3:
            MEMORY.together[name] += len(args[0])
            if MEMORY.company and name == "aten::_linalg_eigh":
                found = (found[0] * (1.0 + 0.01 * len(args[0])), found[1])
        if device.type == "cpu":
            return found
        known = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, Pretended)}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            same = known.get(id(value))
            return Pretended(value, device) if same is None else same

        return tree_map(wrapped, found)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretended) else value


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **others: Any) -> torch.Tensor:
    return Pretended(torch.empty(size, dtype=dtype), torch.device(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **others: Any) -> torch.Tensor:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))


def _copy_from(given: torch.Tensor, into: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _raw(into).copy_(_raw(given))
    return into


def beside(folder: Path, calls: list[list[str]], **settings: int) -> tuple[tiny.Run, dict[str, Any]]:
    """Run commands beside the device, in a process of their own; what it said, and what the device saw."""
    report = folder / f"report-{len(list(folder.glob('report-*')))}"
    given = [f"{name}={value}" for name, value in settings.items()]
    process = Forked("-c", CODE, str(report), *given, "--", json.dumps(calls), together=False)
    run = tiny.finish(process)
    found = report.with_name(f"{report.name}.0")
    return run, json.loads(found.read_text()) if found.exists() else {}


def main() -> int:
    """Run commands beside the device; see the module."""
    from hfmerge.cli.main import main as run

    at = sys.argv.index("--")
    for setting in sys.argv[2:at]:
        name, _, value = setting.partition("=")
        setattr(MEMORY, {"memory": "size"}.get(name, name), int(value))
    # inference tensors cannot be wrapped
    torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]
    _setup_privateuseone_for_python_backend("pretend", Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.set_float32_matmul_precision("high")
    # what is only garbage because it refers to itself counts as left
    gc.disable()
    code = 0
    for arguments in json.loads(sys.argv[at + 1]):
        code = code or run(arguments)
    report = {
        "left": MEMORY.now, "most": MEMORY.most, "times": MEMORY.times, "done": dict(MEMORY.done),
        "places": sorted(MEMORY.places), "precisions": sorted(MEMORY.precisions), "together": dict(MEMORY.together),
        "orders": sorted(MEMORY.orders), "after": torch.get_float32_matmul_precision(),
    }  # fmt: skip
    rank = os.environ.get("RANK", "0")
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(report), encoding="utf-8")
    return code
