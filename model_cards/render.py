"""Render the golden cards: for every recipe the card its merge would get, with commits and norms made from the names.

The results and pictures in the quickstart's card are measured ones, by `python -m evaluation.tables quickstart`, which
puts the same into the card on the Hub.

`make cards` writes them; a test renders them again and compares.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hfmerge.engine.plan import KeptState
from hfmerge.evaluation.plots import draw_all
from hfmerge.evaluation.plots.embedding import CAPTIONS, FIGURES, figures_text
from hfmerge.evaluation.report import card_with_results
from hfmerge.evaluation.results import load_results
from hfmerge.hashing import sha256_bytes
from hfmerge.hub.reference import parse_ref
from hfmerge.ledger.card import card_facts, render_card
from hfmerge.ledger.card_sections import with_part
from hfmerge.ledger.entry import Entry, Material, MethodUsed, RunScalars, settings_of
from hfmerge.ledger.learned import LearnedWeights
from hfmerge.recipe.recipe import Recipe, load_recipe
from hfmerge.recipe.weights import Weight


HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
MEASURED = HERE.parent / "evaluation" / "results" / "quickstart-recipe.json"
INSPECTED = MEASURED.with_name("quickstart-recipe-inspection.json")
MERGED = "quickstart/minilm-merged"
"""What was measured: the merge of the quickstart's recipe. No other recipe's models can be had without a network."""


def golden_cards() -> dict[str, str]:
    """File name -> text, one for each recipe."""
    paths = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("quickstart/*.yaml")])
    names = [path.stem if path.parent == RECIPES else path.parent.name for path in paths]
    cards = {name: golden_card(load_recipe(path), f"org/{name}") for name, path in zip(names, paths, strict=True)}
    pictures = sorted((HERE / FIGURES).glob("*.png"), key=lambda path: list(CAPTIONS).index(path.stem))
    card = with_part(cards["quickstart"], FIGURES, figures_text(pictures))
    cards["quickstart"] = card_with_results(card, load_results(MEASURED), MERGED, "quickstart")
    return {f"{name}.md": text for name, text in cards.items()}


def draw(folder: Path) -> list[Path]:
    """The pictures of the quickstart's card."""
    return draw_all([json.loads(path.read_text(encoding="utf-8")) for path in (INSPECTED, MEASURED)], folder)


def golden_card(recipe: Recipe, repo_id: str) -> str:
    """The card of a recipe's merge under a repository ID."""
    base = _material(recipe.base, 1.0, None)
    models = tuple(_material(entry.model, entry.weight, 4.0 + i) for i, entry in enumerate(recipe.models))
    entry = Entry(
        step=1,
        parent=None,
        action="merge",
        subjects=tuple(model.name for model in models),
        how=f"merged {len(models)} models in order of arrival",
        base=base,
        models=models,
        method=MethodUsed(recipe.method.name, 1, recipe.method.options, recipe.method.norm),
        settings=settings_of(
            recipe, {"library_name": "transformers", "pipeline_tag": None, "architecture": "AutoModel"}
        ),
        scalars=RunScalars(1.0, 2.0),
        states=() if recipe.learn else (KeptState(len(models), sha256_bytes(b"state"), 1000),),
        products={"model.safetensors": sha256_bytes(b"weights")},
        environment={"hfmerge": "0.1.0"},
        learned=_learned(recipe),
    )
    return render_card((entry,), card_facts(entry, repo_id))


def _learned(recipe: Recipe) -> LearnedWeights | None:
    if recipe.learn is None:
        return None
    how = f"weights learned by {recipe.learn.loss}, {recipe.learn.steps} steps"
    return LearnedWeights(how, (), recipe.learn.steps, (), (None,) * len(recipe.models), None)


def _material(ref: str, weight: Weight, squared_norm: float | None) -> Material:
    name = str(parse_ref(ref)[0].repo_id)
    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    files = {"model.safetensors": sha256_bytes(name.encode())}
    return Material(name, commit, None, "full", weight, files, squared_norm=squared_norm, license="apache-2.0")


if __name__ == "__main__":
    draw(HERE / FIGURES)
    for file, text in golden_cards().items():
        (HERE / file).write_text(text, encoding="utf-8")
        print(HERE / file)
