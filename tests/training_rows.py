"""Made-up rows of training runs, as the run writes them, and the folder of one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transect.results import Row, Table, to_line

TEXTS = (("valid", "wiki", 1000), ("valid", "books", 3000), ("ood", "code", 500))


def stamp(step: int, run: str = "first", **others: Any) -> dict[str, Any]:
    """The provenance that all rows of a step have."""
    return {
        "run": run, "model": "tiny", "revision": f"step-{step:08d}", "step": step, "tokens": 4096 * step,
        "seconds": 0.5 * step, "flops": 1e12 * step, "data": "sample [0123]", "seed": 0, "dtype": "bfloat16",
        "code": "transect 0", "config": "abcd", **others,
    }  # fmt: skip


def logged(step: int, loss: float, layers: int = 0, sparse: bool = False, **others: Any) -> Iterator[Row]:
    """What a run logs of a step: the main loss as given, every other number grown from it."""
    common = {"probe": "train", "split": "train", **stamp(step, **others)}
    for part, value in (("main", loss), ("z_loss", loss / 1000), ("total", loss * 1.001)):
        yield Row(metric="loss", value=value, unit="nats", part=part, **common)
    yield Row(metric="gradient_norm", value=2 * loss, unit="1", **common)
    yield Row(metric="skipped_steps", value=0.0, unit="steps", **common)
    yield Row(metric="learning_rate", value=1e-3 / step, unit="1", part="adamw", **common)
    yield Row(metric="gradient_norm", value=loss / 7, unit="1", part="embeddings", **common)
    for layer in range(layers):
        for half in ("attn", "ffn"):
            yield Row(
                metric="gradient_norm", value=loss / (layer + 2), unit="1", part=f"layers.{layer}.{half}", **common
            )
    for layer in range(layers + 1 if layers else 0):
        yield Row(metric="stream_norm", value=loss * (layer + 1), unit="1", layer=layer, site="resid", **common)
    for layer in range(layers if sparse else 0):
        place = {"layer": layer, "element": "ffn", "unit": "1", **common}
        yield Row(metric="dead_fraction", value=0.25 / (layer + 1), **place)
        yield Row(metric="largest_load", value=0.5 / (layer + 1), **place)
        yield Row(metric="drop_fraction", value=0.0, **place)
        yield Row(metric="entropy", value=1 - 0.1 / (layer + 1), **place)
    yield Row(metric="tokens_per_second", value=8000 + step, unit="tokens/s", **common)
    yield Row(metric="mfu", value=None, reason="the peak of this device is not known", unit="1", **common)
    yield Row(metric="peak_memory", value=1.5 * 2**30, unit="bytes", **common)


def evaluated(step: int, loss: float, texts: Sequence[tuple[str, str, int]] = TEXTS, **others: Any) -> Iterator[Row]:
    """Language modelling after a step: each next domain is 0.25 nats per token worse, and a third in bits per byte."""
    for number, (split, domain, tokens) in enumerate(texts):
        place = {"task": "language_modelling", "split": split, "domain": domain, "n": tokens, **stamp(step, **others)}
        for metric, unit, size in (("nats_per_token", "nats/token", 1.0), ("bits_per_byte", "bits/byte", 1 / 3)):
            value, error = (loss + 0.25 * number) * size, 0.02 * size
            yield Row(
                metric=metric,
                value=value,
                unit=unit,
                stderr=error,
                low=value - 2 * error,
                high=value + 2 * error,
                **place,
            )


def run_folder(path: Path, rows: Sequence[Row], steps: int | None = 100, done: bool = False) -> Path:
    """The folder of a run, with the settings that are read from it."""
    path.mkdir(parents=True, exist_ok=True)
    train = {"steps": steps, "tokens": None if steps else 100 * 32 * 128, "batch_size": 32}
    recipe = {"train": train, "data": {"seq_len": None}, "model": {"max_positions": 128}}
    (path / "config.json").write_text(json.dumps({"kind": "training", "data": "0123", "recipe": recipe}))
    (path / "rows.jsonl").write_text("".join(map(to_line, rows)))
    if done:
        Table(rows).write(path)
    return path
