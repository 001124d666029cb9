"""Without a terminal a long command says now and then how far it is, and how long it will take."""

import threading
import time

import pytest

from repa.pipeline.commands.progress import Progress


@pytest.mark.parametrize(
    ("before", "done", "seconds", "expected"),
    [
        (0, 0, 60, "0 of 5000 images (0 %), none in 60 s"),
        (0, 1280, 60, "1280 of 5000 images (25 %), 21.3 images/s, 3 min left"),
        (4000, 500, 50, "4500 of 5000 images (90 %), 10 images/s, 50 s left"),
        (0, 10, 100, "10 of 5000 images (0 %), 0.1 images/s, 13.9 h left"),
    ],
)
def test_a_line_has_rate_and_time_left_of_what_is_done_now(
    before: int, done: int, seconds: float, expected: str
) -> None:
    with Progress("images") as progress:
        progress.start(before, 5000)
        progress.advance(done)
        assert progress.line(seconds) == expected


def test_of_several_counts_each_begins_anew() -> None:
    with Progress("shards", of="hog") as progress:
        progress.reach(3, 4)
        assert progress.line(1) == "hog: 3 of 4 shards (75 %), 3 shards/s, 0 s left"
        progress.reach(1, 4)
        progress.reach(2, 4)
        assert progress.line(1) == "hog: 2 of 4 shards (50 %), 2 shards/s, 1 s left"
        progress.reach(1, 9)
        assert progress.line(1) == "hog: 1 of 9 shards (11 %), 1 shards/s, 8 s left"


def test_lines_come_while_nothing_ends_and_none_after_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("images", interval_s=0.01) as progress:
        progress.start(0, 10)
        said = ""
        while "0 of 10 images (0 %), none in" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert "progress" not in {thread.name for thread in threading.enumerate()}
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
