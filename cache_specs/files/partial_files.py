"""Files under a temporary name, in a folder where others may write too: made anew, never opened through a link."""

import contextlib
import os
import shutil
from pathlib import Path


def new_file(path: Path) -> int:
    """Return a descriptor, to write, of a new and empty file; raise `OSError`.

    What had the name is removed, never opened: left by a killed process, or put there by somebody, it may be a link to
    a file that is none of ours.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def clear_folder(folder: Path) -> None:
    """Remove a folder of half-written files with all in it, if it is there; of links, the links alone."""
    with contextlib.suppress(OSError):
        # By the parent's descriptor: a parent that is a link, or becomes one meanwhile, leads nowhere.
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            shutil.rmtree(folder.name, dir_fd=parent, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(folder.name, dir_fd=parent)
        finally:
            os.close(parent)
