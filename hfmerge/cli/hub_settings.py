"""Flags that say how the Hub is reached, named as those of `hf`: token, cache, revision."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hfmerge.errors import HfMergeError


WITHOUT_HUB = ("convert", "methods", "plot")
"""Commands that never ask the Hub."""


def hub_flags(sub: argparse.ArgumentParser) -> None:
    """Add the flags of every command that may ask the Hub."""
    group = sub.add_argument_group("Hub")
    group.add_argument(
        "--token",
        help="a User Access Token, which other users of this machine can see in the list of processes (default: "
        "HF_TOKEN, or what `hf auth login` stored)",
    )
    group.add_argument("--cache-dir", metavar="FOLDER", help="folder for what is downloaded (default: HF_HUB_CACHE)")


def revision_flag(sub: argparse.ArgumentParser) -> None:
    """Add the flag for the revision of the merge that a command reads."""
    sub.add_argument("--revision", help="branch, tag or commit of MERGED, the same as MERGED@REVISION (default: main)")


def with_revision(args: argparse.Namespace) -> None:
    """Put the revision of a flag behind the name of the merge.

    Raises:
        HfMergeError: a folder, or a merge that is named with its revision.
    """
    if getattr(args, "revision", None) is None:
        return
    if Path(args.merged).is_dir():
        raise HfMergeError(f"--revision {args.revision}: {args.merged} is a folder, which has no revision.")
    if "@" in args.merged:
        raise HfMergeError(f"--revision {args.revision}: {args.merged} names its revision already; give one of both.")
    args.merged = f"{args.merged}@{args.revision}"


@contextlib.contextmanager
def hub_settings(args: argparse.Namespace) -> Iterator[None]:
    """Have one command use the token and the cache of its flags, and show no bars if it is to be quiet.

    Raises:
        HfMergeError: see `with_revision`.
    """
    given = {
        "HF_TOKEN": getattr(args, "token", None),
        "HF_HUB_CACHE": getattr(args, "cache_dir", None),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1" if args.quiet else None,
    }
    with_revision(args)
    with contextlib.ExitStack() as stack:
        for name, value in given.items():
            if value is not None:
                stack.callback(_restore, name, os.environ.get(name))
                os.environ[name] = value
        # the client reads the cache's folder from the environment once, when it is imported
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None and given["HF_HUB_CACHE"] is not None:
            stack.callback(setattr, constants, "HF_HUB_CACHE", vars(constants)["HF_HUB_CACHE"])
            vars(constants)["HF_HUB_CACHE"] = str(Path(given["HF_HUB_CACHE"]).expanduser())
        yield


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
