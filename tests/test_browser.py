"""The explorer in a real JupyterLab and a real browser: run all, press Generate, see the player."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import ENVIRONMENT, ROOT, Cell

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((p for n in ("chromium", "chromium-browser") if (p := shutil.which(n))), None)
if CHROMIUM is None:
    pytest.skip("no chromium: apt-get install chromium", allow_module_level=True)

SHOTS = ROOT / ".cache" / "browser"
TOKEN = "explorer"
SETTINGS = {  # no question about news, which would ask the network
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
HARMLESS = ("favicon",)


def copy_notebook(folder: Path, whole: bool) -> Path:
    "The notebook without its outputs; unless `whole`, only what it exports and the last display."
    notebook = json.loads((ROOT / "nbs/70_explore.ipynb").read_text(encoding="utf-8"))
    kept = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        needed = Cell(cell["cell_type"], source, "").exported or source.endswith("Explorer()")
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        if whole or needed or cell is notebook["cells"][0]:
            kept.append(cell)
    path = folder / "work/70_explore.ipynb"
    shutil.copytree(ROOT / "nbs/images", path.parent / "images")
    path.write_text(json.dumps(notebook | {"cells": kept}))
    return path


@contextmanager
def lab(folder: Path, theme: str = "JupyterLab Light"):
    "A JupyterLab on a free port that shows `folder`; its address. It and its kernels end here."
    settings = SETTINGS | {"apputils-extension/themes": {"theme": theme}}
    for name, values in settings.items():
        path = folder / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    kinds = ("CONFIG", "DATA", "RUNTIME")
    places = {f"JUPYTER_{kind}_DIR": str(folder / "jupyter" / kind) for kind in kinds}
    env = os.environ | ENVIRONMENT | places | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1"]
    command += ["--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder / 'work'}", "--LabApp.news_url=None"]
    command += [f"--LabApp.user_settings_dir={folder / 'settings'}"]
    command += [f"--LabApp.workspaces_dir={folder / 'workspaces'}"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield address(folder / "jupyter/RUNTIME", server, folder / "server.log")
        finally:
            end(server, folder / "jupyter/RUNTIME")


def address(runtime: Path, server, log: Path, limit: float = 90.0) -> str:
    "Where the server listens, once it does."
    until = time.time() + limit
    while time.time() < until and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text())["url"]
            except ValueError:
                pass  # half written
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def end(server, runtime: Path) -> None:
    "The server ends its kernels when asked; whoever still has our runtime folder is killed."
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        pass
    for pid in started_with(runtime):
        os.kill(pid, signal.SIGKILL)
    server.wait(10)


def started_with(runtime: Path) -> list[int]:
    "Processes whose environment names this folder: the server, its kernels, their children."
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"JUPYTER_RUNTIME_DIR={runtime}\0".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue  # not ours, or gone
    return found


@contextmanager
def browser_page(url: str, errors: list):
    "A page of 1280 x 800 pixels on the notebook; what goes wrong in it is collected."
    with playwright.sync_playwright() as play:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: errors.append(f"page: {error}"))
        page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} {m.location}"))
        page.goto(f"{url}lab/tree/70_explore.ipynb?token={TOKEN}")
        try:
            yield page
        except Exception:
            shot(page, "failed")
            raise
        finally:
            browser.close()


def run_all(page, limit: float) -> None:
    "Run all cells by the menu, until the panel stands and shows its first clip."
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_selector("#jp-main-statusbar :text('| Idle')", timeout=90_000)
    page.click(".lm-MenuBar-item:has-text('Run')")
    page.click(".lm-Menu-item:has-text('Run All Cells')")
    page.wait_for_selector(".cmmd-panel video", timeout=1000 * limit)


def shot(page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def visit(tmp_path: Path, *, whole: bool, theme: str, limit: float) -> None:
    errors = []
    copy_notebook(tmp_path, whole)
    with lab(tmp_path, theme) as url, browser_page(url, errors) as page:
        run_all(page, limit)
        panel = page.locator(".cmmd-panel")
        panel.locator("button:has-text('Generate')").scroll_into_view_if_needed()
        before = panel.locator("video").count()
        panel.locator("button:has-text('Generate')").click()
        page.wait_for_selector(".cmmd-live >> visible=true", timeout=30_000)
        page.wait_for_selector(".cmmd-panel video[aria-label*='generated']", timeout=60_000)
        assert before == 1 and panel.locator("video").count() == 2
        ready = "v => new Promise(r => v.readyState > 1 ? r(true) : v.oncanplay = () => r(true))"
        assert panel.locator("video").last.evaluate(ready), "the player does not play"
        panel.evaluate("e => e.scrollIntoView()")
        shot(page, f"generated-{theme.split()[-1].lower()}")
        keyboard(page, panel)
    assert [e for e in errors if not any(word in e for word in HARMLESS)] == []


def keyboard(page, panel) -> None:
    "Without a mouse: from Generate to Cancel by Tab, the result kept by Enter."
    keep = panel.locator("button:has-text('Keep as favourite')")
    keep.focus()
    page.keyboard.press("Enter")
    panel.locator("text=kept as favourite 1").wait_for(timeout=20_000)
    panel.locator("button:text-is('Favourites')").focus()
    page.keyboard.press("Space")
    panel.locator("h3:has-text('toy-bounce')").wait_for(timeout=20_000)
    assert page.locator(".jp-Notebook .jp-Cell").count() > 3, "a key reached the notebook"


def test_explorer_in_jupyterlab(tmp_path):
    visit(tmp_path, whole=False, theme="JupyterLab Light", limit=120)


@pytest.mark.slow
def test_explorer_in_jupyterlab_after_the_whole_lesson_in_the_dark(tmp_path):
    visit(tmp_path, whole=True, theme="JupyterLab Dark", limit=400)
