"""Child processes for one Hub: one that runs the command line again and again, one that uploads folders."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tiny import Run

from hfmerge.hubserver.serve import HubServer


LOOP = """
import contextlib, io, json, sys, traceback
from hfmerge.cli.main import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = -1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""

UPLOAD = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
for repo_id, folder in json.load(sys.stdin).items():
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
"""


def upload(hub: HubServer, home: Path, folders: Mapping[str, Path]) -> None:
    """Put folders into new repositories (`org/name` -> folder) with the official client."""
    text = json.dumps({repo_id: str(folder) for repo_id, folder in folders.items()})
    environment = {**os.environ, **hub.env(home)}
    subprocess.run([sys.executable, "-c", UPLOAD], input=text, text=True, env=environment, check=True)


class Shell:
    """Runs commands in one child process, whose Hub and cache are those of its environment."""

    def __init__(self, **environment: str):
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def run(self, *arguments: object) -> Run:
        """One command: exit code, standard output and standard error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([str(argument) for argument in arguments]), file=self._process.stdin, flush=True)
        code, out, err = json.loads(self._process.stdout.readline())
        return Run(code, out, err)

    def done(self, *arguments: object) -> Run:
        """One command that must succeed."""
        run = self.run(*arguments)
        assert run.code == 0, run.err
        return run
