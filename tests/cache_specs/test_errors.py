"""What is said: one line, that a terminal shows and never obeys, and of an exception what it says."""

import sys
from pathlib import Path

import pytest

from repa.cache_specs.errors import (
    UsageError,
    check_arguments,
    expand_home,
    nearest,
    one_line_errors,
    printable,
    reason,
)
from repa.cache_specs.files.outside import parse_yaml
from repa.cache_specs.storage import location
from repa.cache_specs.tables import as_known, encoder_name


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


def test_the_home_folder_is_expanded_where_a_shell_leaves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--out=~/x", "~/x", "--weights", "dinov2=~/w.pth", "a~/b", "--set=a=b~", "~", "~other/x"]
    monkeypatch.setattr("sys.argv", ["repa-cache", *words])
    expand_home()
    home = str(tmp_path)
    assert sys.argv[1:5] == [f"--out={home}/x", f"{home}/x", "--weights", f"dinov2={home}/w.pth"]
    assert sys.argv[5:] == words[4:]
    assert str(location("~/cache")) == f"{home}/cache"
    assert parse_yaml("cache: ~/c\nentries: [~/e.yaml]\nname: a~/b\nnone: ~") == {
        "cache": f"{home}/c",
        "entries": [f"{home}/e.yaml"],
        "name": "a~/b",
        "none": None,
    }


def test_a_name_is_found_whatever_its_case() -> None:
    assert "did you mean 'sd-vae-ft-mse'" in nearest("SD-VAE-MSE", ["sd-vae-ft-mse", "pixels"])
    assert as_known("DINOv2_ViT_B", {"dinov2-vit-b"}) == "dinov2-vit-b"
    assert as_known("My-Net", {"dinov2-vit-b"}) == "My-Net"
    assert encoder_name("DINOv2") == encoder_name("dinov2") == "dinov2-vit-b"
