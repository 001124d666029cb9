"""Run commands that kill themselves with SIGKILL at a chosen disk operation; run by conftest.py, not by pytest.

Reads lines of JSON, `[point, arguments, environment]`. Each is one `repa-cache`, in a process forked from this one
after the imports (torch has started no thread yet), that dies at its point-th operation: a write (half of its bytes are
written first), an fsync or a rename (before it), a put to an object store (before it, or when it is done). Point 0 lets
it run to its end. Answers each line with how the process ended and how many operations there were.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import repa.pipeline.building.build
import repa.pipeline.deriving.derive
import repa.pipeline.importing.latents  # noqa: F401
from repa.cache_specs.remote.object_store import ObjectPath
from repa.cache_specs.tables import autoencoder_table, encoder_table
from repa.pipeline.commands.cache import main


def die_at(point: int) -> list[int]:
    """Arm this process; the returned list holds the number of operations so far."""
    count = [0]
    plain = {"write": os.write, "fsync": os.fsync, "replace": os.replace}

    def counted(name: str) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == point:
                if name == "write":
                    plain["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain[name](*arguments)

        return operation

    for name in plain:
        setattr(os, name, counted(name))

    def counted_put(put: Callable[..., None]) -> Callable[..., None]:
        def operation(*arguments: Any) -> None:
            for step in (lambda: None, lambda: put(*arguments)):
                step()
                count[0] += 1
                if count[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        return operation

    for name in ("take", "write"):
        setattr(ObjectPath, name, counted_put(getattr(ObjectPath, name)))
    return count


def run_one(point: int, arguments: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """Fork, build, return the end and the number of operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ.update(environment)
        plain_write = os.write
        count = die_at(point)
        sys.argv = ["repa-cache", *arguments]
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        plain_write(writer, str(count[0]).encode())
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        operations = int(pipe.read() or point)
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", operations


if __name__ == "__main__":
    autoencoder_table()
    encoder_table()
    for line in sys.stdin:
        print(json.dumps(run_one(*json.loads(line))), flush=True)
