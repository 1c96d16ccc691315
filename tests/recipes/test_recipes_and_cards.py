"""Every recipe of the repository parses, names its command, and has a golden card that is up to date."""

import importlib.util
from pathlib import Path

import pytest

from hfmerge.ledger.card import BEGIN, END, combine_cards, parse_card
from hfmerge.methods import registry
from hfmerge.recipe.recipe import load_recipe


ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")

spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
assert spec is not None and spec.loader is not None
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_names_its_command(path: Path) -> None:
    load_recipe(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# hfmerge merge {path.relative_to(ROOT).as_posix()}"


def test_every_method_has_a_recipe() -> None:
    assert {load_recipe(path).method.name for path in RECIPES} >= set(registry())


@pytest.mark.parametrize(("name", "text"), render.golden_cards().items(), ids=lambda value: str(value)[:20])
def test_golden_card_is_up_to_date(name: str, text: str) -> None:
    assert (ROOT / "model_cards" / name).read_text(encoding="utf-8") == text, "run `make cards`"


def test_no_golden_card_without_a_recipe() -> None:
    assert {path.name for path in (ROOT / "model_cards").glob("*.md")} == set(render.golden_cards())


def test_text_around_the_block_and_foreign_keys_survive_a_new_card() -> None:
    card = next(iter(render.golden_cards().values()))
    front, block, rest = parse_card(card)
    assert block is not None and block.startswith(BEGIN) and block.rstrip().endswith(END)
    edited = (
        card.replace("---\n", "---\nlanguage: fr\n", 1).replace(BEGIN, f"My own words.\n\n{BEGIN}")
        + "\nAnd an appendix.\n"
    )
    other = combine_cards(edited, card)
    assert "My own words." in other and "And an appendix." in other
    assert parse_card(other)[0] == {**front, "language": "fr"}
    assert parse_card(other)[1] == block
    assert combine_cards(other, card) == other


def test_a_card_written_by_hand_is_kept_below_the_block() -> None:
    card = next(iter(render.golden_cards().values()))
    text = combine_cards("---\nlicense: mit\ntags: [mine]\n---\n# Hello\n", card)
    front, block, rest = parse_card(text)
    assert "# Hello" in rest[1] and block is not None
    assert "mine" in front["tags"] and front["license"] == parse_card(card)[0]["license"]
