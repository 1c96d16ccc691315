"""`hfmerge hub user`, `token` and `org`: who may use a store, whether a server runs on it or not."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from hfmerge.errors import HfMergeError
from hfmerge.hubserver.accounts import ROLES, TOKEN_ROLES, Accounts, check_name, prepare_store


_DEFAULT_USER = "me"


def main_user(argv: list[str]) -> int:
    """`hfmerge hub user add|remove|list`. Returns the exit code."""
    parser, actions = _parser("user", "Add and remove the users of a store.")
    add = _action(actions, "add", "add a user, and print a token: once, as the store keeps only its hash")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--role", choices=TOKEN_ROLES, default="write", help="what the token may do (default: write)")
    remove = _action(actions, "remove", "remove a user with all tokens and memberships; repositories stay")
    remove.add_argument("name", metavar="NAME")
    _action(actions, "list", "print all users, with their organisations")

    def work(accounts: Accounts, arguments: argparse.Namespace) -> None:
        if arguments.action == "add":
            check_name(arguments.name)
            if not accounts.add_user(arguments.name):
                raise HfMergeError(f"there is a user {arguments.name}; a new token: hfmerge hub token add NAME")
            print(accounts.add_token(arguments.name, role=arguments.role))
        elif arguments.action == "remove":
            accounts.remove_user(arguments.name)
        else:
            for name in accounts.users():
                print(name, *(f"{org}:{role}" for org, role in accounts.memberships(name)))

    return _run(parser, argv, work)


def main_token(argv: list[str]) -> int:
    """`hfmerge hub token add|list|revoke|rotate`. Returns the exit code."""
    parser, actions = _parser("token", "Make and revoke tokens. A token is printed once, when it is made.")
    add = _action(actions, "add", "make one more token for a user")
    add.add_argument("user", metavar="USER")
    add.add_argument("--role", choices=TOKEN_ROLES, default="write", help="what it may do (default: write)")
    add.add_argument("--label", default="", help="what it is for")
    listed = _action(actions, "list", "print id, user, role, time and label of each token")
    listed.add_argument("user", metavar="USER", nargs="?")
    revoke = _action(actions, "revoke", "make a token worthless")
    revoke.add_argument("id", metavar="ID", help="as `list` prints it")
    rotate = _action(actions, "rotate", "revoke all tokens of a user, and make a new one")
    rotate.add_argument("user", metavar="USER")

    def work(accounts: Accounts, arguments: argparse.Namespace) -> None:
        if arguments.action == "add":
            print(accounts.add_token(arguments.user, role=arguments.role, label=arguments.label))
        elif arguments.action == "revoke":
            accounts.revoke(arguments.id)
        elif arguments.action == "rotate":
            print(accounts.rotate(arguments.user))
        else:
            for token in accounts.tokens(arguments.user):
                print(token.id, token.user, token.role, token.created, token.label)

    return _run(parser, argv, work)


def main_org(argv: list[str]) -> int:
    """`hfmerge hub org add|remove|list`. Returns the exit code."""
    parser, actions = _parser(
        "org",
        "Say who is a member of an organisation. `read` sees its private repositories, `contributor` also makes"
        " repositories and writes those, `write` writes all of them, `admin` also changes who is a member.",
    )
    add = _action(actions, "add", "make a user a member, or change their role; makes the organisation if need be")
    add.add_argument("org", metavar="ORG")
    add.add_argument("user", metavar="USER")
    add.add_argument("--role", choices=ROLES, default="write", help="(default: write)")
    remove = _action(actions, "remove", "take a member out")
    remove.add_argument("org", metavar="ORG")
    remove.add_argument("user", metavar="USER")
    listed = _action(actions, "list", "print the members of an organisation, or all organisations")
    listed.add_argument("org", metavar="ORG", nargs="?")

    def work(accounts: Accounts, arguments: argparse.Namespace) -> None:
        if arguments.action == "add":
            check_name(arguments.org)
            if not accounts.add_org(arguments.org, arguments.user, arguments.role):
                accounts.set_member(arguments.org, arguments.user, arguments.role)
        elif arguments.action == "remove":
            accounts.remove_member(arguments.org, arguments.user)
        elif arguments.org is None:
            print(*accounts.orgs(), sep="\n")
        else:
            if accounts.org(arguments.org) is None:
                raise HfMergeError(f"{arguments.org}: no such organisation")
            for user, role in accounts.members(arguments.org):
                print(user, role)

    return _run(parser, argv, work)


def add_root(parser: argparse.ArgumentParser) -> None:
    """The option that names the store."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    default = Path(data) / "hfmerge" / "hub"
    parser.add_argument(
        "--root", "--store", type=Path, default=default, help="folder of the store (default: %(default)s)"
    )


def first_users(root: Path) -> list[str]:
    """The users to make in a store that has none; nothing is made here."""
    if not (root / "people.sqlite").exists():
        return [_DEFAULT_USER]
    with closing(Accounts(root)) as accounts:
        return [] if accounts.users() else [_DEFAULT_USER]


def _parser(
    name: str, description: str
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog=f"hfmerge hub {name}", description=description)
    return parser, parser.add_subparsers(dest="action", required=True)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_root(action)
    return action


def _run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    work: Callable[[Accounts, argparse.Namespace], None],
) -> int:
    arguments = parser.parse_args(argv)
    try:
        prepare_store(arguments.root)
        with closing(Accounts(arguments.root)) as accounts:
            work(accounts, arguments)
    except HfMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
