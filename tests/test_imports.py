"""Each module imports alone, in a clean process, offline, and leaves nothing behind."""

import json
import os
import subprocess
import sys

import pytest
from project import MODULES, ROOT

# The libraries are imported once; each module is then imported in a fork of that process, which has
# seen no other module of cmmd.
PROBE = """
import json, os, sys, tempfile, traceback, warnings
touched, home = [], os.environ["HOME"]
def watch(event, args):
    if event == "socket.connect" and not isinstance(args[1], str): touched.append(repr(args[1]))
    if event == "socket.getaddrinfo": touched.append(repr(args[0]))
sys.addaudithook(watch)
sys.modules["torchaudio"] = None  # as where it is broken: cmmd imports it only where it is used
import accelerate, IPython, ipywidgets, librosa, matplotlib.pyplot, scipy.signal, torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
torch.set_num_threads(1)
assert not any(name.partition(".")[0] == "cmmd" for name in sys.modules)

def files(): return sorted(os.path.join(at, f) for at, _, names in os.walk(home) for f in names)

def probe(name):
    import contextlib, io
    warnings.filterwarnings("error", category=DeprecationWarning, module=r"cmmd\\b")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try: module = __import__(name, fromlist=["*"])
        except BaseException: return dict(failed=traceback.format_exc())
    names = getattr(module, "__all__", [])
    return dict(failed="", said=said.getvalue(), touched=touched, file=module.__file__,
                missing=[n for n in names if not hasattr(module, n)],
                private=[n for n in names if n.startswith("_")], written=files())

def in_child(name):
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        with open(write, "w") as out: out.write(json.dumps(probe(name)))
        os._exit(0)
    os.close(write)
    with open(read) as answer: text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else dict(failed="died")

print(json.dumps(dict(libraries=dict(touched=touched, written=files()),
                      **{name: in_child(name) for name in sys.argv[1:]})))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    "What each module did, read from an empty folder with an empty home."
    folder = tmp_path_factory.mktemp("imports")
    (folder / "home").mkdir()
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("XDG_", "HF_")) and k != "PYTHONPATH"
    }
    env |= {
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder / "mpl"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *(f"cmmd.{p.stem}" for p in MODULES)],
        cwd=folder,
        env=env,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_libraries_open_no_connection_and_write_nothing(probes):
    assert probes["libraries"] == {"touched": [], "written": []}


@pytest.mark.parametrize("stem", [p.stem for p in MODULES])
def test_imports_alone_offline_and_leaves_nothing(stem, probes):
    said = probes[f"cmmd.{stem}"]
    assert said["failed"] == ""
    assert said["file"].startswith(str(ROOT / "cmmd")), "another installation was tested"
    assert said["missing"] == [] and said["private"] == [], "__all__"
    assert said["touched"] == [], "an import opens no connection"
    assert said["said"] == "", "an import prints nothing"
    assert said["written"] == [], "an import wrote into the home folder"


def test_importing_the_package_is_instant(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import cmmd; print(cmmd.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and " torch\n" not in done.stderr
