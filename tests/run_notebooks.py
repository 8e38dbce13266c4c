"""Run notebooks top to bottom in place, keep their outputs, export and clean (`make notebooks`).

python tests/run_notebooks.py [10 44_train ...]     all when none is named
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from project import ENVIRONMENT, LESSONS, ROOT, SOLUTIONS, Cell, name

os.environ.update(ENVIRONMENT)
os.environ.pop("MPLBACKEND")  # a notebook shows its figures inline
BIN = Path(sys.executable).parent


def execute(path: Path) -> None:
    "Run one notebook in its folder; cells that a default run skips keep the outputs they have."
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    skipped = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and not Cell("code", cell.source, cell.id).runs:
            skipped[cell.id] = (cell.source, cell.outputs)
            cell.source = ""
    NotebookClient(
        notebook,
        timeout=600,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        if cell.id in skipped:
            cell.source, cell.outputs = skipped[cell.id]
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(path)


def main(asked: list[str]) -> int:
    "Each notebook in reading order, so that one may use the modules of those before it."
    paths = [
        p for p in LESSONS + SOLUTIONS if not asked or any(name(p).startswith(a) for a in asked)
    ]
    if not paths:
        return print(f"no notebook in nbs/ begins with {', '.join(asked)}", file=sys.stderr) or 1
    for path in paths:
        subprocess.run([BIN / "nbdev_export"], cwd=ROOT, check=True)
        start = time.time()
        try:
            execute(path)
        except Exception as error:
            print(f"{name(path)} failed and was left as it was:\n{error}", file=sys.stderr)
            return 1
        subprocess.run([BIN / "nbdev_clean", "--fname", path], cwd=ROOT, check=True)
        print(f"{name(path)} ran in {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
