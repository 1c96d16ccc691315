"""Quickstart and README: the steps are run on real models; pages that show something else are found (see `pages`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfmerge.hubserver.serve import HubServer
from tests.fixtures import pages


@pytest.mark.slow
def test_quickstart(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.run(pages.ROOT / "docs" / "quickstart.md", tmp_path, monkeypatch)
    pages.clear()


def test_the_readme_shows_steps_of_the_quickstart() -> None:
    def blocks(path: Path, kind: str) -> list[str]:
        return [block[2] for block in pages.FENCE.finditer(path.read_text(encoding="utf-8")) if block[1] == kind]

    quickstart, readme = pages.ROOT / "docs" / "quickstart.md", pages.ROOT / "README.md"
    steps = dict(entry for body in blocks(quickstart, "console") for entry in pages.entries(body))
    shown = [entry for body in blocks(readme, "console") for entry in pages.entries(body)]
    assert len(shown) >= 4
    for command, output in shown:
        assert command in steps, f"README.md: {command} is no step of the Quickstart"
        assert pages.matches(output.splitlines(), steps[command].splitlines()), (
            f"README.md: {command}\n{steps[command]}"
        )
    assert not {*blocks(readme, "python")} - {*blocks(quickstart, "python")}


def test_a_page_that_shows_something_else_is_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "```console\n$ hfmerge --version\nhfmerge 0.0.9\n```\n```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    )
    page = pages.Page(path, tmp_path)
    text = page.run()
    assert len(page.wrong) == 2 and "hfmerge 0.0.9" in page.wrong[0] and text.count("\n2\n") == 1
    assert pages.close("norm 2.964 of 1.0 s", "norm 2.965 of 9.9 s") and not pages.close("norm 2.9", "norm 3.1")
    assert pages.matches(["a", "...", "d"], ["a", "b", "c", "d"]) and not pages.matches(["a", "..."], ["b"])
