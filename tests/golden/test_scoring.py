"""Scores of tokens against passes over one sequence at a time, and what must not change them."""

import numpy as np
import pytest
import torch

from judged import causal_nats, masked_nats, tokenizer, view
from transect.errors import InputError
from transect.tasks._encoding import Reader, encoded
from transect.tasks.base import Subject

TEXTS = [
    ("the cat sees", " a small dog"),
    ("never goes to", " from"),
    ("the cat sees", " a small bird then"),
    ("", "red old house"),
    ("a tree and ", "river"),
    ("x", " finds the old river and the small tree then goes never to a red house from the dog"),
]


def _ids(text: str) -> list[int]:
    return encoded(tokenizer(), text)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_continuations_are_scored_as_one_by_one(name: str, batch: int):
    one = view(name)
    reader = Reader.of(Subject(view=one, batch_size=batch))
    scored = reader.score([reader.pair(*pair) for pair in TEXTS])
    for (context, continuation), found in zip(TEXTS, scored, strict=True):
        before = _ids(context.rstrip()) if context else [tokenizer().bos_token_id]
        whole = _ids(context + continuation)
        asked = whole[len(before) :] if context else whole
        np.testing.assert_allclose(found.nats, causal_nats(one.model, before, asked), atol=1e-10)
        with torch.no_grad():
            logits = one.model(input_ids=torch.tensor([[*before, *asked]])).logits[0, len(before) - 1 : -1]
        assert found.greedy == (logits.argmax(-1).tolist() == list(asked))


def test_a_pass_is_shared_by_requests_that_differ_in_their_last_token():
    one = view()
    reader = Reader.of(Subject(view=one))
    passes = []
    hook = one.model.register_forward_hook(lambda module, args, kwargs, out: passes.append(kwargs), with_kwargs=True)
    first = reader.request([5, 6, 7], [8, 9])
    scored = reader.score([first, reader.request([5, 6, 7], [8, 11]), reader.request([5, 6], [7, 8, 13])])
    hook.remove()
    assert len(passes) == 1 and len(passes[0]["input_ids"]) == 1
    for found, (before, asked) in zip(
        scored, [([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 11]), ([5, 6], [7, 8, 13])], strict=True
    ):
        np.testing.assert_allclose(found.nats, causal_nats(one.model, before, asked), atol=1e-10)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_masked_model_is_asked_for_each_token_alone(batch: int):
    one = view("bert")
    reader = Reader.of(Subject(view=one, batch_size=batch))
    words = tokenizer(wrapped=True)
    scored = reader.score([reader.pair(*pair) for pair in TEXTS])
    for (context, continuation), found in zip(TEXTS, scored, strict=True):
        before, whole = _ids(context.rstrip()) if context else [], _ids(context + continuation)
        ids = [words.bos_token_id, *whole, words.eos_token_id]
        places = range(1 + len(before), 1 + len(whole))
        np.testing.assert_allclose(found.nats, masked_nats(one.model, ids, places, words.mask_token_id), atol=1e-10)


def test_float32_scores_do_not_depend_on_batches_and_padding():
    one = view(dtype=torch.float32)
    found = []
    for batch in (1, 2, 7, 64):
        reader = Reader.of(Subject(view=one, batch_size=batch))
        found.append([s.total for s in reader.score([reader.pair(*pair) for pair in TEXTS])])
    np.testing.assert_allclose(found, [found[0]] * len(found), rtol=1e-6, atol=0)


def test_the_beginning_of_a_long_context_is_cut_off():
    one = view()
    reader = Reader.of(Subject(view=one), length=11)
    before, asked = list(range(5, 40)), [41, 42, 43]
    (found,) = reader.score([reader.request(before, asked)])
    whole = [*before, *asked][-12:]
    with torch.no_grad():
        logits = one.model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    want = [float(logits[place - 1, whole[place]]) for place in range(9, 12)]
    np.testing.assert_allclose(found.nats, want, atol=1e-10)


def test_a_masked_model_keeps_its_special_tokens_around_what_is_cut():
    one = view("bert")
    words = tokenizer(wrapped=True)
    before, asked = list(range(5, 40)), [41, 42, 43]
    request = Reader.of(Subject(view=one), length=11).request(before, asked)
    assert request.ids.tolist() == [words.bos_token_id, *[*before, *asked][-9:], words.eos_token_id]
    assert request.targets.tolist() == asked


def test_what_cannot_be_asked_is_refused():
    reader = Reader.of(Subject(view=view()), length=11)
    assert len(reader.request([5], list(range(5, 16))).targets) == 11
    with pytest.raises(InputError, match="12 tokens, more than the 11"):
        reader.request([5], list(range(5, 17)))
    with pytest.raises(InputError, match="no token of its own"):
        reader.pair("the cat", "")
    with pytest.raises(InputError, match="2 to 64"):
        Reader.of(Subject(view=view()), length=65)


def test_a_model_that_gives_nan_is_refused():
    one = view()
    with torch.no_grad():
        one.model.lm_head.weight[7] = float("nan")
    reader = Reader.of(Subject(view=one))
    with pytest.raises(InputError, match="NaN"):
        reader.score([reader.request([5, 6], [7])])
