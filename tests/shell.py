"""Forked processes for one Hub: one that runs the command line again and again, one that uploads folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from fixtures.processes import CONTEXT, Forked, set_environment
from tiny import Run

from hfmerge.hubserver.serve import HubServer


UPLOAD = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
for repo_id, folder in json.loads(sys.argv[1]).items():
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
"""


def upload(hub: HubServer, home: Path, folders: Mapping[str, Path]) -> None:
    """Put folders into new repositories (`org/name` -> folder) with the official client."""
    text = json.dumps({repo_id: str(folder) for repo_id, folder in folders.items()})
    process = Forked("-c", UPLOAD, text, env=hub.env(home))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said


class Shell:
    """Runs commands in one child process, whose Hub and cache are those of its environment."""

    def __init__(self, **environment: str):
        self._here, there = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_loop, args=(there, {**os.environ, **environment}))
        self._process.start()
        there.close()

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc: object) -> None:
        self._here.close()
        self._process.kill()
        self._process.join()

    def run(self, *arguments: object) -> Run:
        """One command: exit code, standard output and standard error."""
        self._here.send([str(argument) for argument in arguments])
        return Run(*self._here.recv())

    def done(self, *arguments: object) -> Run:
        """One command that must succeed."""
        run = self.run(*arguments)
        assert run.code == 0, run.err
        return run


def _loop(commands: Connection, environment: Mapping[str, str]) -> None:
    set_environment(environment)
    from hfmerge.cli.main import main

    while True:
        arguments = commands.recv()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(arguments)
            except SystemExit as stop:
                code = stop.code  # type: ignore[assignment]
            except Exception:
                code = -1
                traceback.print_exc()
        commands.send((code, out.getvalue(), err.getvalue()))
