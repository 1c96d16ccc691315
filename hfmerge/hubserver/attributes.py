"""Which files are large: `.gitattributes`, `.gitignore` and a look at the first bytes."""

from __future__ import annotations

import io

from dulwich.attrs import GitAttributes, compile_gitattributes_patterns, parse_git_attributes
from dulwich.ignore import IgnoreFilter, read_ignore_patterns


# Text files from this size on are stored as large objects too.
LARGE_BYTES = 10 << 20

_COMMON = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx"
    " *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz"
    " *.wasm *.xz *.zip *.zst *tfevents*"
).split()
_MEDIA = (
    "*.lz4 *.mds *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav *.bmp *.gif *.png *.tiff *.jpg *.jpeg *.webp *.mp4"
    " *.webm"
).split()

DEFAULT_ATTRIBUTES = {
    kind: "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
    for kind, patterns in (("model", _COMMON), ("dataset", _COMMON + _MEDIA))
}


def attributes_of(text: bytes) -> GitAttributes:
    """The rules of a `.gitattributes` file."""
    return GitAttributes(compile_gitattributes_patterns(parse_git_attributes(io.BytesIO(text))))


def is_large(attributes: GitAttributes, path: str, size: int, sample: bytes) -> bool:
    """Whether a file goes to the store of large objects: by rule, by size, or because it is not text."""
    if size == 0:
        return False
    if size >= LARGE_BYTES or attributes.match_path(path.encode()).get(b"filter") == b"lfs":
        return True
    if b"\0" in sample:
        return True
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        # A sample may end in the middle of a character.
        return error.end < len(sample) or size == len(sample)
    return False


def ignored(rules: bytes, paths: list[str]) -> dict[str, bool]:
    """Which paths a `.gitignore` leaves out, also through a folder above them."""
    rule_filter = IgnoreFilter(list(read_ignore_patterns(io.BytesIO(rules))))

    def out(path: str) -> bool:
        parts = path.split("/")
        folders = ["/".join(parts[:depth]) + "/" for depth in range(1, len(parts))]
        return any(rule_filter.is_ignored(folder) for folder in folders) or bool(rule_filter.is_ignored(path))

    return {path: out(path) for path in paths}
