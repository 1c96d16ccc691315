"""Runs the commands and the Python of a page of the documentation, and compares what they print with what it shows.

A page is run from top to bottom in a folder of its own, against the Hub on loopback. Of its fenced blocks

* `console` holds commands after `$`, each with what it prints; a last line `...` of it stands for any further lines,
* `bash` holds commands whose output is not shown; they have to succeed,
* `python` is executed, with one set of names for the page, and a `text` block right behind it is what it prints,
* `yaml` whose first line is a comment with a file's name is written to that file.

A command has to succeed, unless the next one is `echo $?`. What sets up a shell or installs software (`SETUP`) is not
run. Compared are words and numbers: digests, commits, tokens, ports, dates, seconds and what a machine needs are left
out (`VOLATILE`), and decimal numbers may be off by a hundredth. `UPDATE_DOCS=1` writes what was printed into the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfmerge.cli.main import main


ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETUP = ("pip", "make", "export", "source", ".")
VOLATILE = (
    (r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,64}\b", "<digest>"),
    (r"hf_\w+", "<token>"),
    (r"SHA256:[\w+/]{43}", "<fingerprint>"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:<port>"),
    (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?Z?)?", "<date>"),
    (r"\b\d+(\.\d+)? s\b", "<seconds>"),
    (r"(disk|memory about|received|streamed) [\d.]+ [MG]B", r"\1 <size>"),
    (r"in \d+ requests", "in <count> requests"),
    (r"[\d.]+ MB (more than once|beyond need)", r"<size> \1"),
)
NUMBER = re.compile(r"(\d+\.\d+(?:e[-+]\d+)?)")
PORT = "http://127.0.0.1:8421"
"""What pages show in the place of the address of the Hub of the tests."""


class Page:
    """One page while it is run."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.names: dict[str, object] = {"__name__": "page"}
        self.code = 0
        self.wrong: list[str] = []

    def run(self) -> str:
        """Run all blocks in order; the text of the page with what they print now."""
        text, done, result, printed = self.path.read_text(encoding="utf-8"), 0, [], None
        for block in FENCE.finditer(text):
            kind, body = block[1], block[2]
            result.append(text[done : block.start(2)])
            follows = text[done : block.start()].strip() == "```"
            if kind == "text" and printed is not None and follows:
                body = self.shown(body, printed, f"the Python before {body.splitlines()[0]!r}")
                printed = None
            assert not printed, f"{self.path.name}: Python printed {printed!r}, and no `text` block follows"
            printed = None
            if kind in ("console", "bash"):
                body = "".join(self.commands(body, kind == "console"))
            elif kind == "python":
                printed = self.python(body)
            elif kind in ("yaml", "json"):
                self.write(body)
            result.append(body)
            done = block.end(2)
        assert not printed, f"{self.path.name}: Python printed {printed!r}, and no `text` block follows"
        return "".join([*result, text[done:]])

    def commands(self, body: str, with_output: bool) -> Iterator[str]:
        """Run the commands of a block; its lines with what they print now."""
        pairs = list(entries(body)) if with_output else [(line, "") for line in joined(body)]
        for i, (command, shown) in enumerate(pairs):
            line = command.replace("\\\n", " ").removeprefix("$ ")
            yield command + "\n"
            if not line.strip() or line.startswith("#") or shlex.split(line)[0] in SETUP:
                yield shown
                continue
            code, printed = self.command(line)
            expected = i + 1 < len(pairs) and pairs[i + 1][0] == "$ echo $?"
            assert code == 0 or expected, f"{self.path.name}: {line}\n{printed}"
            if with_output:
                yield self.shown(shown, printed, line)

    def command(self, line: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        words = shlex.split(line, comments=True)
        if line == "echo $?":
            return 0, f"{self.code}\n"
        if words[:3] == ["hfmerge", "hub", "serve"]:
            return 0, serve(words[1:])
        if words[0] == "hfmerge" and words[1:3] != ["hub", "run"]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    self.code = main(words[1:])
                except SystemExit as stop:
                    self.code = int(stop.code or 0)
            return self.code, out.getvalue()
        path = os.pathsep.join([str(self.programs()), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.code = done.returncode
        return self.code, done.stdout

    def programs(self) -> Path:
        """A folder with the program `hfmerge` of this source tree, whatever is installed."""
        program = self.folder / ".bin" / "hfmerge"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hfmerge "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        return program.parent

    def python(self, body: str) -> str:
        """What a piece of Python prints."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            exec(compile(body, str(self.path), "exec"), self.names)
        return out.getvalue()

    def write(self, body: str) -> None:
        """Write a block to the file that its first line names."""
        first, _, rest = body.partition("\n")
        name = re.fullmatch(r"# ([\w./-]+\.\w+)", first)
        if name is not None:
            (self.folder / name[1]).write_text(rest, encoding="utf-8")

    def shown(self, shown: str, printed: str, what: str) -> str:
        """What the page should show: what it shows, where that is what was printed."""
        printed = re.sub(r"\n*^.*\[\d\d:\d\d.*/s\]$", "", printed, flags=re.MULTILINE).removeprefix("\n")  # bars
        printed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
        printed = re.sub(r"http://127\.0\.0\.1:\d+", PORT, printed.replace(str(self.folder), "/home/me/work"))
        if matches(shown.splitlines(), printed.splitlines()):
            return shown
        self.wrong.append(f"{self.path.name}: {what}\n--- shown\n{shown}--- printed\n{printed}")
        return printed


def entries(body: str) -> Iterator[tuple[str, str]]:
    """Commands of a block, with the lines that follow each."""
    command, output = "", ""
    for line in body.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line, ""
        elif command.endswith("\\") and not output:
            command += f"\n{line}"
        else:
            output += f"{line}\n"
    yield command, output


def joined(body: str) -> Iterator[str]:
    """Commands of a block without output, each with the lines it goes on in."""
    yield from body.replace("\\\n", "\0").replace("\n", "\1").replace("\0", "\\\n").rstrip("\1").split("\1")


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether printed lines are those shown; a line `...` stands for any."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(matches(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and close(shown[0], printed[0]) and matches(shown[1:], printed[1:])


def close(shown: str, printed: str) -> bool:
    """Whether two lines have the same words and nearly the same numbers."""
    for pattern, name in VOLATILE:
        shown, printed = re.sub(pattern, name, shown), re.sub(pattern, name, printed)
    first, second = NUMBER.split(" ".join(shown.split())), NUMBER.split(" ".join(printed.split()))
    if first[::2] != second[::2]:
        return False
    numbers = zip(map(float, first[1::2]), map(float, second[1::2]), strict=True)
    return all(abs(a - b) <= 0.01 * max(abs(a), abs(b)) for a, b in numbers)


def serve(words: Sequence[str]) -> str:
    """What `hfmerge hub serve` prints until it serves; a free port in the place of the usual one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hfmerge", *words, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("export HF_TOKEN"):
                break
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
    return "".join(lines)


def clear(keep: Sequence[str] = ()) -> None:
    """Delete what has names that pages use from the Hub of the tests, whoever left it, and what is in the caches."""
    api = HfApi()
    for model in api.list_models():
        if model.id.startswith(("org/", "quickstart/", "sentence-transformers/")) and model.id not in keep:
            api.delete_repo(model.id)
    for cache in ("hfmerge", "hub"):
        shutil.rmtree(Path(os.environ["HF_HOME"]) / cache, ignore_errors=True)


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, keep: Sequence[str] = ()) -> None:
    """Run a page in a folder; what it shows has to be what was printed, or becomes so with UPDATE_DOCS.

    Args:
        keep: the repositories on the Hub that the page starts with.
    """
    clear(keep)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)
    page = Page(path, folder)
    text = page.run()
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(text, encoding="utf-8")
    else:
        assert not page.wrong, "\n\n".join(page.wrong)
