"""Methods by name: what `objective` in a recipe or a stored run stands for. Imported when asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ...cache_specs.errors import UsageError, nearest
from ..diffusion.interpolant import Interpolant
from .objective import Field, Objective

# The module and its class; a class says itself which section of a run's configuration is its own.
OBJECTIVES: dict[str, tuple[str, str]] = {
    "velocity": ("velocity", "Velocity"),
    "meanflow": ("meanflow", "MeanFlow"),
    "reg": ("reg", "REG"),
    "sra": ("sra", "SRA"),
    "jit": ("jit", "JiT"),
    "internal": ("internal", "Internal"),
}


def objective_class(name: str) -> type[Objective]:
    """Return the method of this name; raise UsageError, with the nearest, where there is none."""
    if name not in OBJECTIVES:
        raise UsageError(f"objective is {name!r}; {nearest(name, OBJECTIVES)}")
    module, cls = OBJECTIVES[name]
    return getattr(import_module(f".{module}", __package__), cls)


def settings_of(config: Any) -> Any:
    """Return the section of a run's configuration that is its method's own, or None."""
    section = objective_class(config.objective).section
    return None if section is None else getattr(config, section)


def other_sections(name: str) -> set[str]:
    """Return the sections of a run's configuration that belong to methods other than `name`."""
    own = objective_class(name).section
    return {section for other in OBJECTIVES if (section := objective_class(other).section) not in (None, own)}


def stored_field(config: Mapping[str, Any], interpolant: Interpolant) -> Field:
    """Return what samples of a checkpoint's model follow; `config` is its run's, or `TrainedModel.method`."""
    method = objective_class(config.get("objective", "velocity"))
    settings = None if method.section is None else method.Settings(**config.get(method.section, {}))
    return method.field(interpolant, settings)
