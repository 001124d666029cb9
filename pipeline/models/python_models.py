"""Networks of the user's own (`loader: python`): a function of theirs gives one, and its output is taken as declared.

An encoder is a callable from pixels [B, 3, h, w] float32, as the entry's mean, std and input size make them, to a map
[B, E, h', w'], to tokens [B, P + T, E], or to several maps by name or in a list (stages). An autoencoder has `encode`,
pixels to moments, and `decode`, latents to pixels. A torch module is moved to the device; anything else sees the CPU,
unless its function takes the keyword `device`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...cache_specs.entries import OwnCode
from ...cache_specs.errors import UsageError
from .own_modules import cause, own_function
from .weights import RANDOM_SEED, freeze

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class OwnNetwork:
    """What the target of an entry returned, on a device; `weights` is the digest of its state, or of its files."""

    def __init__(self, what: str, spec: Mapping[str, Any], code: OwnCode | None, device: torch.device) -> None:
        """Import and call the target. `what` begins every error: `encoder my-net`."""
        if code is None:
            raise UsageError(
                f"{what} is a network of your own, and a cache never causes an import: give its file, "
                f"--entry {spec['entry']}.yaml"
            )
        function = own_function(what, code)
        options = dict(spec["options"])
        aware = _takes_device(function)
        if aware:
            options.setdefault("device", str(device))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                self.network = function(**options)
        except (Exception, SystemExit) as error:  # whatever the user's function raises; the cause is in the line
            raise UsageError(f"{what}: target {code.target} failed ({cause(error)})") from error
        self.what = what
        self.module = self.network if isinstance(self.network, torch.nn.Module) else None
        self.device = device if aware or self.module is not None else torch.device("cpu")
        self.weights = code.digest
        if self.module is not None:
            digest = freeze(self.module, device)
            self.weights = digest if self.module.state_dict() else code.digest


def _takes_device(function: Any) -> bool:
    try:
        return "device" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C, or of something that only looks like a function
        return False


class PythonFeatures:
    """An encoder of the user's own, and how its tokens are taken; `model` is its torch module, or None."""

    def __init__(self, spec: Mapping[str, Any], code: OwnCode | None, device: torch.device) -> None:
        self._own = OwnNetwork(f"encoder {spec['entry']}", spec, code, device)
        self._spec = spec
        self.model = self._own.module
        self.weights = self._own.weights
        if not callable(self._own.network):
            raise UsageError(f"{self._own.what}: the target returned {self._own.network!r}, expected something to call")

    def __call__(self, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return the one pair: tokens [B, T, E] or a map [B, E, h, w], and prefix tokens [B, P, E] or None."""
        returned = self._own.network(pixels.to(self._own.device))
        if isinstance(returned, Mapping | tuple | list):
            raise UsageError(
                f"{self._own.what}: returns several maps ({_names(returned)}); declare them as stages, and ask for "
                "one, as in :stage=NAME"
            )
        tokens, num_prefix = self._checked(returned), self._spec["prefix_tokens"]
        if self._spec["output"] == "map" or not num_prefix:
            return [(tokens, None)]
        return [(tokens[:, num_prefix:], tokens[:, :num_prefix])]

    def stages(self, pixels: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        """Return the maps [B, E, h, w] of the stages `names`, of one forward."""
        returned = self._own.network(pixels.to(self._own.device))
        if isinstance(returned, tuple | list):
            returned = {str(i): one for i, one in enumerate(returned)}
        if not isinstance(returned, Mapping):
            raise UsageError(f"{self._own.what}: returns {_brief(returned)}, expected its stages by name or in a list")
        for name in names:
            if name not in returned:
                raise UsageError(f"{self._own.what}: no stage {name!r} in what it returns; it has {_names(returned)}")
        return [self._checked(returned[name]) for name in names]

    def _checked(self, tokens: Any) -> torch.Tensor:
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in DTYPES:
            raise UsageError(f"{self._own.what}: returns {_brief(tokens)}, expected a tensor of float32 (or half)")
        return tokens


class PythonAutoencoder:
    """An autoencoder of the user's own: what its target returned, `encode` and `decode` checked for their shapes."""

    def __init__(self, spec: Mapping[str, Any], code: OwnCode | None, device: torch.device) -> None:
        self._own = OwnNetwork(f"autoencoder {spec['entry']}", spec, code, device)
        self._spec = spec
        self.module = self._own.module
        self.weights = self._own.weights
        for name in ("encode", "decode"):
            if not callable(getattr(self._own.network, name, None)):
                raise UsageError(f"{self._own.what}: {_brief(self._own.network)} without {name}; expected both methods")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return moments [B, M, h, w] of pixels [B, 3, H, W] in the entry's range."""
        moments = self._own.network.encode(pixels.to(self._own.device))
        side = [size // self._factor for size in pixels.shape[-2:]]
        return self._checked("encode", moments, [len(pixels), self._spec["moment_channels"], *side])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels [B, 3, H, W] in the entry's range of latents [B, C, h, w]."""
        pixels = self._own.network.decode(latents.to(self._own.device))
        side = [size * self._factor for size in latents.shape[-2:]]
        return self._checked("decode", pixels, [len(latents), 3, *side])

    @property
    def _factor(self) -> int:
        return self._spec["factor"]

    def _checked(self, method: str, values: Any, shape: list[int]) -> torch.Tensor:
        if not isinstance(values, torch.Tensor) or values.dtype not in DTYPES or list(values.shape) != shape:
            raise UsageError(
                f"{self._own.what}: {method} returns {_brief(values)}, expected float32 {shape} by its entry"
            )
        return values


def _names(returned: Any) -> str:
    return ", ".join(map(str, returned)) if isinstance(returned, Mapping) else f"{len(returned)} of them"


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
