"""Killed runs go on from where they ended, and end with the bytes, the ledger and the card of an undisturbed run."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hfmerge.checkpoint.writer import SafetensorsWriter, Slot, bytes_of, header_bytes
from hfmerge.engine.fingerprint import work_of
from hfmerge.engine.journal import Finished, Journal, Past, Region, begin, checksum, read_past, work_in
from hfmerge.engine.planner import make_plan
from hfmerge.recipe.recipe import MethodChoice, ModelEntry, Recipe
from tests.fixtures import launching, processes, tiny


MODELS = ("m0", "m1", "m2")
VARIANTS: dict[str, tuple[str, ...]] = {
    "two passes, all states": ("--method", "opcm", "--state", "all"),
    "two passes, scratch": ("--method", "opcm", "--state", "none"),
    "one pass, large tensors in slices": ("--method", "linear", "--dtype", "bfloat16", "--out-shard-size", "1MB"),
    "histograms first": ("--method", "ties", "--option", "scope=model", "--norm", "mean"),
}
KILLS = 5
"""Per variant of the random moments."""
MARGIN = 10
"""Steps that a command may go on for after the moment at which it is to be killed, before it waits for that."""
TENSORS = 12 * 11 + 2
"""Of the model that is merged."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of twelve layers, with an embedding that is tied and large enough to be cut, and fine-tunes of it."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 18000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12}
    base = tiny.build("Qwen3ForCausalLM", tiny.config("qwen3", **sizes, num_attention_heads=4, head_dim=16))
    tiny.save(base, root / "base", max_shard_size="3MB")
    for i, name in enumerate((*MODELS, "m3"), 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    return root


def command(root: Path, out: Path, *flags: object, models: Sequence[str] = MODELS) -> list[object]:
    paths = [root / name for name in models]
    return ["merge", *paths, "--base", root / "base", "--output", out, "--quiet", "--json", *flags]


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Variant -> digest of every file of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def digests(title: str) -> dict[str, str]:
        out = folder / title.replace(" ", "-")
        if not out.exists():
            tiny.done(*command(root, out, *VARIANTS[title]))
        return tiny.everything(out)

    return digests


def journal(out: Path) -> Path:
    return out.parent / f".{out.name}.hfmerge-journal"


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.hfmerge-partial"


def noted(out: Path) -> int:
    return tiny.noted(journal(out))


def reused(run: tiny.Run) -> int:
    """How many chunks a successful run took over, by its JSON."""
    text = run.out or run.err
    count: int = json.loads(text[text.index("{\n") : text.rindex("}") + 1])["reused"]
    return count


def left_nothing(out: Path) -> bool:
    return not [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


SLOW = """
import sys, time
from hfmerge.cli import main
from hfmerge.engine.journal import Journal
note = Journal.note
def slow(self, *given):
    time.sleep(0.005)
    note(self, *given)
Journal.note = slow
sys.exit(main(sys.argv[1:]))
"""
"""The command line, slow enough to be met in the middle."""


def kill_when(child: tiny.Child, moment: Callable[[], bool]) -> None:
    """Send SIGKILL as soon as the moment has come, unless the command is done before; `MARGIN` keeps it from that."""
    while child.process.is_alive() and not moment():
        time.sleep(0.001)
    if child.process.is_alive() and child.process.pid is not None:
        os.kill(child.process.pid, signal.SIGKILL)


def killed_midway(root: Path, out: Path, *flags: object, lines: int = 30) -> int:
    """Kill a merge in its first third; how many steps it had noted."""
    child = tiny.fork(out.parent, command(root, out, *flags), steps=lines + MARGIN)
    kill_when(child, lambda: noted(out) >= lines)
    assert child.end().code == -signal.SIGKILL
    assert partial(out).is_dir() and not out.exists() and noted(out) >= lines
    return noted(out)


@pytest.mark.slow
@pytest.mark.parametrize("title", VARIANTS)
def test_killed_again_and_again(
    title: str, root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """SIGKILL after random numbers of finished steps, and at random times; each run goes on from the one before."""
    out, chance = tmp_path / "out", random.Random(title)
    total = TENSORS if title.startswith("one pass") else 2 * TENSORS
    goals = sorted(chance.randrange(1, total) for _ in range(KILLS - 2))
    moments = [*((goal, 60.0) for goal in goals), *((10**6, chance.uniform(0.05, 1.0)) for _ in range(2))]
    before, killed = 0, 0
    for goal, seconds in moments:
        wait = min(goal + MARGIN, total - 1) if killed < len(goals) else 0
        child = tiny.fork(tmp_path, command(root, out, *VARIANTS[title]), steps=wait)
        end = time.monotonic() + seconds
        kill_when(child, lambda goal=goal, end=end: noted(out) >= goal or time.monotonic() > end)
        run = child.end()
        if run.code == 0:
            break
        assert run.code == -signal.SIGKILL, run.err
        if out.exists():  # killed after all was done: what is left beside the output goes with the next run
            assert killed >= len(goals) and tiny.everything(out) == undisturbed(title)
            return
        assert noted(out) >= before, "an attempt forgot what the one before had finished"
        before, killed = noted(out), killed + 1
    assert killed >= len(goals)
    if not out.exists():
        run = tiny.done(*command(root, out, *VARIANTS[title], "--resume"))
        assert "hfmerge: resuming: " in run.err
    assert reused(run) > 0
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


def die_at(point: str, arguments: list[str], log: str) -> None:
    """Run a command in this process and kill it at one point of the program."""
    from hfmerge.cli import main
    from hfmerge.engine import executor, run_files, workspace

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(home: Any, name: str, count: int = 1, *, instead: bool = False) -> None:
        real, seen = getattr(home, name), iter(range(count))

        def dying(*given: Any, **options: Any) -> Any:
            result = None if instead and next(seen, None) == count - 1 and die() else real(*given, **options)
            return result if instead or next(seen, None) != count - 1 else die()

        setattr(home, name, dying)

    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    if point == "bytes without a line":
        after(SafetensorsWriter, "write", 50)
    elif point == "half a line":
        note, seen = Journal.note, iter(range(40))

        def torn(self: Journal, key: Any, done: Finished) -> None:
            if next(seen, None) is None:
                self._file.write(b'0badc0de ["merged","model.layers.3.self')
                die()
            note(self, key, done)

        Journal.note = torn  # type: ignore[method-assign]
    elif point == "state noted but not renamed":
        after(Path, "rename", instead=True)
    elif point == "state renamed":
        after(Path, "rename")
    elif point == "heads and side files there":
        after(executor, "finish_folder")
    elif point == "side files half there":
        after(executor, "copy_side_files")
    elif point == "all written":
        after(workspace, "_publish", instead=True)
    elif point == "published":
        after(workspace, "_publish")
    elif point == "half of the files laid out":
        after(run_files, "SafetensorsWriter", 2)
    main(arguments)


POINTS = {
    "half of the files laid out": 0,
    "bytes without a line": 1,
    "half a line": 40,
    "state noted but not renamed": 2 * TENSORS,
    "state renamed": 2 * TENSORS,
    "side files half there": 2 * TENSORS,
    "heads and side files there": 2 * TENSORS,
    "all written": 2 * TENSORS,
}
"""Point of death -> chunks that must have been finished before."""


def dead_at(point: str, arguments: Sequence[object], log: Path) -> None:
    """Run a command in a process of its own that dies at a point of the program."""
    child = processes.CONTEXT.Process(target=die_at, args=(point, [str(item) for item in arguments], str(log)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_the_worst_moment(
    point: str, root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    out, title = tmp_path / "out", "two passes, all states"
    dead_at(point, command(root, out, *VARIANTS[title]), tmp_path / "log")
    run = tiny.done(*command(root, out, *VARIANTS[title]), "--resume")
    assert POINTS[point] <= reused(run)
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_killed_when_all_is_done(root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """The result is in its place; only the journal has not gone yet, and the next command takes it away."""
    out, title = tmp_path / "out", "two passes, scratch"
    dead_at("published", command(root, out, *VARIANTS[title]), tmp_path / "log")
    assert tiny.everything(out) == undisturbed(title) and journal(out).is_dir()
    assert "the folder is not empty" in tiny.cli(*command(root, out, *VARIANTS[title])).err
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_the_command_itself(root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """`python -m hfmerge` killed from outside, and run again by hand."""
    out, title = tmp_path / "out", "two passes, scratch"
    for _ in range(5):
        process = launching.start("-m", "hfmerge", *map(str, command(root, out, *VARIANTS[title])), together=False)
        while process.poll() is None and noted(out) < 160:
            time.sleep(0.001)
        process.kill()
        if tiny.finish(process).code == -signal.SIGKILL and not out.exists():
            break
        # it was done before it could be killed
        shutil.rmtree(out)
    assert 160 <= noted(out)
    again = ["-m", "hfmerge", *map(str, command(root, out, *VARIANTS[title])), "--resume"]
    run = tiny.finish(launching.start(*again, together=False))
    assert run.code == 0 and reused(run) >= 160, run.err
    assert f"hfmerge: resuming: {TENSORS} of {TENSORS} tensors merged, " in run.err
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
@pytest.mark.parametrize("title", VARIANTS)
def test_one_of_two_processes_is_killed_again_and_again(
    title: str, root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """SIGKILL of either process after random numbers of finished steps: the other ends in order, two more go on."""
    out, chance = tmp_path / "out", random.Random(title)
    total = TENSORS if title.startswith("one pass") else 2 * TENSORS
    before = 0
    for goal in sorted(chance.sample(range(1, total - 20), KILLS)):
        victim, goal = chance.randrange(2), max(goal, before + 1)
        arguments = command(root, out, *VARIANTS[title])
        crew = [tiny.fork(tmp_path, arguments, steps=goal + MARGIN, env=env) for env in launching.environments(2)]
        kill_when(crew[victim], lambda goal=goal: noted(out) >= goal)
        killed, other = crew[victim].end(), crew[1 - victim].end()
        assert killed.code == -signal.SIGKILL and other.code == 1, other.err
        assert f"process {victim} of 2" in other.err and "Traceback" not in other.err, other.err
        assert not out.exists() and noted(out) >= max(before, goal), "an attempt forgot what one before had finished"
        before = noted(out)
    assert reused(tiny.done(*command(root, out, *VARIANTS[title]))) > 0
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_one_of_several_processes_is_killed(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """A process alone is killed, then one of two, then both, and one alone ends it: ledger, card and bytes stay."""
    out, title, chance = tmp_path / "out", "two passes, all states", random.Random(7)
    arguments = [str(item) for item in command(root, out, *VARIANTS[title])]
    killed_midway(root, out, *VARIANTS[title])
    for victims in ((1,), (0, 1)):
        crew = launching.crew(2, "-c", SLOW, *arguments, "--resume")
        reached = noted(out)
        goal = reached + chance.randint(5, 40)
        while all(process.poll() is None for process in crew) and noted(out) < goal:
            time.sleep(0.001)
        for rank in victims:
            crew[rank].kill()
        told = [process.communicate(timeout=120)[1] for process in crew]
        assert "hfmerge: resuming: " in told[0] and "resuming" not in told[1], told
        assert all(crew[rank].returncode == -signal.SIGKILL for rank in victims)
        for rank in {0, 1} - {*victims}:
            assert crew[rank].returncode == 1 and "Traceback" not in told[rank], told[rank]
            assert f"process {victims[0]} of 2" in told[rank] and "run the same command again" in told[rank]
        assert partial(out).is_dir() and noted(out) >= goal
    assert reused(tiny.done(*arguments, "--resume")) >= goal
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_a_killed_launcher_run_is_finished_by_one_process(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    out, title = tmp_path / "out", "histograms first"
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv.pop(1), 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n" + SLOW
    )
    arguments = [str(item) for item in command(root, out, *VARIANTS[title])]
    process = launching.torchrun(2, str(script), str(tmp_path), *arguments)
    while process.poll() is None and noted(out) < 40:
        time.sleep(0.001)
    os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and partial(out).is_dir(), text
    assert reused(tiny.done(*arguments, "--resume")) >= 39
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["two passes, scratch", "one pass, large tensors in slices"])
def test_what_the_journal_claims_is_checked(
    title: str, root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """One wrong bit in a finished tensor; only what depends on it is done again."""
    out = tmp_path / "out"
    lines = killed_midway(root, out, *VARIANTS[title])
    region = next(done.wrote[0] for key, done in read_past(journal(out)).finished.items() if "_proj" in key[1])
    path = next(path for folder in (partial(out), journal(out)) for path in folder.rglob(region.file))
    with open(path, "r+b") as handle:
        head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        at = handle.tell() + head[region.tensor]["data_offsets"][0] + 100
        handle.seek(at)
        wrong = handle.read(1)[0] ^ 1
        handle.seek(at)
        handle.write(bytes([wrong]))
    assert reused(tiny.done(*command(root, out, *VARIANTS[title]))) == lines - 1
    assert tiny.everything(out) == undisturbed(title)


@pytest.mark.slow
def test_files_that_are_gone_are_made_again(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    out, title = tmp_path / "out", "two passes, scratch"
    lines = killed_midway(root, out, *VARIANTS[title], lines=160)
    os.truncate(journal(out) / "scratch", 5000)
    (partial(out) / "model-00001-of-00002.safetensors").unlink()
    (partial(out) / "notes").mkdir()
    (partial(out) / "notes" / "left.txt").write_text("by nobody")
    assert reused(tiny.done(*command(root, out, *VARIANTS[title]))) < lines
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_a_journal_with_torn_and_foreign_lines(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """A power cut may leave zeros, half a line, or old content of the disk; whole lines still count."""
    out, title = tmp_path / "out", "one pass, large tensors in slices"
    lines = killed_midway(root, out, *VARIANTS[title])
    path = journal(out) / "1-0.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    wrong = whole[9].replace(b"model", b"modem")
    path.write_bytes(b"".join([*whole[:9], b"\0" * 300, b"\n", wrong, b"\xff\xfe\n", *whole[10:-1], whole[-1][:-20]]))
    assert reused(tiny.done(*command(root, out, *VARIANTS[title]))) == lines - 2
    assert tiny.everything(out) == undisturbed(title)


@pytest.mark.slow
def test_other_work_is_not_gone_on_with(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    out, title = tmp_path / "out", "one pass, large tensors in slices"
    flags = VARIANTS[title]
    lines = killed_midway(root, out, *flags)
    for other, what in (
        (command(root, out, *flags, models=("m0", "m2", "m1")), "models"),
        (command(root, out, *flags, "--weight", "1", "--weight", "1", "--weight", "2"), "models"),
        (command(root, out, *flags[:2]), "settings, tensors"),
        (command(root, out, *flags, "--norm", "mean"), "method"),
        (command(root, out, *flags, "--exclude", "*.norm.weight"), "settings, tensors"),
        (command(root, out, *flags, "--state", "none"), "kept states"),
    ):
        run = tiny.cli(*other, "--resume")
        assert run.code == 1 and f"{out}: the interrupted run there was other work" in run.err
        assert f"(what differs: {what})" in run.err, run.err
        assert noted(out) == lines
    again = tiny.done(*command(root, out, *flags, models=("m0", "m1")))
    assert reused(again) == 0 and "resuming" not in again.err
    tiny.done(*command(root, tmp_path / "plain", *flags, models=("m0", "m1")))
    assert tiny.everything(out) == tiny.everything(tmp_path / "plain")


@pytest.mark.slow
def test_the_flags(root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    out, title = tmp_path / "out", "one pass, large tensors in slices"
    flags = VARIANTS[title]
    refused = tiny.cli(*command(root, out, *flags), "--resume")
    assert refused.code == 1 and f"{out}: no interrupted run to resume there; leave out --resume." in refused.err
    refused = tiny.cli(*command(root, out, *flags)[:6], *flags, "--push-to", "me/nowhere", "--resume")
    assert refused.code == 1 and "a run that only publishes leaves no unfinished work here" in refused.err
    killed_midway(root, out, *flags)
    again = tiny.done(*command(root, out, *flags), "--no-resume")
    assert reused(again) == 0 and "resuming" not in again.err
    assert tiny.everything(out) == undisturbed(title)
    refused = tiny.cli(*command(root, out, *flags), "--resume")
    assert refused.code == 1 and "the folder is not empty" in refused.err


@pytest.mark.slow
def test_a_source_that_changed_in_between(root: Path, tmp_path: Path) -> None:
    """Same names, same sizes, and even the same time of the last change: nothing made of the old files is used."""
    (tmp_path / "in").mkdir()
    for name in ("base", *MODELS):
        shutil.copytree(root / name, tmp_path / "in" / name)
    out = tmp_path / "out"
    killed_midway(tmp_path / "in", out, *VARIANTS["two passes, scratch"])
    path = tmp_path / "in" / "m1" / "model.safetensors"
    times = path.stat()
    shutil.copyfile(root / "m3" / "model.safetensors", path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused = tiny.cli(*command(tmp_path / "in", out, *VARIANTS["two passes, scratch"]), "--resume")
    assert refused.code == 1 and "(what differs: models)" in refused.err
    assert reused(tiny.done(*command(tmp_path / "in", out, *VARIANTS["two passes, scratch"]))) == 0
    tiny.done(*command(tmp_path / "in", tmp_path / "plain", *VARIANTS["two passes, scratch"]))
    assert tiny.everything(out) == tiny.everything(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("year", [1970, 2099])
def test_clocks_that_jump(
    year: int,
    root: Path,
    undisturbed: Callable[[str], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of the killed run come from another age, and during the second run the clock leaps to and fro."""
    out, title = tmp_path / "out", "two passes, scratch"
    lines = killed_midway(root, out, *VARIANTS[title])
    for folder in (partial(out), journal(out)):
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (31e6 * (year - 1970) + 1, 31e6 * (year - 1970) + 1))
    leaps = random.Random(year)
    monkeypatch.setattr(time, "time", lambda: leaps.uniform(0.0, 4e9))
    assert reused(tiny.done(*command(root, out, *VARIANTS[title]), "--resume")) == lines
    assert tiny.everything(out) == undisturbed(title) and left_nothing(out)


@pytest.mark.slow
def test_a_disk_that_is_full_when_going_on(
    root: Path, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    out, title = tmp_path / "out", "one pass, large tensors in slices"
    killed_midway(root, out, *VARIANTS[title])
    run = tiny.fork(tmp_path, command(root, out, *VARIANTS[title]), limit=60_000).end()
    assert run.code == 1 and "cannot be written: File too large" in run.err
    assert not out.exists() and left_nothing(out)
    tiny.done(*command(root, out, *VARIANTS[title]))
    assert tiny.everything(out) == undisturbed(title)


@pytest.mark.slow
def test_too_little_room_leaves_what_is_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the killed run wrote counts as room for its bytes; too little room costs nothing of it."""
    out, flags = tmp_path / "out", VARIANTS["one pass, large tensors in slices"]
    lines = killed_midway(root, out, *flags)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    held = sum(path.stat().st_blocks * 512 for path in partial(out).rglob("*"))
    if held < 4_000_000:  # a file system that promises no space: nothing is there before it is written
        assert "GB are needed" in tiny.cli(*command(root, out, *flags)).err and noted(out) == lines
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    assert reused(tiny.done(*command(root, out, *flags))) == lines


@pytest.mark.slow
def test_a_second_run_into_the_folder_waits_its_turn(root: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", VARIANTS["one pass, large tensors in slices"]
    lines = killed_midway(root, out, *flags)
    first = tiny.fork(tmp_path, command(root, out, *flags), hold="write")
    first.wait_until_held()
    for flag in ("--resume", "--no-resume"):
        second = tiny.cli(*command(root, out, *flags), flag)
        assert second.code == 1 and "another merge is writing this folder" in second.err
    assert first.end().code == 0
    assert f"resuming: {lines - 1} of " in first.log.read_text() or reused(first.end()) == lines


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["add", "unmerge"])
def test_changes_of_a_merge(verb: str, root: Path, tmp_path: Path) -> None:
    """`add` and `unmerge` of a folder in place, killed and run again; its old content is there in between."""
    flags = VARIANTS["two passes, all states"]
    tiny.done(*command(root, tmp_path / "merged", *flags))
    shutil.copytree(tmp_path / "merged", tmp_path / "plain" / "merged")
    more = {"add": [root / "m3"], "unmerge": ["--remove", "m0"]}[verb]
    before, out = tiny.everything(tmp_path / "merged"), tmp_path / "merged"
    child = tiny.fork(tmp_path, [verb, out, *more, "--quiet", "--json"], steps=150 + MARGIN)
    kill_when(child, lambda: noted(out) >= 150)
    assert child.end().code == -signal.SIGKILL
    assert tiny.everything(out) == before and tiny.only_leftovers(tiny.cli("verify", out))
    run = tiny.done(verb, out, *more, "--resume", "--quiet", "--json")
    assert reused(run) >= 150 and left_nothing(out)
    tiny.done(verb, tmp_path / "plain" / "merged", *more)
    assert tiny.everything(out) == tiny.everything(tmp_path / "plain" / "merged")


@pytest.fixture
def recipe(root: Path) -> Iterator[Recipe]:
    models = tuple(ModelEntry(str(root / name)) for name in MODELS)
    yield Recipe(base=str(root / "base"), models=models, method=MethodChoice("opcm", {}, "mean"))


def test_the_same_work_has_the_same_name(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = work_of(make_plan(recipe))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert work_of(make_plan(recipe)) == first, "the bytes do not depend on the number of processes"


def test_a_checksum_sees_what_disks_lose() -> None:
    data = random.Random(0).randbytes(5 * 4096 + 1000)
    right = checksum(memoryview(data))
    for page in range(5):
        assert checksum(memoryview(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])) != right
    assert checksum(memoryview(data[4096:8192] + data[:4096] + data[8192:])) != right, (
        "two pages in each other's place"
    )
    assert checksum(memoryview(data[: 5 * 4096] + bytes(1000))) != right
    for bit in range(0, 8 * len(data), 997):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert checksum(memoryview(flipped)) != right
    parts = checksum(memoryview(data[8192:]), checksum(memoryview(data[:8192])))
    assert parts == right and checksum(memoryview(b"")) == 0
    assert checksum(memoryview(bytes(4096))) != checksum(memoryview(bytes(8192)))


def test_a_journal_gives_back_what_was_noted(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    begin(folder, {"method": "a", "models": "b"})
    assert work_in(folder) == {"method": "a", "models": "b"} and work_in(tmp_path / "none") is None
    numbers = [0.1, 5e-324, 1.7976931348623157e308, math.pi, math.inf, 1 / 3]
    first = Journal(folder, 0, Past())
    steps = {("merged", f"tensor {i} ü\n", (i, i + 1) if i % 2 else None): [numbers, i] for i in range(400)}
    threads = [
        threading.Thread(
            target=lambda part=part: [
                first.note(key, Finished(steps[key], (Region("f", key[1], 7),))) for key in list(steps)[part::4]
            ]
        )
        for part in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()
    past = read_past(folder)
    assert past.attempts == 1 and {key: done.result for key, done in past.finished.items()} == steps
    assert all(done.wrote == (Region("f", key[1], 7),) for key, done in past.finished.items())
    second = Journal(folder, 3, past)
    second.note(("copied", "x", None), Finished(None))
    second.close()
    past = read_past(folder)
    assert past.attempts == 2 and len(past.finished) == 401
    (folder / "work.json").write_text("{")
    assert work_in(folder) is None


def test_a_file_that_is_opened_again_keeps_its_tensors(tmp_path: Path) -> None:
    import torch

    slots = {"a": Slot("F32", (3, 4)), "b": Slot("BF16", (5,))}
    first = SafetensorsWriter(tmp_path / "f", slots)
    value = torch.arange(12.0).reshape(3, 4)
    assert bytes(first.write("a", value)) == bytes(bytes_of(value))
    first.close(complete=False)
    size = (tmp_path / "f").stat().st_size
    assert size == len(header_bytes(slots, {"format": "pt"})[0]) + 48 + 10
    os.truncate(tmp_path / "f", size - 10)
    again = SafetensorsWriter(tmp_path / "f", slots)
    assert torch.equal(again.read("a"), value) and again.missing() == {"a": 48, "b": 10}
    again.claim("a", 48)
    again.write("b", torch.ones(5, dtype=torch.bfloat16))
    again.close()
