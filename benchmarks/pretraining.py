"""A pre-training step of GPT-2 124M: our trainer against Hugging Face's and litgpt's, each in a process of its own.

    python -m benchmarks.pretraining [--repeats 3] [--steps 4] [--threads 2] [-o benchmarks/results/pretraining.json]

GPT-2's shape with random weights and no dropout, vocabulary 50,257, 4 sequences of 1,024 random tokens a step,
float32 on a CPU, bfloat16 and 16 sequences on a GPU. Ours is the code of `transect train` with the recipe gpt2 on a
prepared corpus. `transformers` is GPT2LMHeadModel in its Trainer at its best settings here: fused AdamW, SDPA
attention, no checkpointing, no logging, compiled on a GPU. `litgpt`, where it is installed, is its GPT of this width
and depth (it has rotary positions and a head of its own, which is 38M parameters more) with its loss and Fabric, as
its pretraining script steps; on a GPU compiled. Each repeat runs every candidate once, in an order that turns; a rate
is the median over the steps after the first; memory is the most that the process ever took. Ratios are within a
repeat.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from transect.results import write_whole

VOCAB, POSITIONS = 50257, 1024
BOUNDS = {"speed": (1.2, 1.5), "memory": (0.8, 0.6)}
"""Against transformers: what must hold, and what is wanted."""


def candidates() -> tuple[str, ...]:
    found = importlib.util.find_spec("litgpt") is not None
    return ("transect", "transformers", "litgpt") if found else ("transect", "transformers")


def sequences() -> int:
    return 16 if torch.cuda.is_available() else 4


def ours(folder: Path, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    from benchmarks.random_corpus import random_corpus
    from transect.recipes.recipe import load
    from transect.train.audience import Silent
    from transect.train.run import train

    random_corpus(folder / "data", VOCAB, tokens=steps * sequences() * POSITIONS + 4 * POSITIONS)
    gpu = torch.cuda.is_available()
    changes = [
        f"data.path={folder / 'data'}",
        "data.across_documents=true",
        "train.tokens=null",
        f"train.steps={steps}",
        f"train.batch_size={sequences()}",
        "train.micro_batch=null",
        f"train.precision={'bfloat16' if gpu else 'float32'}",
        f"train.compile={str(gpu).lower()}",
        "train.evaluation.splits=[]",
        "train.log_every=1",
    ]
    seconds: list[float] = []

    class Watch(Silent):
        def step(self, progress, shown) -> None:
            seconds.append(progress.seconds)

    train(load("gpt2", changes), folder / "run", audience=Watch())
    return [after - before for before, after in itertools.pairwise(seconds)]


def theirs(folder: Path, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    gpu = torch.cuda.is_available()
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="sdpa", use_cache=False, **off))
    ids = torch.randint(VOCAB, (steps * sequences(), POSITIONS), generator=torch.Generator().manual_seed(0))

    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, place: int) -> dict:
            return {"input_ids": ids[place], "labels": ids[place]}

    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            if gpu:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=sequences(),
        max_steps=steps,
        optim="adamw_torch_fused",
        learning_rate=6e-4,
        weight_decay=0.1,
        bf16=gpu,
        torch_compile=gpu,
        use_cpu=not gpu,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=[Clock()]).train()
    return [after - before for before, after in itertools.pairwise(marks)]


def litgpts(folder: Path, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    import lightning
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    gpu = torch.cuda.is_available()
    fabric = lightning.Fabric(
        accelerator="cuda" if gpu else "cpu", devices=1, precision="bf16-mixed" if gpu else "32-true"
    )
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": POSITIONS, "intermediate_size": 3072}
    shape |= {"padded_vocab_size": VOCAB, "vocab_size": VOCAB, "parallel_residual": False, "bias": True}
    model = GPT(Config(name="gpt2-shaped", gelu_approximate="tanh", **shape))
    model = fabric.setup(torch.compile(model) if gpu else model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    ids = torch.randint(VOCAB, (steps * sequences(), POSITIONS + 1), generator=torch.Generator().manual_seed(0))
    marks: list[float] = []
    for batch in ids.to(fabric.device).split(sequences()):
        logits = model(batch[:, :-1].contiguous())
        fabric.backward(chunked_cross_entropy(logits, batch[:, 1:].contiguous()))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks)]


def one(rival: str, steps: int, threads: int) -> dict:
    """What one process reports."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        seconds = {"transect": ours, "transformers": theirs, "litgpt": litgpts}[rival](Path(folder), steps)
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = sequences() * POSITIONS
    return {"seconds": seconds, "tokens_per_second": tokens / statistics.median(seconds), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/pretraining.json"))
    parser.add_argument("--one", choices=("transect", "transformers", "litgpt"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.steps, given.threads)))
        return
    names, repeats = candidates(), []
    for repeat in range(given.repeats):
        found = {}
        for place in range(len(names)):
            name = names[(repeat + place) % len(names)]
            found[name] = _process(name, given.steps, given.threads)
            rate, size = found[name]["tokens_per_second"], found[name]["peak_bytes"] / 1e9
            print(f"repeat {repeat}  {name:12}  {rate:,.0f} tokens/s  {size:.2f} GB", flush=True)
        repeats.append(found)
    result = {"ratios": {rival: _ratios(repeats, rival) for rival in names[1:]}, "bounds": BOUNDS, "repeats": repeats}
    result |= {"steps": given.steps, "threads": given.threads, "torch": torch.__version__}
    result |= {"transformers": transformers.__version__, "machine": platform.processor() or platform.machine()}
    write_whole(given.output, (json.dumps(result, indent=1) + "\n").encode())
    for rival, ratio in result["ratios"].items():
        print(f"against {rival}: speed {ratio['speed']:.2f}x, memory {ratio['memory']:.2f}x")


def _process(name: str, steps: int, threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.pretraining", "--one", name]
    command += ["--steps", str(steps), "--threads", str(threads)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        sys.exit(said.stderr)
    return json.loads(said.stdout.splitlines()[-1])


def _ratios(repeats: list[dict], rival: str) -> dict:
    """Medians over the repeats: of our speed over the rival's, and of our memory over its."""

    def median(of: str) -> float:
        return statistics.median(one["transect"][of] / one[rival][of] for one in repeats)

    return {"speed": median("tokens_per_second"), "memory": median("peak_bytes")}


if __name__ == "__main__":
    main()
