"""Ray started on this machine or joined on a cluster, and left again: the one place that does either."""

import atexit
import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ...cache_specs.errors import JobError, reason
from .ray_start import (
    descendants,
    driver_folder,
    give_token,
    kill_started,
    nothing_left,
    session_folder,
    take_back_sigterm,
    terminated_quietly,
)

CONNECT_TIMEOUT_S = 10


@contextlib.contextmanager
def ray_session(address: str | None, *, instead: str, **local: Any) -> Iterator[Any]:
    """Yield the module ray, connected to `address`, or to an instance of this machine's own that `local` sizes.

    `instead` says how to do without. Raises JobError where Ray cannot be reached or does not start.
    """
    if address is None:
        give_token()
    import ray

    with contextlib.ExitStack() as stack:
        # Ray puts the driver's folder first on its workers' path, where a checkout's `kernels` would shadow the
        # published package of that name: start it from an empty one.
        empty = stack.enter_context(driver_folder())
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            # "local": one of our own, also beside a cluster that happens to run on this machine.
            settings |= {"address": "local", "include_dashboard": False, **local}
            sessions = stack.enter_context(session_folder())
            if sessions is not None:
                settings["_temp_dir"] = str(sessions)
        else:
            _check_reachable(address)
            settings["address"] = address
        stack.enter_context(terminated_quietly())
        before = descendants(os.getpid())
        try:
            with contextlib.chdir(empty), nothing_left():
                ray.init(**settings)
        except Exception as error:  # a raylet that was lost, a folder that cannot be written: Ray has no class for it
            if address:
                raise JobError(f"--address {address}: Ray could not be reached ({reason(error)})") from error
            raise JobError(f"Ray did not start ({reason(error)}); run the same command again, or {instead}") from error
        stack.enter_context(_no_logs_of_the_dead())
        stack.callback(_leave, ray, before)
        take_back_sigterm()
        yield ray


def head_answers(ray: Any) -> bool:
    """Return whether the server behind all of this Ray is there: a minute without it, and Ray ends this process."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _no_logs_of_the_dead() -> Iterator[None]:
    """Keep Ray from printing the log of a daemon that dies into our output: what is lost is said in one line."""
    worker = importlib.import_module("ray._private.worker")
    printing = getattr(worker, "print_to_stdstream", None)  # of its own thread; where it has none, it prints
    if printing is None:
        yield
        return
    worker.print_to_stdstream = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        worker.print_to_stdstream = printing  # type: ignore[attr-defined]


def _leave(ray: Any, before: Mapping[int, int]) -> None:
    """Leave Ray, ending one of our own; of one whose head is gone nobody can take leave, now or at the exit."""
    if head_answers(ray):
        ray.shutdown()
        return
    atexit.unregister(ray.shutdown)
    atexit.register(_end)  # of what Ray still has in this process, a plain exit would be a crash
    kill_started(before)


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(JobError.exit_code)


def _check_reachable(address: str) -> None:
    """Raise `JobError` where nobody listens at host:port: Ray itself would try again for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`, or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(f"--address {address}: Ray could not be reached ({error}); is the cluster up?") from error
