"""Pictures in a merge's card: drawn into `figures/` and shown in a marked part of their own.

The part is about the models in the merge, so the next `add` or `unmerge` leaves it out (see
`lifecycle.record.record_result`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmerge.errors import OutputError
from hfmerge.evaluation.plots import draw_all
from hfmerge.ledger.card import FILE
from hfmerge.ledger.card_sections import linked_files, part, with_part
from hfmerge.ledger.entry import Entry
from hfmerge.ledger.repository import open_merged


FIGURES = "figures"
"""Folder of the merge, and name of the card's part."""
CAPTIONS: Mapping[str, str] = {
    "task_vector_cosine": "Cosine of the merged models' changes; unrelated changes have 0.",
    "norm_per_layer": "Norm of every model's change, layer by layer.",
    "kept_energy_per_layer": "What OPCM keeps of every model's matrices against those merged before it.",
    "spectra": "How much of a change lies in its leading singular directions.",
    "accuracy_matrix": "Scores of every model on every task.",
    "accuracy_over_steps": "Mean score on the tasks merged so far, after every step.",
    "sweep": "Mean final score against the option that was varied.",
    "sweep_interference": "Interference, norm and forgetting against the option that was varied.",
    "similarity_against_drop": "Cosine of two models' changes against what the later one costs the earlier.",
    "norm_drift": "Norm of the merged change after every step.",
    "kept_energy": "What OPCM keeps of every model, over all matrices.",
    "learning_loss": "Mean loss of all models while their weights were learned.",
    "learning_weights": "The models' weights while they were learned.",
}


def embed(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw results into a merge's folder and show them in its card; what was drawn there before goes.

    Returns:
        The files written, the card among them.

    Raises:
        OutputError: not a folder. LedgerError: not a merge. HfMergeError: as `draw_all`.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; pictures are put into a merge on this machine, then pushed.")
    open_merged(str(folder))
    card = folder / FILE
    text = card.read_text(encoding="utf-8")
    before = [folder / name for name in drawn(text)]
    written = draw_all(results, folder / FIGURES)
    for stale in before:
        if stale not in written:
            stale.unlink(missing_ok=True)
    card.write_text(with_part(text, FIGURES, figures_text(written)), encoding="utf-8")
    return [*written, card]


def embed_learning(folder: Path, entry: Entry) -> str | None:
    """Draw how the weights of a merge were learned into its folder and card; why not, where it is not possible."""
    if entry.learned is None or not entry.learned.curve:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture of learning in the card: pip install hfmerge[plots]"
    models = [model.name for model in entry.models]
    embed(folder, [{"kind": "learning", "schema": 1, "models": models, "learned": entry.learned.to_dict()}])
    return None


def figures_text(written: Sequence[Path]) -> str:
    """Markdown of the card's part for pictures that `draw_all` wrote."""
    names = dict.fromkeys(path.stem for path in written if path.suffix == ".png")
    body = "\n\n".join(
        f"![{CAPTIONS.get(name, name)}]({FIGURES}/{name}.png)\n\n{CAPTIONS.get(name, name)} "
        f"([SVG]({FIGURES}/{name}.svg))"
        for name in names
    )
    return f"## Figures\n\n{body}"


def drawn(text: str | None) -> list[str]:
    """Files that the pictures of a card lie in."""
    return linked_files(part(text, FIGURES), FIGURES) if text is not None else []
