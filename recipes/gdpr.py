"""A removal request, from publication to proof, on real models and a Hub on loopback.

    python recipes/gdpr.py [--keep FOLDER]

A publisher merges, publishes and adds; somebody asks for a model to be removed; the publisher takes it out, certifies
that, and purges what came before. A second user, with a token and a cache of their own, has the certificate and the
publisher's public key, and checks everything against the Hub. Every step is the command a user would type, printed
before it runs. Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quickstart.demo import BASE, HERE, base_folder, source  # beside this file


RECIPE = Path(__file__).resolve().with_suffix(".yaml")
MERGED = "quickstart/minilm-published"
REMOVED = source("snips")
ADDED = source("mr")
TASKS = ("clinc_domain", "snips", "mr")


@dataclass(frozen=True)
class User:
    """Somebody with a token, a cache and a working folder of their own."""

    name: str
    environment: dict[str, str]
    folder: Path

    def hfmerge(self, *arguments: str, code: int = 0) -> str:
        """Run a command, print it and what it says, and insist on its exit code; returns standard output."""
        print(f"\n{self.name}$ hfmerge {' '.join(arguments)}", flush=True)
        said = self._run(["-m", "hfmerge", *arguments], code)
        print(said, end="", flush=True)
        return said

    def python(self, text: str) -> str:
        """Run a piece of Python; returns standard output."""
        return self._run(["-c", text], 0)

    def _run(self, command: Sequence[str], code: int) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=self.environment, cwd=self.folder, text=True, stdout=subprocess.PIPE
        )
        if done.returncode != code:
            print(done.stdout, end="", flush=True)
            raise SystemExit(f"failed: exit code {done.returncode} instead of {code}: {' '.join(command)}")
        return done.stdout


def main() -> int:
    """Run the demo; 0 when every step ends as it must."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, help="folder for the Hub's store, keys and certificate; default: a temporary one"
    )
    args = parser.parse_args()
    from hfmerge.hubserver.serve import HubServer

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hfmerge-gdpr-") as temporary:
        work = (args.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        users = {"publisher": "hf_publisher", "reader": "hf_reader"}
        with HubServer(work / "hub", users=users) as server:
            print(f"A Hub on loopback: {server.endpoint} (store in {work / 'hub'})")
            import_models(server.endpoint, server.token)
            story(*(user(server.env(work / name / "home"), name, token, work) for name, token in users.items()))
    print(f"\n{time.monotonic() - start:.0f} s.")
    return 0


def user(environment: dict[str, str], name: str, token: str, work: Path) -> User:
    """A user whose token and cache are nobody else's."""
    folder = work / name
    folder.mkdir(exist_ok=True)
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(RECIPE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return User(name, {**os.environ, **environment, **quiet, "HF_TOKEN": token, "PYTHONPATH": path}, folder)


def import_models(endpoint: str, token: str) -> None:
    """Put the base and three adapters on the Hub, each a repository of its own."""
    from hfmerge.hubserver.importer import import_folder

    folders = {BASE: base_folder()} | {source(task): HERE / "adapters" / task for task in TASKS}
    for repo_id, folder in folders.items():
        import_folder(endpoint, token, folder, repo_id)
        print(f"   {repo_id}")


def make_key(folder: Path) -> None:
    """What `ssh-keygen -t ed25519 -f signing-key` does, where OpenSSH is not installed either."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    private = folder / "signing-key"
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / "signing-key.pub").write_bytes(public + b" the-publisher\n")


def story(publisher: User, reader: User) -> None:
    """All steps in order."""
    print("\n1. Two models are merged and published; a third is added.")
    publisher.hfmerge("merge", str(RECIPE))
    publisher.hfmerge("add", MERGED, ADDED, "--push-to", MERGED)
    print(f"\n2. Somebody asks for {REMOVED} to be removed. It is taken out, and the result published.")
    publisher.hfmerge("unmerge", MERGED, "--remove", REMOVED, "--push-to", MERGED)
    print("\n3. The publisher certifies that, and signs.")
    make_key(publisher.folder)
    certificate = str(publisher.folder / "certificate.json")
    publisher.hfmerge(
        *("certify", MERGED, "--remove", REMOVED, "--key", "signing-key", "--output", certificate),
        *("--expires", "365"),
    )
    print("\n4. A second user has the certificate and the publisher's public key, and checks both against the Hub;")
    print("   --replay merges the listed materials again on their machine: the same bytes, without trust in anybody.")
    trust = ("--certificate", certificate, "--public-key", str(publisher.folder / "signing-key.pub"))
    reader.hfmerge("verify", MERGED, *trust, "--replay")
    print("\n5. The certificate is for these weights alone: of the step before it does not hold.")
    reader.hfmerge("verify", f"{MERGED}@step-0002", *trust, code=1)
    print("\n6. Earlier commits still hold the removed model. The publisher purges them.")
    old = weights(reader, "step-0002")
    said = publisher.hfmerge("purge-history", MERGED, "--yes", "--delete-files")
    former = re.search(r"main was at ([0-9a-f]{12})", said)
    assert former is not None
    print("\n7. Commits have new ids now, the weights and the ledger are the same, and the certificate still holds.")
    reader.hfmerge("verify", MERGED, *trust)
    print("\n8. The weights that held the model are gone from the Hub, by tag and by commit.")
    for revision in ("step-0002", old):
        gone = weights(reader, revision)
        print(f"   {MERGED}@{revision[:12]}: {gone or 'gone'}")
        if gone:
            raise SystemExit("failed: earlier weights are still on the Hub")


def weights(user: User, revision: str) -> str:
    """The commit from which a user can download the weights of a revision; empty if they cannot."""
    return user.python(
        "from huggingface_hub import get_hf_file_metadata, hf_hub_url\n"
        "from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError\n"
        "try:\n"
        f"    url = hf_hub_url({MERGED!r}, 'model.safetensors', revision={revision!r})\n"
        "    print(get_hf_file_metadata(url).commit_hash, end='')\n"
        "except (EntryNotFoundError, RevisionNotFoundError):\n"
        "    pass\n"
    )


if __name__ == "__main__":
    sys.exit(main())
