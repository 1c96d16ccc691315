"""The page docs/architectures.md: what the sweep found for every type of model that transformers knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
VERDICTS = ("equal", "refused", "failing", "not built")
LONGEST = 160
"""Characters of a reason."""
HEAD = """# Architectures

For every type of model that transformers knows, `make sweep` makes a small random base and two random tunes of it,
merges the tunes by `task_arithmetic`, and loads the merge with `from_pretrained`.

* **equal**: every parameter of the loaded merge equals the same sum over the models in memory, within 1e-6; values
  above one within 1e-6 of themselves.
* **refused**: hfmerge does not merge these models, for the reason given.
* **failing**: the merge differs, or ended in another way.
* **not built**: there is no small model of this type to try: it is a part of other types, its default configuration
  cannot be made small, or it needs a package that is not installed. This says nothing on its merges.

A type that is *equal* works with the other methods too: they get the same parameters. Models with code of their own
are not in the table; see [Security](security.md).
"""


@dataclass(frozen=True)
class Row:
    """What came of one type: its model_type, the class that was built, the verdict, and the reason of a verdict."""

    kind: str
    title: str
    verdict: str
    reason: str

    def line(self) -> str:
        """The row of a table."""
        said = re.sub(r"[|`*<>\[\]\\]", " ", self.reason)
        said = " ".join(re.sub(r"(?<!\w)/[a-z]\S*", "(path)", said).split())
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
        title = f"`{self.title}`" if self.title else ""
        return f"| `{self.kind}` | {title} | {self.verdict} | {said} |"


def count_line(rows: Sequence[Row], transformers: str) -> str:
    """How many types have which verdict."""
    counts = Counter(row.verdict for row in rows)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{len(rows)} types of transformers {transformers}: {parts}."


def render(rows: Sequence[Row], transformers: str) -> str:
    """The page."""
    merged = [row for row in rows if row.verdict != "not built"]
    rest = [row for row in rows if row.verdict == "not built" and "part of other types" not in row.reason]
    parts = [row for row in rows if row.verdict == "not built" and "part of other types" in row.reason]
    table = ["| type | class | verdict | reason |", "|---|---|---|---|"]
    return "\n".join([
        HEAD, count_line(rows, transformers), "", "## Merged", "", *table, *(row.line() for row in merged),
        "", "## Not built", "", *table, *(row.line() for row in rest),
        "", "## Parts of other types", "", "They are merged with the type that they belong to.", "",
        *(f"* `{row.kind}`" for row in parts), "",
    ])  # fmt: skip


def read(text: str) -> tuple[list[Row], str]:
    """The rows of a page, parts left out, and its line of counts."""
    found = re.findall(r"^\| `([^`]+)` \| (?:`(\w+)`)? ?\| ([a-z ]+) \| (.*) \|$", text, re.MULTILINE)
    line = re.search(r"^\d+ types of transformers .*\.$", text, re.MULTILINE)
    return [Row(*cells) for cells in found], line[0] if line else ""
