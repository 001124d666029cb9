"""What the tests of builds that go wrong share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def images(make_images: Callable[..., list[Path]], tmp_path: Path) -> Path:
    make_images(tmp_path / "images", num=6)
    return tmp_path / "images"


def refuse(outcome: Any, code: int, *parts: str) -> None:
    """Hold that a command ended with `code` and that its last line says all `parts`; nothing but lines before it."""
    assert outcome.code == code, outcome
    lines = outcome.err.strip().splitlines()
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in lines[-1], (part, lines[-1])
    if code == 2:
        assert len(lines) == 1, lines
