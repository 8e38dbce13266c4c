"""Each module imports alone, in a clean process, offline, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from project import MODULES, ROOT

PROBE = """
import json, sys, warnings
touched = []
def watch(event, args):
    if event == "socket.connect" and not isinstance(args[1], str): touched.append(repr(args[1]))
    if event == "socket.getaddrinfo": touched.append(repr(args[0]))
sys.addaudithook(watch)
sys.modules["torchaudio"] = None  # as where it is broken: cmmd imports it only where it is used
warnings.filterwarnings("error", category=DeprecationWarning, module=r"cmmd\\b")
name = sys.argv[1]
module = __import__(name, fromlist=["*"])
missing = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
private = [n for n in getattr(module, "__all__", []) if n.startswith("_")]
print(json.dumps(dict(touched=touched, missing=missing, private=private, file=module.__file__)))
"""


def probe(module: str, folder) -> subprocess.CompletedProcess:
    "Import one module from an empty folder, with an empty home."
    (folder / "home").mkdir(parents=True)
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("XDG_", "HF_")) and k != "PYTHONPATH"
    }
    env |= {
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder.parent / "mpl"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", PROBE, module],
        cwd=folder,
        env=env,
        timeout=180,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    "All modules, two at a time."
    folder = tmp_path_factory.mktemp("imports")
    with ThreadPoolExecutor(2) as pool:
        jobs = {p.stem: pool.submit(probe, f"cmmd.{p.stem}", folder / p.stem) for p in MODULES}
        yield {stem: (job.result(), folder / stem) for stem, job in jobs.items()}


@pytest.mark.parametrize("stem", [p.stem for p in MODULES])
def test_imports_alone_offline_and_leaves_nothing(stem, probes):
    done, folder = probes[stem]
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["file"].startswith(str(ROOT / "cmmd")), "another installation was tested"
    assert said["missing"] == [] and said["private"] == [], "__all__"
    assert said["touched"] == [], "an import opens no connection"
    assert done.stderr == "", done.stderr[-2000:]
    assert [p.name for p in (folder / "home").rglob("*") if p.is_file()] == [], (
        "an import wrote into the home folder"
    )


def test_importing_the_package_is_instant(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import cmmd; print(cmmd.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and " torch\n" not in done.stderr
