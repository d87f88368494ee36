"""Compiled layers give the same numbers, keep their names and are compiled once; what cannot be is said in a line."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from own_models import _BASE, LAYERS, _sparse, own_model
from transect.errors import InputError
from transect.models.compiling import compile_layers
from transect.models.config import ModelConfig, merged
from transect.models.heads import TransectForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the compiler are not ours

STEPS = 3
EAGER = "aot_eager"  # traced and differentiated as by the compiler, without a compiler


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_of(model, generator: torch.Generator, steps: int = STEPS) -> tuple[list[float], list[int]]:
    """Losses of some steps of gradient descent, each on its own text, and how many graphs there were after each."""
    losses, graphs = [], []
    for _ in range(steps):
        ids = torch.randint(5, 40, (3, 13), generator=generator)
        out = model(input_ids=ids, labels=ids)
        model.zero_grad()
        out.loss.backward()
        with torch.no_grad():
            for one in model.parameters():
                one -= 0.1 * one.grad if one.grad is not None else 0
        losses.append(float(out.loss.detach()))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


def compared(name: str, mode: str, backend: str, generator: torch.Generator, said: str | None = None) -> None:
    state = generator.get_state()
    plain, compiled = own_model(name).train(), own_model(name).train()
    expected, _ = losses_of(plain, generator)
    names = list(compiled.state_dict())
    compiled.recompute(mode)
    assert compile_layers(compiled, backend) == said
    assert list(compiled.state_dict()) == names
    found, graphs = losses_of(compiled, generator.set_state(state))
    assert found == pytest.approx(expected, rel=1e-5, abs=0)
    assert graphs[0] > 1 or said  # beside that of the trial
    assert len(set(graphs)) == 1, "a later step compiled again"


@pytest.mark.parametrize(
    ("name", "mode"),
    [("standard", "none"), ("standard/masked", "cheap"), ("caa", "layer"), ("mixed/blocks", "layer")],
)
def test_dense_layers(name: str, mode: str, generator: torch.Generator):
    compared(name, mode, EAGER, generator)
    assert not counters["graph_break"]


def test_sparse_layers(generator: torch.Generator):
    compared("sparse/top_k", "cheap", EAGER, generator)


def test_layers_that_choose_are_left_where_they_are_computed_again(generator: torch.Generator):
    said = "1 of 3 layers are not compiled: recompute layer would choose blocks again"
    compared("mixed", "layer", EAGER, generator, said)


@pytest.mark.parametrize(
    ("backend", "whole"), [("reference", True), ("masked", True), ("grouped", False), ("gather", False)]
)
def test_back_ends_that_break_the_graph(backend: str, whole: bool, generator: torch.Generator):
    torch.manual_seed(3)
    chosen = ModelConfig.parse(merged(_BASE, _sparse("top_k", backend=backend) | {"layers": 1}))
    model = TransectForCausalLM.make(chosen).train()
    compile_layers(model, EAGER)
    losses_of(model, generator, steps=1)
    assert (not counters["graph_break"]) == whole


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_with_a_real_compiler(generator: torch.Generator):
    compared("standard", "none", "inductor", generator)


def test_without_a_compiler_the_run_goes_on(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler found\n\nand many more lines")

    model = own_model("standard").train()
    monkeypatch.setattr(torch, "compile", broken)
    assert compile_layers(model) == "layers are not compiled: No working C++ compiler found"
    monkeypatch.undo()
    losses_of(model, generator)
    assert counters["stats"]["unique_graphs"] == 0 and not model.model.compiled


def test_recompute_comes_first():
    model = own_model("standard")
    assert compile_layers(model, EAGER) is None
    with pytest.raises(InputError, match="after layers were compiled"):
        model.recompute("layer")
    assert len(model.model.layers) == LAYERS
