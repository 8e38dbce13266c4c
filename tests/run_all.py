"""Every check of the tree (`make test`); the last line is `N passed, N failed`.

python tests/run_all.py [--only export|ruff|notebooks|pytest] [-- arguments of pytest]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from project import ENVIRONMENT, LESSONS, ROOT, SOLUTIONS, name

BIN, CACHE = Path(sys.executable).parent, ROOT / ".cache"
NOTEBOOK_LIMIT_S = 600  # for a hanging notebook; the promise is 90 s each on 2 cores
counts = {"passed": 0, "failed": 0, "skipped": 0}


def report(what: str, seconds: float, problem: str) -> None:
    "Count one result and print its line, with the problem when there is one."
    counts["failed" if problem else "passed"] += 1
    print(f"{'FAILED' if problem else 'ok    '} {what} ({seconds:.1f} s)", flush=True)
    if problem:
        print("    " + problem.strip()[-6000:].replace("\n", "\n    "), flush=True)


def run(*command, cwd: Path = ROOT, limit: float = 900) -> tuple[float, str]:
    "Seconds, and what the command printed when it failed."
    start, env = time.time(), {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=env,
            timeout=limit,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        return limit, f"stopped after {limit:.0f} s"
    failure = done.stdout + f"\nexit code {done.returncode}"
    return time.time() - start, failure if done.returncode else ""


def digests(root: Path, *patterns: str) -> dict[str, str]:
    "SHA-256 of the files that a command may write."
    files = [p for pattern in patterns for p in root.glob(pattern) if "_checkpoints" not in str(p)]
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
    return dict(zip((p.relative_to(root).as_posix() for p in files), hashes))


def check_export() -> None:
    "Export and clean a copy without modules: it must give what the tree holds."
    written = {"nbdev_export": ["cmmd/*.py", "pyproject.toml"], "nbdev_clean": ["nbs/**/*.ipynb"]}
    with tempfile.TemporaryDirectory() as folder:
        for file in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / file, folder)
        shutil.copytree(ROOT / "nbs", Path(folder) / "nbs")
        (Path(folder) / "cmmd").mkdir()
        for command, patterns in written.items():
            seconds, problem = run(BIN / command, cwd=folder)
            here, there = digests(ROOT, *patterns), digests(Path(folder), *patterns)
            differ = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            if differ and not problem:
                problem = f"run {command} and commit: " + ", ".join(differ)
            report(f"{command} changes nothing", seconds, problem)


def check_notebooks(workers: int) -> None:
    "nbdev_test on each notebook, in a process of its own; then the slowest."
    paths, times = LESSONS + SOLUTIONS, {}
    one = [BIN / "nbdev_test", "--n_workers", 0, "--path"]

    def test(path):
        return run(*one, path, limit=NOTEBOOK_LIMIT_S)

    with ThreadPoolExecutor(workers) as pool:
        for path, (seconds, problem) in zip(paths, pool.map(test, paths)):
            times[name(path)] = seconds
            report(f"notebook {name(path)}", seconds, problem)
    slowest = sorted(times, key=times.get, reverse=True)[:5]
    print("slowest notebooks: " + ", ".join(f"{n} {times[n]:.0f} s" for n in slowest), flush=True)


def check_pytest(workers: int, arguments: list[str]) -> None:
    "pytest, its tests counted one by one; a file's tests stay in one process."
    CACHE.mkdir(exist_ok=True)
    results = CACHE / "pytest.xml"
    results.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--durations=5",
        f"--numprocesses={workers}",
        "--dist=loadfile",
        "--continue-on-collection-errors",
        f"--junitxml={results}",
    ]
    env = {**os.environ, **ENVIRONMENT}
    code = subprocess.run(command + arguments, cwd=ROOT, env=env).returncode
    suites = list(ElementTree.parse(results).iter("testsuite")) if results.exists() else []
    total, failures, errors, skipped = (
        sum(int(suite.get(k)) for suite in suites)
        for k in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors or int(code != 0)  # pytest itself broke, or found no tests
    counts["passed"] += total - failures - errors - skipped
    counts["failed"] += failed
    counts["skipped"] += skipped


def main() -> int:
    "Run what was asked for; 0 when nothing failed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("export", "ruff", "notebooks", "pytest"))
    parser.add_argument("--workers", type=int, default=2, help="notebooks or test files at a time")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    asked, start = parser.parse_args(), time.time()
    steps = {
        "export": check_export,
        "ruff": lambda: report("ruff", *run(BIN / "ruff", "check", ".")),
        "notebooks": lambda: check_notebooks(asked.workers),
        "pytest": lambda: check_pytest(asked.workers, asked.pytest),
    }
    for step in [asked.only] if asked.only else steps:
        steps[step]()
    print(f"{(time.time() - start) / 60:.1f} minutes")
    tail = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{tail}", flush=True)
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
