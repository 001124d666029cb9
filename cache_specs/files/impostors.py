"""What lies where a file of weights should, and is none: said in words, before a parser stumbles over it."""

from pathlib import Path

HEAD_BYTES = 512


def impostor(file: Path) -> str | None:
    """Return what `file` is instead of weights and how to get them, None where its first bytes show nothing of it.

    Raises OSError where it cannot be read.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = next((line.split()[1] for line in head.splitlines() if line.startswith(b"size ")), b"")
        whole = f" of {int(size):,} bytes" if size.isdigit() and len(size) < 20 else ""
        return f"it is a Git LFS pointer, not the file{whole} that it stands for. Fetch that with git lfs pull"
    if head.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "it is a git-annex pointer, not the file that it stands for. Fetch that with git annex get"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, as a download gets that needs a login or a click. Fetch the file itself"
    return None
