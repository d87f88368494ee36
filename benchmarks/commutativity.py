"""All swaps of a model's layers with shared beginnings against the plain way: layers run, seconds, equal bits.

    python -m benchmarks.commutativity [--layers 12] [--repeats 3]

One process, GPT-2-small shape with random weights and `layers` layers, one batch of 8 x 128. Each repeat runs both
ways in turn: the shared way through `run_all`, the plain way with a whole forward pass for each pair.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

import transect as tx
from benchmarks.measuring import BATCH, POSITIONS, token_ids
from transect.results import write_whole
from transect.view.variants import Variant, planned_evaluations, run_all


def swapped(layers: int) -> list[Variant]:
    """Every pair."""
    found = []
    for first in range(layers):
        for second in range(first + 1, layers):
            order = list(range(layers))
            order[first], order[second] = second, first
            found.append(Variant(tuple(order)))
    return found


def main() -> None:
    """Run both ways, compare bits, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/commutativity.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=args.layers)).eval()
    view = tx.View(model, name="gpt2-small shape")
    ids = token_ids(BATCH * POSITIONS)
    mask = torch.ones_like(ids, dtype=torch.bool)
    variants = swapped(args.layers)
    shared, plain, equal, layers_run = [], [], True, 0
    for repeat in range(args.repeats):
        started = time.perf_counter()
        sums, layers_run = {}, 0
        for ran in run_all(view, ids, mask, variants):
            layers_run += ran.layers_run
            if ran.number is not None:
                assert ran.logits is not None
                sums[ran.number] = ran.logits[0, -1].clone()
        shared.append(time.perf_counter() - started)
        started = time.perf_counter()
        for number, variant in enumerate(variants):
            with torch.no_grad(), tx.edits.order(view, variant.order):
                equal &= torch.equal(view.run(ids, mask, head=True)[0, -1], sums[number])
        plain.append(time.perf_counter() - started)
        print(f"repeat {repeat + 1}: shared {shared[-1]:.1f} s, plain {plain[-1]:.1f} s", flush=True)
    planned, naive = planned_evaluations(variants, args.layers)
    result = {
        "command": f"python -m benchmarks.commutativity --layers {args.layers} --repeats {args.repeats}",
        "pairs": len(variants),
        "layers_run": layers_run,
        "layers_planned": planned,
        "layers_plain": naive,
        "bit_equal": equal,
        "seconds_shared": shared,
        "seconds_plain": plain,
        "median_ratio_to_plain": statistics.median(own / other for own, other in zip(shared, plain, strict=True)),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(args.output, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
