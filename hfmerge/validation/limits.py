"""All limits on what a file may make hfmerge read, hold or compute, in one table. Each limit has a reason.

A file of a repository is a claim by somebody. Its limit is checked before the file is read, parsed or built from, and
whatever is streamed out of it stops at the size that it declared.
"""

from __future__ import annotations

from dataclasses import dataclass


MB = 1_000_000


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        what: what is counted, with its unit, as an error names it.
        most: the greatest number that is accepted.
        reason: why no honest file comes near it, or what lies beyond it.
    """

    what: str
    most: int
    reason: str

    def check(self, number: int) -> None:
        """Refuse a number beyond the limit. Raises ValueError, whose text names limit, number and reason."""
        if number > self.most:
            raise ValueError(f"has {number:,} {self.what}; the limit is {self.most:,}: {self.reason}")


JSON_BYTES = Limit("bytes", 16 * MB, "configurations and manifests take kilobytes")
JSON_VALUES = Limit("values", 1_000_000, "a configuration has some hundreds")
JSON_DEPTH = Limit("levels of nesting", 64, "known formats have fewer than ten")
INDEX_BYTES = Limit("bytes of index", 64 * MB, "250,000 tensors with long names take less")
HEADER_BYTES = Limit("bytes of header", 100 * MB, "safetensors reads no longer header")
HEADER_VALUES = Limit("values in its header", 4_000_000, "250,000 tensors with five dimensions each have fewer")
PLAN_BYTES = Limit("bytes of plan", 512 * MB, "200 models of 5,000 tensors each take half of it")
PLAN_VALUES = Limit("values in a plan", 32 * MB, "200 models of 5,000 tensors each have half of them")
TENSORS = Limit("tensors", 250_000, "the largest open models have about 140,000")
TENSOR_NAME = Limit("bytes in the name of a tensor", 1_000, "known names have fewer than 200")
DIMENSIONS = Limit("dimensions in a tensor", 16, "known tensors have at most six")

ENTRIES = Limit("ledger entries", 20_000, "a merge with one change an hour reaches it after two years")
ENTRY_BYTES = Limit("bytes of ledger entry", 16 * MB, "100 models with 1,000 weights each take half of it")
LEDGER_BYTES = Limit("bytes of ledger", 256 * MB, "the whole ledger is held in memory")
MODELS = Limit("models", 2_000, "the largest merges have some dozens")
FILES = Limit("files", 100_000, "the Hub advises no more in a repository")

CERTIFICATE_BYTES = Limit("bytes of certificate", 32 * MB, "it holds one ledger entry, in base64")
LOG_BYTES = Limit("bytes of log", 64 * MB, "a merge verified every five minutes reaches it after a year")
LOG_LINE = Limit("bytes in a record of the log", 4_096, "a record of hfmerge takes less than 1,000")

CARD_BYTES = Limit("bytes of card", 16 * MB, "a card with 10,000 entries takes 4 MB")
YAML_BYTES = Limit("characters of YAML", 2 * MB, "the longest known front matter, of benchmark results, has 0.5 MB")
YAML_VALUES = Limit("values once aliases are written out", 200_000, "recipes and cards have fewer than 50,000")
YAML_DEPTH = Limit("levels of nesting", 64, "recipes and cards have fewer than ten")
YAML_NUMBER = Limit("characters in a number", 400, "a float64 needs 25")

MANIFEST_BYTES = Limit("bytes of manifest", 64 * MB, "250,000 tensors with long names take less")
MEMBERS = Limit("files", 10_000, "a model has some dozens")
DIRECTORY_BYTES = Limit("bytes of directory", 4 * MB, "10,000 files with long names take 2 MB")
UNPACKED = Limit("MB beyond 16 times its merge, once unpacked", 2_000, "a source is about as large as its merge")

TEMPLATE_BYTES = Limit("bytes of chat template", 512_000, "the longest known templates have some 20 kB")
TOKENIZER_BYTES = Limit("bytes of tokenizer", 500 * MB, "the largest known tokenizers have 40 MB")
LAYERS = Limit("layers, experts or heads of one kind", 10_000, "the deepest published models have about 1,000")
LABELS = Limit("labels", 1_000_000, "known classifiers have at most some 100,000")
PARTS = Limit("modules for each stored tensor", 8, "known classes have at most three")
ELEMENTS = Limit("times as many elements in one parameter as all weights", 8, "a parameter is a part of the weights")

PATTERN = Limit("characters in a pattern", 2_000, "known patterns have at most some hundreds")
PATTERNS = Limit("patterns", 10_000, "an adapter has at most one for each module that it changes")
PATTERN_STATES = Limit("states once its repeats are written out", 2_000, "known patterns have some hundreds")
PATTERN_STEPS = Limit(
    "steps of matching", 2_000_000, "1,400 modules with a pattern for each take nearly all, known adapters thousands"
)
TEXT = Limit("characters in a text", 10_000, "names, licences and labels have at most some hundreds")
