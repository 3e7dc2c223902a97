"""The tables of README.md from the files of the benchmark."""


def everything() -> str:
    """All tables."""
    return ""
