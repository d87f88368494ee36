"""A whole training run: set up from a recipe, step after step, watched, kept, and gone on with after any stop."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from transect import runs
from transect.data.ahead import Ahead
from transect.data.corpus import Corpus
from transect.data.samples import Samples, TrainBatch
from transect.errors import InputError
from transect.models.build import LanguageModel, build
from transect.recipes.recipe import Recipe
from transect.results import Row, Table
from transect.stopping import stoppable
from transect.train import rows as rows_of
from transect.train.audience import Audience, Silent
from transect.train.checkpoints import Checkpoints
from transect.train.distributed.world import World
from transect.train.evaluate import Evaluation
from transect.train.folder import TrainFolder
from transect.train.meters import Meters
from transect.train.optimizers.base import Optimizer
from transect.train.optimizers.base import build as build_optimizer
from transect.train.probing import Probing
from transect.train.progress import Progress
from transect.train.schedule import factor
from transect.train.step import Done, Stepper
from transect.train.tracking import Tracker
from transect.train.tracking import check as check_tracking


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a run came to its end, how far it is, and its rows (of the first process).

    reason: `steps`, all were done; `target_loss`; `max_minutes`; `stopped` by a person or the machine.
    """

    reason: str
    progress: Progress
    table: Table


def train(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    resume_from: int | None = None,
    device: str = "auto",
    audience: Audience | None = None,
) -> Outcome:
    """Train the recipe's model on its corpus; the folder holds settings, rows and checkpoints.

    The same code runs alone and under `torchrun`. `resume` goes on from the newest checkpoint, or from that of step
    `resume_from`; on a CPU every later loss is then equal to the last bit to that of a run that was never stopped.
    Raises InputError for whatever the user can mend; nothing that was written before is lost by it.
    """
    world = World.open(recipe.parallel, device)
    try:
        with stoppable() as stopped:
            run = Run(recipe, Path(output), world, audience or Silent())
            run.open(resume or resume_from is not None, resume_from)
            return run.go(stopped)
    finally:
        world.close()


def length(recipe: Recipe, seq_len: int) -> int:
    """Steps of a run; raises InputError where the recipe does not say."""
    config = recipe.train
    if config.steps is not None:
        return config.steps
    if config.tokens is None:
        raise InputError("the recipe does not say how long to train; give --set train.steps=N or train.tokens=N")
    return -(-config.tokens // (config.batch_size * seq_len))


class Run:
    """One sitting of a run: everything is checked and made before `open` takes the folder; then `go` trains."""

    def __init__(self, recipe: Recipe, path: Path, world: World, audience: Audience) -> None:
        if recipe.data.path is None:
            raise InputError("no data is given; make a folder with `transect data prepare` and give --data FOLDER")
        self.recipe, self.path, self.world, self.audience = recipe, path, world, audience
        self.config = recipe.train
        self.corpus = Corpus.open(recipe.data.path)
        self.samples = Samples(self.corpus, recipe.data, recipe.model, self.config.seed)
        self.samples.check(self.config.batch_size)
        self.steps = length(recipe, self.samples.seq_len)
        factor(self.config.schedule, 0, self.steps)
        check_tracking(self.config.track)
        self.own = share_of(self.config.batch_size, world)
        self.evaluation = Evaluation(self.corpus, recipe, world)
        self.probing = Probing(self.corpus, recipe, world)
        self.model = new_model(recipe, self.corpus)
        self.probing.check()
        self.progress = Progress()
        self.notes: list[str] = []
        self._began = time.monotonic()

    def open(self, resume: bool, resume_from: int | None) -> None:
        """Place the model on the processes, take the folder, and load the checkpoint to go on from.

        Going on reads the data once, to see that they are still what was trained on.
        """
        recipe, world = self.recipe, self.world
        self.meters = Meters(recipe, self.samples.seq_len, world)
        world.place(self.model, self.config)
        self.model.recompute(self.config.recompute)
        self.optimizer: Optimizer = build_optimizer(self.config.optimizer, self.model)
        if world.is_main:
            self.folder = TrainFolder.open(self.path, recipe, self.corpus.fingerprint, resume)
            if resume:
                self.corpus.verify()
        world.barrier()
        self.checkpoints = Checkpoints(self.path / "checkpoints", self.config.checkpoints, world)
        if resume:
            self._load(resume_from)
        if self.config.compile:
            self._compile()
        self.stepper = Stepper(self.model, self.optimizer, world, self.config)
        if world.is_main:
            self.folder.keep(recipe)
            self.folder.rewind(self.progress.step or -1)  # without a checkpoint the first evaluation comes again
            self.tracker = Tracker(self.folder.path, recipe, self.progress.step, self.config.track)
            self.stamp = rows_of.stamp(recipe, self.path, self.corpus)

    def go(self, stopped: Callable[[], bool]) -> Outcome:
        """Train until the last step or a reason to stop; whatever happens, what is written stays usable."""
        progress, world = self.progress, self.world
        reason = "steps" if progress.step >= self.steps else None
        if progress.step == 0:
            self._write(self._evaluated())
        if progress.owed:
            self._look(last=False)
            progress.owed = False
        self.meters.before = progress.seconds
        try:
            with Ahead(self._batch, progress.step, self.steps) as batches:
                while reason is None:
                    reason = self._after(self._step(batches), stopped)
            self.checkpoints.finish()
        finally:
            if world.is_main:
                self.tracker.close()
        return Outcome(reason, progress, self._finish(reason) if world.is_main else Table())

    def _compile(self) -> None:
        from transect.models.compiling import compile_layers  # brings torch's compiler

        if (reason := compile_layers(self.model)) is not None:
            self._say(f"not compiled: {reason}")

    def _load(self, resume_from: int | None) -> None:
        known = self.checkpoints.steps()
        if resume_from is not None and resume_from not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise InputError(f"{self.path} has no whole checkpoint of step {resume_from}; it has {listed}")
        if not known:
            self._say("there is no checkpoint yet; the run starts again")
            return
        step = known[-1] if resume_from is None else resume_from
        self.progress = Progress.of(self.checkpoints.load(step, self.model, self.optimizer))
        if resume_from is not None:
            self.checkpoints.drop_after(step)
        self._say(f"going on after step {step:,} of {self.steps:,}")

    def _batch(self, step: int) -> TrainBatch:
        """This process' samples of a step."""
        return self.samples.batch(step * self.config.batch_size + self.world.data_rank * self.own, self.own)

    def _step(self, batches: Ahead[TrainBatch]) -> Done:
        progress, config, world = self.progress, self.config, self.world
        first = progress.samples + world.data_rank * self.own
        watched = self._due(config.log_every, progress.step + 1) or progress.step + 1 == self.steps
        rate = factor(config.schedule, progress.step, self.steps)
        with self.meters.step(self.model, watched):
            done = self.stepper.take(progress.step, first, next(batches), rate, watched)
        progress.step += 1
        progress.samples += config.batch_size
        progress.tokens += self.meters.step_tokens
        progress.seconds = self.meters.before + self.meters.seconds
        progress.flops += self.meters.step_flops
        progress.skipped += not done.applied
        progress.bad = 0 if done.applied else progress.bad + 1
        return done

    def _after(self, done: Done, stopped: Callable[[], bool]) -> str | None:
        """What is due after a step; the reason to stop, if there is one."""
        progress, config = self.progress, self.config
        reason = "steps" if progress.step >= self.steps else None
        late = config.max_minutes is not None and time.monotonic() - self._began > 60 * config.max_minutes
        if self.world.any(late):
            reason = reason or "max_minutes"
        shown = self._due(config.log_every, progress.step) or reason is not None
        if shown:
            self._write(rows_of.of_step(done, self.optimizer.rates(), progress.skipped))
            self._write(rows_of.of_meters(self.meters))
        hopeless = progress.bad >= config.bad_steps
        halted = hopeless or (reason is None and self.world.any(stopped()))
        progress.owed = halted
        if not halted and self._look(reason is not None):
            reason = "target_loss"
        if shown:
            self._show(done)
        halted = halted or (reason is None and self.world.any(stopped()))
        self._keep(reason is not None or halted)
        if hopeless:
            raise InputError(
                f"the loss or its gradient was not finite in {progress.bad} steps in a row, up to step "
                f"{progress.step}; the weights before them are kept; lower the learning rate or train.clip"
            )
        return "stopped" if halted else reason

    def _look(self, last: bool) -> bool:
        """Evaluation and probes, where they are due; whether the target loss is reached."""
        progress, config = self.progress, self.config
        reached = False
        if self._due(config.evaluation.every, progress.step) or last:
            self._write(self._evaluated())
            target = config.target_loss
            reached = target is not None and progress.loss is not None and progress.loss <= target
        self._write(self.probing.rows(self.model, self.probing.due(progress.step, last or reached)))
        return reached

    def _keep(self, ends: bool) -> None:
        """A checkpoint, where one is due or the sitting ends."""
        kept, step = self.config.checkpoints, self.progress.step
        if ends or self._due(kept.every, step) or step in kept.keep_at:
            wait = ends or self.world.device.type == "cpu"  # there a thread would only slow the steps down
            self.checkpoints.save(self.model, self.optimizer, self.progress.plain(), self.corpus.tokenizer(), wait)

    def _show(self, done: Done) -> None:
        if self.world.is_main:
            shown = {"loss": done.losses["main"], "valid": self.progress.loss}
            shown |= {name: value for name, (value, _, _) in self.meters.read().items()}
            self.audience.step(self.progress, shown)

    def _evaluated(self) -> list[Row]:
        rows, loss = self.evaluation.rows(self.model)
        self.progress.loss = loss
        return rows

    def _write(self, rows: list[Row]) -> None:
        if self.world.is_main and rows:
            stamped = [self.stamp.on(row, self.progress) for row in rows]
            self.folder.add(stamped)
            self.tracker.add(stamped)

    def _finish(self, reason: str) -> Table:
        if reason == "stopped":
            return self.folder.table()
        seconds = time.monotonic() - self._began
        return self.folder.finish(runs.environment(self.world.device, self.notes, seconds))

    def _due(self, every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

    def _say(self, line: str) -> None:
        self.notes.append(line)
        if self.world.is_main:
            self.audience.say(line)


def new_model(recipe: Recipe, corpus: Corpus) -> LanguageModel:
    """The recipe's model with first weights that follow from the seed."""
    torch.manual_seed(recipe.train.seed)
    model = build(recipe.model)
    card = corpus.card
    model.config.eos_token_id = card.end_id
    model.config.bos_token_id = card.end_id if card.start_id is None else card.start_id
    return model


def share_of(batch_size: int, world: World) -> int:
    """Sequences of a step that one process has; raises InputError where they cannot be shared out evenly."""
    if batch_size % world.data_size:
        raise InputError(
            f"train.batch_size is {batch_size}, which {world.data_size} data processes cannot share evenly; "
            f"give a multiple of {world.data_size}"
        )
    return batch_size // world.data_size
