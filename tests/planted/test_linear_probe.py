"""Linear probe: a label is read at the layer that writes it and not before; noise is chance; batches do not matter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from families import VOCAB
from labelled_texts import FIRST_FILLER, marked, subject, texts, view, word, written
from plants import planted
from transect.errors import InputError
from transect.results import Table
from transect.tasks._labelled import Example
from transect.tasks._sequences import coded
from transect.tasks.linear_probe import LinearProbe, _vectors
from transect.view.view import View


def rows(data: str, v: View, **options) -> Table:
    batch_size = options.pop("batch_size", 8)
    task, one = LinearProbe(data=data, **options), subject(v, batch_size=batch_size)
    task.check(one)
    return Table(task.rows(one))


def by_layer(table: Table, metric: str = "accuracy") -> dict[int, float]:
    return {row.layer: row.value for row in table.where(metric=metric) if row.layer is not None}


def exclusive(count: int, seed: int) -> list[dict]:
    """Two marks in front of fillers; the label is whether they differ, which no sum of word vectors says."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        one, other = (int(n) for n in generator.integers(2, size=2))
        fillers = generator.integers(FIRST_FILLER, VOCAB, 5).tolist()
        made.append({"text": " ".join(map(word, [5 + one, 7 + other, *fillers])), "label": int(one != other)})
    return made


def test_a_label_is_read_where_it_is_written_and_not_before(tmp_path):
    v = view("gpt2", torch.float64, layers=3)
    zero = torch.zeros_like
    u = torch.randn(v.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    silent = {(part, layer): zero for part in ("attn", "ffn") for layer in range(3)}

    def ends(ids: list[int]) -> Tensor:
        with torch.no_grad(), planted(v, silent), v.capture(["ffn_in"], [1]) as seen:
            v.run(torch.tensor([ids]))
        return seen["ffn_in", 1][0, :2]

    low, high = ends([5, 7, 11]), ends([6, 8, 11])

    def write(x: Tensor) -> Tensor:
        side = ((x[:, :2] - (low + high) / 2) * (high - low)).sum(-1).sign()  # [batch, 2]
        return 20 * (side[:, :1] * side[:, 1:])[..., None] * u.expand(*x.shape[:2], -1)

    data = written(tmp_path, exclusive(301, 1), exclusive(401, 2))
    with planted(v, silent | {("ffn", 1): write}):
        found = by_layer(rows(data, v))
    assert sorted(found) == [0, 1, 2, 3]
    assert found[2] == found[3] == 1.0
    assert 0.42 < found[0] < 0.58 and 0.42 < found[1] < 0.58


def test_noise_is_chance(tmp_path):
    generator = np.random.default_rng(0)
    training, test = (
        [record | {"label": int(generator.integers(2))} for record in marked(count, seed)]
        for count, seed in ((151, 1), (401, 2))
    )
    table = rows(written(tmp_path, training, test), view("bert"))
    assert all(0.4 < value < 0.6 for value in by_layer(table).values())
    majority = table.where(variant="majority", metric="accuracy").rows[0]
    assert majority.n == 401 and majority.layer is None and 0.4 < majority.value < 0.6


@pytest.mark.parametrize("name", ["bert", "gpt2", "own/standard"])
@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_vectors_are_those_of_each_text_alone(name, pool):
    v = view(name, torch.float64)
    pairs = [record["text"] for record in marked(17, 1)]
    made = coded(v, [Example(((text, ""),), "a", None) for text in pairs], ["a"], 31)
    layers = tuple(range(v.num_layers + 1))
    batched = _vectors(subject(v, batch_size=7), made.sequences, layers, pool)
    for number, (tokens,) in enumerate(made.sequences):
        with torch.no_grad(), v.capture(["resid", "resid_next"]) as seen:
            v.run(torch.from_numpy(tokens.ids)[None])
        states = [seen["resid", layer][0] for layer in layers[:-1]] + [seen["resid_next", v.num_layers - 1][0]]
        text = torch.from_numpy(~tokens.special)
        for layer, state in enumerate(states):
            expected = {"mean": state[text].mean(0), "first": state[0], "last": state[-1]}[pool]
            assert torch.allclose(batched[layer, number], expected, rtol=0, atol=1e-11)


def test_rows_do_not_depend_on_the_batch(tmp_path):
    data = written(tmp_path, marked(97, 1), marked(41, 2))
    v = view("gpt2", torch.float64)
    one, other = (rows(data, v, batch_size=size) for size in (1, 13))
    for row, same in zip(one, other, strict=True):
        assert (row.metric, row.layer, row.part, row.variant, row.n) == (
            same.metric, same.layer, same.part, same.variant, same.n,
        )  # fmt: skip
        assert row.value == pytest.approx(same.value, abs=1e-9)


def test_chosen_layers_are_those_of_all(tmp_path):
    data = written(tmp_path, marked(97, 1), marked(41, 2))
    v = view("gpt2", torch.float64)
    some, whole = by_layer(rows(data, v, layers=(2, 0))), by_layer(rows(data, v))
    assert some == {layer: whole[layer] for layer in (2, 0)}
    row = rows(data, v, layers=(0,)).where(metric="macro_f1", layer=0).rows[0]
    assert (row.site, row.n, row.split, row.domain) == ("resid", 41, "test", "made") and row.part.startswith("ridge ")


def test_a_model_is_left_as_it_is(tmp_path):
    v = view("bert")
    before = [tensor.clone() for tensor in v.model.state_dict().values()]
    rows(written(tmp_path, marked(41, 1), marked(11, 2)), v, ridges=(1.0,))
    assert all(map(torch.equal, before, v.model.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": (3,)}, "resid 0 to 2"), ({"pool": "max"}, "pool is 'max'"), ({"ridges": (0.0,)}, "above 0")],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, options, message):
    data = written(tmp_path, marked(31, 1), marked(11, 2))
    with pytest.raises(InputError, match=message) as error:
        rows(data, view("bert"), **options)
    assert "\n" not in str(error.value)


def test_sets_of_options_are_refused(tmp_path):
    records = [{"question": text, "choices": ["w11", "w12"], "gold": label} for text, label in texts(41, 1)]
    layout = {"context": "{{ question }}", "options": "choices", "gold": "gold"}
    with pytest.raises(InputError, match="set of options"):
        rows(written(tmp_path, records, records[:7], **layout), view("bert"))
