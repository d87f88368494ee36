"""View: a model, its tokenizer and its map, seen through sites that were proven when it was made."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transect.errors import InputError
from transect.view import adapters
from transect.view.capture import Capture, capture, check_site
from transect.view.discover import discover, no_cache
from transect.view.layout import LayerMap, Tap
from transect.view.own import heads_of
from transect.view.prove import Proof, prove
from transect.view.sites import NEXT
from transect.view.tensors import Key, eps, logits_of, parts, put

Adapter = Mapping[str, Tap]


class View:
    """A proven model: `View(model)` or `View.load(...)`; layers, sites, edits and captures go through it.

    `layers` and `maps` follow the executed order, also inside an edit. `executed` holds, for each place in that order,
    the 0-based layer of the model as it was loaded. `causal` says that no position sees a later one. `replacing` says
    that a replacement is being computed, whose calls of the model's own modules are no part of the pass. `known` is how
    many of the first layers are not run, as their output is known; edits in them are part of it. `path` is what the
    model was loaded from; None for a live one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        adapter: Adapter | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Find the model's parts and prove them.

        `adapter` maps sites to taps that replace the ones found, in every layer. Raises InputError when the layers
        cannot be found, an identity does not hold, or a weight is not finite.
        """
        self.model = model.eval()
        self.base: nn.Module = model.base_model
        self.tokenizer = tokenizer
        self.name = name or model.config._name_or_path or type(model).__name__
        self.revision = revision
        self.notes = notes
        self.path: str | None = None
        self.replacing = False
        self.known = 0
        _refuse_nan(self.name, model)
        ids = self._random_ids(0, 7)
        found = discover(self.base, ids)
        self.container = found.container
        self.final_norm_path = found.final_norm
        self.width = found.width
        changes = dict(adapters.find(model.config.model_type)) | dict(adapter or {})
        for site in changes:
            check_site(site)
        self.maps: list[LayerMap] = [known.with_taps(_fitting(known, changes)) for known in found.layers]
        modules = list(self.base.get_submodule(self.container).children())
        self.modules: list[int] = list(found.executed)
        self.layers: list[nn.Module] = [modules[index] for index in found.executed]
        self.executed: list[int] = list(range(len(self.layers)))
        self.proof: Proof = prove(self, self._random_ids(1, 11))
        self.causal = self._looks_back_only(self._random_ids(2, 11))

    @staticmethod
    def load(
        source: Any,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        *,
        tokenizer: Any = None,
        adapter: Adapter | None = None,
        trust_remote_code: bool = False,
    ) -> "View":
        """A view of a folder, hub id, GGUF file, run folder or live `PreTrainedModel`.

        `dtype` None means float32 for files and "as it is" for a live model. Raises InputError in one line for
        whatever cannot be loaded or proven. `trust_remote_code` runs code that comes with the checkpoint.
        """
        from transect.view.load import load_model

        loaded = load_model(source, revision, dtype, device, trust_remote_code)
        view = View(
            loaded.model,
            tokenizer if tokenizer is not None else loaded.tokenizer,
            name=loaded.name,
            revision=loaded.revision,
            adapter=adapter,
            notes=loaded.notes,
        )
        view.path = loaded.path
        return view

    @property
    def num_layers(self) -> int:
        """Layers in the executed order; an edit may change it."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self._table.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self._table.device

    @property
    def _table(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def pad_id(self) -> int:
        """The id that fills short rows: the config's, or 0 where it names none that the vocabulary has."""
        pad = self.model.config.pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self.vocab_size else 0

    @property
    def has_head(self) -> bool:
        """Whether the model ends in logits over the vocabulary."""
        return self.model.get_output_embeddings() is not None

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between resid[L] and the head; None where there is none, as in post-norm encoders."""
        return None if self.final_norm_path is None else self.base.get_submodule(self.final_norm_path)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model takes, where its config says so."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= (config.pad_token_id or 0) + 1
        return limit

    @property
    def layouts(self) -> tuple[str, ...]:
        """The residual layout of each layer."""
        return tuple(known.layout for known in self.maps)

    def site_width(self, layer: int, site: str) -> int:
        """The last dimension of a site's tensor."""
        return self.proof.widths[self.executed[layer]][site]

    def heads(self, layer: int) -> int:
        """How many attention heads a layer has."""
        return heads_of(self.model, layer)

    def layer_path(self, layer: int) -> str:
        """The module path of a layer in the whole model."""
        prefix = getattr(self.model, "base_model_prefix", "") if self.base is not self.model else ""
        return ".".join(part for part in (prefix, self.container, str(self.modules[layer])) if part)

    def capture(self, sites: tuple[str, ...] | list[str], layers: Any = None) -> AbstractContextManager[Capture]:
        """Capture the named sites of the named layers in the forward passes of the block; see `view.capture`."""
        return capture(self, sites, layers)

    def run(self, ids: Tensor, mask: Tensor | None = None, *, head: bool = False) -> Tensor:
        """One forward pass of right-padded [batch, positions] ids: logits with `head`, else the last hidden state.

        The cache is off; gradients are the caller's choice. Models without a head give the last hidden state.
        """
        target = self.model if head and self.has_head else self.base
        attention = None if mask is None or bool(mask.all()) else mask.to(self.device, torch.long)
        with self._cleared(attention):
            output = target(input_ids=ids.to(self.device), attention_mask=attention, **no_cache(target))
        logits = logits_of(output)
        if head and logits is not None:
            return logits
        hidden = getattr(output, "last_hidden_state", None)
        return hidden if hidden is not None else output[0]

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [batch, positions, vocabulary] without gradients, for padding on any side.

        Rows are moved to the left before the pass and back after it; positions that are padding hold 0. Raises
        InputError for ids out of range or a model without a head.
        """
        if not self.has_head:
            raise InputError(f"{self.name} has no head, so there are no logits; load a checkpoint with its head")
        self.check_ids(ids)
        with torch.no_grad():
            if mask is None:
                return self.run(ids, head=True)
            mask = mask.to(ids.device).bool()
            order = torch.argsort(~mask, dim=1, stable=True)
            packed = self.run(ids.gather(1, order), mask.gather(1, order), head=True)
            back = torch.argsort(order, dim=1).to(packed.device)
            logits = packed.gather(1, back[..., None].expand_as(packed))
            return logits.masked_fill(~mask.to(packed.device)[..., None], 0)

    @contextmanager
    def _cleared(self, attention: Tensor | None) -> Iterator[None]:
        """Set what is not finite in padding to 0 after each layer of a float64 model.

        A sliding window that holds nothing but padding gives NaN there, as the mask's number is infinite in float32, in
        which attention weights are computed; the next layer would mix it into the text, since 0 times NaN is NaN.
        """
        with ExitStack() as stack:
            if attention is not None and self.dtype == torch.float64:
                padding = ~attention.bool()[..., None]
                for layer, known in {id(m): (m, k) for m, k in zip(self.layers, self.maps, strict=True)}.values():
                    handle = layer.register_forward_hook(_clearing(padding, known.taps[NEXT].key))
                    stack.callback(handle.remove)
            yield

    def check_ids(self, ids: Tensor) -> None:
        """Raise InputError when a token id is outside the model's vocabulary."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"token id {wrong} is out of range for {self.name}: allowed are 0 to {self.vocab_size - 1}; "
                "use the tokenizer this model was trained with"
            )

    def check_layer(self, layer: int) -> None:
        """Raise InputError for a number that is no layer of the executed order."""
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer} does not exist; {self.name} has layers 0 to {self.num_layers - 1}")

    def _looks_back_only(self, ids: Tensor) -> bool:
        """Whether another last token leaves every state before it as it was."""
        changed = ids.clone()
        changed[:, -1] = ids[:, 0]
        with torch.no_grad():
            # a row by itself: blocks with a limit of tokens let the rows of a batch see each other
            before, after = (self.run(given[:1])[:, :-1] for given in (ids, changed))
        return bool((before - after).norm() <= 1000 * eps(before.dtype) * before.norm())

    def _random_ids(self, seed: int, positions: int) -> Tensor:
        """Random ids [2, positions], distinct within a row where the vocabulary allows, without special tokens."""
        special = set(getattr(self.model.config, name, None) for name in ("pad_token_id", "bos_token_id"))
        allowed = torch.tensor([token for token in range(min(self.vocab_size, 5000)) if token not in special])
        generator = torch.Generator().manual_seed(seed)
        picks = torch.stack([torch.randperm(len(allowed), generator=generator)[:positions] for _ in range(2)])
        return allowed[picks].to(self.device)


def _clearing(padding: Tensor, key: Key) -> Callable:
    def clear(module: nn.Module, args: tuple, output: object) -> object:
        states = parts(output)[key]
        return put(output, key, states.masked_fill(padding & ~torch.isfinite(states), 0))

    return clear


def _fitting(known: LayerMap, changes: Mapping[str, Tap]) -> dict[str, Tap]:
    return {site: replace(tap) for site, tap in changes.items() if site in known.taps or site in known.missing}


def _refuse_nan(name: str, model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"{name}: weight {path} holds NaN or infinity; the checkpoint is damaged, load another one"
            )
