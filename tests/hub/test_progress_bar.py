"""Progress off a terminal: at most a line a minute, and nothing where bars are turned off."""

from __future__ import annotations

import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from hfmerge.hub import progress_bar as bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def counted(clock: list[float], shown: bool = True) -> None:
    """An hour of work in 3,600 pieces."""
    with bars.progress_bar(3600, "Merging", "B", shown=shown) as bar:
        for _ in range(3600):
            clock[0] += 1.0
            bar.update(1)


def test_a_line_a_minute(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    with bars.only_on_a_terminal():
        assert are_progress_bars_disabled("huggingface_hub.http_get") and are_progress_bars_disabled()
        counted(clock)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 60 and lines[29] == "hfmerge: Merging: 50 % after 30 min"
        counted(clock, shown=False)
        assert capsys.readouterr().err == ""
    assert not are_progress_bars_disabled("huggingface_hub.http_get")


def test_nothing_where_bars_are_off(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert constants.HF_HUB_DISABLE_PROGRESS_BARS
    counted(clock)
    assert capsys.readouterr().err == ""
