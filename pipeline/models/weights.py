"""Whose weights these are: a digest of what was loaded, and one clear line where nothing can be loaded."""

import contextlib
import importlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError, reason
from ...cache_specs.files.impostors import impostor
from ...cache_specs.fingerprint import weights_digest

NO_WEIGHTS = "none"
RANDOM_SEED = 0  # random weights are the same on every worker, and say what they are in the group's name


def digest_of(model: torch.nn.Module) -> str:
    """Return `sha256:<digest>` over the model's state dict: the same from the hub, a .pth or a .safetensors."""
    return "sha256:" + weights_digest(_tensors(model.state_dict()))


def freeze(module: torch.nn.Module, device: torch.device) -> str:
    """Make a module ready to encode on `device`; return its digest."""
    module.eval().requires_grad_(False)
    digest = digest_of(module)
    module.to(device)
    return digest


def load_network(
    spec: Mapping[str, Any],
    code: OwnCode | None,
    device: torch.device,
    *,
    own: Callable[[Mapping[str, Any], OwnCode | None, torch.device], Any],
    library: Callable[[], tuple[Any, torch.nn.Module]],
) -> tuple[Any, str]:
    """Return the network of a resolved spec on `device`, None for one without weights, and what its weights are.

    `own` makes a user's from its code, which has `weights`; `library` returns another one and the module behind it.
    """
    if spec["loader"] == "builtin":
        return None, NO_WEIGHTS
    if spec["loader"] == "python":
        network = own(spec, code, device)
        return network, network.weights
    network, module = library()
    return network, freeze(module, device)


def _tensors(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        yield name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data.data


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub client's retries and deprecations from the screen: what failed is said in our one line."""
    with contextlib.suppress(ImportError):
        importlib.import_module("huggingface_hub.utils.logging")  # which sets the level, as it is imported
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def check_weights_file(name: str, file: Path) -> None:
    """Raise `UsageError` for a --weights file that is not there, is something else, or whose ending says nothing."""
    if not file.exists():
        raise UsageError(f"--weights {name}={file}: no such file")
    if not file.is_file() and not file.is_dir():
        raise UsageError(f"--weights {name}={file}: a FIFO or a device, expected a file")
    if file.is_file() and file.suffix not in (".safetensors", ".pth", ".pt", ".bin", ".tar"):
        raise UsageError(f"--weights {name}={file}: expected .safetensors, .pth, .pt, .bin or .pth.tar")
    if file.is_file() and (instead := impostor(file)):
        raise UsageError(f"--weights {name}={file}: {instead}")


def check_weights(spec: Mapping[str, Any], file: Path | None) -> None:
    """Raise `UsageError` for a --weights file that the model of `spec` cannot be loaded from, before it is read."""
    name = spec["entry"]
    if file is None:
        return
    if spec["loader"] in ("builtin", "python"):
        why = "has no weights" if spec["loader"] == "builtin" else "is your own; list its weights under files"
        raise UsageError(f"--weights {name}={file}: {name} {why}")
    check_weights_file(name, file)


def read_state_dict(file: Path) -> dict[str, Any]:
    """Return what a .safetensors or a .pth holds, on the CPU; a .pth is unpickled as weights only, never as code."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"a {type(loaded).__name__}, expected tensors by name")
    return dict(loaded)


def hub_file(place: str) -> Path:
    """Fetch `hf.co/OWNER/REPOSITORY/FILE` by the hub's own client and return where it lies."""
    from huggingface_hub import hf_hub_download

    owner, repository, file = place.removeprefix("hf.co/").split("/", 2)
    return Path(hf_hub_download(f"{owner}/{repository}", file))


def no_weights_error(name: str, model: str, error: Exception) -> UsageError:
    """Return the line for weights that could not be downloaded, with both ways out."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UsageError(
        f"{name}: the pretrained weights of {model} could not be had from the hub "
        f"({type(error).__name__}: {reason[:200]}). "
        f"Give a local file with --weights {name}=FILE.safetensors (or .pth), or take --random-weights for a dry run "
        "of the pipeline; such a component is named so"
    )


def wrong_weights_error(name: str, file: Path, error: Exception) -> UsageError:
    """Return the line for a weights file that does not fit the model, naming the first differences."""
    # What unpicklers say advises to run the file's code.
    unpickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
    why = "it is no file of tensors alone, and nothing else is unpickled" if unpickled else reason(error)
    return UsageError(f"--weights {name}={file}: does not fit {name}: {why}")
