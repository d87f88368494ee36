"""Load a model and its tokenizer from a folder, the hub, a GGUF file or a run folder; every failure in one line."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transect import models as own  # tells the Auto classes of our models
from transect.errors import InputError
from transect.models.saved import check_description, is_checkpoint
from transect.view.checkpoints import checkpoints, home, last, named

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "state/model/*.safetensors")
_ALIGNMENT = 64  # bytes; what torch gives its own tensors


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what is known of where it came from."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    notes: tuple[str, ...] = ()
    path: str | None = None  # that it was read from


def load_model(
    source: Any, revision: str | None, dtype: str | torch.dtype | None, device: str, trust_remote_code: bool
) -> Loaded:
    """Load what `View.load` takes; raises InputError naming the source and what to do."""
    kind = _dtype(dtype)
    if isinstance(source, PreTrainedModel):
        model = source if kind is None else source.to(kind)  # pyright: ignore[reportArgumentType]
        return Loaded(_placed(model, device, live=True), None, source.config._name_or_path or "model", revision)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"cannot load a {type(source).__name__}; give a folder, a hub id, a GGUF file or a model")
    where = located(str(source), revision)
    kind = torch.float32 if kind is None else kind
    with _one_line(str(source)):
        model, tokenizer = _read(where, kind, trust_remote_code)
    align(model)
    return Loaded(_placed(model, device, live=False), tokenizer, where.name, where.label, where.notes, where.path)


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move weights that lie where a file left them to addresses as torch chooses them; CPU kernels round by address."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever reading a checkpoint raises, as an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load {source}: {first}") from error


@dataclass(frozen=True, slots=True)
class Where:
    """Where a model is read from, and what its rows call it.

    `home` is what `name` stands for: the folder, file or hub id; all checkpoints of a folder have one. `label` is the
    rows' revision, `revision` the hub's.
    """

    path: str
    name: str
    home: str
    revision: str | None = None
    label: str | None = None
    gguf: str | None = None
    notes: tuple[str, ...] = ()


def located(source: str, revision: str | None) -> Where:
    """Where a source is, without reading it; raises InputError when a local one is not there."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no file {source}; give a GGUF file, a model folder or a hub id")
        return _gguf(path)
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"no model folder {source}; give a folder with config.json, a hub id or a GGUF file")
        return Where(source, source, source, revision, revision)
    if (path / "checkpoints").is_dir():
        return _checkpoint(path, revision)
    if (path / "config.json").is_file() or is_checkpoint(path):
        found = None if revision is None else named(checkpoints(path), revision)
        return _folder(path, revision) if found is None else _checkpoint(path, found)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0])
    if checkpoints(path):
        return _checkpoint(path, revision)
    raise InputError(
        f"{source} is not a model folder: it has no config.json, no single .gguf file, no checkpoints/ "
        "and no folders with a config.json"
    )


def _gguf(path: Path) -> Where:
    note = f"weights of {path.name} are quantised values made dense"
    return Where(str(path.parent), path.stem, str(path.resolve()), None, None, path.name, (note,))


def _folder(path: Path, revision: str | None) -> Where:
    notes, label = _provenance(path)
    owner, checkpoint = home(path)
    return Where(str(path), owner.name, str(owner), None, revision or label or checkpoint, None, notes)


def _checkpoint(path: Path, revision: str | None) -> Where:
    """A checkpoint of a folder that holds several: the one named by `revision`, else the one with the highest step."""
    found = checkpoints(path)
    if not found:
        raise InputError(f"{path}/checkpoints holds no checkpoint with a config.json")
    chosen = last(found) if revision is None else named(found, revision)
    if chosen is None:
        raise InputError(f"{path} has no checkpoint {revision!r}; it has {', '.join(sorted(found))}")
    owner = path.resolve()
    owner = owner.parent if owner.name == "checkpoints" and owner.parent.name else owner
    return Where(str(found[chosen]), owner.name, str(owner), None, chosen)


def check_readable(where: Where, trust_remote_code: bool) -> None:
    """Raise InputError when a model's configuration cannot be read or a folder has no weights; loads no weights."""
    folder = Path(where.path)
    if is_checkpoint(folder):
        check_description(folder)
    if folder.is_dir() and not any(True for kind in _WEIGHTS for _ in folder.glob(kind)):
        raise InputError(f"cannot load {folder}: it has no weights ({', '.join(_WEIGHTS)})")
    with _one_line(where.path):
        AutoConfig.from_pretrained(where.path, **_extra(where, trust_remote_code))


def _provenance(path: Path) -> tuple[tuple[str, ...], str | None]:
    """The notes and label in a folder's `provenance.json`, where it has one."""
    file = path / "provenance.json"
    if not file.is_file():
        return (), None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        label = None
        if set(record) != {"note"}:
            label = f"{record['package']}=={record['version']} sha256:{record['sha256'][:16]}"
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read {file}: {type(error).__name__} {error}; it holds package, version and sha256, "
            "or only a note, or is not there"
        ) from error
    return ((record["note"],) if record.get("note") else ()), label


def _extra(where: Where, trust_remote_code: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if where.revision:
        extra["revision"] = where.revision
    if where.gguf:
        extra["gguf_file"] = where.gguf
    return extra


def _read(where: Where, dtype: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    extra = _extra(where, trust_remote_code)
    if is_checkpoint(Path(where.path)):
        check_description(Path(where.path))
    config = AutoConfig.from_pretrained(where.path, **extra)
    if dtype == torch.float64:  # fused experts refuse float64
        config._experts_implementation = "eager"
    model_class = _model_class(config, trust_remote_code, where.gguf is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=DeprecationWarning)
        model, report = model_class.from_pretrained(
            where.path, config=config, dtype=dtype, output_loading_info=True, **extra
        )
        if report["missing_keys"]:
            raise InputError(
                f"cannot load {where.path}: weight {min(report['missing_keys'])} is not in the checkpoint "
                f"({len(report['missing_keys'])} missing); a {type(model).__name__} would have it made up"
            )
        return model, _tokenizer(where.path, extra)


def _tokenizer(path: str, extra: dict[str, Any]) -> Any:
    """The tokenizer; None where there is none, as a model without one takes token ids."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **extra)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    # without files, transformers makes up one that knows special tokens only
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def _model_class(config: Any, trust_remote_code: bool, gguf: bool) -> Any:
    """The class the checkpoint was saved as, so that its head comes along and nothing is made up."""
    architectures = getattr(config, "architectures", None) or []
    owner = own if config.model_type == own.TransectConfig.model_type else transformers
    named = getattr(owner, architectures[0], None) if architectures else None
    if named is not None:
        return named
    if gguf and type(config) in AutoModelForCausalLM._model_mapping:  # such a file does not say, but has the head
        return AutoModelForCausalLM
    if trust_remote_code:
        maps = getattr(config, "auto_map", {})
        for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
            if auto in maps:
                return getattr(transformers, auto)
    return AutoModel


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _placed(model: PreTrainedModel, device: str, live: bool) -> PreTrainedModel:
    if device == "auto":
        if live or not torch.cuda.is_available():
            return model
        device = "cuda"
    try:
        return model.to(device)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
