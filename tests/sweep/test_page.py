"""docs/architectures.md has the shape that the sweep writes, and its counts are those of its rows."""

from __future__ import annotations

import re

from tests.sweep.page import PAGE, VERDICTS, Row, count_line, read, render


def test_a_page_is_read_as_it_is_written() -> None:
    rows = [
        Row("bert", "BertModel", "equal", ""),
        Row("odd", "OddModel", "refused", "it holds | and <b> and `code`"),
        Row("new", "", "not built", "needs a package"),
        Row("bert_part", "", "not built", "is a part of other types, with no class of its own"),
    ]
    text = render(rows, "5.0")
    found, line = read(text)
    assert [(row.kind, row.title, row.verdict) for row in found] == [
        (row.kind, row.title, row.verdict) for row in rows[:3]
    ]
    assert found[1].reason == "it holds and b and code"
    assert line == "4 types of transformers 5.0: 1 equal, 1 refused, 0 failing, 2 not built."
    assert "* `bert_part`" in text


def test_the_page_is_the_sweeps() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows, line = read(text)
    parts = re.findall(r"^\* `([^`]+)`$", text, re.MULTILINE)
    every = [*rows, *(Row(kind, "", "not built", "is a part of other types") for kind in parts)]
    version = line.split(":")[0].rpartition(" ")[2]
    assert line == count_line(every, version)
    assert render(sorted(every, key=lambda row: row.kind), version) == text
    assert all(row.verdict in VERDICTS for row in rows)
    assert all(row.reason or row.verdict == "equal" for row in rows)
    works = {row.kind for row in rows if row.verdict == "equal"}
    assert {"bert", "llama", "t5", "vit", "clip", "whisper", "mixtral", "mamba2", "mistral3", "qwen3_moe"} <= works
