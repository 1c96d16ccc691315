"""`--stream`: the bytes of a merge from the cache, nothing stored but the result, through every fault of the Hub."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch

from hfmerge.engine.journal import read_past
from hfmerge.hubserver.serve import HubServer
from hfmerge.ledger.entry import Entry
from tests.fixtures import launching, tiny
from tests.fixtures.faultproxy import Fault, FaultProxy
from tests.fixtures.hub import USERS
from tests.fixtures.shell import Shell, upload


pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class World:
    """A Hub and its storage behind proxies; a process that streams through them, and one that downloads."""

    hub: FaultProxy
    storage: FaultProxy
    streaming: Shell
    plain: Shell
    home: Path
    folders: dict[str, Path]

    def size(self, *models: str) -> int:
        """Bytes of the weight files of some models."""
        return sum(path.stat().st_size for name in models for path in self.folders[name].glob("*.safetensors"))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("streaming")
    base = tiny.build("BertModel", tiny.config("bert", **SIZES))
    tiny.save(base, root / "base")
    for i, (name, labels) in enumerate({"a": ["x", "y"], "b": ["x", "y", "z"], "c": ["p", "q"]}.items(), 1):
        tuned = tiny.with_head("BertForSequenceClassification", base, i, labels)
        tiny.save(tuned, root / name, max_shard_size="1500KB" if name == "b" else "1GB")
    targets = {f"encoder.layer.{i}.attention.self.query": (128, 128) for i in range(2)}
    tiny.adapter(root / "lora", targets, 7)
    shutil.copytree(root / "a", root / "pickled")
    torch.save(tiny.tensors(root / "a"), root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / WEIGHTS).unlink()
    folders = {f"org/{name}": root / name for name in ("base", "a", "b", "c", "lora", "pickled")}
    with HubServer(root / "store", users=USERS, cdn=True) as hub:
        upload(hub, root / "home", folders)
        answer = httpx2.head(f"{hub.endpoint}/org/a/resolve/main/{WEIGHTS}", follow_redirects=False)
        with (
            FaultProxy(answer.headers["Location"]) as storage,
            FaultProxy(hub.endpoint, storage=storage) as front,
            Shell(HF_ENDPOINT=front.endpoint, HF_HOME=str(root / "home-streaming")) as streaming,
            Shell(HF_ENDPOINT=hub.endpoint, HF_HOME=str(root / "home-plain")) as plain,
        ):
            yield World(front, storage, streaming, plain, root / "home-streaming", folders)


@pytest.fixture
def world(started: World) -> World:
    started.hub.faults()
    started.storage.faults()
    return started


def asked(method: str, *models: str) -> list[str]:
    return ["--base", "org/base", "--method", method, *(f"org/{model}" for model in models or ("a", "b"))]


def ledger(folder: Path) -> bytes:
    return sorted((folder / "merge_history").glob("*.json"))[-1].read_bytes()


@pytest.fixture(scope="module")
def wanted(started: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear merge from the cache."""
    folder = tmp_path_factory.mktemp("wanted") / "out"
    started.plain.done("merge", *asked("linear"), "--output", folder)
    return folder


METHODS = {
    "linear": ["a", "b", "c"],
    "task_arithmetic": ["a", "b"],
    "slerp --out-shard-size 1MB": ["a", "b"],
    "ties": ["a", "b", "c"],
    "ties --option scope=model": ["a", "b"],
    "ties --norm mean": ["a", "b"],
    "opcm": ["a", "b", "c"],
    "opcm --state all --dtype bfloat16": ["lora", "b"],
    "linear --exclude encoder.layer.1.*": ["a", "c"],
    "task_arithmetic --norm mean": ["lora"],
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bytes_and_the_same_ledger_as_from_the_cache(world: World, name: str, tmp_path: Path) -> None:
    method, *flags = name.split()
    command = ["merge", *asked(method, *METHODS[name]), *flags, "--output"]
    with ThreadPoolExecutor(2) as both:
        streamed = both.submit(world.streaming.done, *command, tmp_path / "streamed", "--stream", "--json")
        plain = both.submit(world.plain.done, *command, tmp_path / "plain")
        told = streamed.result().json["streamed"]
        plain.result()
    assert tiny.files(tmp_path / "streamed") == tiny.files(tmp_path / "plain")
    assert ledger(tmp_path / "streamed") == ledger(tmp_path / "plain")
    read = ["org/base", *(f"org/{model}" for model in METHODS[name])]
    assert not told["unverified"] and len(told["verified"]) == sum(
        len(list(world.folders[model].glob("*.safetensors"))) for model in read
    )
    assert told["again"] == 0, "all of it fits into memory"
    assert world.size(*read) <= told["received"] <= world.size(*read) + 100_000 * len(told["verified"])
    assert told["failures"] == 0


def test_nothing_is_stored_but_the_result(world: World, tmp_path: Path) -> None:
    world.streaming.done("merge", *asked("linear"), "--stream", "--output", tmp_path / "out")
    stored = [path for path in world.home.rglob("*") if path.is_file() and path.stat().st_size > 500_000]
    assert not stored
    assert not list(world.home.rglob("*.safetensors")) and list(world.home.rglob("config.json"))


def test_the_token_goes_to_the_hub_alone(world: World, tmp_path: Path) -> None:
    world.streaming.done("merge", *asked("linear"), "--stream", "--output", tmp_path / "out")
    assert world.storage.requests() and not any(record.token for record in world.storage.requests())
    resolved = world.hub.requests("GET .*safetensors$")
    assert all(record.token for record in resolved)
    files = 2 + len(list(world.folders["org/b"].glob("*.safetensors")))
    assert len(resolved) == files, "one redirect a file serves all its ranges"


def test_a_plan_says_what_will_be_read(world: World) -> None:
    plan = world.streaming.done("plan", *asked("opcm", "a", "b", "c"), "--stream", "--json").json["estimate"]
    assert plan["download"] == 0
    sizes = world.size("org/base", "org/a", "org/b", "org/c")
    assert 0 <= sizes + world.size("org/base") - plan["stream"] < 60_000, "twice the base, and headers left out"
    assert plan["disk"] < 3.1 * world.size("org/base"), "the result and its state, no sources"
    text = world.streaming.done("plan", *asked("opcm"), "--stream").out
    assert "stream   " in text and "only the result is stored" in text
    plain = world.streaming.done("plan", *asked("opcm", "a", "b", "c"), "--json").json["estimate"]
    assert plain["stream"] == 0 and plain["download"] == sizes


def test_as_a_key_of_a_recipe(world: World, wanted: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: org/base\nmodels: [org/a, org/b]\nmethod: linear\nstream: true\n")
    run = world.streaming.done("merge", recipe, "--output", tmp_path / "out")
    assert "streamed " in run.out and "4 of 4 files" in run.out or "files compared" in run.out
    assert tiny.files(tmp_path / "out") == tiny.files(wanted)


def test_add_and_unmerge_stream_too(world: World, tmp_path: Path) -> None:
    merged, added, removed = (tmp_path / name for name in ("merged", "added", "removed"))
    world.streaming.done("merge", *asked("opcm"), "--stream", "--output", merged)
    told = world.streaming.done("add", merged, "org/c", "--stream", "--output", added, "--json").json["streamed"]
    # of models that the state stands for, the heads are read, and with them the rest of their files for the digest
    assert [name.partition("@")[0] for name in told["verified"]] == ["org/base", "org/a", "org/b", "org/c"]
    assert told["beyond"] > world.size("org/a")
    world.streaming.done("unmerge", added, "--remove", "org/a", "--stream", "--output", removed)
    for name, models in (("added", "abc"), ("removed", "bc")):
        world.plain.done("merge", *asked("opcm", *models), "--output", tmp_path / f"{name}-plain")
        assert tiny.files(tmp_path / name) == tiny.files(tmp_path / f"{name}-plain")
    assert not list(world.home.rglob("*.safetensors"))


def test_what_the_cache_holds_is_read_from_there(world: World, wanted: Path, tmp_path: Path) -> None:
    told = world.plain.done("merge", *asked("linear"), "--stream", "--output", tmp_path / "out", "--json").json
    assert told["streamed"]["received"] == 0 and told["streamed"]["verified"] == []
    assert tiny.files(tmp_path / "out") == tiny.files(wanted)


def test_a_pickle_cannot_be_streamed(world: World, tmp_path: Path) -> None:
    command = ["merge", *asked("linear", "a", "pickled"), "--allow-pickle", "--output", tmp_path / "out"]
    run = world.streaming.run(*command, "--stream")
    assert run.code == 1 and len(run.err.splitlines()) == 1
    assert "org/pickled@" in run.err and "pytorch_model.bin is pickled" in run.err and "without --stream" in run.err
    world.plain.done(*command)


def test_offline_it_cannot_go_on(started: World, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": started.hub.endpoint, "HF_HOME": str(started.home), "HF_HUB_OFFLINE": "1"}
    run = tiny.finish(tiny.start("merge", *asked("linear"), "--stream", "--output", tmp_path / "out", **environment))
    assert run.code == 1 and "not in the local cache" in run.err and "Traceback" not in run.err


PASSING = {
    "error 500": ("storage", Fault(status=500, every=3)),
    "too many requests": ("storage", Fault(status=429, headers={"Retry-After": "1"}, times=2)),
    "slow": ("storage", Fault(delay=0.3, every=2)),
    "cut": ("storage", Fault(cut=300_000, every=2)),
    "dropped": ("storage", Fault(drop=True, every=4)),
    "another range": ("storage", Fault(shift=64, times=2)),
    "expired addresses": ("storage", Fault(status=403, every=3)),
    "the Hub out of order": ("hub", Fault(status=500, every=4)),
    "the Hub cut off": ("hub", Fault(drop=True, every=5)),
    "the Hub overrun": ("hub", Fault(status=429, headers={"Retry-After": "1"}, times=2)),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_change_nothing(world: World, wanted: Path, name: str, tmp_path: Path) -> None:
    place, fault = PASSING[name]
    getattr(world, place).faults(fault)
    run = world.streaming.run("merge", *asked("linear"), "--stream", "--output", tmp_path / "out", "--json")
    assert run.code == 0, run.err
    assert tiny.files(tmp_path / "out") == tiny.files(wanted) and ledger(tmp_path / "out") == ledger(wanted)
    assert [record for record in getattr(world, place).requests() if record.hit]
    told = run.json["streamed"]
    if name in ("slow", "the Hub overrun"):
        return
    assert told["failures"] > 0
    assert told["received"] <= world.size("org/base", "org/a", "org/b") + 500_000, "what came before a fault counts"


@pytest.mark.parametrize("place", ["header", "embedding", "middle", "last byte", "head"])
def test_a_flipped_bit_is_an_error_by_name(world: World, place: str, tmp_path: Path) -> None:
    data = (world.folders["org/a"] / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    at = {
        "header": data.index(b"[128,128]") + 1,
        "embedding": end + header["bert.embeddings.word_embeddings.weight"]["data_offsets"][0] + 4,
        "middle": len(data) // 2,
        "last byte": len(data) - 1,
        "head": end + header["classifier.weight"]["data_offsets"][0],
    }[place]
    world.storage.faults(Fault(flip=at))
    run = world.streaming.run("merge", *asked("linear", "a", "c"), "--stream", "--output", tmp_path / "out")
    assert run.code == 1, run.out
    assert WEIGHTS in run.err and ("not those the Hub lists" in run.err or "broken safetensors header" in run.err)
    assert "Traceback" not in run.err and (place == "header" or len(run.err.splitlines()) == 1)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_checked_is_said_everywhere(world: World, tmp_path: Path) -> None:
    """Two processes read a part of each file, so that no digest can be compared."""
    environment = {"HF_ENDPOINT": world.hub.endpoint, "HF_HOME": str(world.home)}
    command = ["-m", "hfmerge", "merge", *asked("linear"), "--stream", "--json", "--output", str(tmp_path / "out")]
    first, second = map(tiny.finish, launching.crew(2, *command, env=environment))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    told = first.json
    assert not told["streamed"]["verified"] and len(told["streamed"]["unverified"]) == 4
    assert sum("not compared with the digest" in warning for warning in told["warnings"]) == 4
    entry = Entry.from_bytes(ledger(tmp_path / "out"), "ledger")
    assert entry.models[0].unverified == (WEIGHTS,) and len(entry.models[1].unverified) > 1
    assert entry.base.unverified == (WEIGHTS,)
    world.plain.done("merge", *asked("linear"), "--output", tmp_path / "plain")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "plain")
    plain = Entry.from_bytes(ledger(tmp_path / "plain"), "ledger")
    assert [model.files for model in entry.models] == [model.files for model in plain.models]
    assert b"unverified" not in ledger(tmp_path / "plain")
    assert world.plain.done("verify", tmp_path / "out", "--replay").code == 0


def test_a_hub_that_stays_out_of_order(world: World, tmp_path: Path) -> None:
    """See `test_ranged.py` for what stays so after several tries."""
    world.storage.faults(Fault(status=429, headers={"Retry-After": "4000"}, skip=5))
    run = world.streaming.run("merge", *asked("linear"), "--stream", "--output", tmp_path / "out")
    assert run.code == 1 and list(tmp_path.iterdir()) == [] and len(run.err.splitlines()) == 1
    for part in (
        "org/",
        "model",
        ".safetensors: ",
        "asks to wait 4000 s",
        "run again after that, or without --stream",
    ):
        assert part in run.err


def test_a_hub_without_ranges(world: World, tmp_path: Path) -> None:
    world.storage.faults(Fault(whole=True))
    run = world.streaming.run("merge", *asked("linear"), "--stream", "--output", tmp_path / "out")
    assert run.code == 1 and "sends the whole file instead of a part; run again without --stream" in run.err


@pytest.mark.parametrize("method", ["linear", "ties --option scope=model"])
def test_a_killed_run_that_streams_is_gone_on_with(world: World, method: str, tmp_path: Path) -> None:
    """SIGKILL between two tensors, twice; what was finished is not read again, and the bytes are those of one run."""
    name, *flags = method.split()
    command = ["merge", *asked(name), *flags, "--output"]
    again = [*command, tmp_path / "out", "--stream", "--json"]
    environment = {"HF_ENDPOINT": world.hub.endpoint, "HF_HOME": str(world.home), "OMP_NUM_THREADS": "1"}
    journal = tmp_path / ".out.hfmerge-journal"
    done = 0
    for goal in (5, 15):
        world.storage.faults(Fault(delay=0.05))
        process = tiny.start(*again, **environment)
        while process.poll() is None and done < goal:
            done = sum(path.read_bytes().count(b"\n") for path in journal.glob("*.jsonl"))
            time.sleep(0.002)
        process.kill()
        assert tiny.finish(process).code == -signal.SIGKILL, "it was done before"
    world.storage.faults()
    # a step that both killed runs finished has two lines
    known = len(read_past(journal).finished)
    run = world.streaming.done(*again, "--resume")
    assert "hfmerge: resuming: " in run.err and 5 <= run.json["reused"] <= known
    world.plain.done(*command, tmp_path / "plain")
    assert tiny.files(tmp_path / "out") == tiny.files(tmp_path / "plain")
    told = run.json["streamed"]
    assert told["received"] <= world.size("org/base", "org/a", "org/b") + 500_000
    assert told["verified"] or told["unverified"]
    assert not journal.exists()
