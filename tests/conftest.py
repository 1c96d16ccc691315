"""Shared fixtures: a quiet, offline-safe environment; warnings of third parties that are not ours to fix."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from launching import free_port

from hfmerge.hubserver.serve import HubServer


# read at import by huggingface_hub, so it is set before anything imports it; tests of the Hub run clients in child
# processes
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PORT = free_port()
HOME = tempfile.mkdtemp(prefix="hfmerge-test-home-")
USERS = {"me": "hf_test_token_of_me", "other": "hf_test_token_of_other"}
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{PORT}"
os.environ["HF_HOME"] = HOME
os.environ["HF_TOKEN"] = USERS["me"]
atexit.register(shutil.rmtree, HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub on loopback in a process of its own, at the endpoint that the real client in this process was told."""
    folder = tmp_path_factory.mktemp("hub-end-to-end")
    with HubServer(folder / "store", port=PORT, users=USERS, log=folder / "requests.jsonl") as server:
        yield server
