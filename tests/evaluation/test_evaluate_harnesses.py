"""Where the harnesses themselves are installed (extras `lm-eval`, `mteb`): their tasks by name, on stand-ins' data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hfmerge
from hfmerge.errors import HfMergeError
from hfmerge.evaluation.evaluator import Settings
from hfmerge.hubserver.serve import HubServer
from tests.fixtures import evaluating, tiny


# warnings are the harnesses' own; lm-eval reads thousands of files before it knows its tasks
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow, pytest.mark.timeout(1200)]
FRESH = Settings(cache=False, batch_size=4)


def data_set(repo_id: str, folder: Path, rows: list[dict[str, Any]], splits: tuple[str, ...]) -> HfApi:
    """Put rows on the Hub under the ID that the harness asks for."""
    for split in splits:
        evaluating.write_rows(folder / f"{split}.jsonl", rows)
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder)
    return api


def score(model: Path, tmp_path: Path, **task: Any) -> hfmerge.Score:
    found = hfmerge.evaluate([model], evaluating.suite(tmp_path / "s.yaml", {"name": "t", **task}), settings=FRESH)
    assert found.scores[0][0] is not None
    return found.scores[0][0]


def test_lm_eval_and_our_own_multiple_choice_agree(hub: HubServer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    texts = [evaluating.sentences(6, seed) for seed in range(24)]
    names = ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")
    rows = [{**dict(zip(names, row, strict=True)), "answer": 3} for row in texts]
    data_set("allenai/sciq", tmp_path / "sciq", rows, ("train", "validation", "test"))
    model = tiny.build("LlamaForCausalLM", tiny.config("llama", max_position_embeddings=128))
    tiny.tokenizer(tiny.save(model, tmp_path / "llama"), evaluating.TOKENS)
    own = score(
        tmp_path / "llama", tmp_path, kind="multiple-choice", dataset="allenai/sciq", label="answer",
        prompt="{support}\nQuestion: {question}\nAnswer:",
        choices=["distractor1", "distractor2", "distractor3", "correct_answer"],
    )  # fmt: skip
    with pytest.raises(HfMergeError, match="a bos_token or an eos_token"):
        score(tmp_path / "llama", tmp_path, kind="lm-eval", benchmark="sciq", metric="acc")
    tiny.edit_config(tmp_path / "llama", file="tokenizer_config.json", eos_token="[PAD]")
    theirs = score(tmp_path / "llama", tmp_path, kind="lm-eval", benchmark="sciq", metric="acc")
    assert theirs.n == own.n == 24 and theirs.value == own.value and 0 < theirs.value < 1
    assert theirs.interval == "reported" and theirs.low < theirs.value < theirs.high
    limited = score(tmp_path / "llama", tmp_path, kind="lm-eval", benchmark="sciq", metric="acc", limit=5)
    assert limited.n == 5


def test_mteb_scores_a_merge_of_sentence_encoders(hub: HubServer, tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="the extra mteb is not installed")
    import mteb
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer, models

    first, second = evaluating.sentences(20, 1), evaluating.sentences(20, 2)
    rows = [
        {"sentence1": a, "sentence2": b, "score": i % 6} for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    wanted = mteb.get_task("STSBenchmark").metadata.dataset
    api = data_set(wanted["path"], tmp_path / "sts", rows, ("train", "validation", "test"))
    # the commit that the harness asks for is the real one's; here a branch bears its name
    api.create_branch(wanted["path"], branch=wanted["revision"], repo_type="dataset")
    base = tiny.build("BertModel", tiny.config("bert"))
    for seed, name in enumerate(("base", "one", "two")):
        tiny.save(base if name == "base" else tiny.fine_tune(base, seed, 0.2), tmp_path / "plain" / name)
        tiny.tokenizer(tmp_path / "plain" / name, evaluating.TOKENS)
        tiny.edit_config(tmp_path / "plain" / name, file="tokenizer_config.json", pad_token="[PAD]")
        reader = models.Transformer(str(tmp_path / "plain" / name), max_seq_length=16)
        SentenceTransformer(modules=[reader, models.Pooling(reader.get_word_embedding_dimension())]).save(
            str(tmp_path / name)
        )
    tiny.done(
        "merge", tmp_path / "one", tmp_path / "two", "--base", tmp_path / "base", "--method", "opcm", "--output",
        tmp_path / "merged",
    )  # fmt: skip
    assert (tmp_path / "merged" / "modules.json").is_file() and json.loads(
        (tmp_path / "merged" / "modules.json").read_text()
    )
    found = score(tmp_path / "merged", tmp_path, kind="mteb", benchmark="STSBenchmark")
    encoder = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    a, b = (encoder.encode(texts, normalize_embeddings=True) for texts in (first, second))
    by_hand = spearmanr((a * b).sum(1), [row["score"] for row in rows])[0]
    assert found.n == 20 and found.value == pytest.approx(by_hand, abs=1e-4)
