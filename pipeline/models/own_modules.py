"""Python sources of the user's, imported under a private name from the bytes that came with the request.

A package named after their digest holds the sources, so that neither their folder nor their names are on the path: two
networks may each have a `nets.py`, and neither is `nets` to anything else. Among themselves they import each other as
they do at home, by `import nets` or `from .nets import X`: each module has an `__import__` of its own that looks there
first. What is run is what was digested, on every worker.
"""

import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ...cache_specs.entries import OwnCode, module_name
from ...cache_specs.errors import UsageError
from ...cache_specs.fingerprint import digest

PREFIX = "_repa_own_"


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and runs the modules of private packages; `_held` gives source and path by full name."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[bytes, str]] = {}

    def add(self, code: OwnCode) -> str:
        """Hold the sources of `code`; return the name of their package. The same ones are held once."""
        # Paths too: what a module reads beside its `__file__` must not be another one's.
        package = PREFIX + digest([dict(code.digests), {n: str(code.files[n]) for n in code.sources}])[:16]
        held = {package: (b"", package)}
        for name, source in code.sources.items():
            *above, last = module_name(name).split(".")
            for depth in range(len(above)):  # folders need no __init__.py
                held.setdefault(".".join([package, *above[: depth + 1]]), (b"", package))
            held[".".join([package, *above, last])] = (source, str(code.files[name]))
        self._held |= held
        return package

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._held:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self._held)
        return importlib.util.spec_from_loader(
            fullname, self, origin=self._held[fullname][1], is_package=is_package or fullname.count(".") == 0
        )

    def exec_module(self, module: ModuleType) -> None:
        source, path = self._held[module.__name__]
        package = module.__name__.partition(".")[0]
        module.__file__ = path  # weights that lie beside it are found as at home
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._importer(package)}
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)

    def _importer(self, package: str) -> Callable[..., ModuleType]:
        def own_import(
            name: str,
            globals: Mapping[str, Any] | None = None,
            locals: Mapping[str, Any] | None = None,
            fromlist: tuple[str, ...] | None = (),
            level: int = 0,
        ) -> ModuleType:
            root = name.partition(".")[0]
            if level or f"{package}.{root}" not in self._held:
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            if fromlist:
                return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
            importlib.import_module(f"{package}.{name}")
            return sys.modules[f"{package}.{root}"]

        return own_import


_SOURCES = _Sources()


def own_function(where: str, code: OwnCode) -> Callable[..., Any]:
    """Return the target of `code`, its module imported; files that did not travel are compared before anything runs.

    Raises `UsageError` beginning with `where` where a file is another one here, or the target cannot be imported.
    """
    code.check_here(where)
    if _SOURCES not in sys.meta_path:
        sys.meta_path.insert(0, _SOURCES)
    package = _SOURCES.add(code)
    try:
        module = importlib.import_module(f"{package}.{code.module}" if code.in_file else code.module)
    except (Exception, SystemExit) as error:  # whatever the user's module raises; the cause is in the line
        hint = "; list helpers of your own under files" if isinstance(error, ModuleNotFoundError) else ""
        raise UsageError(f"{where}: target {code.target} cannot be imported ({cause(error)}){hint}") from error
    function = getattr(module, code.function, None)
    if not callable(function):
        there = ", ".join(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
        raise UsageError(
            f"{where}: target {code.target}: no function {code.function!r} in it; it has {there or 'none'}"
        )
    return function


def cause(error: BaseException) -> str:
    """Return an error as part of a line: its class, its first line, and the place in the code that raised it."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in theirs if not frame.filename.startswith("<")]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{': ' if first else ''}{first[:200]}{place}"
