"""What is wrong with a network of one's own is one line, said when it is loaded: before any image is decoded."""

from pathlib import Path
from typing import Any

import pytest

from repa.cache_specs.errors import UsageError
from repa.cache_specs.tables import resolve_encoder
from repa.pipeline.models.encoders import load_encoder

from .own_networks import TARGET, write_own

PLAIN = "import torch\nimport torch.nn.functional as F\n\ndef make(width):\n    return lambda x: "
POOLED = "F.avg_pool2d(x, 8).repeat(1, 2, 1, 1)"
# The network is one map of 6 channels at 8 pixels a place.
ONE: dict[str, Any] = {"stages": None, "files": None}


def refused(folder: Path, request: str, *, match: str, **written: Any) -> None:
    file = write_own(folder, **written)

    def load() -> None:
        resolved = resolve_encoder(f"{file}{request}", resolution=16)
        load_encoder(resolved.spec, code=resolved.code)

    with pytest.raises(UsageError, match=match) as error:
        load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import absent\n", "cannot be imported .ModuleNotFoundError: No module named 'absent' at .*own.py:1.; list"),
        ("def make(width:\n", "cannot be imported .SyntaxError"),
        ("raise SystemExit(1)\n", "cannot be imported .SystemExit: 1"),
        ("def other():\n    pass\n", "no function 'make' in it; it has other"),
        ("def make():\n    pass\n", r"own.py:make failed .TypeError: make\(\) got an unexpected keyword"),
        ("def make(width):\n    return width\n", "returned 6, expected something to call"),
        (PLAIN + "x[:, :, ::8, ::8]", r"a map of shape \[3, 3, 2, 2\], expected \[3, 6, h, w\]"),
        (PLAIN + "F.avg_pool2d(x, 4).repeat(1, 2, 1, 1)", "its map has 4 x 4 places for 16 x 16 pixels, its entry says "
         "2 x 2; a patch of 4 pixels"),
        (PLAIN + f"{POOLED}.double()", "a tensor of float64 .3, 6, 2, 2., expected a tensor of float32"),
        (PLAIN + f"{POOLED}.numpy()", "returns a ndarray, expected a tensor"),
        (PLAIN + f"{POOLED} / 0", "values are not finite"),
        (PLAIN + f"F.dropout({POOLED}, 0.1)", "two calls on the same pictures differ by up to"),
        (PLAIN + f"{POOLED} - x.mean()", "a picture alone and the same one in a batch of 3 differ by up to"),
        (PLAIN + "{'a': x, 'b': x}", r"returns several maps \(a, b\); declare them as stages"),
        (PLAIN + "x @ x[0, 0, :3]", "fails on pictures of 16 x 16 pixels .RuntimeError: .* at .*own.py:5."),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_cached_is_one_line(tmp_path: Path, source: str, said: str) -> None:
    refused(tmp_path, ":grid=2", match=f"^encoder mine: .*{said}", source=source, **ONE)


@pytest.mark.parametrize(
    ("request_", "fields", "said"),
    [
        (":grid=2:stage=lat", {}, "no such stage; did you mean 'late'. Known: early, late"),
        (":grid=2:stage=last", {"stages": {"last": [6, 8]}}, "no stage 'last' in what it returns; it has early, late"),
        (":grid=2:stage=1", ONE | {"files": ["nets.py", "weights.pth"]}, "no such stage; it declares no stages"),
        (":grid=4:stage=late", {}, "2 x 2 is the network's own grid, not 4 x 4. Ask for :grid=2 or fewer, or for"),
        (":grid=4:stage=early:resize=cubic", {}, "resize is 'cubic', expected bilinear"),
        (":grid=2:stage=../x", {}, "stage is '../x', expected the number or name of a stage"),
        (":grid=4", {**ONE, "output": "tokens"}, "2 x 2 is the network's own grid, not 4 x 4; tokens are never"),
        (":grid=2", {"files": ["absent.pth"]}, "absent.pth: .*absent.pth cannot be read .No such file"),
        (":grid=2", {"files": ["../other/nets.py", "nets.py"]}, "files: two are called nets.py"),
        (":grid=2", {"files": ["."]}, "cannot be read .Is a directory.; list files"),
        (":grid=2", {"target": "own.make"}, "target is 'own.make', expected FILE.py:function or package.mod"),
        (":grid=2", {"target": "absent_package:make"}, "no package 'absent_package' is installed here"),
        (":grid=2", {"target": None}, "target is missing, expected a text"),
        (":grid=2", {"model": "x"}, "model is a library's name; loader: python has a target"),
        (":grid=2", {"loader": "timm", "model": "x", "prefix_tokens": 0, "cls_token": False, "tensor": "no_norm"},
         "target and files are of loader: python"),
        (":grid=2", {"stages": {"a": 1}}, r"stages is .*expected \[width, patch\] a stage"),
        (":grid=2", {"native_grid": 3, "input_size": None}, "native_grid is that of one input size"),
        (":grid=2", {"width": None, "patch": None}, "width is missing.*and 1 more: repa-cache encoders --check"),
        (":grid=2", {"mean": None, "std": [1, 1, 0]}, "no std of 0"),
    ],
)  # fmt: skip
def test_a_request_or_entry_that_makes_no_sense_is_one_line(
    tmp_path: Path, request_: str, fields: dict[str, Any], said: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/nets.py").write_text("")
    refused(tmp_path / "own", request_, match=said, **fields)


def test_weights_are_compared_where_they_are_read(tmp_path: Path) -> None:
    file = write_own(tmp_path)
    resolved = resolve_encoder(f"{file}:grid=2:stage=late", resolution=16)
    write_own(tmp_path, seed=1)
    with pytest.raises(UsageError, match=r"weights\.pth changed since the command began, or is another file on this"):
        load_encoder(resolved.spec, code=resolved.code)
    with pytest.raises(UsageError, match=r"a cache never causes an import: give its file, --entry mine\.yaml"):
        load_encoder(resolved.spec)
    with pytest.raises(UsageError, match="mine is your own; list its weights under files"):
        load_encoder(resolved.spec, code=resolved.code, weights=tmp_path / "weights.pth")


def test_an_enlarged_map_is_recorded_where_it_was_asked_for(tmp_path: Path) -> None:
    file = write_own(tmp_path, source=TARGET)
    spec = resolve_encoder(f"{file}:grid=4:stage=late:resize=bilinear", resolution=16).spec
    assert (spec["grid"], spec["native_grid"], spec["resize"]) == ([4, 4], [2, 2], "bilinear")
    # Where nothing is enlarged the words change nothing: the same tokens have one fingerprint.
    plain, asked = (
        resolve_encoder(f"{file}:grid=2:stage=late{words}", resolution=16).spec for words in ("", ":resize=bilinear")
    )
    assert plain == asked
