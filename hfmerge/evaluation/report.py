"""Writes results to the Hub and to folders: card block, `model-index`, `.eval_results`, in one commit or a PR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfmerge.errors import HfMergeError, PushError
from hfmerge.evaluation.models import open_subject
from hfmerge.evaluation.results import Matrix, ModelInfo, Score, TaskInfo, markdown_table
from hfmerge.evaluation.suite import KINDS
from hfmerge.hub.client import hub_api, hub_errors, patiently
from hfmerge.hub.commits import Commit, NewCommit, commit_once, download, listed
from hfmerge.ledger.card import FILE, card_pointer, present_site
from hfmerge.ledger.card_sections import RESULTS_PREFIX, TOOL, with_scores
from hfmerge.validation.folders import file_in
from hfmerge.validation.quoting import Markdown, code, link, markdown
from hfmerge.validation.strict_yaml import dump_yaml, parse_yaml
from hfmerge.version import __version__


def results_text(matrix: Matrix, label: str) -> str:
    """Markdown of the results for the card of one of the models.

    Args:
        matrix: of this model and those it is compared with.
        label: this model's.
    """
    many = len(matrix.tasks) > len(matrix.models)
    text = f"## Results\n\nSuite {code(matrix.suite)}, measured with `hfmerge evaluate` {__version__}"
    limit = matrix.settings.get("limit")
    text += f" on at most {limit} rows a task (seed {matrix.settings['seed']})" if limit else ""
    text += "; in brackets 95 % confidence intervals.\n\n"
    shown = matrix.to_markdown(by_task=many)
    text += shown.replace(f"| {markdown(label)} |", f"| **{markdown(label)}** |") if len(matrix.models) > 1 else shown
    rows = [[_data(task), task.config or "-", task.split, task.metric, _rows(matrix, i), _head(task)]
            for i, task in enumerate(matrix.tasks)]  # fmt: skip
    names = [task.name for task in matrix.tasks]
    text += f"\n{markdown_table('task', ['data', 'config', 'split', 'metric', 'rows', 'head of'], names, rows)}"
    return text


def index_entries(matrix: Matrix, label: str) -> list[dict[str, Any]]:
    """The entries of `model-index` for one model: one for each task it has a score on."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = []
    for task, score in _scores(matrix, label):
        args = {"tool": f"{TOOL} {__version__}", "suite": matrix.suite, "rows": score.n}
        if score.interval != "none":
            args |= {"low": round(score.low, 6), "high": round(score.high, 6), "interval": score.interval}
        results.append(
            EvalResult(
                task_type=KINDS[task.kind].hub,
                dataset_type=task.dataset,
                dataset_name=task.name,
                metric_type=task.metric,
                metric_value=round(score.value, 6),
                dataset_config=task.config,
                dataset_split=task.split,
                dataset_revision=task.commit,
                metric_args=args,
            )
        )
    found: list[dict[str, Any]] = eval_results_to_model_index(label, results)[0]["results"]
    return found


def card_with_results(text: str, matrix: Matrix, label: str, name: str) -> str:
    """A card with the results of one model: its part and its entries of `model-index` renewed, all else kept.

    Args:
        text: the card so far; "" for none.
        label: the model's row.
        name: what `model-index` calls the model.
    """
    return with_scores(text, results_text(matrix, label), index_entries(matrix, label), name)


def write_results(matrix: Matrix, folder: Path, label: str) -> Path:
    """Put results into the card of a folder, such as a merge that is not published yet; returns the card's path.

    Raises:
        HfMergeError: the card cannot be read.
    """
    path = file_in(folder, FILE)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise HfMergeError(f"{path}: is not UTF-8; save it as UTF-8.") from error
    name = str(card_pointer(text).get("repo") or label).rpartition("/")[2]
    path.write_text(card_with_results(text, matrix, label, name), encoding="utf-8")
    return path


def push_results(matrix: Matrix, repo_id: str, *, create_pr: bool = False) -> Commit:
    """Publish the results of a model that was evaluated by its Hub ID in its own repository: one commit, or a PR.

    Raises:
        PushError: not among the models, other weights there than were measured, or the branch moved.
        SourceError: no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd, RepoCard

    api = hub_api()
    rows = [m for m in matrix.models if m.commit is not None and m.label.partition("@")[0].lower() == repo_id.lower()]
    if not rows:
        raise PushError(f"{repo_id}: is not among the models that were evaluated; evaluate it by its ID.")
    with hub_errors(repo_id):
        head = str(patiently(lambda: api.model_info(repo_id, revision="main")).sha)
        info = next((m for m in rows if m.commit == head), rows[0])
        if info.commit != head and open_subject(f"{repo_id}@{head}").info.digest != info.digest:
            raise PushError(f"{repo_id}: main holds other weights than {str(info.commit)[:8]}; evaluate it again.")
        files = listed(api, repo_id, head)
        text = download(api, repo_id, FILE, head).decode("utf-8") if FILE in files else ""
        card = card_with_results(text, matrix, info.label, repo_id.rpartition("/")[2])
        _validate(RepoCard, card, repo_id)
        adds = {FILE: card.encode()}
        if entries := benchmark_entries(matrix, info.label):
            adds[f"{RESULTS_PREFIX}{matrix.suite}.yaml"] = dump_yaml(entries).encode()
        new = NewCommit(
            [CommitOperationAdd(name, data) for name, data in adds.items()],
            title=f"Results on {matrix.suite} with hfmerge", description=f"{len(matrix.tasks)} tasks",
            parent=head, proof={FILE: card.encode()}, create_pr=create_pr,
        )  # fmt: skip
        return commit_once(api, repo_id, new)


def benchmark_entries(matrix: Matrix, label: str) -> list[dict[str, Any]]:
    """Entries of `.eval_results` for tasks whose data set is a registered benchmark: one with an `eval.yaml`.

    Only scores on whole splits count there; a sample does not belong on a leaderboard.
    """
    from huggingface_hub import EvalResultEntry
    from huggingface_hub import eval_result_entries_to_yaml as to_yaml

    found = []
    for task, score in _scores(matrix, label):
        task_id = _benchmark_task(task) if task.commit is not None and not task.sampled else None
        if task_id is not None:
            notes = f"{TOOL} {__version__}, suite {matrix.suite}, {task.metric}, {score.n} rows"
            found.append(EvalResultEntry(task.dataset, task_id, round(score.value, 6), task.commit, notes=notes))
    entries: list[dict[str, Any]] = to_yaml(found)
    return entries


def _benchmark_task(task: TaskInfo) -> str | None:
    """The task that a data set's `eval.yaml` has for this configuration and split."""
    from huggingface_hub.errors import EntryNotFoundError

    api, revision = hub_api(), str(task.commit)
    try:
        path = patiently(
            lambda: api.hf_hub_download(task.dataset, "eval.yaml", repo_type="dataset", revision=revision)
        )
    except EntryNotFoundError:
        return None
    data, _ = parse_yaml(Path(path).read_text(encoding="utf-8"), f"{task.dataset}: eval.yaml")
    listed = data.get("tasks") if isinstance(data, Mapping) else None
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, Mapping) and "id" in item:
            same = item.get("config", task.config) in (task.config, task.config or "default")
            if same and item.get("split", task.split) == task.split:
                return str(item["id"])
    return None


def _validate(card_class: Any, card: str, repo_id: str) -> None:
    """Ask the Hub whether the card is valid, before anything is sent.

    Raises:
        PushError: it is not.
    """
    try:
        card_class(card).validate(repo_type="model")
    except ValueError as error:
        raise PushError(f"{repo_id}: the Hub refuses the card: {' '.join(str(error).split())[:300]}") from error


def _info(matrix: Matrix, label: str) -> ModelInfo:
    for info in matrix.models:
        if info.label == label:
            return info
    raise HfMergeError(f"{label}: is not among the models that were evaluated.")


def _scores(matrix: Matrix, label: str) -> list[tuple[TaskInfo, Score]]:
    _info(matrix, label)
    row = [(task, matrix.score(label, task.name)) for task in matrix.tasks]
    return [(task, score) for task, score in row if score is not None]


def _data(task: TaskInfo) -> Markdown:
    name = markdown(task.dataset)
    if task.commit is None:
        return Markdown(f"{name} ({code(task.digest[:12])})") if task.digest else name
    return Markdown(f"{link(task.dataset, 'datasets', task.dataset, site=present_site())} {code(task.commit[:12])}")


def _head(task: TaskInfo) -> Markdown:
    return Markdown(markdown(task.head or "own") + (f" {code(task.head_commit[:12])}" if task.head_commit else ""))


def _rows(matrix: Matrix, column: int) -> str:
    counts = sorted({score.n for row in matrix.scores if (score := row[column]) is not None})
    return ", ".join(map(str, counts)) or "-"
