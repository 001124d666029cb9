"""What `import repa` and its rooms offer, and that looking at a cache loads no torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import repa
import repa.pipeline
import repa.trainer
from repa.cache_specs import errors


@pytest.mark.parametrize("face", [repa, repa.pipeline, repa.trainer])
def test_every_name_of_a_face_is_listed_and_there(face: Any) -> None:
    assert set(face.__all__) <= set(dir(face))
    for name in face.__all__:
        assert getattr(face, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        face.nothing  # noqa: B018


def test_the_package_has_its_errors_and_version() -> None:
    assert (repa.RepaError, repa.UsageError) == (errors.RepaError, errors.UsageError)
    assert (repa.CacheError, repa.JobError) == (errors.CacheError, errors.JobError)
    assert isinstance(repa.__version__, str)


def test_info_loads_no_torch(make_images: Callable[..., list[Path]], tmp_path: Path) -> None:
    make_images(tmp_path / "images", num=4)
    build = (
        f"build --data {tmp_path}/images --cache {tmp_path}/cache --resolution 16 "
        "--encoder hog:grid=4 --autoencoder none --workers 0"
    )
    run = "import sys; from repa.pipeline.commands.cache import main; sys.argv[1:] = {!r}; main(); {}"
    subprocess.run([sys.executable, "-c", run.format(build.split(), "")], check=True, capture_output=True)
    info = run.format(["info", f"{tmp_path}/cache"], "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", info], check=True, capture_output=True, text=True)
    assert "features/hog-grid4: complete" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
