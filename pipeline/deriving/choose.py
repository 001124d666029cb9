"""Which class is behind `--with METHOD[:K]`."""

from collections.abc import Callable

from ...cache_specs.derived import MethodRequest
from ...cache_specs.errors import UsageError
from .method import Fitting, Method
from .pca import Pca
from .purify import PurifyLinear
from .standardise import Standardise

METHODS: dict[str, Callable[[MethodRequest], Fitting]] = {
    "pca": lambda request: Pca(request.width),
    "pca-scaled": lambda request: Pca(request.width, scaled=True),
    "purify-linear": lambda request: PurifyLinear(),
    "standardise": lambda request: Standardise(),
}


def method_of(request: MethodRequest) -> Fitting:
    """Return the method that is asked for; cache_specs/derived.py has read its name and width."""
    return METHODS[request.name](request)


def transform_of(request: MethodRequest) -> Method:
    """Return the method by which a component was made; raise `UsageError` for one that makes none."""
    method = method_of(request)
    if not isinstance(method, Method):
        raise UsageError(f"{request.label} makes no component")
    return method
