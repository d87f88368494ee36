"""A known loss: nanoGPT's small character-level set-up, by our trainer and by a plain PyTorch loop, over seeds.

    python -m benchmarks.anchor --text tinyshakespeare.txt [--seeds 3] [-o benchmarks/results/anchor.json]

The first nine tenths of the text are trained on, the rest is the validation text; both sides read the same characters
through the same ids and are scored on the whole validation text, each character from at most 64 before it. `plain` is
benchmarks/plain_gpt.py, which shares no code with transect; `transect` is the recipe nanogpt-char by
`transect.train.run.train`. nanoGPT's README gives 1.88 for this set-up on Shakespeare. Without --text the built-in
speeches are read.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import plain_gpt
from transect.data import PrepareConfig, prepare
from transect.recipes.recipe import load
from transect.results import write_whole
from transect.train.run import train


def halves(text: str, folder: Path) -> list[str]:
    """The sources of a corpus: the first nine tenths of a text to train on, the rest to validate."""
    cut = int(0.9 * len(text))
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "valid.txt").write_text(text[cut:], encoding="utf-8")
    return [f"train/text={folder / 'train.txt'}", f"valid/text={folder / 'valid.txt'}"]


def builtin_characters(count: int) -> str:
    """The first characters of the speeches that come with the package."""
    import transect.data

    with gzip.open(Path(transect.data.__file__).with_name("sotu.jsonl.gz"), "rt", encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    return "\n".join(texts).encode("ascii", "ignore").decode()[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/anchor.json"))
    given = parser.parse_args()
    text = builtin_characters(1_115_394) if given.text is None else given.text.read_text(encoding="utf-8")
    found: dict[str, list[float]] = {"transect": [], "plain": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = tuple(halves(text, folder))
        config = PrepareConfig(sources=sources, tokenizer_kind="characters", deduplicate=False, normalise=False)
        corpus = prepare(config, folder / "data")
        ids = {}
        for split in ("train", "valid"):
            part = corpus.part(split, "text")
            ids[split] = torch.from_numpy(part.read(0, part.tokens - 1).astype(np.int64))
        vocab = corpus.card.vocab_size
        for seed in range(given.seeds):
            changes = [f"data.path={folder / 'data'}", f"train.seed={seed}", f"model.vocab_size={vocab}"]
            changes.append("train.evaluation.every=null")  # at the end is enough
            table = train(load("nanogpt-char", changes), folder / f"run{seed}").table
            last = table.where(metric="nats_per_token", split="valid", step=2000).rows[0]
            assert last.value is not None
            found["transect"].append(last.value)
            found["plain"].append(plain_gpt.loss_on(plain_gpt.train(ids["train"], vocab, seed), ids["valid"]))
            print(f"seed {seed}: transect {found['transect'][-1]:.4f}  plain {found['plain'][-1]:.4f} nats a character")
    means = {name: statistics.mean(losses) for name, losses in found.items()}
    spread = {name: statistics.stdev(losses) if len(losses) > 1 else None for name, losses in found.items()}
    result = {"text": "built-in speeches" if given.text is None else given.text.name, "characters": len(text)}
    result |= {"vocabulary": vocab, "losses": found, "mean": means, "standard_deviation": spread}
    write_whole(given.output, (json.dumps(result, indent=1) + "\n").encode())
    print(f"mean: transect {means['transect']:.4f}, plain {means['plain']:.4f}")


if __name__ == "__main__":
    main()
