"""A live view as a model object of lm-evaluation-harness; imported only where that package is there."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from transect.errors import InputError
from transect.tasks._encoding import Reader
from transect.tasks._scoring import Request
from transect.tasks.base import Subject, Tick, silent
from transect.view.view import View

NEW_TOKENS = 256  # of a task that names no number; lm_eval's own


class HarnessModel(LM):
    """What lm_eval asks of a model, answered by a view as it is at that moment, with the edits that are open in it.

    Texts are encoded and cut as by lm_eval's `HFLM`, to which log-probabilities of a causal model are equal. A masked
    model's are pseudo-log-likelihoods. length: most tokens of an input, by default all that the model takes. Raises
    InputError for a view without tokenizer or head.
    """

    def __init__(self, view: View, batch_size: int = 8, length: int | None = None, tick: Tick = silent) -> None:
        super().__init__()
        if view.tokenizer is None or not view.has_head:
            what = "tokenizer" if view.tokenizer is None else "head"
            raise InputError(f"{view.name} has no {what}, and lm_eval's tasks need one; load a checkpoint with it")
        self.view = view
        self.tokenizer = view.tokenizer
        most = view.max_positions if length is None else length
        self.reader = Reader.of(Subject(view=view, batch_size=batch_size), most)
        self.tick = tick

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.view.device

    @property
    def max_length(self) -> int:
        """Most tokens of an input."""
        return self.reader.length

    @property
    def tokenizer_name(self) -> str:
        """Names lm_eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, or that of a name; None where none is asked for."""
        if chat_template is False:
            return None
        return self.tokenizer.get_chat_template(chat_template=None if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; raises InputError where the tokenizer has no template."""
        if not self.tokenizer.chat_template:
            raise InputError(f"the tokenizer of {self.view.name} has no chat template; run without one")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding gives it, of each request."""
        asked = [self._pair(*request.args[:2]) for request in requests]
        return [(one.total, one.greedy) for one in self.reader.score(asked, self.tick)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats: windows of `max_length` tokens, the last one with as much context as fits.

        As in lm_eval, the start token that a tokenizer puts before a text is asked for too, behind another one.
        """
        asked: list[Request] = []
        owners: list[int] = []
        step = self._room()
        for number, request in enumerate(requests):
            ids = self._plain(request.args[0])
            if self.reader.causal:
                ids = [*self.reader.prefix, *ids]
            for start in range(0, len(ids), step):
                asked.append(self.reader.request(ids[:start], ids[start : start + step]))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, self.reader.score(asked, self.tick), strict=True):
            totals[owner] += one.total
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that each context goes on with, up to a stop string; greedy unless a task asks for samples.

        One sequence at a time, so that nothing depends on padding. Raises InputError for a model that cannot generate,
        and where the new tokens leave no room for a context. Cost: without edits a key-value cache is used; with an
        edit open every token is a pass over all before it, as edits may need to see all positions.
        """
        if not (self.reader.causal and self.view.model.can_generate()):
            raise InputError(f"{self.view.name} cannot generate text; give tasks that ask for likelihoods alone")
        texts = []
        for number, request in enumerate(requests):
            texts.append(self._generated(*request.args[:2]))
            self.tick(number + 1, len(requests))
        return texts

    def _plain(self, text: str) -> list[int]:
        """The ids of a text without the start tokens that its tokenizer adds, also if the text names them itself."""
        ids, prefix = self.reader.encode(text), self.reader.prefix
        return ids[len(prefix) :] if prefix and tuple(ids[: len(prefix)]) == prefix else ids

    def _pair(self, context: str, continuation: str) -> Request:
        """As `Reader.pair`; a start token that the texts begin with, as chat templates write it, is not doubled."""
        kept = context.rstrip()
        whole, before = self._plain(context + continuation), self._plain(kept) if kept else []
        asked = whole[len(before) :]
        if not context and self.reader.causal and not self.reader.prefix and asked[:1] == [self.reader.start]:
            asked = asked[1:]
        return self.reader.request(before, asked, continuation)

    def _room(self) -> int:
        """Tokens asked for in one window."""
        reader = self.reader
        return reader.length if reader.causal else reader.length - len(reader.prefix) - len(reader.suffix)

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
        stops = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.eos_token)
        new = given.pop("max_gen_toks")
        if new >= self.max_length:
            raise InputError(
                f"a task asks for up to {new} new tokens, and {self.view.name} takes {self.max_length} in all; "
                "leave it out, or judge a model with a longer context"
            )
        if not given["do_sample"]:
            given.pop("temperature", None)
        ids = [*self.reader.prefix, *self._plain(context)][new - self.max_length :] or [self.reader.start]
        sequence = torch.tensor([ids], device=self.view.device)
        self.view.check_ids(sequence)
        pads = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        generate: Any = self.view.model.generate
        output = generate(
            input_ids=sequence,
            attention_mask=torch.ones_like(sequence),
            max_length=given.pop("max_length", len(ids) + new),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stops, len(ids), 1),
            pad_token_id=next(pad for pad in pads if pad is not None),
            use_cache=not self._hooked(),
            **given,
        )
        text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)

    def _hooked(self) -> bool:
        """Whether an edit is open: all edits of computations act by hooks."""
        modules = self.view.model.modules()
        return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
