"""What is installed: exactly the folders of the package, under one name, and cheap to import."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import heatmill

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
OUTSIDE = {"tests", "benchmarks", "docs", "build", "dist"}


def tree(pattern):
    """The files of the checkout that could belong to the package."""
    tops = [
        top
        for top in ROOT.iterdir()
        if top.is_dir() and top.name[0] != "." and top.name not in OUTSIDE and not (top / "pyvenv.cfg").exists()
    ]
    return [*ROOT.glob(pattern), *(path for top in tops for path in top.rglob(pattern))]


def child(script):
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env={"PYTHONSAFEPATH": "1"}
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split()


def test_the_package_list_is_the_tree():
    folders = [path.parent.relative_to(ROOT) for path in tree("__init__.py")]
    found = {".".join(["heatmill", *folder.parts]) for folder in folders}
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))
    assert set(SETUPTOOLS["packages"]) == found
    assert SETUPTOOLS["package-dir"] == {"heatmill": "."}


def test_no_module_stands_outside_a_package():
    listed = {ROOT.joinpath(*name.split(".")[1:]) for name in SETUPTOOLS["packages"]}
    strays = {path for path in tree("*.py") if path.parent not in listed}
    assert strays == set()


def test_the_root_holds_two_modules():
    """Every other one would be installed with them."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_data_files_are_listed():
    listed = {
        path
        for package, names in SETUPTOOLS["package-data"].items()
        for name in names
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(name)
    }
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in SETUPTOOLS["packages"] if name != "heatmill"]
    folders += [ROOT / "kernels" / "src", *(ROOT / "kernels").glob("cubins")]
    beside = {path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {path.parent.name for path in beside} >= {"jobs", "models", "src"}
    assert beside == listed


def test_tests_are_no_package():
    """Two test files may then have one name."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_one_name_is_installed():
    """The folders are reached through the package, and by no name of their own."""
    script = (
        "import sys, heatmill, heatmill.cli, heatmill.engine.explainer, heatmill.engine.jobs.job\n"
        "print(*[name for name in ('engine', 'kernels', 'models', 'cli') if name in sys.modules], sep='\\n')"
    )
    assert child(script) == []


def test_importing_the_package_imports_nothing_else():
    found = child("import sys, heatmill; print(*sys.modules)")
    installed = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in installed if name[0] != "_"} == {"heatmill"}


@pytest.mark.parametrize("name", heatmill.__all__)
def test_public_names_resolve(name):
    assert getattr(heatmill, name) is not None


def test_public_names_are_sorted_and_unknown_ones_are_refused():
    assert len(set(heatmill.__all__)) == len(heatmill.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Explainr'"):
        heatmill.Explainr  # noqa: B018


def test_exit_codes():
    codes = {
        error.__name__: error.exit_code
        for error in (
            heatmill.HeatmillError,
            heatmill.ModelError,
            heatmill.InputError,
            heatmill.BackendError,
            heatmill.IncompleteError,
            heatmill.RunError,
        )
    }
    assert codes == {
        "HeatmillError": 2, "ModelError": 2, "InputError": 2, "BackendError": 2, "IncompleteError": 4, "RunError": 5
    }  # fmt: skip


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", heatmill.__version__)
    assert SETUPTOOLS["dynamic"] == {"version": {"attr": "heatmill.__version__"}}
    assert PROJECT["project"]["scripts"] == {"heatmill": "heatmill.cli:main"}
