"""Folds LoRA adapters of a Llama shape with OPCM, as factors and as dense matrices; prints JSON for `lora.py`.

`python -m benchmarks.fold_adapters full|quick ADAPTERS THREADS`. The factors are folded for every matrix of all
layers; the dense path, which takes an hour for the model, for one matrix of each shape.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import torch

from benchmarks.kinds import KINDS, QUICK, llama_matrices, number
from benchmarks.models import ADAPTER_RANK
from hfmerge.methods.opcm import OPCM
from hfmerge.task_vector import Dense, LowRank, TaskVector


def adapters(shape: tuple[int, int], count: int, seed: int) -> list[LowRank]:
    """Random factors of trained size: `up` is small beside `down`, as it starts at zero."""
    gen = torch.Generator().manual_seed(seed)
    m, n = shape
    return [
        LowRank(
            0.01 * torch.randn(m, ADAPTER_RANK, generator=gen), torch.randn(ADAPTER_RANK, n, generator=gen) / n**0.5
        )
        for _ in range(count)
    ]


def fold(taus: list[TaskVector]) -> tuple[TaskVector, float]:
    """The accumulator after all task vectors, and the seconds it took."""
    method = OPCM()
    start = time.perf_counter()
    carry = None
    for tau in taus:
        carry = method.step(carry, tau, 1.0, matrix=True)
    seconds = time.perf_counter() - start
    assert carry is not None
    return method.emit(carry, [1.0] * len(taus), matrix=True), seconds


def bytes_read() -> int:
    """What this process has read from files so far, the reading of that number left out."""
    with open("/proc/self/io", "rb", buffering=0) as file:
        text = file.read(4096)
    return int(text.split(b"rchar: ")[1].split()[0])


def main() -> None:
    """Parse, fold, print."""
    size, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    config = (QUICK if size == "quick" else KINDS)["llama-1b"].config
    layers, shapes = number(config, "num_hidden_layers"), list(llama_matrices(config).values())
    fold(list(adapters((64, 64), 2, 0)))  # so that neither path pays for loading the library
    own = -bytes_read() + bytes_read()  # what asking costs
    before = bytes_read()
    factored, state, stored = 0.0, 0, 0
    for seed in range(layers * len(shapes)):
        taus = adapters(shapes[seed % len(shapes)], count, seed)
        found, seconds = fold(list(taus))
        factored += seconds
        state += sum(tensor.numel() * tensor.element_size() for tensor in found.tensors().values())
        stored += sum(4 * tensor.numel() for tau in taus for tensor in tau.tensors().values())
    read = bytes_read() - before - own
    dense, differences = 0.0, []
    for (m, n), number_of in Counter((max(shape), min(shape)) for shape in shapes).items():
        taus = adapters((m, n), count, 7)
        exact, seconds = fold([Dense(tau.to_dense()) for tau in taus])
        dense += layers * number_of * seconds
        small, _ = fold(list(taus))
        wanted = exact.to_dense().double()
        differences.append(float((small.to_dense().double() - wanted).norm() / wanted.norm()))
        print(f"{m} x {n}: {seconds:.1f} s dense, difference {differences[-1]:.1e}", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "factored": factored,
                "dense": dense,
                "difference": max(differences),
                "state": state,
                "adapters": stored,
                "read": read,
                "matrices": layers * len(shapes),
            }
        )
    )


if __name__ == "__main__":
    main()
