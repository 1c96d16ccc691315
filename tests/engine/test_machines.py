"""Machines that share no disk: each makes and uploads its own weight files, one commit publishes all of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.engine.ranks import Ranks, assign_owners
from hfmerge.engine.storage import disk_of_files, find_disks
from hfmerge.hubserver.importer import import_folder
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import launching, tiny


pytestmark = pytest.mark.slow
NAMES = ("base", "m1", "m2", "m3")
WORKER = """
import json, os, sys
from pathlib import Path
from hfmerge.lifecycle import publish
from hfmerge.cli import main
upload = publish.upload_weights
def told(folder, names, repo_id, **options):
    held = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    print("UPLOAD", json.dumps([os.environ["GROUP_RANK"], int(os.environ["RANK"]), names, held]), flush=True)
    return upload(folder, names, repo_id, **options)
publish.upload_weights = told
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    if int(os.environ["RANK"]) == 0:
        print("CODE", code, flush=True)
"""


@pytest.fixture(scope="module")
def models(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = tiny.build("LlamaForCausalLM", tiny.config("llama"))
    tiny.save(base, root / "base", max_shard_size="10KB")
    for i, name in enumerate(NAMES[1:], 1):
        tiny.save(tiny.fine_tune(base, i), root / name)
    for name in NAMES:
        import_folder(hub.endpoint, hub.token, root / name, f"apart/{name}")
    return root


def recipe(*models: str) -> list[str]:
    return ["merge", *models, "--base", "apart/base", "--method", "opcm", "--quiet"]


def machines(folder: Path, calls: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """Machines of one and of two processes, with disks of their own."""
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    place = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(launching.free_port())]
    running = []
    for node, processes in enumerate(("1", "2")):
        own = folder / f"machine-{node}"
        for part in ("home", "tmp"):
            (own / part).mkdir(parents=True, exist_ok=True)
        flags = ["-m", "torch.distributed.run", *place, "--node_rank", str(node), "--nproc_per_node", processes]
        environment = {"HF_HOME": str(own / "home"), "TMPDIR": str(own / "tmp"), "OMP_NUM_THREADS": "1"}
        work = [str(folder / "worker.py"), json.dumps([list(call) for call in calls])]
        running.append(launching.start(*flags, *work, env=environment, cwd=own, together=False))
    return running


def published(repo_id: str) -> dict[str, str]:
    """Path -> content id of what a merge publishes, but for card and ledger."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True)
    files = {item.path: item.lfs.sha256 if item.lfs else item.blob_id for item in tree if hasattr(item, "size")}
    return {path: oid for path, oid in files.items() if path != "README.md" and not path.startswith("merge_history/")}


def test_machines_without_a_common_disk_publish_the_bytes_of_one_process(models: Path, tmp_path: Path) -> None:
    for rank in range(2):
        # the same name on both machines, other bytes on the second
        other = tmp_path / "machine-1" / "tuned" if rank else tmp_path / "machine-0" / "tuned"
        tiny.save(tiny.fine_tune(tiny.build("LlamaForCausalLM", tiny.config("llama")), 7 + rank), other)
    local = ["--storage", "local", "--push-to"]
    crew = machines(
        tmp_path,
        [
            [*recipe("apart/m1", "apart/m2"), *local, "apart/merged"],
            ["add", "apart/merged", "apart/m3", "--quiet", *local, "apart/merged", "--json"],
            [*recipe("./tuned"), *local, "apart/mixed"],
            [*recipe("apart/m1"), "--storage", "local", "--output", "here"],
        ],
    )
    (out, err), (out2, err2) = [process.communicate(timeout=180) for process in crew]
    codes = [line for line in out.splitlines() if line.startswith("CODE")]
    assert codes == ["CODE 0", "CODE 0", "CODE 1", "CODE 1"], err + err2
    assert "on 3 processes" in out and '"processes": 3' in out
    assert "process 2 has another model.safetensors than process 0; put the same files on all machines" in err, err
    assert "here: the machines of this run share no disk there" in err, err

    # every file was uploaded once, from a machine that had made it and no other
    told = [
        json.loads(line.removeprefix("UPLOAD ")) for line in (out + out2).splitlines() if line.startswith("UPLOAD")
    ]
    assert len(told) == 6
    weights = [name for name in published("apart/merged") if name.endswith(".safetensors")]
    for round_ in (told[:1] + told[2:4], told[1:2] + told[4:]):
        by_machine = {machine: names for machine, _, names, _ in round_ if names}
        assert by_machine.keys() == {"0", "1"}
        assert sorted(by_machine["0"] + by_machine["1"]) == sorted(weights)
        assert all(held == by_machine[machine] for machine, _, _, held in round_)

    tiny.done(*recipe("apart/m1", "apart/m2", "apart/m3"), "--push-to", "apart/alone")
    assert published("apart/merged") == published("apart/alone")
    assert len(HfApi().list_repo_commits("apart/merged")) == len(HfApi().list_repo_commits("apart/alone")) + 1
    report = hfmerge.verify("apart/merged", replay=True)
    assert report.ok, report.culprits
    assert "the machines share no disk, so the carried state is not kept" in err
    # one process goes on from there, and keeps a state again
    added = hfmerge.unmerge("apart/merged", "apart/m2", push_to="apart/merged")
    assert added.entry.states and hfmerge.verify("apart/merged").ok


PROBE = """
import os, sys
from pathlib import Path
from hfmerge.engine.storage import find_disks
from hfmerge.engine.ranks import processes
with processes() as ranks:
    for place in sys.argv[1:]:
        disks = find_disks(ranks, Path(place), "auto").disks
        ranks.gather(None)
        print("DISKS", disks, os.listdir(place), flush=True)
"""


def test_whether_machines_share_a_disk_is_found_out(tmp_path: Path) -> None:
    common, own = tmp_path / "common", tmp_path / "own"
    common.mkdir()
    own.mkdir()
    # each process sees a file system of its own at the second place, if this machine allows that
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(own)]
    allowed = subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    crew = launching.ranks(2, "-c", PROBE, str(common), str(own), machines=True, before=mount if allowed else [])
    said = [process.communicate(timeout=90) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], said
    expected = ["DISKS () []", "DISKS (0, 1) []" if allowed else "DISKS () []"]
    assert [out.splitlines() for out, _ in said] == [expected] * 2
    if not allowed:
        pytest.skip("half of this test: nobody may mount a file system of their own here")


def test_files_go_to_disks_by_cost_and_tied_tensors_stay_together(tmp_path: Path) -> None:
    model = tiny.build("Qwen3ForCausalLM", tiny.config("qwen3"))
    tiny.save(model, tmp_path / "base", max_shard_size="4KB")
    # a copy of the tied embedding in the last file, as some repositories store it
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    first = index["weight_map"]["model.embed_tokens.weight"]
    assert first != last
    embedding = tiny.tensors(tmp_path / "base")["model.embed_tokens.weight"]
    tiny.edit(tmp_path / "base", lambda held: held.update({"lm_head.weight": embedding.clone()}), last)
    index["weight_map"]["lm_head.weight"] = last
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny.save(tiny.fine_tune(model, 1), tmp_path / "m1")
    plan = hfmerge.plan(
        hfmerge.Recipe(
            base=str(tmp_path / "base"),
            models=(hfmerge.ModelEntry(str(tmp_path / "m1")),),
            method=hfmerge.MethodChoice("linear", {}, "none"),
            output=str(tmp_path / "out"),
        )
    )
    files = {param.file for param in plan.params}
    at = disk_of_files(plan, Ranks(0, 3, disks=(0, 1, 2)))
    assert at.keys() == files and set(at.values()) == {0, 1, 2}
    tied = next(param for param in plan.params if param.mode == "tied")
    owner = next(param for param in plan.params if param.key == tied.owner)
    assert tied.file != owner.file and at[tied.file] == at[owner.file]
    assert set(disk_of_files(plan, Ranks(1, 3)).values()) == {0}


def test_work_goes_to_the_processes_of_its_disk() -> None:
    ranks = Ranks(3, 5, disks=(0, 0, 1, 1, 1))
    assert (ranks.disk, ranks.disk_count, ranks.leads, ranks.on_disk(0), ranks.on_disk(1)) == (
        1,
        2,
        False,
        [0, 1],
        [2, 3, 4],
    )
    assert [Ranks(rank, 5, disks=ranks.disks).leads for rank in range(5)] == [True, False, True, False, False]
    assert [Ranks(rank, 3).leads for rank in range(3)] == [True, False, False]
    crews = [ranks.on_disk(disk) for disk in (0, 1, 1, 0, 1, 1)]
    owners = assign_owners([5.0, 4.0, 3.0, 2.0, 2.0, 1.0], 5, crews)
    assert owners == [0, 2, 3, 1, 4, 4]


def test_only_known_kinds_of_storage() -> None:
    with pytest.raises(hfmerge.HfMergeError, match="storage 'nfs': choose auto, shared, local"):
        find_disks(Ranks(), Path(os.curdir), "nfs")
