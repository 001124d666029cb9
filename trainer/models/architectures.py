"""Which network a model's name or a checkpoint's record stands for: SiT or JiT."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...cache_specs.errors import UsageError
from .jit import JiT, JiTConfig, jit_config
from .projector import ProjectorConfig
from .sit import SiT, SiTConfig, sit_config

_CONFIGS: dict[str, Callable[..., SiTConfig]] = {"SiT": sit_config, "JiT": jit_config}
_RECORDS: dict[str, type[SiTConfig]] = {"sit": SiTConfig, "jit": JiTConfig}  # by key in a checkpoint


def model_config(name: str, *, architecture: str, **shape: Any) -> SiTConfig:
    """Return the configuration of a model by name; raise UsageError for another `architecture` than its method's."""
    found = name.partition("-")[0]
    if found != architecture and found in _CONFIGS:
        sizes = f"{architecture}-{name.partition('-')[2]}"
        raise UsageError(f"model is {name}; this recipe's method trains a {architecture}, such as {sizes}")
    return _CONFIGS[architecture](name, **shape)


def make_model(
    config: SiTConfig,
    projectors: Sequence[ProjectorConfig] = (),
    *,
    encoder_depth: int | Sequence[int] | None = None,
    seed: int = 0,
) -> SiT:
    """Return the network of a configuration, as its class makes it."""
    if isinstance(config, JiTConfig):
        return JiT(config, projectors, encoder_depth=encoder_depth, seed=seed)
    return SiT(config, projectors, encoder_depth=encoder_depth, seed=seed)


def config_record(config: SiTConfig) -> dict[str, dict[str, Any]]:
    """Return a configuration as a checkpoint holds it, under the key of its class."""
    (key,) = [key for key, cls in _RECORDS.items() if cls is type(config)]
    return {key: dataclasses.asdict(config)}


def recorded_config(record: Mapping[str, Any]) -> SiTConfig:
    """Return what `config_record` was given; raises KeyError, TypeError or UsageError where it is damaged."""
    key = next((key for key in _RECORDS if key in record), "sit")
    return _RECORDS[key](**record[key])
