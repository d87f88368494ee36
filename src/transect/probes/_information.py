"""The mutual-information part of `contribution`: clusters of the states at every place, and the counts of a sample."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transect.metrics.information import mutual_information_without
from transect.metrics.kmeans import BATCH, MiniBatchKMeans, assign, buffer_rows, finish_together, partial_fit_together
from transect.parallel import on_every_core

GROUPS = 10


@dataclass(slots=True, eq=False)
class Clusters:
    """k-means at each place for each seed, the states waiting for a whole mini-batch, and the sample's labels."""

    models: list[list[MiniBatchKMeans]]  # [places][seeds]
    waiting: list[list[Tensor]]  # [places]
    labels: Tensor  # [seeds, places, sample] int16, -1 = did not come
    centres: list[list[Tensor]]  # [places][seeds], once fitted

    @classmethod
    def empty(cls, places: int, seeds: list[int], clusters: int, sample: int) -> "Clusters":
        """Nothing seen yet."""
        labels = torch.full((len(seeds), places, sample), -1, dtype=torch.int16 if clusters < 2**15 else torch.int32)
        models = [[MiniBatchKMeans(clusters, seed) for seed in seeds] for _ in range(places)]
        return cls(models, [[] for _ in range(places)], labels, [])

    @staticmethod
    def nbytes(places: int, seeds: int, clusters: int, sample: int, width: int, size: int) -> int:
        """Labels, buffers of the start, centres, and the products of one start."""
        rows, label = buffer_rows(clusters) + BATCH, 2 if clusters < 2**15 else 4
        vectors = rows + BATCH + 2 * seeds * clusters
        return places * (label * seeds * sample + size * width * vectors) + size * rows * rows

    def fit(self, place: int, states: Tensor) -> None:
        """Learn from states [n, d], in mini-batches of 1,024 that do not depend on how the states come."""
        waiting = self.waiting[place]
        waiting.append(states)
        if sum(len(part) for part in waiting) < BATCH:
            return
        joined = torch.cat(waiting)
        whole = len(joined) // BATCH * BATCH
        for start in range(0, whole, BATCH):
            partial_fit_together(self.models[place], joined[start : start + BATCH])
        self.waiting[place] = [joined[whole:].clone()]

    def finish(self) -> None:
        """The centres, once every state has come."""
        for models, waiting in zip(self.models, self.waiting, strict=True):
            left = torch.cat(waiting) if waiting else torch.empty(0, 1)
            if len(left):
                partial_fit_together(models, left)
            self.centres.append(finish_together(models))
        self.models, self.waiting = [], []

    def label(self, place: int, at: Tensor, states: Tensor) -> None:
        """Keep the nearest centre of states [n, d] that stand at `at` [n] in the sample."""
        for seed, centres in enumerate(self.centres[place]):
            self.labels[seed, place, at] = assign(states, centres).to(self.labels.dtype).cpu()

    def levels(self, targets: np.ndarray, groups: np.ndarray, debias: str, seed: int) -> np.ndarray:
        """Mutual information in nats [seeds, 1 + groups, places]: of the sample, then without each hash group."""
        labels = self.labels.numpy()
        jobs = [(s, p) for s in range(labels.shape[0]) for p in range(labels.shape[1])]

        def one(job: tuple[int, int]) -> np.ndarray:
            return mutual_information_without(labels[job], targets, groups, debias, seed)

        found = np.stack(on_every_core(one, jobs)).reshape(labels.shape[0], labels.shape[1], -1)
        return found.transpose(0, 2, 1)

    def pack(self) -> dict:
        """Plain tensors, numbers and lists."""
        return {
            "models": [[model.pack() for model in models] for models in self.models],
            "waiting": self.waiting,
            "labels": self.labels,
            "centres": self.centres,
        }

    @classmethod
    def unpack(cls, packed: dict) -> "Clusters":
        """Take up what `pack` gave."""
        models = [[MiniBatchKMeans.unpack(model) for model in models] for models in packed["models"]]
        return cls(models, packed["waiting"], packed["labels"], packed["centres"])
