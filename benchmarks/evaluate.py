"""`toy-cmmd` against its matched control on 200 unseen clips, by `cmmd.evaluate`.

    python benchmarks/evaluate.py

The clips (the evaluator's stream 1,000,003) are in no training and in no earlier benchmark. No
guidance, 25 evaluations with fresh noise. The page and all raw numbers go to runs/evaluate, the
summary to benchmarks/evaluate.json. About 10 minutes of one CPU core.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from cmmd.evaluate import REPORT_FILES, EvalConfig, evaluate
from cmmd.pipeline import check_out_folder

RAW = ("clips", "true", "values")  # of each direction: what a summary leaves out


def summary(data: dict) -> dict:
    "The report without its numbers per clip."
    results = {}
    for direction, result in data["results"].items():
        kept = {k: v for k, v in result.items() if k not in RAW}
        if "memorisation" in kept:
            kept["memorisation"] = {
                name: {k: v for k, v in m.items() if k not in ("distances", "nearest", "unseen")}
                for name, m in kept["memorisation"].items()
            }
        results[direction] = kept
    return data | {"results": results}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--models", nargs="+", default=["toy-ncmmd", "toy-cmmd"])
    p.add_argument("--clips", type=int, default=200)
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--v2a-weight", type=float, default=0.0)
    p.add_argument("--a2v-weight", type=float, default=0.0)
    p.add_argument("--n-train", type=int, default=512, help="of the 4,096 training clips")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--report", type=Path, default=Path("runs/evaluate"))
    p.add_argument("--out", type=Path, default=Path("benchmarks/evaluate.json"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    check_out_folder(args.report, REPORT_FILES, overwrite=True)
    config = EvalConfig(
        n_clips=args.clips,
        steps=args.steps,
        v2a_weight=args.v2a_weight,
        a2v_weight=args.a2v_weight,
        train_data="toy:bounce",
        n_train=args.n_train,
    )
    with tqdm(total=100, unit="%") as bar:
        report = evaluate(args.models, config, on_part=lambda x: bar.update(100 * x - bar.n))
    report.save(args.report, overwrite=True)
    args.out.write_text(json.dumps(summary(report.data), indent=1) + "\n")
    print(report.summary())


if __name__ == "__main__":
    main()
