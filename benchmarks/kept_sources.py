"""What kept copies of sources cost: size, seconds to make and to unpack; prints one JSON line a source.

`python -m benchmarks.kept_sources BASE MODEL...`: folders or Hub IDs of a base and of fine-tunes or adapters of it.
Seconds are of the process, on one thread.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from hfmerge.checkpoint.archive import read_manifest, unpack, write_archive
from hfmerge.checkpoint.reader import Reader
from hfmerge.engine.planner import make_plan
from hfmerge.hashing import sha256_file
from hfmerge.lifecycle.archive_write import pairs_of
from hfmerge.recipe.recipe import parse_recipe


def main(base: str, *models: str) -> None:
    """Make the copy of each source, unpack it, and compare the files."""
    recipe = {"base": base, "models": list(models), "method": "task_arithmetic"}
    plan = make_plan(parse_recipe(recipe, "command line"))
    with tempfile.TemporaryDirectory() as name, Reader(plan.base) as reader:
        for i, delta in enumerate((None, *plan.deltas)):
            source = plan.base if delta is None else delta.source
            pairs = {} if delta is None else pairs_of(delta, plan.base)
            archive, back = Path(name) / f"{i}.zip", Path(name) / str(i)
            start = time.process_time()
            write_archive(archive, source, pairs, reader, "base", remote_code=False)
            made = time.process_time()
            manifest = read_manifest(archive)
            unpack(archive, manifest, {file: back / file for file in manifest.files}, lambda: reader)
            end = time.process_time()
            assert all(sha256_file(back / file) == digest for file, (_, digest) in manifest.files.items())
            whole = sum(size for size, _ in manifest.files.values())
            result = {
                "source": source.name,
                "tensors against the base": sum(map(len, pairs.values())),
                "MB": round(whole / 1e6, 2),
                "ratio": round(archive.stat().st_size / whole, 4),
                "MB/s made": round(whole / 1e6 / (made - start), 1),
                "MB/s unpacked": round(whole / 1e6 / (end - made), 1),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
