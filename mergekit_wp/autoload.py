"""The start-up hook: plain mergekit commands know `weight_patching`.

mergekit 0.1.5 discovers no plugins: a method exists once `mergekit.merge_methods.register` has
been called in the process. So an install puts `mergekit_wp_autoload.pth` into site-packages; its
one line calls `install` at each interpreter start, which only leaves a finder on `sys.meta_path`.
The finder waits for `mergekit.merge_methods` and registers the method when that has executed.

Every Python process of the environment pays for this module, so it imports nothing that an
interpreter has not loaded anyway (that rules out `typing` and `__future__`). And it is a guest in
each of those processes: it must never break a start or an import. When the method cannot be
registered, one line on stderr says so.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "MERGEKIT_WP_AUTOLOAD"
_HOST = "mergekit.merge_methods"
_OURS = "mergekit_wp."


def install() -> None:
    """Have the method registered once mergekit's registry exists; `MERGEKIT_WP_AUTOLOAD=0`: no."""
    if os.environ.get(SWITCH) == "0":
        return
    if _HOST in sys.modules:
        _register_or_complain()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def ensure_registered() -> None:
    """Register `weight_patching` with mergekit, or find that it is registered already.

    Raises:
        ImportError: mergekit is absent or has no `register`, or our method cannot be imported.
        RuntimeError: another package holds the name.
    """
    import mergekit.merge_methods as host

    if not hasattr(host, "register"):
        raise ImportError("this mergekit has no merge_methods.register; version 0.1.5 has")
    from mergekit_wp.merging.method import weight_patching

    name = weight_patching.spec.name
    try:
        host.register(weight_patching)
    except ValueError:  # taken; asking beforehand instead would race with another thread
        home = _home(host.get(name))
        if not home.startswith(_OURS):
            raise RuntimeError(
                f"the merge method name {name!r} is already registered by {home}"
            ) from None


def _home(method: object) -> str:
    """Name the module that defines a method, be it a class of its own or a decorated function."""
    return str(getattr(method, "implementation", type(method)).__module__)


def _register_or_complain() -> None:
    """Do `ensure_registered` as a guest: an import of mergekit must not fail because of us."""
    try:
        ensure_registered()
    except Exception as error:
        _complain(f"{type(error).__name__}: {error}")


def _complain(reason: str) -> None:
    """Say on one line why the method is missing; a warning could be filtered, or raise."""
    if sys.stderr is not None:
        sys.stderr.write(
            f"mergekit-wp: merge method weight_patching is not available "
            f"({' '.join(reason.split())}); {SWITCH}=0 turns its registration off\n"
        )


class _Watcher:
    """A meta path finder that lets the finders behind it find, and acts after the module ran.

    It watches our own modules, too. One of them may be the reason why mergekit is imported; to
    import `mergekit_wp.merging.method` at that moment could be circular. So it waits until none is
    halfway.
    """

    def __init__(self) -> None:
        self._host_ready = False
        self._halfway: set[str] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find what the others find; hook the loader of a module that concerns us."""
        if name != _HOST and not name.startswith(_OURS):
            return None
        finders = list(sys.meta_path)
        if self not in finders:  # retired by another thread meanwhile
            return None
        for finder in finders[finders.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                if spec.loader is not None:
                    self._hook(spec.loader, name)
                return spec
        return None

    def _hook(self, loader: "Loader", name: str) -> None:
        """Shadow the loader's `exec_module` once, so that spec and loader stay the genuine ones."""
        try:
            execute, attributes = loader.exec_module, vars(loader)

            def exec_module(module: "ModuleType") -> None:
                if module.__name__ != name:  # a zip archive's loader serves all its modules
                    execute(module)
                    return
                if attributes.get("exec_module") is exec_module:
                    del attributes["exec_module"]
                self._run(execute, module)

            attributes["exec_module"] = exec_module
        except (AttributeError, TypeError):  # no such method, no instance, or no attributes
            if name == _HOST:
                _complain(f"mergekit comes from a loader that cannot be hooked: {loader!r}")

    def _run(self, execute: "Callable[[ModuleType], None]", module: "ModuleType") -> None:
        """Execute a module, then register the method if this was the last thing it waited for."""
        name = module.__name__
        if name == _HOST:
            execute(module)
            self._host_ready = True
            self._register_when_settled()
            return
        self._halfway.add(name)
        try:
            execute(module)
        except KeyboardInterrupt:  # a method that was not waited for is not missing
            self._halfway.discard(name)
            raise
        except BaseException:
            self._ended(name)
            raise
        self._ended(name)

    def _ended(self, name: str) -> None:
        self._halfway.discard(name)
        self._register_when_settled()

    def _register_when_settled(self) -> None:
        if self._host_ready and not self._halfway:
            self._host_ready = False  # once: what follows imports modules that end here as well
            _register_or_complain()
            # A new list, for other threads may be walking the old one and would skip a finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
