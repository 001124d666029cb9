"""What is said: one line, that a terminal shows and never obeys, and of an exception what it says."""

import sys

import pytest

from repa.cache_specs.errors import UsageError, check_arguments, nearest, one_line_errors, printable, reason


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Äpfel 名前 👩‍👧.png", "Äpfel 名前 👩‍👧.png"),
        ("\x1b[31mred\x07.png", "\\x1b[31mred\\x07.png"),
        ("a\nb\r\t\x7f\x9b", "a\\nb\\r\\t\\x7f\\x9b"),
        ("gnp\u202ejpg", "gnp\\u202ejpg"),
        ("\udcff.png", "\\udcff.png"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_names_of_files_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_an_error_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["repa-cache", "info", "x"])
    with pytest.raises(SystemExit) as stop, one_line_errors("repa-cache"):
        raise UsageError("a\x1b]0;title\x07\nb")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "repa-cache: a\\x1b]0;title\\x07 b\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--cache", ""], "--cache: an empty value follows"),
        (["build", "--cache="], "--cache: an empty value follows"),
        (["info", ""], "info: an empty value follows"),
        ([""], "the first argument: an empty value follows"),
        (["build", "--cache", "c", "--set", "a="], None),
        (["build", "--cache", "c=", "-h"], None),
    ],
)
def test_an_empty_argument_never_names_the_working_folder(arguments: list[str], said: str | None) -> None:
    if said is None:
        check_arguments(arguments)
        return
    with pytest.raises(UsageError, match=said):
        check_arguments(arguments)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(2, "No such file or directory", "x"), "No such file or directory"),
        (OSError("cannot identify"), "cannot identify"),
        (IndexError(), "IndexError"),
        (KeyError(), "KeyError"),
        (ValueError("a\n  b"), "a b"),
        (ValueError("x" * 10_000), "x" * 300),
    ],
)
def test_what_an_exception_says(error: BaseException, said: str) -> None:
    assert reason(error) == said


def test_a_name_without_end_is_likened_in_its_beginning() -> None:
    assert "did you mean 'dinov2'" in nearest("dinov3", ["dinov2", "clip"])
    assert nearest("x" * 10**7, ["dinov2", "clip"]) == "Known: clip, dinov2"
