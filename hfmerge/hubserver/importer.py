"""Putting a local folder into a repository, through the official client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hfmerge.errors import OutputError, PushError
from hfmerge.validation.folders import files_in


# Variables that would keep a client from asking the server, or let it use caches and tokens from elsewhere.
MISLEADING = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("HF_DATASETS_CACHE", "TRANSFORMERS_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE"),
    *("HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
)


def import_folder(
    endpoint: str,
    token: str,
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    message: str = "Import a local folder",
) -> str:
    """Upload a folder (a saved model, a snapshot of a Hugging Face cache) and create the repository if need be.

    An organisation that does not exist is made, with the user as its administrator; in one that exists the user must
    be a member who may create repositories. The client runs in a process of its own: it reads its endpoint when it is
    imported, and with another one it would ask huggingface.co in passing.

    Args:
        endpoint: address of the server.
        token: token of the user who will own the repository.
        folder: what to upload; links are followed to files of the folder, and of a cache's snapshot to its blobs.
        repo_id: `namespace/name`.
        repo_type: `model` or `dataset`.
        private: whether a repository that has to be created is private.
        message: summary of the commit.

    Returns:
        The id of the commit, or of the newest one if nothing changed.

    Raises:
        OutputError: the folder is missing. SourceError: a link leaves it.
        PushError: the server refused.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; name the folder of a saved model or of a data set")
    files_in(folder, skip=(".git",))  # which the client does not upload
    request = {
        "folder": str(folder.absolute()),
        "repo_id": repo_id,
        "repo_type": repo_type,
        "private": private,
        "message": message,
    }
    environment = {key: value for key, value in os.environ.items() if key not in MISLEADING}
    package = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="hfmerge-import-") as home:
        environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": home}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        child = subprocess.run(
            [sys.executable, "-m", "hfmerge.hubserver.importer"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
        )
    if child.returncode != 0:
        said = [line for line in child.stderr.strip().splitlines() if line.strip()]
        raise PushError(f"{folder}: not imported as {repo_id}: {' '.join(said[-4:])}")
    return str(json.loads(child.stdout.splitlines()[-1])["commit"])


def _upload(request: dict[str, Any]) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    where = {"repo_id": request["repo_id"], "repo_type": request["repo_type"]}
    try:
        api.create_repo(**where, private=request["private"], exist_ok=True)
        return str(api.upload_folder(**where, folder_path=request["folder"], commit_message=request["message"]).oid)
    except (HfHubHTTPError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    print(json.dumps({"commit": _upload(json.load(sys.stdin))}))
