"""Shared fixtures: a quiet, offline-safe environment; warnings of third parties that are not ours to fix."""

import os


# read at import by huggingface_hub, so it is set before anything imports it; tests of the Hub run clients in child processes
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
