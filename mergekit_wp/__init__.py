"""mergekit-wp: mechanism-aware model merging for mergekit.

Kept free of imports on purpose: the start-up hook (`mergekit_wp.autoload`) imports this package
in every Python process of the environment, so it must cost nothing.
"""

__version__ = "0.1.0"
