"""Ray started on this machine or joined on a cluster, and left again: the one place that does either."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from ...cache_specs.errors import JobError, reason
from .ray_start import driver_folder, give_token, nothing_left, session_folder, take_back_sigterm, terminated_quietly

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
        try:
            with contextlib.chdir(empty), nothing_left():
                ray.init(**settings)
        except Exception as error:  # a raylet that was lost, a folder that cannot be written: Ray has no class for it
            if address:
                raise JobError(f"--address {address}: Ray could not be reached ({reason(error)})") from error
            raise JobError(f"Ray did not start ({reason(error)}); run the same command again, or {instead}") from error
        stack.callback(ray.shutdown)
        take_back_sigterm()
        yield ray


def _check_reachable(address: str) -> None:
    """Raise `JobError` where nobody listens at host:port: Ray itself would try again for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`, or a name that Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(f"--address {address}: Ray could not be reached ({error}); is the cluster up?") from error
