"""The progress of every verb: a bar where standard error is a terminal, and at most a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from hfmerge.validation.quoting import tell


EVERY = 60.0
"""Seconds between two lines."""


def progress_bar(total: int, title: str, unit: str, *, scaled: bool = False, shown: bool = True) -> Any:
    """A bar of tqdm that counts to `total`; HF_HUB_DISABLE_PROGRESS_BARS turns bars and lines off.

    Args:
        unit: what is counted, such as " tensors".
        scaled: show large counts in units of a thousand, a million, ...
        shown: False: show nothing.
    """
    return _class()(
        total=total, desc=title, unit=unit, unit_scale=scaled, name="hfmerge", disable=not shown or None, lines=shown
    )


@contextlib.contextmanager
def only_on_a_terminal() -> Iterator[None]:
    """For a program: libraries draw no bars of their own where nobody sees them move; our lines stay."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    enable_progress_bars("hfmerge")
    try:
        yield
    finally:
        enable_progress_bars()


@cache
def _class() -> Any:
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm

    class Bar(tqdm):  # type: ignore[misc,unused-ignore]  # tqdm may come without types
        """A bar that says a line a minute where it is not drawn."""

        def __init__(self, *, lines: bool, **settings: Any) -> None:
            self._title, self._lock_of_lines = settings["desc"], threading.Lock()
            self._lines = lines and not sys.stderr.isatty() and not are_progress_bars_disabled("hfmerge")
            self._begun = self._said = time.monotonic()
            self._done = 0
            super().__init__(**settings)

        def update(self, n: float | None = 1) -> bool | None:
            """Count, and say a line if none was said for a minute."""
            if self._lines:
                with self._lock_of_lines:
                    self._done += int(n or 0)
                    now = time.monotonic()
                    if now - self._said >= EVERY:
                        self._said = now
                        share = 100 * self._done // max(1, int(self.total or 0))
                        tell(f"hfmerge: {self._title}: {share} % after {(now - self._begun) / 60:.0f} min")
            return super().update(n)

    return Bar
