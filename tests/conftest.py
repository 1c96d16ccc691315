"""What holds for all tests: the Hub that they share, and the order in which workers take files."""

import pytest

from tests.fixtures.hub import hub


__all__ = ["hub"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several workers each begins with files that have slow tests, so that all end at about the same time."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
