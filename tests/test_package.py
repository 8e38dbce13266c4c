"""The package is whole: source archive and checkout give one wheel, and it works elsewhere."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from project import MODULES, ROOT, SETTINGS


def run(*command, cwd, **env):
    "A command's output; its errors when it fails."
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the checkout without what is ignored: building leaves no files in the real one."
    copy = tmp_path_factory.mktemp("tree") / "cmmd"
    skip = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def wheels(tree, tmp_path_factory):
    "(direct wheel, wheel built from the source archive), both offline."
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", out / "direct", tree, cwd=out)
    shutil.rmtree(tree / "build")
    run("-m", "build", "--no-isolation", "--outdir", out / "archive", tree, cwd=out)
    return next((out / "direct").glob("*.whl")), next((out / "archive").glob("*.whl"))


def digests(wheel) -> dict[str, str]:
    "SHA-256 of each file of a wheel."
    with zipfile.ZipFile(wheel) as z:
        return {n: hashlib.sha256(z.read(n)).hexdigest() for n in z.namelist()}


def test_archive_gives_the_same_wheel(wheels):
    direct, archive = map(digests, wheels)
    assert direct == archive


def test_wheel_holds_the_code_and_the_data(wheels):
    names = set(digests(wheels[0]))
    assert {f"cmmd/{p.name}" for p in MODULES} <= names
    data = {
        p.relative_to(ROOT / "data").as_posix() for p in (ROOT / "data").rglob("*") if p.is_file()
    }
    assert {f"cmmd/_data/{p}" for p in data if "__pycache__" not in p} <= names
    outside = [
        n for n in names if not n.startswith(("cmmd/", f"cmmd-{SETTINGS['version']}.dist-info/"))
    ]
    assert outside == [], "only the package itself is installed"


def test_installed_package_finds_its_data(wheels, tmp_path):
    "Installed without its checkout, data_path points into the package."
    run(
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path / "site",
        wheels[0],
        cwd=tmp_path,
    )
    code = "import cmmd.core as c; print(c.__file__); d = c.data_path; print(d()); "
    code += "print(d('README.md').is_file())"
    lines = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert all(str(tmp_path / "site") in line for line in lines[:2]) and lines[2] == "True"


def test_metadata(wheels):
    with zipfile.ZipFile(wheels[0]) as z:
        info = f"cmmd-{SETTINGS['version']}.dist-info"
        meta, entry = (
            z.read(f"{info}/METADATA").decode(),
            z.read(f"{info}/entry_points.txt").decode(),
        )
    assert (
        "Requires-Python: >=3.11" in meta
        and "Apache-2.0" in meta
        and "cmmd = cmmd.cli:main" in entry
    )
    assert "Requires-Dist: torch" in meta and "Description-Content-Type: text/markdown" in meta
