"""mergekit-wp: mechanism-aware model merging for mergekit.

The public names below are loaded when they are first asked for. The start-up hook
(`mergekit_wp.autoload`) imports this package in every Python process of the environment, so it
must cost nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mergekit_wp.api import compare as compare
    from mergekit_wp.api import find_anchors as find_anchors
    from mergekit_wp.api import fit as fit
    from mergekit_wp.api import fuse as fuse
    from mergekit_wp.api import load_scores as load_scores
    from mergekit_wp.api import merge as merge
    from mergekit_wp.api import merge_experts as merge_experts
    from mergekit_wp.api import register_architecture as register_architecture
    from mergekit_wp.api import score as score
    from mergekit_wp.api import score_together as score_together
    from mergekit_wp.api import stability as stability
    from mergekit_wp.api import trace as trace
    from mergekit_wp.api import verify as verify
    from mergekit_wp.architectures import Architecture as Architecture
    from mergekit_wp.errors import UserError as UserError
    from mergekit_wp.version import __version__ as __version__

_HOMES = {
    "mergekit_wp.api": (
        "score score_together fit load_scores merge merge_experts fuse compare verify trace "
        "find_anchors stability register_architecture"
    ),
    "mergekit_wp.architectures": "Architecture",
    "mergekit_wp.errors": "UserError",
    "mergekit_wp.version": "__version__",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Load a public name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'mergekit_wp' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(_HOME)
