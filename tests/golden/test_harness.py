"""A view as a model of lm-evaluation-harness answers as that package's own `HFLM` does, also inside an edit."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import transect as tx
from harness_setup import POSITIONS, SENTENCES, START, hf_model, hflm, own_model, requests, tokenizer, without_network
from prepared import texts
from transect import harness
from transect.errors import InputError
from transect.tasks._encoding import Reader
from transect.tasks.base import Subject
from transect.view.commit import Changes, Removal
from transect.view.view import View

PAIRS = (
    ("The cat sat on", " the mat."),
    ("The cat sat on", " the dog"),  # one context twice, the same length of both
    ("", "A dog ran"),
    ("Trailing blanks  ", "move on"),
    ("Trailing line\n", "moves"),
    ("word " * 90, "and on it goes"),  # cut from the left
    ("Question: 2+2\nAnswer:", " 4"),
    ("glued", "together"),  # no blank in between: tokens of the whole text
)
MODELS = {
    "llama": (lambda: hf_model("llama"), False),
    "llama, start token": (lambda: hf_model("llama"), True),
    "gpt2": (lambda: hf_model("gpt2"), False),
    "own": (own_model, False),
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(tmp_path, monkeypatch)


def both(name: str, batch_size: int = 3):
    made, adds = MODELS[name]
    model, words = made(), tokenizer(adds)
    return harness.model(View(model, words), batch_size=batch_size), hflm(model, words)


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_hflm(name):
    ours, golden = both(name)
    expected = golden.loglikelihood(requests(list(PAIRS)), disable_tqdm=True)
    assert len(expected) == len(PAIRS)
    found = ours.loglikelihood(requests(list(PAIRS)))
    for (value, flag), (wanted, known) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, rel=1e-5)
        assert flag == known


@pytest.mark.parametrize("name", MODELS)
def test_what_greedy_decoding_gives_is_greedy(name):
    ours, golden = both(name)
    given = []
    for context in ("The cat sat on", "A dog", "Oaks", "ran home", "Pines", "slowly"):
        ids = golden.tok_encode(context)
        for _ in range(2):
            ids.append(int(golden._model_call(torch.tensor([ids]))[0, -1].argmax()))
            text = golden.tok_decode(ids)
            if golden.tok_encode(text) == ids:
                given.append((context, text[len(context) :]))
    assert given
    found = ours.loglikelihood(requests(given))
    assert [flag for _, flag in found] == [True] * len(given)
    assert [flag for _, flag in golden.loglikelihood(requests(given), disable_tqdm=True)] == [True] * len(given)


@pytest.mark.parametrize("name", MODELS)
def test_rolling_likelihoods_are_those_of_hflm(name):
    ours, golden = both(name)
    given = [("",), ("Oaks",), (" ".join(texts(7)),), ("The cat sat. " * 60,), (SENTENCES[2],)]
    expected = golden.loglikelihood_rolling(requests(given), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests(given))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (found[0] == 0) is (golden.tok_encode("") == [])  # its own start token is asked for too, as there
    assert max(len(golden.tok_encode(text)) for (text,) in given) > 2 * POSITIONS


def test_an_exact_window_and_one_token_more():
    ours, golden = both("llama")
    ids = golden.tok_encode(" ".join(texts(3)))
    for count in (POSITIONS, POSITIONS + 1):
        given = requests([(golden.tok_decode(ids[:count]),)])
        assert len(golden.tok_encode(*given[0].args)) == count
        expected = golden.loglikelihood_rolling(given, disable_tqdm=True)
        assert ours.loglikelihood_rolling(given) == pytest.approx(expected, rel=1e-5)


def test_batch_size_changes_nothing():
    found = []
    for size in (1, 7):
        ours, _ = both("gpt2", size)
        pairs = ours.loglikelihood(requests(list(PAIRS)))
        found.append([value for value, _ in pairs] + ours.loglikelihood_rolling(requests([(texts(1)[0],)])))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_start_token_in_the_text_is_not_doubled():
    ours, golden = both("llama, start token")
    given = requests([(f"{START}The cat sat on", " the mat."), ("", f"{START}The cat")])
    expected = golden.loglikelihood(given[:1], disable_tqdm=True)[0]
    assert ours.loglikelihood(given)[0][0] == pytest.approx(expected[0], rel=1e-5)
    plain = ours.loglikelihood(requests([("The cat sat on", " the mat."), ("", "The cat")]))
    assert [value for value, _ in ours.loglikelihood(given)] == pytest.approx([value for value, _ in plain], rel=1e-6)
    bare, same = both("llama")
    known = same.loglikelihood(given[1:], disable_tqdm=True)
    assert bare.loglikelihood(given[1:])[0][0] == pytest.approx(known[0][0], rel=1e-5)


def test_an_edit_is_seen_and_equals_the_committed_model(tmp_path):
    model, words = hf_model(), tokenizer()
    view = View(model, words)
    ours = harness.model(view)
    pairs, rolling = requests(list(PAIRS)), requests([(texts(1)[0],)])
    generated = requests([("The cat", {"max_gen_toks": 11})])
    with tx.edits.remove(view, "ffn", 1):
        inside = ours.loglikelihood(pairs), ours.loglikelihood_rolling(rolling), ours.generate_until(generated)
    before = ours.loglikelihood(pairs)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(inside[0], before, strict=True))
    tx.commit(view, Changes(removed=(Removal("ffn", 1),)), tmp_path / "cut")
    golden = hflm(AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32), words)
    expected = golden.loglikelihood(pairs, disable_tqdm=True)
    assert [value for value, _ in inside[0]] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert inside[1] == pytest.approx(golden.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5)
    assert inside[2] == golden.generate_until(generated, disable_tqdm=True)


GENERATED = [
    ("The cat sat on", {"until": ["</s>"], "max_gen_toks": 19}),
    ("A dog", {"until": ["\n", " "], "max_gen_toks": 13, "do_sample": False}),
    ("word " * 90, {"max_gen_toks": 7, "temperature": 0.0}),
    ("Oaks", {"until": "e", "max_gen_toks": 17}),
]


@pytest.mark.parametrize("name", MODELS)
def test_generated_text_is_that_of_hflm_and_of_generate(name):
    ours, golden = both(name)
    golden.batch_size_per_gpu = 1  # HFLM pads a batch on the left, which some models feel
    given = requests(GENERATED)
    found = ours.generate_until(given)
    assert found == golden.generate_until(given, disable_tqdm=True)
    ids = torch.tensor([golden.tok_encode("The cat sat on")])
    ends = ours.view.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=19, do_sample=False, pad_token_id=0
    )
    expected = ours.tokenizer.decode(ends[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[0] == expected.split("</s>")[0] and found[0]


def test_special_tokens_and_all_from_the_first_stop_on_are_no_text(monkeypatch):
    ours, _ = both("llama")
    made = [0, *ours.reader.encode("oak, elm. yew. fir")]
    monkeypatch.setattr(
        ours.view.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([made])], dim=1)
    )
    assert ours.generate_until(requests([("The", {"until": [".", "fir"], "max_gen_toks": 7})])) == ["oak, elm"]


@pytest.mark.parametrize("edit", ["repeat", "swap", "remove"])
def test_generated_text_inside_an_order_edit_is_that_of_full_passes(edit):
    view = View(hf_model(), tokenizer())
    ours = harness.model(view)
    change = {
        "repeat": lambda: tx.edits.repeat(view, 1, 2),
        "swap": lambda: tx.edits.swap(view, 0, 2),
        "remove": lambda: tx.edits.remove(view, "layer", 0),
    }[edit]
    with change():
        found = ours.generate_until(requests([("The cat", {"max_gen_toks": 11})]))[0]
        ids = torch.tensor([view.tokenizer("The cat", add_special_tokens=False)["input_ids"]])
        length = ids.shape[1]
        for _ in range(11):
            ids = torch.cat([ids, view.logits(ids)[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == view.tokenizer.eos_token_id:
                break
    assert found == view.tokenizer.decode(ids[0, length:], skip_special_tokens=True).split("</s>")[0]
    assert found != ours.generate_until(requests([("The cat", {"max_gen_toks": 11})]))[0]


def test_an_edit_that_reads_all_positions_is_not_given_one_at_a_time():
    view = View(hf_model(), tokenizer())
    ours = harness.model(view)
    seen = []

    def first_position(states: torch.Tensor) -> torch.Tensor:
        seen.append(states.shape[1])
        return states[:, :1].expand_as(states)

    with tx.edits.replace(view, "ffn", 1, first_position):
        ours.generate_until(requests([("The cat", {"max_gen_toks": 3})]))
    assert seen == [seen[0], seen[0] + 1, seen[0] + 2]
    assert not ours._hooked()


def test_a_masked_model_answers_by_pseudo_likelihood():
    view = View(hf_model("bert"), tokenizer(masked=True))
    ours = harness.model(view)
    reader = Reader.of(Subject(view=view))
    for (value, _), pair in zip(ours.loglikelihood(requests(list(PAIRS))), PAIRS, strict=True):
        assert value == pytest.approx(reader.score([reader.pair(*pair)])[0].total, rel=1e-6)
    text = texts(1, words=41)[0]
    ids = reader.encode(text)
    room = view.max_positions - 2
    assert room < len(ids) < 2 * room
    parts = [reader.request([], ids[:room]), reader.request(ids[:room], ids[room:])]
    expected = sum(one.total for one in reader.score(parts))
    assert ours.loglikelihood_rolling(requests([(text,)])) == pytest.approx([expected], rel=1e-6)
    with pytest.raises(InputError, match="cannot generate"):
        ours.generate_until(requests(GENERATED))


def test_chat_templates():
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(True).backend_tokenizer, bos_token=START)
    words.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ours = harness.model(View(hf_model(), words))
    text = ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == f"{START}user: Hi\n" and ours.chat_template(True) == words.chat_template
    assert ours.chat_template(False) is None
    bare = harness.model(View(hf_model(), tokenizer()))
    with pytest.raises(InputError, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_what_cannot_be_judged_is_refused(monkeypatch):
    with pytest.raises(InputError, match="no tokenizer"):
        harness.model(View(hf_model()))
    ours, _ = both("llama")
    with pytest.raises(InputError, match=r"up to 256 new tokens, and .* takes 101"):
        ours.generate_until(requests([("The cat", {})]))
    with pytest.raises(InputError, match="no token of its own"):
        ours.loglikelihood(requests([("The cat", "")]))
    with pytest.raises(InputError, match="takes 2 to 101"):
        harness.model(View(hf_model(), tokenizer()), length=103)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'pip install "transect\[eval\]"'):
        harness.run(ours.view, ["anything"])
