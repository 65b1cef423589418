"""What happens when JAX and Keras are imported."""

import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import PathFinder
from threading import RLock
from types import ModuleType

_DEFERRED = {f"{package}.{part}" for package in ("keras", "keras.src", "keras._tf_keras.keras") for part in ("visualization", "wrappers")}


def defer_slow_parts_of_keras() -> None:
    """Let Keras load its plotting and its scikit-learn wrappers when they are first used.

    Keras 3.15 imports both packages whole when it is imported, and with them matplotlib, scikit-learn and SciPy's statistics, where
    these are installed, as parafit's are: half of the time that `import keras` takes. Does nothing if Keras is imported already.
    """
    if "keras" not in sys.modules and not any(isinstance(finder, _Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Deferring())


class _Deferring:
    """A finder of the deferred packages."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in _DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferredLoader(spec.loader)
        return spec


class _DeferredLoader(Loader):
    """A package's loader that runs it once, when something is first looked up that the package does not have yet.

    The standard library's lazy loader runs a package again when its own modules are imported by it (before Python 3.12), so that there
    are two classes of each name, and objects of the one cannot be pickled.
    """

    def __init__(self, loader):
        self._loader, self._lock, self._runs = loader, RLock(), False

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def get(name: str):
            self._run(module)
            if name in vars(module):
                return vars(module)[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def names() -> list[str]:
            self._run(module)
            return sorted(vars(module))

        vars(module).update(__getattr__=get, __dir__=names)

    def _run(self, module: ModuleType) -> None:
        with self._lock:
            if not self._runs:
                self._runs = True
                try:
                    self._loader.exec_module(module)
                except BaseException:
                    self._runs = False
                    raise


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a package when it has been imported, at once if it is.

    Args:
        name: name of the package.
        then: takes the package.
    """
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Following(name, then))


class _Following:
    """A finder that does something when one package has been imported, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self._name, self._then = name, then

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == self._name else None
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then(module)

        loader.exec_module = exec_module
