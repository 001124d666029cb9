"""A Ray of our own starts wherever this machine allows it, and leaves nothing behind, however it ends."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repa.cache_specs.errors import JobError
from repa.pipeline.building import ray_start
from repa.pipeline.building.ray_start import (
    DRIVER_PREFIX,
    SESSION_PREFIX,
    clear_old,
    descendants,
    driver_folder,
    fits,
    give_token,
    nothing_left,
    session_folder,
    terminated_quietly,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a short folder in the place of /tmp, with no variable set that says where Ray's files go."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    short = tmp_path / "t"
    short.mkdir()
    monkeypatch.setattr(ray_start, "SHORT_FOLDERS", (str(short),))
    return short


def test_a_folder_that_ray_can_use_is_left_to_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "fits", lambda _: True)
    monkeypatch.setenv("TMPDIR", str(machine))
    with session_folder() as folder:
        assert folder is None


@pytest.mark.parametrize("wrong", ["long", "missing", "a file", "empty"])
def test_a_short_folder_is_made_where_rays_own_is_of_no_use(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    places = {"long": "l" * 44, "missing": "missing", "a file": "file", "empty": ""}
    (tmp_path / "file").touch()
    (tmp_path / ("l" * 44)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / places[wrong]) if places[wrong] else "")
    with session_folder() as folder:
        assert folder is not None
        assert folder.parent == machine
        (folder / "ray/session_x").mkdir(parents=True)
    assert list(machine.iterdir()) == []


def test_the_longest_folder_that_fits_does_and_the_next_does_not() -> None:
    assert fits(Path("/" + "a" * 38))
    assert not fits(Path("/" + "a" * 39))
    assert fits(Path("/tmp") / (SESSION_PREFIX + "12345678"))


def test_without_any_folder_it_is_one_line(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setattr(ray_start, "SHORT_FOLDERS", (str(machine / "none"),))
    monkeypatch.setenv("TMPDIR", "/" + "long" * 30)
    with pytest.raises(JobError, match=r"Ray cannot put its sockets into .*RAY_TMPDIR"), session_folder():
        pass


def test_what_killed_drivers_left_goes_and_what_others_use_stays(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(machine))
    killed = Path(tempfile.mkdtemp(prefix=DRIVER_PREFIX))
    full = Path(tempfile.mkdtemp(prefix=DRIVER_PREFIX))
    (full / "something").touch()
    scratch = machine / f"{DRIVER_PREFIX}{os.getuid()}"  # of builds into buckets
    scratch.mkdir()
    with driver_folder() as living, driver_folder() as own:
        assert not killed.exists()
        assert sorted(machine.iterdir()) == sorted([full, scratch, living, own])
    assert sorted(machine.iterdir()) == sorted([full, scratch])


def test_sessions_of_killed_drivers_go_with_all_in_them(machine: Path) -> None:
    killed, living = (Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=machine)) for _ in range(2))
    (killed / "ray/session").mkdir(parents=True)
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    clear_old(machine, SESSION_PREFIX)
    assert list(machine.iterdir()) == [living]
    os.close(descriptor)
    clear_old(machine, SESSION_PREFIX)
    assert list(machine.iterdir()) == []


def test_a_token_is_given_where_there_is_none(machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's own")
    give_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "the user's own"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").touch()
    give_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    (tmp_path / "home/.ray/auth_token").unlink()
    give_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_start_that_fails_leaves_no_process(tmp_path: Path) -> None:
    # A process with one of its own in another session, as a raylet and its agents.
    command = "import subprocess, sys; subprocess.run(['sleep', '600'], start_new_session=True)"
    before = descendants(os.getpid())
    started = []

    def start() -> None:
        started.append(subprocess.Popen([sys.executable, "-c", command], start_new_session=True))
        while len(descendants(os.getpid())) < len(before) + 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), nothing_left():
        start()
    assert started[0].wait() == -signal.SIGKILL
    assert descendants(os.getpid()).keys() <= before.keys()


def test_sigterm_ends_quietly_with_its_exit_code_and_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, terminated_quietly():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_ray_starts_with_a_long_temporary_folder_and_no_home_and_ends_at_sigterm(
    tmp_path: Path, make_images: Callable[..., Any], small_options: list[str]
) -> None:
    make_images(tmp_path / "images", num=6)
    long = tmp_path / ("long" * 20)
    long.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(long), "HOME": "/proc/none", "RAY_USAGE_STATS_ENABLED": "0"}
    options = ["build", "--data", tmp_path / "images", "--cache", tmp_path / "cache", *small_options, "--workers", "1"]
    run = "import sys; from repa.pipeline.commands.cache import main; main()"
    done = subprocess.run([sys.executable, "-c", run, *map(str, options)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert list(long.iterdir()) == []

    # Again, and stopped as soon as Ray is up.
    options[4] = tmp_path / "other"
    with subprocess.Popen(
        [sys.executable, "-c", run, *map(str, options)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "Ray worker" in line)
        process.terminate()
        rest = process.stderr.read()
        assert process.wait() == 143, said + rest
    assert "SIGTERM received" not in rest
    assert "Traceback" not in rest
    assert list(long.iterdir()) == []
