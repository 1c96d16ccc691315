"""Which modules an adapter's configuration gives factors to; PEFT ignores factors in the file of any other module.

Source: `check_target_module_exists` in PEFT's `tuners/tuners_utils.py`. `target_modules` is a list of names or of
ends of names, or a regular expression for whole names. `exclude_modules` and `modules_to_save` take modules out, and
`layers_to_transform` all but some layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hfmerge.checkpoint.patterns import Patterns


ALL_LINEAR = "all-linear"
_NAME = re.compile(r"[\w-]+")


class Targets:
    """The modules that one configuration names.

    Args:
        config: adapter_config.json.
        patterns: reads its regular expressions.
    """

    def __init__(self, config: Mapping[str, Any], patterns: Patterns):
        self._config, self._patterns = config, patterns

    def has(self, module: str) -> bool:
        """Whether PEFT gives factors to a module. A configuration that names no targets leaves it to the file.

        Raises:
            ValueError: a pattern cannot be matched here.
        """
        targets = self._config.get("target_modules")
        if self._named(self._config.get("exclude_modules"), module):
            return False
        saved = self._config.get("modules_to_save") or ()
        if any(f".{name}." in f".{module}." for name in ([saved] if isinstance(saved, str) else saved)):
            return False
        if not targets or targets == ALL_LINEAR:
            return True
        if not self._named(targets, module):
            return False
        # a regular expression, and a whole name, say the layer themselves
        return isinstance(targets, str) or module in targets or self._in_layers(module)

    def _named(self, names: Any, module: str) -> bool:
        if not names:
            return False
        if isinstance(names, str):
            return self._patterns.is_all_of(names, module)
        return any(f".{module}".endswith(f".{name}") for name in names)

    def _in_layers(self, module: str) -> bool:
        layers = self._config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        wanted = [layers] if isinstance(layers, int) else layers
        patterns = self._config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if pattern != r"[^.]*" and not _NAME.fullmatch(pattern):
                raise ValueError(f"layers_pattern {pattern!r} is not a plain name")
            lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            found = re.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", module)
            if found is not None:
                return int(found["index"]) in wanted
        return False
