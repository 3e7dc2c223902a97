"""The start-up hook, in real interpreters whose site-packages hold it beside a tiny mergekit."""

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mergekit_wp import autoload

ROOT = Path(__file__).parents[1]

# What matters of mergekit 0.1.5: a package that fills a registry while it is imported.
REGISTRY = """
class Method:
    def __init__(self, name):
        self.spec = type("Spec", (), {"name": name})
methods = {}
def register(method):
    if method.spec.name in methods:
        raise ValueError("already registered")
    methods[method.spec.name] = method
def get(name):
    return methods[name]
register(Method("linear"))
"""
STAND_INS = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": (
        "from mergekit.merge_methods.registry import Method, get, methods, register\n"
    ),
    "mergekit/merge_methods/registry.py": REGISTRY,
    "mergekit_wp/merging/__init__.py": "",
    "mergekit_wp/merging/method.py": (
        "from mergekit.merge_methods.registry import Method\n"
        "from mergekit_wp.merging import fusion\n"
        "class WeightPatching(Method): ...\n"
        "weight_patching = WeightPatching('weight_patching')\n"
    ),
    "mergekit_wp/merging/fusion.py": "import mergekit.merge_methods\nready = True\n",
}
SHIPPED = ("mergekit_wp_autoload.pth", "mergekit_wp/__init__.py", "mergekit_wp/autoload.py")

REGISTERED = (
    "import sys; from mergekit.merge_methods import methods\n"
    "assert list(methods) == ['linear', 'weight_patching'], list(methods)\n"
    "assert '_Watcher' not in [type(finder).__name__ for finder in sys.meta_path]\n"
)
NOT_REGISTERED = (
    "from mergekit.merge_methods import methods; assert list(methods) == ['linear'], list(methods)"
)


@dataclass
class Site:
    """A virtual environment of which a test fills, and spoils, the site-packages."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def packages(self) -> Path:
        return self.home / "lib/python{}.{}/site-packages".format(*sys.version_info)

    def write(self, name: str, text: str) -> None:
        path = self.packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        path = self.packages / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, code: str, *options: str) -> str:
        """Run `code`; it must succeed. What it and the start wrote to stderr."""
        done = subprocess.run(
            [self.home / "bin/python", "-I", *options, "-c", code],
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    venv.create(tmp_path, symlinks=True, with_pip=False)
    site = Site(tmp_path)
    for name, text in STAND_INS.items():
        site.write(name, text)
    for name in SHIPPED:
        shutil.copy(ROOT / name, site.packages / name)
    return site


@pytest.mark.parametrize(
    "first",
    [
        "import mergekit.merge_methods",
        "from mergekit import merge_methods",
        "import mergekit.merge_methods.registry",
        "import mergekit_wp.merging.method",
        # needed by mergekit_wp.merging.method: not to be imported at once
        "import mergekit_wp.merging.fusion",
        "from mergekit_wp.autoload import ensure_registered as ensure; ensure(); ensure()",
        "from mergekit_wp.autoload import install; install(); install()",
        "import sys; sys.meta_path.insert(0, type('Front', (), {'find_spec': lambda *_: None}))",
    ],
)
def test_any_first_import_ends_registered(site: Site, first: str) -> None:
    assert site.run(f"{first}\n{REGISTERED}") == ""


def test_the_start_imports_next_to_nothing(site: Site) -> None:
    site.run("pass")  # compiles the two modules, as pip does on installation
    shown = site.run("pass", "-X", "importtime")
    site.write("mergekit_wp_autoload.pth", "# any .pth makes Python 3.13 import a codec\n")
    plain = site.run("pass", "-X", "importtime")

    def cumulative_us(report: str) -> dict[str, int]:
        rows = [line.split("|") for line in report.splitlines()[1:]]
        return {name.strip(): int(total) for _, total, name in rows}

    cost, before = cumulative_us(shown), cumulative_us(plain)
    assert cost.keys() - before.keys() == {"mergekit_wp", "mergekit_wp.autoload"}
    assert cost["mergekit_wp"] + cost["mergekit_wp.autoload"] < 20_000  # a loaded machine's bound


def test_pth_is_one_import_line() -> None:
    lines = (ROOT / "mergekit_wp_autoload.pth").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("import ")


def test_spec_and_loader_stay_genuine(site: Site) -> None:
    site.run(
        "import importlib.util, sys\n"
        "from importlib.machinery import SourceFileLoader\n"
        "spec = importlib.util.find_spec('mergekit.merge_methods')\n"
        "assert type(spec.loader) is SourceFileLoader\n"
        "assert 'registry' in spec.loader.get_source(spec.name)\n"
        "assert not {'mergekit.merge_methods', 'mergekit_wp.merging.method'} & sys.modules.keys()\n"
        "import mergekit.merge_methods as host\n"
        "assert type(host.__loader__) is SourceFileLoader\n"
        "assert host.__loader__ is host.__spec__.loader\n"
        "assert 'exec_module' not in vars(host.__loader__)\n"
        f"{REGISTERED}"
        "assert importlib.reload(host) is host\n"
        f"{REGISTERED}"
    )


def test_a_zip_archive_has_one_loader_for_all_modules(site: Site) -> None:
    site.write("mergekit/common.py", "")
    shutil.make_archive(str(site.home / "host"), "zip", site.packages, "mergekit")
    site.remove("mergekit")
    site.write("host.pth", str(site.home / "host.zip"))
    site.run(
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('mergekit.merge_methods')\n"
        "import mergekit.common  # by the same loader; it must not use up the hook\n"
        "assert 'host.zip' in mergekit.common.__file__\n"
        "sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules[spec.name])\n"
        f"{REGISTERED}"
    )


def test_threads(site: Site) -> None:
    names = (
        "mergekit.merge_methods",
        "mergekit_wp.merging.method",
        "mergekit_wp.merging.fusion",
    ) * 4
    site.run(
        "import importlib, threading\n"
        f"names = {names}\n"
        "barrier = threading.Barrier(len(names))\n"
        "def work(name): barrier.wait(); importlib.import_module(name)\n"
        "threads = [threading.Thread(target=work, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        f"{REGISTERED}"
    )


def test_our_method_halfway_in_another_thread(site: Site) -> None:
    """That thread holds our module and wants mergekit; this one holds mergekit: no deadlock."""
    site.write(
        "mergekit_wp/merging/method.py",
        "import threading; entered = threading.Event()\n"
        "import time; time.sleep(0.5)\n" + STAND_INS["mergekit_wp/merging/method.py"],
    )
    errors = site.run(
        "import sys, threading, time\n"
        "other = threading.Thread(target=__import__, args=('mergekit_wp.merging.method',))\n"
        "other.start()\n"
        "while not hasattr(sys.modules.get('mergekit_wp.merging.method'), 'entered'):\n"
        "    time.sleep(0.01)\n"
        "import mergekit.merge_methods\n"
        "other.join()\n"
        f"{REGISTERED}"
    )
    assert errors == ""


def test_switched_off(site: Site) -> None:
    site.variables["MERGEKIT_WP_AUTOLOAD"] = "0"
    assert site.run(f"import mergekit_wp.merging.method\n{NOT_REGISTERED}") == ""
    assert site.run(f"from mergekit_wp.autoload import *\nensure_registered()\n{REGISTERED}") == ""
    late = "import os, mergekit.merge_methods; os.environ.clear()"
    assert site.run(f"{late}\nfrom mergekit_wp.autoload import *\ninstall()\n{REGISTERED}") == ""


@pytest.mark.parametrize("missing", ["mergekit_wp", "mergekit_wp/autoload.py"])
def test_half_removed_package_leaves_no_trace(site: Site, missing: str) -> None:
    site.remove(missing)
    assert site.run(NOT_REGISTERED) == ""


def test_broken_hook_leaves_no_trace(site: Site) -> None:
    site.write("mergekit_wp/autoload.py", "this is no Python")
    assert site.run(NOT_REGISTERED) == ""


def test_mergekit_absent(site: Site) -> None:
    site.remove("mergekit")
    errors = site.run(
        "try: import mergekit.merge_methods\n"
        "except ModuleNotFoundError as error: assert error.name == 'mergekit'"
    )
    assert errors == ""


def test_broken_mergekit_fails_as_without_us_and_can_be_imported_again(site: Site) -> None:
    site.write("mergekit/merge_methods/registry.py", "import os; os.stat(os.environ['NOWHERE'])")
    repaired = site.packages / "mergekit/merge_methods/registry.py"
    errors = site.run(
        "import pathlib\n"
        "try: import mergekit.merge_methods\n"
        "except KeyError as error: assert error.args == ('NOWHERE',)\n"
        f"pathlib.Path({str(repaired)!r}).write_text({REGISTRY!r})\n"
        f"{REGISTERED}"
    )
    assert errors == ""


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (
            "mergekit_wp/merging/method.py",
            None,
            "ModuleNotFoundError: No module named 'mergekit_wp.merging.method'",
        ),
        ("mergekit_wp/merging/method.py", "raise OSError('two\\nlines')", "OSError: two lines"),
        ("mergekit_wp/merging/fusion.py", "1 / 0", "ZeroDivisionError: division by zero"),
        (
            "mergekit/merge_methods/__init__.py",
            "from mergekit.merge_methods.registry import Method, get, methods\n",
            "ImportError: this mergekit has no merge_methods.register; version 0.1.5 has",
        ),
        (
            "mergekit/merge_methods/registry.py",
            REGISTRY + "register(Method('weight_patching'))\ndel methods['linear']\n",
            "RuntimeError: the merge method name 'weight_patching' is already registered by "
            "mergekit.merge_methods.registry",
        ),
    ],
)
def test_a_missing_method_is_said_on_one_line(
    site: Site, file: str, text: str | None, reason: str
) -> None:
    site.remove(file) if text is None else site.write(file, text)
    errors = site.run(
        "import sys\n"
        "from mergekit.merge_methods import methods\n"
        "assert len(methods) == 1\n"
        "assert '_Watcher' not in [type(finder).__name__ for finder in sys.meta_path]",
        "-Werror",
    )
    assert errors.startswith(
        f"mergekit-wp: merge method weight_patching is not available ({reason}"
    )
    assert errors.endswith("MERGEKIT_WP_AUTOLOAD=0 turns its registration off\n")
    assert errors.count("\n") == 1


def test_an_interrupted_import_is_no_missing_method(site: Site) -> None:
    site.write(
        "mergekit_wp/merging/fusion.py",
        "import sys, mergekit.merge_methods\n"
        "if not hasattr(sys, 'once'):\n"
        "    sys.once = True\n"
        "    raise KeyboardInterrupt\n",
    )
    site.write("mergekit_wp/merging/method.py", "raise OSError('for want of time')")
    errors = site.run(
        "try: import mergekit_wp.merging.fusion\n"
        "except KeyboardInterrupt: pass\n"
        "else: assert False, 'not interrupted'"
    )
    assert errors == ""
    site.write("mergekit_wp/merging/method.py", STAND_INS["mergekit_wp/merging/method.py"])
    assert (
        site.run(
            "try: import mergekit_wp.merging.fusion\n"
            "except KeyboardInterrupt: pass\n"
            f"import mergekit_wp.merging.fusion\n{REGISTERED}"
        )
        == ""
    )


def test_a_missing_method_without_stderr(site: Site) -> None:
    site.remove("mergekit_wp/merging/method.py")
    assert site.run(f"import sys; sys.stderr = None; {NOT_REGISTERED}") == ""


def test_a_loader_that_cannot_be_hooked_is_said(site: Site) -> None:
    """Frozen modules are loaded by a class, which all of them share."""
    site.remove("mergekit/merge_methods")
    errors = site.run(
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Frozen:\n"
        "    create_module = staticmethod(lambda spec: None)\n"
        "    exec_module = staticmethod(lambda module: None)\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return ModuleSpec(name, cls) if name == 'mergekit.merge_methods' else None\n"
        "sys.meta_path.append(Frozen)\n"
        "import mergekit.merge_methods"
    )
    assert "mergekit comes from a loader that cannot be hooked" in errors


def test_with_the_real_mergekit() -> None:
    from mergekit.merge_methods import get

    from mergekit_wp.merging.method import weight_patching

    autoload.ensure_registered()
    autoload.ensure_registered()
    assert get("weight_patching") is weight_patching
