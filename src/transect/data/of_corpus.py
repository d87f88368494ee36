"""Documents of a prepared corpus as the sequences that probes measure on."""

import numpy as np

from transect.data.config import DataConfig
from transect.data.corpus import Corpus
from transect.data.dataset import Dataset, assemble
from transect.data.hashing import keyed, token_hashes
from transect.errors import InputError
from transect.models.config import ModelConfig


def from_corpus(
    corpus: Corpus, split: str, domain: str | None, data: DataConfig, model: ModelConfig, limit_tokens: int
) -> Dataset:
    """Whole documents of a split, of one domain or of all, up to so many tokens, in an order by hash.

    Sequences are as long as in training; those of a masked model are wrapped in its start and end tokens. The document
    that would pass the limit is cut. Raises InputError for a split or a domain that is not there.
    """
    if split not in corpus.splits:
        raise InputError(f"{corpus.path} has no split {split!r}; it has {', '.join(corpus.splits)}")
    domains = corpus.domains(split)
    if domain is not None and domain not in domains:
        raise InputError(f"{split} has no domain {domain!r}; it has {', '.join(domains)}")
    rows: list[np.ndarray] = []
    for name in domains if domain is None else (domain,):
        part = corpus.part(split, name)
        ends = part.offsets[1:] - 1  # without the end tokens
        rows += [part.read(start, end - start) for start, end in zip(part.offsets[:-1], ends, strict=True)]
    rows = [row for row in rows if len(row)]
    sizes = np.array([len(row) for row in rows])
    hashes = token_hashes(np.concatenate(rows), np.cumsum(sizes) - sizes, sizes)
    kept, left = [], limit_tokens
    for number in np.argsort(keyed(hashes, 0), kind="stable"):
        if left <= 0:
            break
        kept.append(rows[number][:left])
        left -= len(kept[-1])
    masked = not model.causal
    prefix = [corpus.card.start_id] if masked and corpus.card.start_id is not None else []
    suffix = [corpus.card.end_id] if masked else []
    name = f"{corpus.card.name}, {split}" + (f" of {domain}" if domain else "")
    return assemble(kept, data.seq_len or model.max_positions, name, prefix, suffix)
