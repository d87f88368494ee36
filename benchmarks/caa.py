"""Time of a CAA layer against the standard layer of equal FLOPs, forward and backward, and of its attention's forms.

    python -m benchmarks.caa [--repeats 7] [--threads 1 2]

The paper's layer: post-norm, biases, d = 768, 12 heads; 8 x 128 tokens, float32. Equal FLOPs means that the rival's FFN
is widened: projecting keys and values twice (`raw`) costs 4 d^2 FLOPs per token, what d more FFN units cost, so the
rival has m + d units; a masked direct path costs nothing, and it has m. Both are counted and must be equal. The two
take turns, which one is first too; ratio = median over the turns of the standard layer's seconds / CAA's. Beside it
the ratios of processor time and of the fastest runs, which other work on the machine (`load`) disturbs less; two
threads wait for each other, so a busy machine says nothing about them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from transect.models.blocks.base import Block, build
from transect.models.config import ModelConfig
from transect.models.context import Context
from transect.models.masks import Visible
from transect.models.own_pair import FORMS
from transect.results import write_whole

WIDTH, HEADS, ROWS, LENGTH = 768, 12, 8, 128
BOUND, WANTED = 0.85, 0.95
CASES = {
    "causal, r = 1/8, raw": ("causal", {"outer_ratio": 1 / 8}),
    "masked model, r = 0, raw": ("masked", {"outer_ratio": 0}),
    "masked model, r = 0, masked path": ("masked", {"outer_ratio": 0, "direct_path": "masked"}),
    "causal, r = 1/8, masked path": ("causal", {"outer_ratio": 1 / 8, "direct_path": "masked"}),
}


def layer(objective: str, block: dict, units: int) -> Block:
    """One layer of the paper's model."""
    given = {
        "vocab_size": 2,
        "width": WIDTH,
        "layers": 1,
        "objective": objective,
        "positions": "none",
        "norm": {"layout": "post"},
        "attention": {"heads": HEADS},
        "ffn": {"width": units},
        "block": block,
    }
    settings = ModelConfig.parse(given)
    torch.manual_seed(0)
    return build(settings.layer_configs[0], settings, 0)


def flops(made: Block) -> float:
    """Forward FLOPs per token, every key counted."""
    inner = getattr(made.attn, "inner", None)
    return made.attn.flops(LENGTH) + sum(ffn.flops() for ffn in (inner, made.ffn) if ffn is not None)


def step(made: Block, objective: str, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward pass, gradients of the parameters and of the input."""

    def run() -> None:
        made.zero_grad(set_to_none=True)
        x.grad = None
        visible = Visible(LENGTH, 0, objective == "causal", x.device)
        context = Context(None, None, torch.arange(LENGTH)[None], visible, rotary=False)
        made(x, context, 0).hidden.backward(grad)

    return run


def in_turns(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each, by the clock and of the processor, after one run that does not count; every second turn goes
    backwards.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter(), time.process_time()
            runs[name]()
            if turn:
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return seconds


def ratio(seconds: dict[str, list[tuple[float, float]]], clock: int) -> float:
    """Median over the turns of standard / caa."""
    pairs = zip(seconds["standard"], seconds["caa"], strict=True)
    return statistics.median(standard[clock] / caa[clock] for standard, caa in pairs)


def compare(name: str, multiple: int, repeats: int) -> dict:
    """One case at one width."""
    objective, options = CASES[name]
    raw = options.get("direct_path", "raw") == "raw"
    units = multiple * WIDTH
    caa = layer(objective, {"kind": "caa", **options}, units)
    standard = layer(objective, {"kind": "standard"}, units + (WIDTH if raw else 0))
    if flops(caa) != flops(standard):
        raise RuntimeError(f"{name}: {flops(caa)} and {flops(standard)} FLOPs are not equal")
    x = torch.randn(ROWS, LENGTH, WIDTH).requires_grad_()
    grad = torch.randn(ROWS, LENGTH, WIDTH)
    runs = {"standard": step(standard, objective, x, grad), "caa": step(caa, objective, x, grad)}
    seconds = in_turns(runs, repeats)
    return {
        "case": name,
        "ffn_units": {"caa": units, "standard": units + (WIDTH if raw else 0)},
        "flops_per_token": flops(caa),
        "seconds": {kind: statistics.median(clock for clock, _ in taken) for kind, taken in seconds.items()},
        "range": {kind: [min(taken)[0], max(taken)[0]] for kind, taken in seconds.items()},
        "ratio": ratio(seconds, 0),
        "ratio_of_processor_time": ratio(seconds, 1),
        "ratio_of_fastest": min(seconds["standard"])[0] / min(seconds["caa"])[0],
    }


def forms(objective: str, repeats: int) -> dict[str, float]:
    """Seconds of a CAA layer at m = 4d in each form of its attention."""
    x, grad = torch.randn(ROWS, LENGTH, WIDTH).requires_grad_(), torch.randn(ROWS, LENGTH, WIDTH)
    made = {form: layer(objective, {"kind": "caa", "form": form}, 4 * WIDTH) for form in FORMS}
    seconds = in_turns({form: step(block, objective, x, grad) for form, block in made.items()}, repeats)
    return {form: statistics.median(clock for clock, _ in taken) for form, taken in seconds.items()}


def main() -> None:
    """Measure every case, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/caa.json"))
    args = parser.parse_args()
    found, load = [], [round(os.getloadavg()[0], 1)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for multiple in (4, 32):
            for name in CASES:
                row = {"threads": threads, "m": f"{multiple}d", **compare(name, multiple, args.repeats)}
                found.append(row)
                shown = ", ".join(f"{value:.3f} {kind}" for kind, value in row.items() if kind.startswith("ratio"))
                print(f"{threads} thread(s), m = {multiple}d, {name}: {shown}", flush=True)
    by_form = {objective: forms(objective, args.repeats) for objective in ("causal", "masked")}
    print(by_form)
    load.append(round(os.getloadavg()[0], 1))
    result = {
        "command": f"python -m benchmarks.caa --repeats {args.repeats} --threads {' '.join(map(str, args.threads))}",
        "shape": {"width": WIDTH, "heads": HEADS, "tokens": [ROWS, LENGTH], "dtype": "float32"},
        "equal_flops": "the standard layer's FFN has d more units where keys and values are projected twice",
        "bound": BOUND,
        "wanted": WANTED,
        "worst_ratio": min(row["ratio"] for row in found),
        "cases": found,
        "seconds_by_form": {"threads": args.threads[-1], "m": "4d", **by_form},
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine(), "device": "cpu", "load": load},
        "versions": {"torch": torch.__version__},
    }
    write_whole(args.output, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
