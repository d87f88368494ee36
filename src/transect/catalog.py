"""What `list` and `show` print: names with their meaning, read from the code itself so that they cannot be stale."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields

import typer

from transect import recipes, registry
from transect.errors import InputError
from transect.recipes.reading import SUFFIXES

WIDTH = 80
NAME = 22
KINDS = ("probes", "elements", "sites", "metrics", "models", "recipes", "tasks", "suites", "sets")
MODELS = """
albert bert bloom cohere deepseek_v3 distilbert electra falcon gemma2 gemma3_text gpt2 gpt_neo gpt_neox gpt_oss gptj
granite llama mistral mixtral modernbert olmo olmo2 olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe roberta smollm3
stablelm starcoder2
""".split()  # noqa: SIM905 - one block reads better than 34 quoted lines
"""Model types of the conformance suite; any other model is tried, and refused when its proof does not hold."""


def print_kind(kind: str) -> None:
    """One entry for each name of a kind; raises InputError for an unknown kind."""
    kind = kind if kind in KINDS else f"{kind}s"
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind.removesuffix('s')!r}; kinds are {', '.join(KINDS)}")
    for name, text in _entries(kind).items():
        typer.echo(_entry(name, text))


def print_name(name: str, settings: Sequence[str] = (), context: int | None = None, dtype: str = "bfloat16") -> None:
    """The whole entry of a name, or of a recipe's file with settings and a budget.

    Raises InputError for an unknown name, with the nearest, and for settings of anything but a recipe.
    """
    if name in recipes.names() or "/" in name or name.endswith(SUFFIXES):
        from transect.recipes.page import print_recipe

        print_recipe(name, settings, context, dtype)
        return
    if settings or context is not None:
        raise InputError(f"--set and --context are for recipes; {name!r} is none, `transect list recipes` lists them")
    if name in registry.available("transect.probes"):
        typer.echo(_page(_probe(name)))
        return
    if name in registry.available("transect.tasks"):
        typer.echo(_page(_task(name)))
        return
    if name in _entries("sets"):
        from transect.tasks._sets import FOLDER

        typer.echo((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").rstrip())
        return
    if name in _entries("suites"):
        from transect.suites import FOLDER

        typer.echo((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").rstrip())
        return
    known = {entry: text for kind in KINDS[1:] for entry, text in _entries(kind).items()}
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *registry.available("transect.probes")], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"nothing is called {name!r}{hint}; `transect list KIND` lists names")
    metrics = _metrics()
    text = inspect.getdoc(metrics[name][0]) if name in metrics else known[name]
    typer.echo(f"{name}\n\n{_filled(text or '')}")


def _entry(name: str, text: str) -> str:
    if len(name) > NAME:
        return (
            f"{name}\n{textwrap.fill(text, WIDTH, initial_indent=' ' * (NAME + 1), subsequent_indent=' ' * (NAME + 1))}"
        )
    return _wrapped(f"{name:<{NAME}} {text}".rstrip(), NAME + 1)


def _entries(kind: str) -> dict[str, str]:
    from transect.view.sites import ELEMENTS, MODEL_SITES, SITES

    if kind == "probes":
        names = registry.available("transect.probes")
        return {name: (inspect.getdoc(_probe(name)) or "").split("\n\n")[0].replace("\n", " ") for name in names}
    if kind == "elements":
        return {
            name: f"{element.source} -> {element.target}{f' + {element.add}' if element.add else ''}"
            for name, element in ELEMENTS.items()
        }
    if kind == "sites":
        return SITES | MODEL_SITES
    if kind == "metrics":
        return {name: (inspect.getdoc(function) or "").split("\n")[0] for name, (function, _) in _metrics().items()}
    if kind == "tasks":
        return {name: _task(name).title for name in registry.available("transect.tasks")}  # type: ignore[attr-defined]
    if kind == "suites":
        from transect.suites import described

        return described()
    if kind == "sets":
        from transect.tasks._sets import described

        return described()
    return recipes.described() if kind == "recipes" else dict.fromkeys(MODELS, "")


def _metrics() -> dict:
    import importlib

    from transect.metrics.declare import METRICS

    for module in registry.available("transect.metrics"):
        importlib.import_module(f"transect.metrics.{module}")
    return METRICS


def _probe(name: str) -> type:
    from transect.probes.base import Probe

    return registry.load("transect.probes", name, Probe)


def _task(name: str) -> type:
    from transect.tasks.base import Task

    return registry.load("transect.tasks", name, Task)


def _page(kind: type) -> str:
    """The page of a probe or task: title, docstring, options."""
    name = kind.__module__.rpartition(".")[2]
    lines = [f"{name}: {kind.title}", "", _filled(inspect.getdoc(kind) or ""), "", "Options"]  # type: ignore[attr-defined]
    for field in fields(kind):
        shown = "" if field.default is MISSING else f" = {field.default!r}"
        lines.append(_wrapped(f"  {field.name}{shown}", 4))
    return "\n".join(lines)


def _filled(text: str) -> str:
    """A docstring with its paragraphs and labelled parts ("Source: ...") filled to the width."""
    paragraphs = (re.split(r"\n(?=[A-Z][a-z ]+:)", paragraph) for paragraph in text.split("\n\n"))
    return "\n\n".join("\n".join(_wrapped(part) for part in parts) for parts in paragraphs)


def _wrapped(text: str, indent: int = 0) -> str:
    """Text at the width of a terminal, later lines indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
