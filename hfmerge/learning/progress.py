"""Progress of learning: replay rows and steps, kept in the journal of a run until its output is in place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.checkpoint.writer import disk_errors
from hfmerge.errors import CorruptFileError
from hfmerge.hashing import canonical_json, sha256_bytes
from hfmerge.learning.replay.dataset import Replay, load_replay, save_replay
from hfmerge.recipe.replay import ReplaySettings
from hfmerge.validation.limits import HEADER_BYTES, HEADER_VALUES
from hfmerge.validation.strict_json import read_json_file


class Progress:
    """The notes of rank 0 from which a killed run continues. Torn or damaged notes are ignored.

    Args:
        folder: the journal's; None: nothing is kept.
        question: digest of all that learning depends on beyond what the journal is for.
        shelf: see `RunOptions.rows`.
    """

    def __init__(self, folder: Path | None, question: str, shelf: Path | None = None):
        self._folder, self._question, self._shelf = folder, question, shelf

    def replay(self, model: int, source: str, settings: ReplaySettings) -> Replay | None:
        """The rows that were made of a model.

        Args:
            model: its number.
            source: as rows name it.
            settings: how they are made.
        """
        known = self._read(f"replay-{model}.json")
        place = self._place(f"replay-{known['digest']}") if known else self._shelved(source, settings)
        if place is None or not place.exists():
            return None
        try:
            found = load_replay(place)
        except CorruptFileError:
            # made again, as the user is told of all rows that are
            return None
        return found if known is None or found.digest == known["digest"] else None

    def keep_replay(self, model: int, settings: ReplaySettings, replay: Replay) -> None:
        """Note the rows of a model."""
        shelved = self._shelved(replay.source, settings)
        if shelved is not None:
            new = shelved.with_suffix(".new")
            save_replay(replay, new)
            os.replace(new, shelved)
        if self._folder is not None:
            place = self._place(f"replay-{replay.digest}")
            with disk_errors(place):
                place.write_bytes(replay.data)
            self._write(f"replay-{model}.json", {"digest": replay.digest})

    def steps(self) -> dict[str, Any] | None:
        """Where the steps stood, as it was noted."""
        return self._read("steps.json")

    def keep_steps(self, state: Mapping[str, Any]) -> None:
        """Note where the steps stand: JSON-able; floats come back bit for bit."""
        if self._folder is not None:
            self._write("steps.json", state)

    def _shelved(self, source: str, settings: ReplaySettings) -> Path | None:
        if self._shelf is None:
            return None
        return self._shelf / f"{sha256_bytes(canonical_json([source, settings.to_dict()]))}.safetensors"

    def _place(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"learning-{name}"

    def _digest(self, name: str, state: Mapping[str, Any]) -> str:
        return sha256_bytes(canonical_json([self._question, name, state]))

    def _read(self, name: str) -> dict[str, Any] | None:
        if self._folder is None:
            return None
        try:
            known = read_json_file(self._place(name), HEADER_BYTES, values=HEADER_VALUES, finite=False)
            state: dict[str, Any] = known["state"]
            return state if known["digest"] == self._digest(name, state) else None
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        place = self._place(name)
        new = place.with_name(f"{place.name}.new")
        with disk_errors(place):
            new.write_text(json.dumps({"digest": self._digest(name, state), "state": state}), encoding="utf-8")
            os.replace(new, place)


NOTHING = Progress(None, "")
"""Of a run that nobody could go on from."""
