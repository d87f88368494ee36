"""Cost of measuring against the plain forward pass, and against TransformerLens' cache where it is installed.

    python -m benchmarks.measuring [--tokens 65536] [--repeats 3] [-o benchmarks/results/measuring.json]

One process, GPT-2-small shape with random weights, batches of 8 x 128. Each repeat runs every candidate once, in
turn; a ratio is candidate / plain forward of the same repeat, quoted as the median. The plain forward is `model(ids)`
with its head. Candidates include solving, bootstrap and rows. TransformerLens caches an eighth of the text, its time is
scaled up. Peak memory is that of a process of its own for each token count.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import transect as tx
from transect.results import write_whole
from transect.view.sites import PAPER_ELEMENTS

BATCH, POSITIONS = 8, 128
FORWARD = "plain forward with head"
LENS = "TransformerLens run_with_cache"
LENS_SHARE = 8
BOUNDS = {"jump + nonlinearity + similarity": 2.0, "the same with cosines": 2.5, "R2 of all FFNs": 1.3}


def gpt2_small() -> transformers.GPT2LMHeadModel:
    """GPT-2 small's shape with seeded random weights."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


def token_ids(tokens: int) -> torch.Tensor:
    """Seeded ids [rows, 128], skewed as words are."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, 50257, dtype=torch.float64)
    picks = torch.multinomial(weights, tokens, replacement=True, generator=generator)
    return picks.reshape(-1, POSITIONS)


def candidates(view: "tx.View", data: "tx.data.Dataset", ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the first is the rival of all others."""
    ten = tx.probes.Nonlinearity(elements=PAPER_ELEMENTS, cosine=())
    cosines = tx.probes.Nonlinearity(elements=PAPER_ELEMENTS, cosine=("ffn", "attn"))
    ffn = tx.probes.Nonlinearity(elements=("ffn",), cosine=())

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, len(ids), BATCH):
                view.model(ids[start : start + BATCH])

    return {
        FORWARD: forward,
        "jump + nonlinearity + similarity": lambda: tx.measure(view, ["jump", ten, "similarity"], data),
        "the same with cosines": lambda: tx.measure(view, ["jump", cosines, "similarity"], data),
        "R2 of all FFNs": lambda: tx.measure(view, [ffn], data),
    } | lens_candidate(gpt2_small(), ids)


def lens_candidate(model: transformers.GPT2LMHeadModel, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """TransformerLens caching every activation of every batch; nothing where it is not installed."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return {}
    with tempfile.TemporaryDirectory() as folder:  # it reads the config from a folder, whatever the model it is given
        model.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")

    def cache() -> None:
        with torch.no_grad():
            for start in range(0, len(ids) // LENS_SHARE, BATCH):
                bridge.run_with_cache(ids[start : start + BATCH])

    return {LENS: cache}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_memory(tokens: int) -> float:
    """Peak resident megabytes of a process that measures this many tokens with all three probes."""
    command = [sys.executable, "-m", "benchmarks.measuring", "--memory-of", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def measure_once(tokens: int) -> None:
    """Measure and print this process's peak memory."""
    view = tx.View(gpt2_small(), name="gpt2-small shape")
    data = tx.data.from_tokens(token_ids(tokens))
    tx.measure(view, ["jump", tx.probes.Nonlinearity(elements=PAPER_ELEMENTS, cosine=()), "similarity"], data)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def main() -> None:
    """Run, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/measuring.json"))
    args = parser.parse_args()
    if args.memory_of:
        measure_once(args.memory_of)
        return
    ids = token_ids(args.tokens)
    view = tx.View(gpt2_small(), name="gpt2-small shape")
    runs = candidates(view, tx.data.from_tokens(ids), ids)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    view.run(ids[:BATCH], head=True)
    memory = {str(tokens): peak_memory(tokens) for tokens in (args.tokens // 4, args.tokens)}
    print(f"peak memory MB by tokens: {memory}", flush=True)
    for repeat in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run) * (LENS_SHARE if name == LENS else 1))
            print(f"repeat {repeat + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
        ratios = write_result(args.output, args.tokens, seconds, memory)
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}x  {name}" + (f"  (bound {BOUNDS[name]}x)" if name in BOUNDS else ""))


def write_result(output: Path, tokens: int, seconds: dict[str, list[float]], memory: dict[str, float]) -> dict:
    """Write what is known after a repeat; returns the median ratios to the plain forward pass."""
    rival = seconds[FORWARD]
    ratios = {
        name: statistics.median(own / plain for own, plain in zip(times, rival, strict=True))
        for name, times in seconds.items()
    }
    result = {
        "command": f"python -m benchmarks.measuring --tokens {tokens} --repeats {len(rival)}",
        "tokens": tokens,
        "batch": [BATCH, POSITIONS],
        "seconds": seconds,
        "median_ratio_to_plain_forward": ratios,
        "bounds": BOUNDS,
        "peak_memory_mb_by_tokens": memory,
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())
    return ratios


if __name__ == "__main__":
    main()
