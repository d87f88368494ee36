"""Time and memory of `contribution` on a real decoder, against what a dry run foretold just before.

    python -m benchmarks.contribution [--model material/smollm2] [--tokens 200000] [--clusters 2000] [--keep DIR]

Two processes: the first plans and foretells, the second measures. Peak memory is the second's resident set. The rival
is one forward pass of the model with its head over the same text, timed in the second process before the measurement.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import transect as tx
from benchmarks.measuring import BATCH
from transect.foretell import foretold_seconds
from transect.results import write_whole

BOUNDS = {"seconds": 45 * 60, "peak_memory_bytes": 8e9, "foretold_within": 2.0}
RUNTIME = 500e6
"""Bytes of Python, torch and transformers themselves, which no plan counts."""


def plan_of(model: str, tokens: int, clusters: int) -> tuple:
    """The plan of the run, and its view."""
    view = tx.View.load(model)
    data = tx.data.builtin_text(view.tokenizer, 128, tokens)
    return tx.plan(view, [tx.probes.Contribution(mi_clusters=clusters)], data, BATCH), view


def foretell(model: str, tokens: int, clusters: int) -> dict:
    """Seconds and bytes that the plan says."""
    plan, _ = plan_of(model, tokens, clusters)
    return {
        "seconds": foretold_seconds(plan),
        "peak_memory_bytes": plan.weights + plan.bytes + plan.activations + RUNTIME,
        "plan": plan.lines(),
    }


def measure(model: str, tokens: int, clusters: int, keep: str | None) -> dict:
    """Seconds and bytes that it took."""
    plan, view = plan_of(model, tokens, clusters)
    some = torch.from_numpy(plan.data.ids[: BATCH * 128].astype("int64")).reshape(BATCH, 128)
    forward = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            view.run(some, head=True)
        forward.append(time.perf_counter() - started)
    started = time.perf_counter()
    table = tx.run(plan, keep)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1000,
        "forward_seconds_for_the_text": sorted(forward)[1] * plan.data.num_tokens / some.numel(),
        "rows": len(table),
        "shares": {str(row.variant): row.value for row in table.where(metric="share_mha")},
    }


def main() -> None:
    """Foretell, measure, compare, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="material/smollm2")
    parser.add_argument("--tokens", type=int, default=210_000, help="limit; the built-in text then has 200,696")
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--keep", help="run folder to keep the rows in")
    parser.add_argument("--only", choices=("foretell", "measure"))
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/contribution.json"))
    args = parser.parse_args()
    if args.only == "foretell":
        print(json.dumps(foretell(args.model, args.tokens, args.clusters)))
        return
    if args.only == "measure":
        print(json.dumps(measure(args.model, args.tokens, args.clusters, args.keep)))
        return
    command = [sys.executable, "-m", "benchmarks.contribution", *sys.argv[1:]]
    found = {}
    for what in ("foretell", "measure"):
        output = subprocess.run([*command, "--only", what], check=True, stdout=subprocess.PIPE, text=True).stdout
        found[what] = json.loads(output.strip().splitlines()[-1])
        print(json.dumps(found[what], indent=2), flush=True)
    ratios = {name: found["measure"][name] / found["foretell"][name] for name in ("seconds", "peak_memory_bytes")} | {
        "seconds_to_forward": found["measure"]["seconds"] / found["measure"]["forward_seconds_for_the_text"]
    }
    result = {
        "command": f"python -m benchmarks.contribution --tokens {args.tokens} --clusters {args.clusters}",
        "model": Path(args.model).name,
        "foretold": found["foretell"],
        "measured": found["measure"],
        "measured_to_foretold": ratios,
        "bounds": BOUNDS,
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(args.output, (json.dumps(result, indent=2) + "\n").encode())
    print({name: round(ratio, 2) for name, ratio in ratios.items()})


if __name__ == "__main__":
    main()
