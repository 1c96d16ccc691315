"""Starting and stopping the server: as a child process from Python, in the foreground, or around one command."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.accounts import new_token
from hfmerge.hubserver.importer import MISLEADING, import_folder
from hfmerge.hubserver.people import add_root, first_users
from hfmerge.hubserver.runner import Options, is_loopback, run


DEFAULT_USER = "me"
DEFAULT_PORT = 8421

PURPOSE = (
    "This Hub is for tests, continuous integration, and work without a network by people who trust each other:"
    " connections are not encrypted, and nothing limits what a user stores."
)

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0


class HubServer:
    """A server in a process of its own, which ends with `stop`, with the `with` block, or with its parent.

    Args:
        root: folder of the store; made if it is missing, kept when the server stops.
        host: loopback address to listen on.
        port: port to listen on, 0 for a free one.
        users: user name to token, which hold while this server runs; one user `me` with a random token if None.
            Tokens that were made for the store hold beside them.
        cdn: serve large files from a second port, after a redirect.
        log: file for the request log, one JSON object a line.
        part_size: bytes of one part of a multipart LFS upload; None for the default.

    Attributes:
        endpoint: `http://HOST:PORT`.
        token: token of the first user.
        tokens: token of each user.

    Raises:
        HfMergeError: it cannot start; the message ends with what the server said.
    """

    def __init__(
        self,
        root: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        users: Mapping[str, str] | None = None,
        cdn: bool = False,
        log: Path | None = None,
        part_size: int | None = None,
    ):
        self.tokens = dict(users) if users else {DEFAULT_USER: new_token()}
        self.token = next(iter(self.tokens.values()))
        command = [sys.executable, "-m", "hfmerge.hubserver", "--child", "--root", str(root)]
        command += ["--host", host, "--port", str(port)]
        command += ["--cdn-port", "0"] if cdn else []
        command += ["--log", str(log)] if log is not None else []
        command += ["--part-size", str(part_size)] if part_size is not None else []
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for the command that uses the server; the server ends with its parent.
            start_new_session=True,
        )
        self.endpoint = self._greet()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def env(self, home: Path) -> dict[str, str]:
        """Variables that make a child process use this server, as the first user, with caches under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def stop(self) -> None:
        """End the server and wait for it; harmless when it has ended."""
        pipes = [pipe for pipe in (self._process.stdin, self._process.stdout) if pipe is not None]
        for pipe in pipes:
            pipe.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            try:
                self._process.wait(_STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self._errors.close()

    def _greet(self) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        # The tokens go through the pipe: others can read the command line.
        line = b""
        timer = threading.Timer(_START_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"users": self.tokens}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it ended already: what it said follows
        finally:
            timer.cancel()
        if line:
            return str(json.loads(line)["endpoint"])
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip()
        self.stop()
        raise HfMergeError(f"the hub server could not start: {said or 'it said nothing'}")


def main_serve(argv: list[str]) -> int:
    """`hfmerge hub serve`: serve in the foreground until Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="hfmerge hub serve",
        description=f"Serve a Hub-compatible store on this machine, with pages for browsers. {PURPOSE} Users and their"
        " tokens are kept with the store: `hfmerge hub user`, `hfmerge hub token` and `hfmerge hub org` change them,"
        " also while it is served.",
    )
    add_root(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--public", action="store_true", help="allow an address that other machines can reach")
    parser.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="NAME",
        help=f"make this user, with a token that is printed once (default: {DEFAULT_USER}, in a new store)",
    )
    parser.add_argument(
        "--users", type=Path, metavar="FILE", help="JSON file of user names and tokens, which are not kept"
    )
    parser.add_argument("--cdn-port", type=int, metavar="N", help="serve large files from a second port")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append one JSON object a request")
    parser.add_argument("--part-size", type=int, metavar="BYTES", help="part of a multipart LFS upload")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    def announce(endpoint: str, made: Mapping[str, str], users: Sequence[str]) -> None:
        if arguments.child:
            print(json.dumps({"endpoint": endpoint}), flush=True)
            return
        print(f"# store: {arguments.root}")
        print(f"# pages: {endpoint}/")
        shown = {**session, **made}
        for name, token in shown.items():
            print(f"# user {name}:" + (" (this token is kept, and not shown again)" if name in made else ""))
            print(f"export HF_ENDPOINT={endpoint}")
            print(f"export HF_TOKEN={token}", flush=True)
        if not shown:
            print(f"# users: {', '.join(users)}; a new token: hfmerge hub token add USER --root {arguments.root}")
            print(f"export HF_ENDPOINT={endpoint}", flush=True)

    try:
        session = _session_tokens(arguments)
        if not is_loopback(arguments.host) and arguments.public:
            print(f"warning: other machines can reach {arguments.host}. {PURPOSE}", file=sys.stderr)
        options = Options(
            *(arguments.root, arguments.host, arguments.port, session),
            new_users=[] if session else arguments.user or first_users(arguments.root),
            public=arguments.public,
            cdn_port=arguments.cdn_port,
            log=arguments.log,
            part_size=arguments.part_size,
        )
        run(options, announce, sys.stdin.buffer if arguments.child else None)
    except HfMergeError as error:
        print(error if arguments.child else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def main_run(argv: list[str]) -> int:
    """`hfmerge hub run ... -- COMMAND`: run a command against a server of its own. Returns the command's exit code."""
    parser = argparse.ArgumentParser(
        prog="hfmerge hub run",
        usage="%(prog)s [--root DIR] [--import FOLDER=org/name]... [--home DIR] -- COMMAND...",
        description="Start a Hub-compatible server on a free port, run COMMAND with HF_ENDPOINT, HF_TOKEN and HF_HOME"
        f" set, and stop the server. {PURPOSE}",
    )
    parser.add_argument("--root", type=Path, help="folder of the store (default: a temporary one)")
    parser.add_argument("--home", type=Path, help="HF_HOME of the command (default: a temporary one)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append one JSON object a request")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FOLDER=ID",
        help="put a folder into the repository org/name, or datasets/org/name, first; may be repeated",
    )
    own, command = _split(argv)
    arguments = parser.parse_args(own)
    if not command:
        parser.error("no command: put it after --")
    imports = [_import(parser, text) for text in arguments.imports]
    if shutil.which(command[0]) is None:
        print(f"error: {command[0]}: no such command", file=sys.stderr)
        return 127
    try:
        with ExitStack() as stack:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hfmerge-hub-")))
            server = stack.enter_context(HubServer(arguments.root or temporary / "store", log=arguments.log))
            for folder, repo_type, repo_id in imports:
                import_folder(server.endpoint, server.token, folder, repo_id, repo_type=repo_type)
            environment = {key: value for key, value in os.environ.items() if key not in MISLEADING}
            environment |= server.env(arguments.home or temporary / "home")
            for name in ("NO_PROXY", "no_proxy"):
                environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1"]))
            return _call(command, environment)
    except HfMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    process = subprocess.Popen(command, env=dict(environment))
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue  # the command got the signal too, and decides
        return 128 - code if code < 0 else code


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:cut]), list(argv[cut + 1 :])


def _import(parser: argparse.ArgumentParser, text: str) -> tuple[Path, str, str]:
    folder, _, repo_id = text.rpartition("=")
    repo_type = "model"
    if repo_id.count("/") == 2 and repo_id.startswith("datasets/"):
        repo_type, repo_id = "dataset", repo_id.removeprefix("datasets/")
    if not folder or repo_id.count("/") != 1:
        parser.error(f"--import {text}: write FOLDER=org/name or FOLDER=datasets/org/name")
    if not Path(folder).is_dir():
        parser.error(f"--import {text}: no folder {folder}")
    return Path(folder), repo_type, repo_id


def _session_tokens(arguments: argparse.Namespace) -> dict[str, str]:
    """Tokens from the parent process or from a file; none if the store's own are to be used."""
    if arguments.child:
        users = json.loads(sys.stdin.buffer.readline())["users"]
    elif arguments.users is not None:
        try:
            users = json.loads(arguments.users.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HfMergeError(f'{arguments.users}: cannot be read ({error}); write {{"name": "token"}}') from error
    else:
        return {}
    if not isinstance(users, dict) or not users or not all(isinstance(t, str) and t for t in users.values()):
        raise HfMergeError("users: a JSON object of names and tokens is needed, with at least one user")
    return users
