"""Tasks of other harnesses by name: lm-evaluation-harness and MTEB, each an extra of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfmerge.checkpoint.schema import read_snapshot_json
from hfmerge.errors import HfMergeError, SourceError
from hfmerge.evaluation.data import data_errors
from hfmerge.evaluation.metrics import Z
from hfmerge.evaluation.models import Subject
from hfmerge.evaluation.processors import TOKENIZER_FILES, find_snapshot, load_tokenizer
from hfmerge.evaluation.results import Score
from hfmerge.evaluation.suite import Task
from hfmerge.hub.reference import Snapshot, is_path
from hfmerge.validation.values import show


def lm_eval_score(subject: Subject, task: Task, *, batch_size: int, seed: int) -> Score:
    """A task of lm-evaluation-harness, by name.

    Raises:
        HfMergeError: the harness is not installed, knows no such task or metric, or cannot use the tokenizer.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HfMergeError(
            f"{task.name}: tasks of lm-evaluation-harness need `pip install hfmerge[lm-eval]` ({error})."
        ) from error
    manager = TaskManager()
    if task.benchmark not in manager.all_tasks:
        raise HfMergeError(f"{task.name}: lm-evaluation-harness has no task {task.benchmark}; see `lm-eval ls tasks`.")
    label = subject.info.label
    tokenizer = load_tokenizer(find_snapshot(subject.snapshots, TOKENIZER_FILES, "tokenizer", label))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise HfMergeError(f"{label}: lm-evaluation-harness needs a tokenizer with a bos_token or an eos_token.")
    model = HFLM(pretrained=subject.whole("causal"), tokenizer=tokenizer, batch_size=batch_size, device=subject.device)
    results = lm_eval.simple_evaluate(
        model=model, tasks=[task.benchmark], num_fewshot=task.shots or None, limit=task.limit, random_seed=seed,
        numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, task_manager=manager,
        log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip
    values = results["results"][task.benchmark]
    return _reported(task, values, int(results["n-samples"][task.benchmark]["effective"]))


def _reported(task: Task, values: dict[str, Any], n: int) -> Score:
    """The harness's value with an interval from its standard error."""
    names = sorted({key.partition(",")[0] for key in values if "," in key and "_stderr" not in key})
    key = next((key for key in values if key.partition(",")[0] == task.metric), None)
    if key is None:
        raise HfMergeError(f"{task.name}: {task.benchmark} has no metric {task.metric}; it has {', '.join(names)}.")
    value, error = float(values[key]), values.get(key.replace(",", "_stderr,", 1))
    if not isinstance(error, float) or math.isnan(error):
        return Score(value, n, math.nan, math.nan, task.metric, "none")
    return Score(value, n, value - Z * error, value + Z * error, task.metric, "reported")


def mteb_score(subject: Subject, task: Task, *, batch_size: int) -> Score:
    """The main score of a task of MTEB, by name, of a sentence-transformers model.

    Raises:
        HfMergeError: MTEB is not installed, knows no such task, or the model is an adapter.
    """
    try:
        import mteb
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise HfMergeError(f"{task.name}: tasks of MTEB need `pip install hfmerge[mteb]` ({error}).") from error
    label = subject.info.label
    if subject.source is None or subject.source.kind == "adapter":
        raise HfMergeError(f"{label}: MTEB takes saved models only; merge the adapter into its base first.")
    snapshot = subject.source.snapshot
    if "modules.json" not in snapshot.files:
        raise HfMergeError(f"{label}: has no modules.json; a sentence-transformers model is needed.")
    if snapshot.folder is None and snapshot.subfolder is not None:
        raise HfMergeError(f"{label}: MTEB loads whole repositories only; download the folder, and name it here.")
    _check_modules(snapshot)
    try:
        wanted = mteb.get_task(str(task.benchmark), eval_splits=[task.split])
    except KeyError as error:
        raise HfMergeError(f"{task.name}: MTEB has no task {task.benchmark}.") from error
    with data_errors(f"{task.name}: {task.benchmark}"):
        wanted.load_data()  # else it is gone when its rows are counted
    name = str(snapshot.folder) if snapshot.folder is not None else snapshot.name
    model = SentenceTransformer(name, revision=snapshot.commit, device=subject.device, trust_remote_code=False)
    results = mteb.evaluate(
        model, wanted, cache=None, encode_kwargs={"batch_size": batch_size}, show_progress_bar=False
    )
    result = results.task_results[0]
    rows = _rows(wanted.dataset, task.split)
    return Score(float(result.get_score()), rows, math.nan, math.nan, task.metric, "none")


def _check_modules(snapshot: Snapshot) -> None:
    """Refuse what sentence-transformers would import by name: of a folder it runs such code without being told to.

    Raises:
        SourceError: a module, or a function in one, is not of sentence-transformers or torch; names it.
    """
    for module in read_snapshot_json(snapshot, "modules.json"):
        kind, path = str(module.get("type")), module.get("path") or ""
        if not kind.startswith("sentence_transformers."):
            raise SourceError(f"{snapshot.label}: modules.json names {show(kind)}, code of its own, which is not run.")
        if path and not is_path(path):
            raise SourceError(f"{snapshot.label}: modules.json names {show(path)}, which is not a folder in it.")
        file = f"{path}/config.json" if path else "config.json"
        named = read_snapshot_json(snapshot, file).get("activation_function") if file in snapshot.files else None
        if named is not None and not str(named).startswith("torch.nn."):
            raise SourceError(f"{snapshot.label}: {file} names the function {show(named)}, which is not run.")


def _rows(data: Any, split: str) -> int:
    """Rows of a split, over all of its languages; 0 where a task keeps its data in another form."""
    if not isinstance(data, Mapping):
        return 0
    if split in data:
        return len(data[split])
    return sum(_rows(part, split) for part in data.values())
