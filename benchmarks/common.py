"""What all benchmarks share: peers' environments, running and measuring a command, facts about the machine, tables.

Imports the standard library only: Linux counts a parent's memory as its child's peak until the child has started
its own program, so the timing process has to stay small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".envs"
CACHE = Path(os.environ.get("BENCHMARKS_CACHE", HERE / ".cache"))
OURS = (sys.executable, "-m", "hfmerge")
SAMPLING_SECONDS = 0.05


class BenchmarkError(Exception):
    """A command of a benchmark failed; the text holds the command and the end of its output."""


@dataclass(frozen=True)
class Peer:
    """A tool to compare with: its name and what pip installs, in order, one call each."""

    name: str
    steps: tuple[tuple[str, ...], ...]

    @property
    def bin(self) -> Path:
        """Folder of the environment's commands."""
        return ENVIRONMENTS / self.name / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"


# torch goes first and alone, so that the CPU build an index prefers is not replaced through somebody's dependencies.
TORCH = ("torch==2.13.0",)
FUSION_BENCH = Peer("fusion-bench", (TORCH, ("fusion-bench==0.2.33", "transformers<5", "datasets<4.5", *TORCH)))
MERGEKIT = Peer("mergekit", (TORCH, ("mergekit==0.1.5", *TORCH)))


def install(peer: Peer) -> None:
    """Create the peer's virtual environment under `benchmarks/.envs/`, unless a finished one is there."""
    folder = ENVIRONMENTS / peer.name
    stamp, wanted = folder / "installed.json", json.dumps(peer.steps)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {peer.name} into {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for step in peer.steps:
        subprocess.run([str(peer.python), "-m", "pip", "install", "--quiet", *step], check=True)
    stamp.write_text(wanted)


def versions(python: Path | str, packages: Sequence[str]) -> str:
    """Installed versions in another environment, as "name 1.2, name 3.4"; a missing package is left out."""
    script = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = []\n"
        "for name in sys.argv[1:]:\n    try:\n        found.append(name + ' ' + version(name))\n"
        "    except PackageNotFoundError:\n        pass\nprint(', '.join(found))"
    )
    done = subprocess.run([str(python), "-c", script, *packages], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def our_versions() -> str:
    """Versions of hfmerge (by its own word, as it need not be installed) and of what it computes with."""
    rest = versions(sys.executable, ("torch", "transformers", "safetensors"))
    done = subprocess.run([*OURS, "--version"], capture_output=True, text=True, env=environment(1))
    return f"{done.stdout.strip() or 'hfmerge'}, {rest}"


@dataclass(frozen=True)
class Sample:
    """One finished run of a command.

    Attributes:
        wall: seconds from start to end.
        cpu: user plus system seconds.
        peak: greatest resident memory in bytes, mapped files included (the kernel's own `ru_maxrss`).
        anonymous: greatest resident memory in bytes without mapped files, sampled 20 times a second.
        output: standard output and standard error together.
        inside: seconds the command itself reports for merging; None if it reports none.
    """

    wall: float
    cpu: float
    peak: int
    anonymous: int
    output: str
    inside: float | None = None


def environment(threads: int) -> dict[str, str]:
    """Environment of every timed command: thread count, offline, nothing but the repository on the module path."""
    own = {
        "HF_HOME": str(CACHE / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MKL_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(HERE.parent),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **own}


def measure(
    command: Sequence[str | Path], *, threads: int, scratch: Path | None = None, remember: bool = False
) -> Sample:
    """Run one command to its end and account for it.

    Args:
        command: program and arguments.
        threads: for OpenMP and MKL.
        scratch: folder made anew before the command starts (not timed), for everything it writes, and its working
            folder; the repository by default.
        remember: leave what hfmerge knows of files that it hashed in earlier runs; otherwise it hashes all it reads.

    Raises:
        BenchmarkError: the command cannot be started or exits with another status than 0.
    """
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    if not remember:
        shutil.rmtree(CACHE / "hf-home" / "hfmerge" / "digests", ignore_errors=True)
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        os.sync()  # so that one run does not pay for writing back what the run before it left in the page cache
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=scratch or HERE.parent,
                env=environment(threads),
            )
        except OSError as error:
            raise BenchmarkError(f"{' '.join(words)}: {error}") from error
        sampler = AnonymousSampler(process.pid)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        anonymous = sampler.stop()
        output.seek(0)
        text = output.read()
    if process.returncode != 0:
        raise BenchmarkError(f"{' '.join(words)}: exit status {process.returncode}\n{text[-3000:]}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, anonymous, text)


class AnonymousSampler(threading.Thread):
    """Keeps the greatest `RssAnon` a process showed while it ran."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._greatest = 0

    def run(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            try:
                text = self._status.read_text()
            except OSError:  # the process is gone; `stop` will follow
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self._greatest = max(self._greatest, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """Stop sampling and return the greatest value in bytes."""
        self._done.set()
        self.join()
        return self._greatest


def alternate(runners: Mapping[str, Callable[[], Sample]], runs: int) -> dict[str, list[Sample]]:
    """Run each of `runners` in turn, `runs` rounds, so that a drift of the machine's speed meets all of them alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in runners}
    for round_number in range(1, runs + 1):
        for name, runner in runners.items():
            samples[name].append(runner())
            last = samples[name][-1]
            progress(
                f"round {round_number}/{runs}, {name}: {last.wall:.2f} s wall, {last.cpu:.2f} s cpu, "
                f"{mib(last.peak)} peak"
            )
    return samples


def progress(text: str) -> None:
    """Say on standard error what is going on; standard output holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def warm(folders: Sequence[Path]) -> None:
    """Read every weight file once, so that all runs find them in the page cache."""
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def generate_models(kind: str, count: int, *, quick: bool = False, adapters: int = 0) -> tuple[Path, list[Path]]:
    """The generated base and fine-tunes of a kind from `kinds.py`, made now if they are not in the cache.

    Args:
        kind: name of the kind.
        count: full fine-tunes.
        quick: of the size that measures nothing.
        adapters: LoRA adapters; they come after the fine-tunes.
    """
    folder = CACHE / (f"{kind}-quick" if quick else kind)
    size = "quick" if quick else "full"
    words = [size, kind, str(folder), str(count), str(adapters)]
    subprocess.run([sys.executable, "-m", "benchmarks.models", *words], check=True, cwd=HERE.parent)
    models = [folder / f"model-{index:02d}" for index in range(count)]
    return folder / "base", models + [folder / f"adapter-{index:02d}" for index in range(adapters)]


def tensor_count(path: Path) -> int:
    """Tensors of a safetensors file, from its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return len([name for name in header if name != "__metadata__"])


def seconds_inside(output: str, name: str = "merging") -> float:
    """`seconds` of the JSON object that `hfmerge merge --json` prints, whatever else is printed around it."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^\{", output, re.MULTILINE):
        try:
            found, _ = decoder.raw_decode(output, match.start())
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and name in found.get("seconds", {}):
            return float(found["seconds"][name])
    raise BenchmarkError(f"no JSON object with seconds.{name} in the output of hfmerge:\n{output[-2000:]}")


def ask(module: str, *words: object) -> Any:
    """Run a module of this package in a process of its own, which may import torch; its last line, read as JSON."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *(str(word) for word in words)]
    done = subprocess.run(command, check=True, cwd=HERE.parent, env=environment(1), stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(samples: Sequence[Sample], figure: str) -> float:
    """Median of one attribute of the samples."""
    return statistics.median(float(getattr(sample, figure)) for sample in samples)


def machine(threads: int) -> str:
    """Processor, cores, memory and system of this machine, and its load when the benchmark began."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), 0)
    return (
        f"{model}, {os.cpu_count()} cores ({threads} threads used), {kib / 2**20:.0f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, load at start {os.getloadavg()[0]:.1f}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


@dataclass(frozen=True)
class Row:
    """One line of a result table; `met` None means that no goal is set."""

    figure: str
    ours: str
    peer: str = ""
    ratio: str = ""
    goal: str = ""
    met: bool | None = None


def report(title: str, facts: Mapping[str, str], rows: Sequence[Row]) -> str:
    """A heading, the facts as a list, one table."""
    lines = [f"## {title}", "", *(f"* {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| figure | hfmerge | peer | ratio | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        lines.append(f"| {row.figure} | {row.ours} | {row.peer} | {row.ratio} | {row.goal} | {met} |")
    return "\n".join(lines) + "\n"


def spread(samples: Sequence[Sample], figure: str = "wall") -> str:
    """Median and range of a time, as "1.23 s (1.20-1.31)"."""
    values = sorted(float(getattr(sample, figure)) for sample in samples)
    middle = statistics.median(values)
    return f"{middle:.2f} s" if len(values) == 1 else f"{middle:.2f} s ({values[0]:.2f}-{values[-1]:.2f})"


def mib(count: float) -> str:
    """Bytes as whole MiB."""
    return f"{count / 2**20:.0f} MiB"


def shown(command: Sequence[str | Path]) -> str:
    """A command as code, with the folders of this machine shortened."""
    text = " ".join(str(word) for word in command)
    text = text.replace(f"{sys.executable} -m hfmerge", "hfmerge")
    for folder in (*(f"{path}/bin/" for path in sorted(ENVIRONMENTS.glob("*"))), f"{CACHE}/"):
        text = text.replace(folder, "")
    return f"`{text}`"


def arguments(description: str, runs: int) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=runs, help="counted runs of each command (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads for all tools (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="time hfmerge alone and install nothing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    return parser
