"""Messages name parameters as Python has them, and on the command line the flags that these are."""

import ast
import inspect
from pathlib import Path

import pytest

import hfmerge
from hfmerge.cli.flags import Flags
from hfmerge.cli.program import build_parser
from hfmerge.errors import HfMergeError, OutputError
from hfmerge.validation.wording import call, parameter, spelled
from tests.fixtures import tiny


PACKAGE = Path(hfmerge.__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a fine-tune of it."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, folder / "base")
    tiny.save(tiny.fine_tune(base, 1), folder / "m0")
    return folder


def named_in_messages(function: str) -> dict[str, str]:
    """First argument of every call of `parameter`, or of `call`, in the package -> a place where it is."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                first = node.args[0]
                assert isinstance(first, ast.Constant), f"{path}:{node.lineno}: a name that is not written out"
                found[str(first.value)] = f"{path}:{node.lineno}"
    return found


@pytest.mark.parametrize(
    ("name", "value", "python", "flag"),
    [
        ("output", None, "`output`", "--output"),
        ("overwrite", True, "`overwrite=True`", "--overwrite"),
        ("push_to", "org/name", "`push_to='org/name'`", "--push-to org/name"),
        ("days", 0.5, "`days=0.5`", "--expires 0.5"),
        ("publish_private", ["org/a", "b"], "`publish_private=['org/a', 'b']`",
         "--publish-private org/a --publish-private b"),
        ("sources", {"m0": "FOLDER"}, "`sources={'m0': 'FOLDER'}`", "--source m0=FOLDER"),
        ("sources", {"m; rm -r ~": "`x`"}, "`sources={'m; rm -r ~': '`x`'}`", "--source m; rm -r ~=`x`"),
        ("no_flag_of_ours", 1, "`no_flag_of_ours=1`", "`no_flag_of_ours=1`"),
    ],
)  # fmt: skip
def test_one_parameter_for_both_readers(name: str, value: object, python: str, flag: str) -> None:
    assert parameter(name, value) == python
    with spelled(Flags(build_parser())):
        assert parameter(name, value) == flag
    assert parameter(name, value) == python


def test_one_call_for_both_readers() -> None:
    def both() -> list[str]:
        return [
            call("unmerge", "org/merged", remove="a b; `c`"),
            call("add", "org/merged", ["MODEL"]),
            call("verify", "out", accept_rewritten=True, log=Path("w.log")),
            call("purge_history", "org/merged"),
        ]

    assert both() == [
        "`hfmerge.unmerge('org/merged', remove='a b; `c`')`",
        "`hfmerge.add('org/merged', ['MODEL'])`",
        "`hfmerge.verify('out', accept_rewritten=True, log='w.log')`",
        "`hfmerge.purge_history('org/merged')`",
    ]
    with spelled(Flags(build_parser())):
        assert both() == [
            "`hfmerge unmerge org/merged --remove 'a b; `c`'`",
            "`hfmerge add org/merged MODEL`",
            "`hfmerge verify out --accept-rewritten --log w.log`",
            "`hfmerge purge-history org/merged`",
        ]


def test_two_commands_at_once_leave_nothing_behind() -> None:
    first, second = spelled(Flags(build_parser())), spelled(Flags(build_parser()))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert parameter("output") == "--output"
    second.__exit__(None, None, None)
    assert parameter("output") == "`output`"


@pytest.mark.slow
def test_the_command_line_has_a_flag_for_every_parameter_that_a_message_names() -> None:
    flags, names = Flags(build_parser()).known, named_in_messages("parameter")
    assert len(names) > 20
    assert {name: where for name, where in names.items() if name not in flags} == {}


@pytest.mark.slow
def test_every_call_that_a_message_names_is_a_public_function_and_a_command() -> None:
    commands = build_parser().format_help()
    for verb, where in named_in_messages("call").items():
        assert inspect.isfunction(getattr(hfmerge, verb)), where
        assert f"\n    {verb.replace('_', '-')} " in commands, where


def test_a_folder_that_looks_like_a_parameter_is_shown_as_it_is(root: Path, tmp_path: Path) -> None:
    """Names from elsewhere are never spelled anew, whatever is in them."""
    out = tmp_path / "x `overwrite` `push_to='a'`"
    out.mkdir()
    (out / "mine").touch()
    asked = ["merge", root / "m0", "--base", root / "base", "--method", "linear", "--output", out]
    run = tiny.cli(*asked)
    assert run.code == 1
    assert run.err == f"hfmerge: {out}: the folder is not empty; empty it, or choose another --output.\n"
    with pytest.raises(OutputError) as caught:
        hfmerge.merge(
            hfmerge.Recipe(
                base=str(root / "base"),
                models=(hfmerge.ModelEntry(str(root / "m0")),),
                method=hfmerge.MethodChoice("linear", {}, "none"),
                output=str(out),
            )
        )
    assert str(caught.value) == f"{out}: the folder is not empty; empty it, or choose another `output`."


def test_an_unknown_source_is_named_to_both_readers(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.done("merge", root / "m0", "--base", root / "base", "--method", "linear", "--output", out)
    with pytest.raises(HfMergeError, match="^`sources` m9: no model of that name was merged from a folder.$"):
        hfmerge.reorder(out, ["m0"], sources={"m9": "x"})
    assert "--source m9: no model of that name" in tiny.cli("reorder", out, "m0", "--source", "m9=x").err
