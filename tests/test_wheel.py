"""The wheel, built and installed as a user would, beside the mergekit of this environment."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import mergekit_wp
from mergekit_wp.tasks.behaviors import plain_text

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergekit_wp"


def run(*command: str | Path) -> str:
    ignored = ("PYTHONPATH", "PYTHONWARNINGS", "MERGEKIT_WP_AUTOLOAD")  # pip warns of its own
    environment = {key: value for key, value in os.environ.items() if key not in ignored}
    done = subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment_with(home: Path, *what: str | Path) -> Path:
    """Install `what` into a fresh environment that sees our packages, but runs no .pth of ours."""
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin/python"
    site_packages = home / "lib/python{}.{}/site-packages".format(*sys.version_info)
    (site_packages / "host.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", *what)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    [path] = out.iterdir()
    return path


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"mergekit_wp-{mergekit_wp.__version__}.dist-info/"
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "_cache" not in path.as_posix()
    }
    assert "mergekit_wp/py.typed" in ours
    assert {name for name in names if not name.startswith(metadata)} == {
        *ours,
        "mergekit_wp_autoload.pth",
    }
    assert metadata + "licenses/LICENSE" in names


@pytest.mark.slow
def test_plain_mergekit_knows_the_method(wheel: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path, wheel)
    shown = run(
        python,
        "-c",
        "import sys; from mergekit.scripts.run_yaml import main\n"
        "import mergekit.merge_methods as host; print(host.get('weight_patching').__module__)\n"
        "import mergekit_wp; print(mergekit_wp.__file__)\n"
        "sys.argv[1:] = ['--help']; main()",
    )
    method, file, *help_text = shown.splitlines()
    assert method == "mergekit_wp.merging.method"
    assert Path(file).is_relative_to(tmp_path)
    assert re.match("Usage: .*CONFIG_FILE", help_text[0])
    assert mergekit_wp.__version__ in run(tmp_path / "bin/mergekit-wp", "--version")
    text = "from mergekit_wp.tasks.behaviors import plain_text; print(plain_text().sha256)"
    assert run(python, "-c", text).strip() == plain_text().sha256


def test_an_editable_install_has_the_hook(tmp_path: Path) -> None:
    python = environment_with(tmp_path, "--editable", ROOT)
    shown = run(
        python,
        "-c",
        "import sys, mergekit_wp; print(mergekit_wp.__file__)\n"
        "print(type(sys.meta_path[0]).__module__)",
    )
    assert shown.splitlines() == [str(PACKAGE / "__init__.py"), "mergekit_wp.autoload"]
