"""How quick the explorer is and whether its memory grows (nothing here is a test).

python benchmarks/explore.py [--generations 50] [--steps 20]     prints JSON
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from common import about_machine

from cmmd.explore import Explorer, LiveFigure


def resident_mib() -> float:
    "Resident memory of this process."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def generate_once(explorer: Explorer) -> tuple[float, float]:
    "(s to the first live picture, s to the answer)."
    first, live = [], explorer.outputs["live"]

    def seen(change):
        first.append(time.perf_counter())

    live.observe(seen, "value")
    began = time.perf_counter()
    explorer.press("generate")
    explorer.wait(600)
    live.unobserve(seen, "value")
    return first[0] - began, time.perf_counter() - began


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--generations", type=int, default=50)
    ask.add_argument("--steps", type=int, default=20)
    ask.add_argument("--threads", type=int, default=2)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    began = time.perf_counter()
    explorer = Explorer(strict=True, device="cpu")
    explorer.wait(600)
    opened = time.perf_counter() - began
    explorer.ask("num_sample_steps", given.steps)
    cold = generate_once(explorer)
    memory, times = [resident_mib()], []
    for k in range(given.generations):
        explorer.controls["seed"].value = k + 1
        times.append(generate_once(explorer))
        memory.append(resident_mib())
    firsts, wholes = (sorted(column) for column in zip(*times))
    result = {
        "steps": given.steps,
        "s to the clip shown at opening": round(opened, 2),
        "cold: s to the first picture, to the answer": [round(x, 2) for x in cold],
        "median s to the first picture": round(firsts[len(firsts) // 2], 2),
        "median s to the answer": round(wholes[len(wholes) // 2], 2),
        "MiB after the first generation": round(memory[0], 1),
        "MiB after half, after all": [round(memory[len(memory) // 2], 1), round(memory[-1], 1)],
        "MiB grown": round(memory[-1] - memory[0], 1),
        "least s between live pictures": LiveFigure().least,
        "load of the machine": os.getloadavg()[0],
        **about_machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
