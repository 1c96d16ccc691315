"""A server and the official client for each module of tests.

Most tests give a script to `client.run`, which runs it in the client's own process and fails the test at the first of
its assertions that does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hubserver.harness import Client, Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server for the module."""
    made = Hub(tmp_path_factory.mktemp("hub"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(hub: Hub) -> Iterator[Client]:
    """The official client in its default mode, as alice."""
    made = Client(hub.server, hub.folder / "home")
    yield made
    made.close()
