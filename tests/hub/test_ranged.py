"""Ranges of a file read through every fault of a Hub and of the storage it redirects to: exact bytes, or one line."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate

import httpx2
import pytest

from hfmerge.errors import AccessError, CorruptFileError, NotFoundError, OfflineError, SourceError
from hfmerge.hub.client import Patience, asked_wait
from hfmerge.hub.ranges import RangedFile, Traffic
from hfmerge.hubserver.serve import HubServer
from tests.fixtures.faultproxy import Fault, FaultProxy
from tests.fixtures.hub import USERS
from tests.fixtures.shell import upload


pytestmark = pytest.mark.slow
DATA = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = Patience(tries=4, first=0.01, longest=0.02, longest_retry_after=5.0)


@dataclass(frozen=True)
class World:
    """A Hub and the storage it redirects to, each behind a proxy, with one file of `DATA`."""

    hub: FaultProxy
    storage: FaultProxy
    path: str

    def file(self, patience: Patience = QUICK, sha256: str = SHA256, path: str = "") -> tuple[RangedFile, Traffic]:
        """The file, opened anew."""
        traffic = Traffic()
        url = self.hub.endpoint + (path or self.path)
        return RangedFile("org/m@0123abcd: model.safetensors", url, len(DATA), sha256, traffic, patience), traffic


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("ranged")
    (root / "m").mkdir()
    (root / "m" / "model.safetensors").write_bytes(DATA)
    with HubServer(root / "store", users=USERS, cdn=True) as hub:
        upload(hub, root / "home", {"org/m": root / "m"})
        answer = httpx2.head(f"{hub.endpoint}/org/m/resolve/main/model.safetensors", follow_redirects=False)
        path = f"/org/m/resolve/{answer.headers['X-Repo-Commit']}/model.safetensors"
        with FaultProxy(answer.headers["Location"]) as storage, FaultProxy(hub.endpoint, storage=storage) as front:
            yield World(front, storage, path)


@pytest.fixture
def world(started: World) -> World:
    started.hub.faults()
    started.storage.faults()
    return started


def test_one_redirect_serves_many_ranges_and_the_token_stays_with_the_hub(world: World) -> None:
    file, traffic = world.file()
    for start, stop in ((0, 1), (5, 70_000), (len(DATA) - 1, len(DATA)), (0, len(DATA)), (9, 9)):
        assert file.read(start, stop) == DATA[start:stop]
    assert [record.token for record in world.hub.requests()] == [True]
    assert [record.token for record in world.storage.requests()] == [False] * 4
    assert [record.range for record in world.storage.requests()][1] == "bytes=5-69999"
    assert traffic.requests == 5 and traffic.failures == 0 and traffic.received == 1 + 69_995 + 1 + len(DATA)


PASSING = {
    "error 500": ("storage", Fault(status=500, every=2)),
    "error 503 of the Hub": ("hub", Fault(status=503, times=2)),
    "too many requests": ("storage", Fault(status=429, headers={"Retry-After": "0"}, times=2)),
    "no answer": ("storage", Fault(drop=True, times=2)),
    "no answer of the Hub": ("hub", Fault(drop=True, times=2)),
    "cut short": ("storage", Fault(cut=700_000)),
    "cut at once": ("storage", Fault(cut=0, times=3)),
    "another range": ("storage", Fault(shift=8, times=2)),
    "expired address": ("storage", Fault(status=403, times=2)),
    "lost address": ("storage", Fault(status=404, times=1, skip=1)),
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_leave_exact_bytes(world: World, name: str) -> None:
    place, fault = PASSING[name]
    getattr(world, place).faults(fault)
    file, traffic = world.file()
    assert file.read(1000, 2000) == DATA[1000:2000]
    assert file.read(0, len(DATA)) == DATA
    assert traffic.failures == len([r for r in (*world.hub.requests(), *world.storage.requests()) if r.hit]) > 0
    assert traffic.received == 1000 + len(DATA), "what had come before a cut is not asked for again"


def test_a_cut_goes_on_from_the_byte_reached(world: World) -> None:
    world.storage.faults(Fault(cut=1_000_000, times=2))
    file, _ = world.file()
    assert file.read(10, 2_500_010) == DATA[10:2_500_010]
    starts = [int(str(r.range).removeprefix("bytes=").partition("-")[0]) for r in world.storage.requests()]
    assert starts == [10, 1_000_010, 2_000_010]


LASTING = {
    "error 500": (
        "storage",
        Fault(status=500),
        OfflineError,
        "bytes 100-199 could not be read .* in 4 tries .*HTTP 500",
    ),
    "no answer": ("storage", Fault(drop=True), OfflineError, "bytes 100-199 .*RemoteProtocolError"),
    "another range": ("storage", Fault(shift=1), OfflineError, r"another range, bytes 101-200/3000000"),
    "expired addresses": ("storage", Fault(status=403), OfflineError, "HTTP 403 from the storage"),
    "no ranges": ("storage", Fault(whole=True), SourceError, "sends the whole file .* without `stream=True`"),
    "shorter": ("storage", Fault(status=416), CorruptFileError, "ends before byte 200, though the Hub lists 3000000"),
    "refused": ("hub", Fault(status=403), AccessError, "refused the token"),
    "gated": ("hub", Fault(status=403, headers={"X-Error-Code": "GatedRepo"}), AccessError, "gated"),
    "gone": ("hub", Fault(status=404, headers={"X-Error-Code": "EntryNotFound"}), NotFoundError, "no such file"),
    "teapot": ("hub", Fault(status=418), SourceError, "HTTP 418"),
    "long wait": ("hub", Fault(status=429, headers={"Retry-After": "3600"}), OfflineError, "asks to wait 3600 s"),
    "round and round": ("hub", Fault(status=302, headers={"Location": "/x"}), SourceError, "redirects without end"),
}


@pytest.mark.parametrize("name", LASTING)
def test_faults_that_last_are_one_line(world: World, name: str) -> None:
    place, fault, kind, words = LASTING[name]
    getattr(world, place).faults(fault)
    with pytest.raises(kind, match=words) as caught:
        world.file()[0].read(100, 200)
    assert str(caught.value).startswith("org/m@0123abcd: model.safetensors: ") and "\n" not in str(caught.value)


def test_a_whole_file_may_come_without_being_asked_for_in_part(world: World) -> None:
    world.storage.faults(Fault(whole=True))
    assert world.file()[0].read(0, len(DATA)) == DATA


def test_other_content_under_the_commit_is_noticed(world: World) -> None:
    with pytest.raises(CorruptFileError, match="other content"):
        world.file(sha256="0" * 64)[0].read(0, 10)


def test_nobody_listens(world: World) -> None:
    file = RangedFile("org/m@0123abcd: x", "http://127.0.0.1:9/x", 10, None, Traffic(), QUICK)
    with pytest.raises(OfflineError, match="ConnectError.*run again later, or without `stream=True`"):
        file.read(0, 10)


def test_a_hub_that_asks_to_wait_is_left_alone_by_all_threads(world: World) -> None:
    world.storage.faults(Fault(status=429, headers={"Retry-After": "1"}, times=1))
    file, traffic = world.file()
    file.read(0, 1)
    world.storage.faults(Fault(status=429, headers={"Retry-After": "1"}, times=1))
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(file.read, 0, 1000)]
        while not world.storage.requests():
            time.sleep(0.01)
        # time for the refusal to be read
        time.sleep(0.4)
        futures += [pool.submit(file.read, i * 1000, i * 1000 + 1000) for i in range(1, 4)]
        assert [future.result() for future in futures] == [DATA[i * 1000 : i * 1000 + 1000] for i in range(4)]
    assert 1.0 <= time.monotonic() - start < 10.0
    assert len(world.storage.requests()) == 5, "one refused, and four that waited for their turn"


def test_a_slow_hub_is_waited_for(world: World) -> None:
    world.storage.faults(Fault(delay=0.3, times=2))
    assert world.file()[0].read(0, 100) == DATA[:100]


def test_a_run_that_ends_does_not_wait(world: World) -> None:
    world.storage.faults(Fault(status=500))
    file, traffic = world.file(Patience(tries=9, first=60.0, longest=60.0))
    threading.Timer(0.3, traffic.stopped.set).start()
    start = time.monotonic()
    with pytest.raises(CancelledError):
        file.read(0, 10)
    assert time.monotonic() - start < 30.0


def test_many_threads_read_one_file(world: World) -> None:
    world.storage.faults(Fault(status=500, every=7), Fault(cut=5_000, every=5))
    file, _ = world.file(Patience(tries=8, first=0.01, longest=0.02))
    spans = [(i * 60_000, i * 60_000 + 50_000) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for (start, stop), data in zip(spans, pool.map(lambda span: file.read(*span), spans), strict=True):
            assert data == DATA[start:stop]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": " 7 "}, 7.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": formatdate(time.time() - 60, usegmt=True)}, 0.0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"RateLimit": '"resolvers";r=3;t=55'}, None),
    ],
)
def test_wishes_of_a_hub(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


def test_a_date_to_come_back_at() -> None:
    seconds = asked_wait({"Retry-After": formatdate(time.time() + 60, usegmt=True)})
    assert seconds is not None and 57.0 <= seconds <= 61.0
