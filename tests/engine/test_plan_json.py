"""A plan is data: written as JSON, read back equal, and run with the same bytes; what is no plan is refused."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hfmerge.checkpoint.streaming import session
from hfmerge.checkpoint.streaming.session import Streaming, leave_session, take_session
from hfmerge.engine import plan_json
from hfmerge.engine.executor import Outcome, run
from hfmerge.engine.plan import Plan
from hfmerge.engine.plan_json import plan_from_json, plan_to_json
from hfmerge.engine.planner import make_plan
from hfmerge.errors import HfMergeError
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from hfmerge.learning.space import Space
from hfmerge.ledger.repository import open_merged
from hfmerge.lifecycle.changes import plan_add, plan_reorder, plan_subtract, plan_unmerge
from hfmerge.methods import BUILT_IN, MergeMethod, registry
from hfmerge.recipe.recipe import parse_recipe
from tests.fixtures import tiny


TOKENS = ["[UNK]", "[PAD]", *(f"w{i}" for i in range(46))]
Build = Callable[[Path], Plan]


@pytest.fixture(scope="module")
def root(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders with heads and adapters, a decoder that ties its embedding, one with more tokens, and experts."""
    root = tmp_path_factory.mktemp("plans")
    base = tiny.build("BertModel", tiny.config("bert"))
    tiny.save(base, root / "base")
    tiny.save(tiny.fine_tune(base, 5), root / "plain")
    for seed, name in enumerate("abc", 1):
        labels = [f"{name}{i}" for i in range(1 + seed)]
        model = tiny.with_head("BertForSequenceClassification", base, seed, labels)
        tiny.disturb(model.base_model, 10 + seed, 0.1)
        tiny.save(model, root / name)
    targets = {f"encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}
    tiny.adapter(root / "lora", targets, 7)
    tiny.save(tiny.fine_tune(base, 6), root / "other")
    tiny.adapter(root / "on-other", targets, 8)
    settings = tiny.config("llama", vocab_size=len(TOKENS), tie_word_embeddings=True)
    tied = tiny.build("LlamaForCausalLM", settings)
    tiny.tokenizer(tiny.save(tied, root / "tied"), TOKENS)
    tiny.tokenizer(tiny.save(tiny.fine_tune(tied, 1), root / "tied-a"), TOKENS)
    longer = tiny.fine_tune(tied, 2)
    longer.resize_token_embeddings(len(TOKENS) + 2, mean_resizing=False)
    tiny.tokenizer(tiny.save(longer, root / "longer"), [*TOKENS, "new", "newer"])
    for name in ("tied", "tied-a", "longer"):
        tiny.edit(root / name, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_key_value_heads": 1}
    experts = tiny.build("MixtralForCausalLM", tiny.config("mixtral", **sizes, num_local_experts=2, vocab_size=16))
    tiny.save(experts, root / "experts")
    tiny.save(tiny.fine_tune(experts, 1), root / "stacked", save_original_format=False)
    for name in ("base", "a", "b", "lora"):
        import_folder(hub.endpoint, hub.token, root / name, f"plans/{name}")
    for method, names in (("opcm", "ab"), ("mdm_oc", "ab"), ("gram", "abc")):
        given = [root / name for name in names]
        flags = ["--method", method, "--state", "all", "--output", root / f"merged-{method}"]
        tiny.done("merge", *given, "--base", root / "base", *flags)
    return root


def planned(root: Path, *models: str, base: str = "base", method: Any = "linear", **keys: Any) -> Plan:
    def place(name: str) -> str:
        return "+".join(part if part.startswith("plans/") else str(root / part) for part in name.split("+"))

    data = {"base": place(base), "models": [place(name) for name in models], "method": method, **keys}
    return make_plan(parse_recipe(data, "test"), origin="test")


LEARN = {"steps": 3, "groups": "layer", "replay": {"rows": 8, "generator": "unigram"}}
CASES: dict[str, Build] = {
    **{
        f"method {kind.name}": lambda root, kind=kind: planned(
            root, *("a", "b", "lora")[: kind.arity[1]], method=kind.name, state="all"
        )
        for kind in BUILT_IN
    },
    "norm of two passes": lambda root: planned(root, "a", "lora", method={"name": "opcm", "norm": "mean"}),
    "a norm that is a number": lambda root: planned(root, "a", "b", method={"name": "opcm", "norm": 2}),
    "patterns": lambda root: make_plan(
        parse_recipe(
            {
                "base": str(root / "base"),
                "models": [
                    {"model": str(root / "a"), "weight": {"encoder.layer.0.*": 0.25, "*": 1.5}},
                    {"model": str(root / "b"), "weight": -0.5},
                ],
                "method": "task_arithmetic",
                "dtype": "bfloat16",
                "exclude": ["embeddings.*"],
                "state": 2,
            },
            "test",
        )
    ),
    "adapter on another model": lambda root: planned(root, "a", "other+on-other"),
    "tied weights": lambda root: planned(root, "tied-a", base="tied"),
    "vocabularies united": lambda root: planned(root, "tied-a", "longer", base="tied", vocabulary="union"),
    "the base's vocabulary": lambda root: planned(root, "longer", base="tied", vocabulary="base"),
    "experts in another layout": lambda root: planned(root, "stacked", base="experts"),
    "experts stacked in the base": lambda root: planned(root, "experts", base="stacked", method="task_arithmetic"),
    "learned": lambda root: planned(root, "a", "b", method="mdm_oc", learn=LEARN),
    "copies of the sources": lambda root: planned(root, "a", "b", method="gram", keep_sources=True),
    "add": lambda root: plan_add(open_merged(str(root / "merged-opcm")), [entry(root / "c")]).plan,
    "unmerge by subtraction": lambda root: plan_unmerge(open_merged(str(root / "merged-gram")), ["a"]).plan,
    "unmerge from the start": lambda root: plan_unmerge(open_merged(str(root / "merged-opcm")), ["a"]).plan,
    "subtract": lambda root: plan_subtract(open_merged(str(root / "merged-mdm_oc")), ["a"]).plan,
    "reorder": lambda root: plan_reorder(open_merged(str(root / "merged-gram")), ["c", "a", "b"]).plan,
    "streamed": lambda root: planned(
        root, "plans/a", "plans/b", "plans/base+plans/lora", base="plans/base", method="opcm", stream=True
    ),
}
RUN = [
    "method opcm", "method ties", "method gram", "norm of two passes", "patterns", "adapter on another model",
    "vocabularies united", "experts in another layout", "experts stacked in the base", "add",
    "unmerge by subtraction", "subtract", "streamed",
]  # fmt: skip


def entry(folder: Path) -> Any:
    return parse_recipe({"base": "x", "models": [str(folder)], "method": "linear"}, "test").models[0]


def again(plan: Plan) -> Plan:
    return plan_from_json(plan_to_json(plan).encode())


def assert_plain(value: Any, place: str = "plan") -> None:
    """Nothing but data: what a dataclass holds beside its fields, such as a cached property, counts too."""
    if dataclasses.is_dataclass(value):
        assert type(value).__module__.startswith("hfmerge."), f"{place}: {type(value)}"
        names = {field.name for field in dataclasses.fields(value)}
        assert set(vars(value)) == names, f"{place}: {set(vars(value)) ^ names}"
        for name in names:
            assert_plain(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, Mapping):
        assert type(value) is dict and all(type(key) is str for key in value), place
        for key, item in value.items():
            assert_plain(item, f"{place}[{key}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            assert_plain(item, f"{place}[{i}]")
    else:
        assert value is None or type(value) in (bool, int, float, str) or isinstance(value, Path), (place, type(value))


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_back_is_the_plan_that_was_written(case: str, root: Path) -> None:
    plan = CASES[case](root)
    assert_plain(plan)
    back = again(plan)
    assert back == plan and plan_to_json(back) == plan_to_json(plan)
    for field in dataclasses.fields(Plan):
        # equality passes over what is not compared, and takes 1 for 1.0
        assert repr(getattr(back, field.name)) == repr(getattr(plan, field.name))
    assert_plain(back)


@pytest.mark.slow
def test_the_cases_are_what_they_are_called(root: Path) -> None:
    plans = {case: build(root) for case, build in CASES.items()}
    assert {plan.method.name for plan in plans.values()} == {kind.name for kind in BUILT_IN}
    assert plans["add"].prior is not None and plans["add"].prior.count == 2
    assert plans["unmerge by subtraction"].leaving and plans["subtract"].subtracted == (0,)
    assert plans["tied weights"].base_layout.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert plans["tied weights"].deltas[0].tied and any(param.owner for param in plans["tied weights"].params)
    vocabulary = plans["vocabularies united"].vocabulary
    assert vocabulary is not None and vocabulary.added == ("new", "newer")
    assert plans["adapter on another model"].deltas[1].source.beneath is not None
    assert len(plans["method opcm"].heads) == 2 and plans["learned"].recipe.learn is not None
    for case in ("experts in another layout", "experts stacked in the base"):
        assert any(origin.converted for origin in plans[case].deltas[0].full.values())
    assert [len(source.streams) for source in plans["streamed"].sources] == [1, 1, 1, 1]


def executed(plan: Plan, folder: Path) -> tuple[dict[str, str], Outcome]:
    folder.mkdir()
    outcome = run(plan, folder)
    return tiny.everything(folder), outcome


@pytest.mark.slow
@pytest.mark.parametrize("case", RUN)
def test_a_plan_read_back_gives_the_same_bytes(case: str, root: Path, tmp_path: Path) -> None:
    plan = CASES[case](root)
    back = again(plan)
    first, told = executed(plan, tmp_path / "first")
    second, said = executed(back, tmp_path / "second")
    assert first == second and any(name.endswith(".safetensors") for name in first)
    assert (told.products, told.source_digests, told.states) == (said.products, said.source_digests, said.states)
    assert (told.squared_norms, told.merged_norm) == (said.squared_norms, said.merged_norm)
    if case == "streamed":
        assert told.streamed is not None and said.streamed is not None
        # the first run goes on with what planning opened, the second opens the files itself
        assert told.streamed == said.streamed and len(told.streamed.verified) == 4


def test_a_session_has_one_owner_and_few_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_waiting", [])
    plan = CASES["streamed"](root)
    (left,) = session._waiting
    assert take_session(plan.sources) is left and session._waiting == []
    fresh = take_session(plan.sources)
    assert fresh is not left and fresh.names == left.names and len(fresh.names) == 4
    leave_session(left)
    assert take_session(again(plan).sources) is left
    leave_session(left)
    for _ in range(session.WAITING):
        leave_session(Streaming())
    assert left not in session._waiting and left._traffic.stopped.is_set()
    assert take_session([]).names == set()


def test_learning_leaves_the_session_to_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_waiting", [])
    plan = planned(root, "plans/a", "plans/b", base="plans/base", method="mdm_oc", stream=True)
    (left,) = session._waiting
    weights = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    with Space(plan, groups="model") as space:
        assert session._waiting == []
        found = space.merged(weights)
    assert session._waiting == [left] and left.report().received > 0
    with Space(planned(root, "a", "b", method="mdm_oc"), groups="model") as space:
        wanted = space.merged(weights)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    with pytest.raises(KeyError), Space(plan, groups="model"):
        raise KeyError
    assert session._waiting == [] and left._traffic.stopped.is_set()


def test_reading_a_plan_opens_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plan_to_json(CASES["add"](root)).replace(str(root), "/nowhere/at/all")
    known = registry()

    def opened(*given: Any, **more: Any) -> Any:
        raise AssertionError(f"{given} was looked for")

    with monkeypatch.context() as patch:
        patch.setattr(plan_json, "registry", lambda: known)
        for module, name in ((builtins, "open"), (os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir")):
            patch.setattr(module, name, opened)
        patch.setattr(socket.socket, "connect", opened)
        plan = plan_from_json(text.encode())
    assert plan.prior is not None and str(plan.prior.path).startswith("/nowhere/at/all")


def at(data: Any, *path: Any) -> Any:
    for step in path:
        data = data[step]
    return data


FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "another format": (lambda d: d.update(format="x"), 'is "x" 3, not hfmerge plan 3'),
    "another version": (lambda d: d.update(version=1), "not hfmerge plan 3"),
    "more beside the plan": (lambda d: d.update(more=1), "unknown key"),
    "no plan": (lambda d: d.pop("plan"), "lacks the key plan"),
    "a list": (lambda d: d.update(plan=[]), "must be a mapping, not a list"),
    "an unknown field": (lambda d: d["plan"].update(parms=1), 'has the unknown field "parms"; did you mean "params"?'),
    "a field of a field": (lambda d: at(d, "plan", "base", "snapshot").update(x=1), "snapshot: has the unknown field"),
    "a missing field": (lambda d: at(d, "plan", "params", 3).pop("slot"), "params: item 3: lacks the field slot"),
    "text for a number": (lambda d: at(d, "plan", "estimate").update(seconds="1"), "seconds: must be a number, not"),
    "a truth for a number": (lambda d: at(d, "plan", "estimate").update(read=True), "read: must be a whole number"),
    "a fraction": (lambda d: at(d, "plan", "estimate").update(read=1.5), "estimate: read: must be a whole number"),
    "a number for text": (lambda d: at(d, "plan", "params", 0).update(key=1), "item 0: key: must be text, not 1"),
    "neither of two": (lambda d: at(d, "plan", "recipe", "models", 0).update(weight=[]), "must be a number or a map"),
    "null": (lambda d: d["plan"].update(base=None), "base: must be a mapping, not null"),
    "a file elsewhere": (lambda d: at(d, "plan", "params", 0).update(file="../x"), '"../x" is no path of a file'),
    "a side file elsewhere": (lambda d: d["plan"].update(side_files=["/etc/x"]), '"/etc/x" is no path of a file'),
    "a head elsewhere": (lambda d: at(d, "plan", "heads", 0, 1).update(slug=".."), 'a head has the name ".."'),
    "a head of nobody": (lambda d: at(d, "plan", "heads", 0).__setitem__(0, 9), "and the model 9"),
    "three of two": (lambda d: at(d, "plan", "heads", 0).append(1), "heads: item 0: must have 2 items, not 3"),
    "fewer models": (lambda d: at(d, "plan", "deltas").pop(), "are not equally many"),
    "fewer ranks": (lambda d: [p["ranks"].clear() for p in d["plan"]["params"]], "has 0 and 0 ranks"),
    "another method": (lambda d: at(d, "plan", "method").update(name="magic"), 'method: "magic" of version 1 is not'),
    "its version": (lambda d: at(d, "plan", "method").update(version=99), '"mdm_oc" of version 99 is not here'),
    "its options": (lambda d: at(d, "plan", "method", "options").update(x=1), "options.x: unknown option of mdm_oc"),
    "an option": (lambda d: at(d, "plan", "method").update(options=None), "options: must be a mapping, not null"),
    "a value of it": (lambda d: at(d, "plan", "method", "options").update(scope=3), "options.scope: 3 is not one of"),
    "how it learns": (lambda d: at(d, "plan", "recipe", "learn").update(steps=0), "learn: learn: 1 problem"),
    "its loss": (lambda d: at(d, "plan", "recipe", "learn").update(loss="x"), 'loss: "x" is not one of distill'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_plan_is_refused_in_one_line(fault: str, root: Path) -> None:
    change, words = FAULTS[fault]
    data = json.loads(plan_to_json(CASES["learned"](root)))
    change(data)
    with pytest.raises(HfMergeError) as caught:
        plan_from_json(json.dumps(data).encode(), "its.json")
    told = str(caught.value)
    assert told.startswith("its.json: ") and words in told and "\n" not in told, told


@pytest.mark.parametrize("data", [b"", b"{", b"null", b'{"format": 1, "format": 2}', b"[" * 100 + b"]" * 100, b"\xff"])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(HfMergeError, match="^plan: .*; plan again.$"):
        plan_from_json(data)


def test_a_plan_too_long_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = plan_to_json(CASES["learned"](root)).encode()
    monkeypatch.setattr(plan_json, "PLAN_BYTES", dataclasses.replace(plan_json.PLAN_BYTES, most=len(data) - 1))
    with pytest.raises(HfMergeError, match="bytes of plan; the limit is"):
        plan_from_json(data)


def test_numbers_that_are_not_finite_come_back(root: Path) -> None:
    plan = CASES["method linear"](root)
    source = dataclasses.replace(plan.base, config={**plan.base.config, "limit": float("inf")})
    assert again(dataclasses.replace(plan, base=source)).base.config["limit"] == float("inf")


def test_what_is_no_data_is_not_written(root: Path) -> None:
    plan = CASES["method linear"](root)
    with pytest.raises(TypeError, match="function is no plain data"):
        plan_to_json(dataclasses.replace(plan, warnings=(assert_plain,)))  # type: ignore[arg-type]


def test_methods_of_the_registry_come_back_with_all_options() -> None:
    for kind in registry().values():
        method = kind()
        assert plan_json._read_method(json.loads(json.dumps(plan_json._write_method(method)))) == method
        assert isinstance(method, MergeMethod)
