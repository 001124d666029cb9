"""What every test needs before its first import, and what more than one room's tests share."""

import http.server
import os
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ops this small gain nothing by a second thread, and where the machine does much else, as with a test a core, they take
# 40 times longer: the threads wait for each other. Read when torch is imported, here and in the processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

# Triton decides at its own import whether kernels are compiled or interpreted. timm, torchvision and torch._dynamo
# import it, so this comes before any of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns where this is left to its default, which 3.10 changes, and here a warning is an error.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Missing weights fail at once, and no test depends on what the network answers. Read when the hub client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Ray may ask for a token; one of this session's own, whatever the user has set up for real clusters. Read when Ray is
# imported, by whichever test that is.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# Started from a process of its own, so that a test's driver joins and leaves it as it would a cluster.
_RAY_HEAD = """
import os, sys, tempfile
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    context = ray.init("local", num_cpus=2, object_store_memory=2**28, include_dashboard=False, logging_level="ERROR")
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
    os.chdir("/")
"""


def s3_settings(endpoint: str) -> dict[str, str]:
    """Return the variables of the environment by which a bucket is reached."""
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", **keys}


@pytest.fixture(scope="session")
def ray_head(object_store: str) -> Iterator[tuple[str, int]]:
    """Yield the address of the session's one Ray instance, and the process whose descendants it is.

    Its workers know the session's S3 server.
    """
    command = [sys.executable, "-W", "ignore", "-c", _RAY_HEAD]
    environment = os.environ | s3_settings(object_store)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        assert address, "Ray did not start"
        yield address, head.pid
        head.stdin.close()
        head.wait(timeout=60)


# Away from the tests' process: its threads, warnings and patches are its own.
_OBJECT_STORE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """Yield the endpoint of the session's one S3 server, real HTTP on loopback."""
    command = [sys.executable, "-W", "ignore", "-c", _OBJECT_STORE]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as server:
        for line in server.stdout:
            if line.startswith("http"):
                yield line.strip()
                break
        else:
            raise AssertionError("the S3 server did not start")
        server.stdin.close()
        server.wait(timeout=60)


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a new bucket, which the AWS_ variables of the environment now lead to."""
    name = f"bucket-{secrets.token_hex(4)}"
    urllib.request.urlopen(urllib.request.Request(f"{object_store}/{name}", method="PUT")).close()
    for key, value in s3_settings(object_store).items():
        monkeypatch.setenv(key, value)
    return f"s3://{name}"


@pytest.fixture
def refusing_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a bucket whose server knows none of our keys."""
    said = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key is not in our records.</Message></Error>"

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(403)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield f"s3://refusing-{secrets.token_hex(4)}"
        server.shutdown()
        thread.join()


def write_images(folder: Path, *, num: int = 10, num_classes: int = 2, seed: int = 0) -> list[Path]:
    """Write `num` distinct smooth PNG pictures of different sizes, one folder a class; return them in row order."""
    rng = np.random.default_rng(seed)
    files = []
    for i in range(num):
        size = (int(rng.integers(20, 70)), int(rng.integers(20, 70)))
        noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))
        file = folder / f"class {i * num_classes // num}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        files.append(file)
    return files


@pytest.fixture(scope="session")
def make_images() -> Callable[..., list[Path]]:
    """Return `write_images`."""
    return write_images
