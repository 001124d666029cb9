"""Which class is behind `--with METHOD[:K]`."""

from collections.abc import Callable

from ...cache_specs.derived import MethodRequest
from .method import Method
from .pca import Pca

METHODS: dict[str, Callable[[MethodRequest], Method]] = {
    "pca": lambda request: Pca(request.width),
}


def method_of(request: MethodRequest) -> Method:
    """Return the method that is asked for; cache_specs/derived.py has read its name and width."""
    return METHODS[request.name](request)
