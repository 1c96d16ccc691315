"""The model card, rendered from the ledger alone: the same ledger gives the same text, which `verify` relies on.

The text lies between two marker comments; what people write outside them is theirs and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hfmerge.checkpoint.behaviour import CHOICES
from hfmerge.errors import LedgerError
from hfmerge.hub.reference import split_name
from hfmerge.ledger.entry import Entry, Material
from hfmerge.methods import registry
from hfmerge.recipe.keys import jsonable, keys_of
from hfmerge.recipe.recipe import Recipe
from hfmerge.recipe.united import UNION
from hfmerge.recipe.weights import PatternWeights, Weight, shown, written
from hfmerge.validation.quoting import SITE, Markdown, code, fenced, link, markdown, python_text, shell_word
from hfmerge.validation.strict_yaml import dump_yaml, parse_front
from hfmerge.validation.values import hub_id


if TYPE_CHECKING:
    from jinja2 import Template

BEGIN, END = "<!-- hfmerge:begin -->", "<!-- hfmerge:end -->"
FILE = "README.md"
_KEYS = (
    *("base_model", "base_model_relation", "library_name", "pipeline_tag"),
    *("license", "license_name", "license_link", "tags", "hfmerge"),
)
"""Front-matter keys that hfmerge writes; all others are the user's."""
_LOOPBACK = re.compile(r"http://(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?")
_FRONT = re.compile(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def render_card(entries: Sequence[Entry], facts: Mapping[str, Any]) -> str:
    """The whole card of a merge: front matter and marked block.

    Args:
        entries: the ledger, oldest first.
        facts: see `card_facts`.
    """
    front = dump_yaml(metadata(entries, facts))
    return f"---\n{front}---\n\n{block(entries, facts)}"


def metadata(entries: Sequence[Entry], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Front matter of the card. Folders are not named in it: only repositories can be linked."""
    last = entries[-1]
    parents = [split_name(m.name)[0] for m in (last.base, *last.models) if m.commit is not None]
    data: dict[str, Any] = {}
    if parents:
        data["base_model"] = list(dict.fromkeys(parents))
        data["base_model_relation"] = "merge"
    data["library_name"] = facts.get("library_name") or "transformers"
    if facts.get("pipeline_tag"):
        data["pipeline_tag"] = facts["pipeline_tag"]
    data |= licence([last.base, *last.models])
    data["tags"] = ["merge", "hfmerge", last.method.name]
    pointer: dict[str, Any] = {"ledger": last.file, "sha256": last.digest, "steps": last.step}
    if facts.get("repo_id"):
        pointer["repo"] = facts["repo_id"]
    if parents and facts.get("site", SITE) != SITE:  # links are those of the parents
        pointer["site"] = facts.get("site", SITE)
    data["hfmerge"] = pointer
    return data


def licence(materials: Sequence[Material]) -> dict[str, str]:
    """One licence if all materials agree; otherwise `other` with a LICENSE.md that lists each (see `licence_note`)."""
    names = {m.license for m in materials}
    if len(names) == 1 and None not in names:
        return {"license": str(names.pop())}
    return {"license": "other", "license_name": "merged-sources", "license_link": "LICENSE.md"}


def licence_note(materials: Sequence[Material]) -> str | None:
    """Text of LICENSE.md, or None when one licence covers everything."""
    if licence(materials)["license"] != "other":
        return None
    rows = "\n".join(
        f"| {markdown(m.name)} | {code((m.commit or str(m.digest))[:12])} | {markdown(m.license or 'not stated')} |"
        for m in materials
    )
    return (
        "# Licences of the merged models\n\nThis model is derived from all of these; using it means keeping to the "
        "terms of "
        f"every one.\n\n| model | revision | licence |\n|---|---|---|\n{rows}\n"
    )


def restrictive(materials: Sequence[Material]) -> list[str]:
    """Warnings on licences: missing ones and those that forbid commercial use."""
    silent = list(dict.fromkeys(m.label for m in materials if m.license is None))
    notes = [f"{', '.join(silent)} state{'s' if len(silent) == 1 else ''} no licence."] if silent else []
    closed = [m for m in materials if m.license is not None and re.search(r"(^|[-_])nc([-_]|$)", m.license)]
    return [*notes, *(f"{m.label} is under {m.license}: no commercial use of the merge." for m in closed)]


@cache
def _template() -> Template:
    """The template of the marked part, compiled."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hfmerge.ledger"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # autoescaping is for HTML; the template prints Markdown
        finalize=markdown,
    )
    environment.filters |= {"code": code, "python_text": python_text, "shell_word": shell_word}
    return environment.get_template("card.md.j2")


def block(entries: Sequence[Entry], facts: Mapping[str, Any]) -> str:
    """The marked part of the card."""
    last = entries[-1]
    me = facts.get("repo_id") or "path/to/this/folder"
    any_head = any(m.head for m in last.models)
    called = list(zip(last.names, last.models, strict=True))
    method = registry().get(last.method.name)
    cited = method.citations if method else ()
    architecture = str(facts["architecture"])
    text = _template().render(
        title=me.rpartition("/")[2] if facts.get("repo_id") else "Merged model",
        me=me,
        published=bool(facts.get("repo_id")),
        causal=architecture.endswith("ForCausalLM"),
        chats="chat_template.jinja" in last.products or facts.get("template_file") is not None,
        library=facts["library_name"],
        architecture=Markdown(architecture if architecture.isidentifier() else "AutoModel"),
        method=last.method,
        norm=last.method.norm,
        base_link=_link(last.base, facts.get("site", SITE)),
        base_pin=_pin(last.base),
        merged_norm=f"{last.scalars.merged_norm:.4g}",
        models=[
            {
                "link": _called(name, m, facts.get("site", SITE)),
                "pin": _pin(m),
                "kind": ("LoRA adapter" if m.kind == "adapter" else "full model")
                + (", approximately subtracted" if m.subtracted else "")
                + _other_base(m, last.base),
                "weight": _weight(m.weight),
                "norm": f"{(m.squared_norm or 0.0) ** 0.5:.4g}",
                "head": code(m.head) if m.head else "-",
            }
            for name, m in called
        ],
        any_head=any_head,
        first_head=next((name for name, m in called if m.head), ""),
        last_model=last.names[-1],
        heads=[{"name": name, "labels": _labels(m.labels)} for name, m in called if m.head],
        history=[
            {
                "step": e.step,
                "action": e.action,
                "models": ", ".join(e.subjects) or f"step {e.restored}",
                "how": e.how,
                "file": e.file,
                "digest": e.digest[:12],
            }
            for e in entries
        ],
        learned=_learned(last),
        usage=_usage(last),
        untied=", ".join(name for name, m in called if m.untied),
        recipe=fenced(dump_yaml(public_recipe(last)), "yaml"),
        citations=fenced("\n".join(c.bibtex for c in cited), "bibtex") if cited else "",
    )
    return f"{BEGIN}\n{text.rstrip()}\n{END}\n"


def _other_base(model: Material, base: Material) -> str:
    """What an adapter names as its base, where that is not the name of the model that it was merged onto."""
    onto = model.beneath.partition("@")[0] if model.beneath else base.name
    named = model.trained_on
    same = named is None or named.lower() == onto.lower()
    return "" if same else f", names {named} as its base"


def public_recipe(entry: Entry) -> dict[str, Any]:
    """The recipe that gives these weights, with every source pinned and no path of any machine."""
    models: list[Any] = []
    for m in entry.models:
        ref = _recipe_ref(m)
        alias = {} if m.alias is None else {"alias": m.alias}
        weight = {} if m.weight == 1.0 else {"weight": written(m.weight)}
        models.append({"model": ref, **weight, **alias} if weight or alias else ref)
    norm = entry.method.norm
    data: dict[str, Any] = {
        "base": _recipe_ref(entry.base),
        "models": models,
        "method": {"name": entry.method.name, **entry.method.options, "norm": norm},
    }
    for key in keys_of(Recipe):
        value = entry.settings.get(key.name)
        if key.declared.get("result") and value not in (None, jsonable(key.default)):
            data[key.name] = value
    return data


def _usage(entry: Entry) -> str:
    """One line on models that are used otherwise than the base, and whose files the merge has; "" without any."""
    named = {key: value for key in CHOICES if (value := entry.settings.get(key)) is not None}
    taken = [f"{key.replace('_', ' ')} of {_maker(value)}" for key, value in named.items()]
    called = zip(entry.names, entry.models, strict=True)
    others = [f"{name} has another {', '.join(m.differing)}" for name, m in called if m.differing]
    if not taken and not others:
        return ""
    held = f"The merge has the {', the '.join(taken)}; else" if taken else "The merge has"
    return f"{held} the base's tokenizer, chat template and generation config. {'; '.join(others)}".rstrip() + (
        "." if others else ""
    )


def _maker(chosen: Any) -> str:
    """Whose tokenizer, chat template or generation config a merge has, from the settings of its entry."""
    if isinstance(chosen, Mapping):
        return "the recipe"
    return "base and models together" if chosen == UNION else str(chosen)


def _learned(entry: Entry) -> str:
    """One sentence on how the weights were learned; "" if they were not."""
    if entry.learned is None:
        return ""
    learn = entry.settings["learn"]
    rows = "rows that each model made itself" if learn["loss"] == "distill" else f"labelled rows of {learn['suite']}"
    return f"The weights were learned by gradient from {rows} ({entry.learned.how})."


def _recipe_ref(material: Material) -> str:
    own = f"{material.name}@{material.commit}" if material.commit else f"./{material.name}"
    return f"{material.beneath}+{own}" if material.beneath else own


def _link(material: Material, site: str) -> Markdown:
    if material.commit is None:
        return markdown(f"{material.name} (folder)")
    repo_id, folder = split_name(material.name)
    shown = link(material.name, f"{repo_id}/tree/{material.commit}/{folder}" if folder else repo_id, site=site)
    return Markdown(f"{shown} on {markdown(material.beneath.partition('@')[0])}") if material.beneath else shown


def _called(name: str, material: Material, site: str) -> Markdown:
    """A link to a model, behind what it is called where that is not its name."""
    link_to = _link(material, site)
    return link_to if name == material.name else Markdown(f"{markdown(name)}: {link_to}")


def _weight(weight: Weight) -> Markdown:
    """Patterns as code, since stars and bars mean something in a table."""
    return code(shown(weight)) if isinstance(weight, PatternWeights) else markdown(shown(weight))


def _pin(material: Material) -> str:
    return material.commit[:12] if material.commit else f"sha256:{str(material.digest)[:12]}"


def _labels(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:12])
    return f"{shown} and {len(labels) - 12} more" if len(labels) > 12 else shown


def parse_card(text: str) -> tuple[dict[str, Any], str | None, tuple[str, str]]:
    """Front matter of a card, its marked block, and the text before and after that; without block all is before.

    Raises:
        LedgerError: front matter that is not YAML.
    """
    head, text = split_front(text)
    front = read_front(head)
    start, stop = text.find(BEGIN), text.find(END)
    if start < 0 or stop < start:
        return front, None, (text, "")
    return front, text[start : stop + len(END)] + "\n", (text[:start], text[stop + len(END) :])


def split_front(text: str) -> tuple[str, str]:
    """The lines of a card's front matter, "" if there is none, and what follows it; as the Hub divides a card."""
    found = _FRONT.match(text)
    return (found.group(1), text[found.end() :]) if found else ("", text)


def read_front(head: str) -> dict[str, Any]:
    """The data of front matter.

    Raises:
        LedgerError: not YAML, or no mapping.
    """
    try:
        front = parse_front(head) or {}
    except ValueError as error:
        raise LedgerError(f"{FILE}: its front matter is not YAML that can be used ({error}).") from error
    if not isinstance(front, dict):
        raise LedgerError(f"{FILE}: its front matter is not a mapping of keys to values.")
    return front


def combine_cards(existing: str | None, rendered: str) -> str:
    """The new card with what people wrote outside the marked block, and their own front-matter keys, kept."""
    if existing is None:
        return rendered
    front, old_block, (before, after) = parse_card(existing)
    new_front, new_block, _ = parse_card(rendered)
    merged = {**new_front, **{key: value for key, value in front.items() if key not in _KEYS}}
    theirs = front.get("tags")
    tags = [
        *new_front["tags"],
        *(
            t
            for t in (theirs if isinstance(theirs, list) else [])
            if isinstance(t, str) and t not in new_front["tags"]
        ),
    ]
    methods = set(registry()) - {new_front["tags"][-1]}
    merged["tags"] = [tag for tag in tags if old_block is None or tag not in methods]
    body = f"\n{new_block}\n{before.lstrip()}"
    if old_block is not None:
        body = before + str(new_block).rstrip("\n") + after
    return f"---\n{dump_yaml(merged)}---\n{body}"


def card_facts(entry: Entry, repo_id: str | None, site: str = SITE) -> dict[str, Any]:
    """Facts for the card beside the ledger's materials: the recorded task, the card's repository, the links' Hub."""
    return {"library_name": None, "architecture": None, **entry.settings["card"], "repo_id": repo_id, "site": site}


def present_site() -> str:
    """The Hub that this process talks to (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def _known_site(value: object) -> str:
    """The Hub that a card's links may lead to: the present one, or a Hub on this machine; else the public one.

    The card of a stranger could name any site; then it is not what its ledger gives.
    """
    known = isinstance(value, str) and (value == present_site() or _LOOPBACK.fullmatch(value) is not None)
    return str(value) if known else SITE


def card_pointer(text: str) -> dict[str, Any]:
    """The ledger's fields in a card's front matter: `ledger`, `sha256`, `steps`, and `repo` if that is a valid name.

    {} if it says nothing.
    """
    pointer = parse_card(text)[0].get("hfmerge")
    if not isinstance(pointer, dict):
        return {}
    try:
        hub_id(pointer.get("repo"))
    except ValueError:
        return {key: value for key, value in pointer.items() if key != "repo"}
    return pointer


def card_differs(text: str, entries: Sequence[Entry]) -> str | None:
    """None if the card agrees with the ledger; else the difference in words."""
    front, found, _ = parse_card(text)
    pointer = card_pointer(text)
    facts = card_facts(entries[-1], pointer.get("repo"), _known_site(pointer.get("site")))
    expected = metadata(entries, facts)
    if found is None:
        return f"{FILE} has no hfmerge block"
    if found != block(entries, facts):
        return f"{FILE}: the marked block is not what {entries[-1].file} gives"
    for key in _KEYS:
        given, wanted = front.get(key), expected.get(key)
        if key == "tags":
            given = [tag for tag in given if tag in expected["tags"]] if isinstance(given, list) else given
        if given != wanted:
            return f"{FILE}: `{key}` is {given!r}, the ledger gives {wanted!r}"
    return None
