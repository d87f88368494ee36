"""Cost of the jump penalty: a training step with it against the same step without it.

    python -m benchmarks.jump_penalty [--repeats 15] [-o benchmarks/results/jump_penalty.json]

Stacks of d = 768, L = 6, vocabulary 1,009, batches of 8 x 128, float32 on the CPU; a step is forward, loss, backward
and AdamW. `gpt2` and `llama` are transformers' own, with the penalty attached through a view (hooks are set and removed
in each step); `transect` is our model, with the penalty in its settings. A process for each stack and number of
threads, held to one core where it has one thread. Each repeat runs every candidate once, in an order that turns from
repeat to repeat; a ratio is that to the plain step of the same repeat, quoted as the median, by the clock and by the
processor's own time, which other processes on the machine disturb less. `plain formula` takes the penalty by autograd
through the metric: what the analytic gradient saves.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import transect as tx
from transect.models.config import ModelConfig
from transect.models.heads import TransectForCausalLM
from transect.models.penalties import jump
from transect.models.penalties._chord import plain_turns
from transect.models.penalties.base import loss_positions
from transect.results import write_whole

BATCH, POSITIONS, WIDTH, LAYERS, VOCAB = 8, 128, 768, 6, 1009
OFF, ON, TWIN = "without penalty", "with penalty", "with penalty, plain formula"
STACKS = ("transect", "gpt2", "llama")
BOUND, WANTED = 1.03, 1.01


def model_of(stack: str) -> nn.Module:
    """The stack with seeded random weights, without dropout."""
    torch.manual_seed(0)
    if stack == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 12, "vocab_size": VOCAB, "n_positions": POSITIONS}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **off))
    if stack == "llama":
        shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 12, "vocab_size": VOCAB}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=2048, **shape))
    settings = {"width": WIDTH, "layers": LAYERS, "vocab_size": VOCAB, "attention": {"heads": 12}}
    return TransectForCausalLM.make(ModelConfig.parse(settings))


def steps_of(stack: str) -> dict[str, Callable[[], None]]:
    """A training step for each candidate; all train the same model."""
    model = model_of(stack)
    view = tx.View(model, name=stack)
    model.train()
    ids = torch.randint(VOCAB, (BATCH, POSITIONS), generator=torch.Generator().manual_seed(1))
    counted = loss_positions(ids, causal=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def update(loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def attached() -> None:
        with tx.penalties.Jump.attach(view) as penalty:
            update(model(ids, labels=ids).loss + penalty.loss(counted))

    def within() -> None:
        with mock.patch.object(model.model, "penalties", [tx.penalties.Jump(tx.penalties.Jump.Config(), LAYERS)]):
            update(model(ids, labels=ids).loss)

    with_penalty = within if stack == "transect" else attached

    def by_autograd() -> None:
        with mock.patch.object(jump, "turns", plain_turns):
            with_penalty()

    return {OFF: lambda: update(model(ids, labels=ids).loss), ON: with_penalty, TWIN: by_autograd}


def measured(stack: str, threads: int, repeats: int) -> dict:
    """Seconds of every step, by the clock and of the processor, and the ratios to the plain step of the same repeat."""
    torch.set_num_threads(threads)
    steps = steps_of(stack)
    names = list(steps)
    for step in steps.values():
        step()
    clocks = {"elapsed": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in clocks}
    for repeat in range(repeats):
        for place in range(len(names)):
            name = names[(repeat + place) % len(names)]
            started = {clock: now() for clock, now in clocks.items()}
            steps[name]()
            for clock, now in clocks.items():
                seconds[clock][name].append(now() - started[clock])
    return {
        "stack": stack,
        "threads": threads,
        "median_ratio": {
            clock: {name: _median_ratio(times[name], times[OFF]) for name in names[1:]}
            for clock, times in seconds.items()
        },
        "seconds": seconds,
    }


def _median_ratio(own: list[float], plain: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(own, plain, strict=True))


def in_a_process(stack: str, threads: int, repeats: int) -> dict:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.jump_penalty", "--only", stack, "--threads", str(threads)]
        command += ["--repeats", str(repeats), "-o", str(file)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        return json.loads(file.read_text())


def main() -> None:
    """Run, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=STACKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/jump_penalty.json"))
    args = parser.parse_args()
    if args.only:
        if args.threads == 1 and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        write_whole(args.output, json.dumps(measured(args.only, args.threads, args.repeats)).encode())
        return
    found = []
    for threads in (1, 2):
        for stack in STACKS:
            found.append(in_a_process(stack, threads, args.repeats))
            for clock, ratios in found[-1]["median_ratio"].items():
                said = ", ".join(f"{name} {ratio:.4f}x" for name, ratio in ratios.items())
                print(f"{stack}, {threads} threads, {clock}: {said}", flush=True)
            write_result(args.output, args.repeats, found)


def write_result(output: Path, repeats: int, found: list[dict]) -> None:
    """Write what is known after a run."""
    result = {
        "command": f"python -m benchmarks.jump_penalty --repeats {repeats}",
        "shape": {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCAB, "batch": [BATCH, POSITIONS]},
        "bound": BOUND,
        "wanted": WANTED,
        "runs": found,
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
