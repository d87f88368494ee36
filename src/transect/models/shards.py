"""Tensors in safetensors files, each process its part, in the format of torch's distributed checkpoints.

torch's `HuggingFaceStorageReader` reads them, on any number of processes. They are not written by its
`HuggingFaceStorageWriter`, which makes each file in memory first (twice the size of the state beside the state), plans
with collectives, which a writing thread should not need, and cannot take checksums as it writes.
"""

import json
import os
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_world_size
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

Form = tuple[tuple[int, ...], torch.dtype]
"""A saved tensor's whole shape, and its type."""


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A process' part of a tensor, where in the whole it begins, and whether processes outside its mesh have it too."""

    tensor: Tensor
    offsets: tuple[int, ...]
    elsewhere: bool = False


def pieces(state: Mapping[str, Tensor], is_main: bool) -> dict[str, Piece]:
    """What this process writes: its shards, of equal replicas only the first; whole tensors only the main one."""
    own = {}
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if is_main:
                own[name] = Piece(tensor.detach(), (0,) * tensor.ndim)
            continue
        place = tensor.device_mesh.get_coordinate()
        if place is None or any(at and kind.is_replicate() for at, kind in zip(place, tensor.placements, strict=True)):
            continue
        local = tensor.to_local().detach()
        if local.numel() == 0 and any(place):  # there were more processes than rows
            continue
        (chunk,) = tensor.__create_chunk_list__()
        own[name] = Piece(local, tuple(chunk.offsets), tensor.device_mesh.size() < get_world_size())
    return own


def copied(own: Mapping[str, Piece]) -> dict[str, Piece]:
    """Copies in the memory of the CPU, so that training can change the tensors; of a GPU's in pinned memory."""
    copies = {}
    for name, piece in own.items():
        tensor = piece.tensor
        room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = replace(piece, tensor=room.copy_(tensor, non_blocking=True))
    if any(piece.tensor.is_cuda for piece in own.values()):
        torch.cuda.synchronize()
    return copies


def write(path: Path, own: Mapping[str, Piece]) -> dict[str, Any]:
    """Write one file through to the disk; its size in bytes and blake2b, taken on the way. Raises OSError.

    Memory: one tensor at a time where they are on a GPU, else nothing. Larger types come first, so all are aligned.
    """
    order = sorted(own, key=lambda name: (-own[name].tensor.element_size(), name))
    offsets = {name: {"saved_offsets": own[name].offsets} for name in order}
    about = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name in order:
        tensor = own[name].tensor
        span = [at, at + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _written(path, chain([struct.pack("<Q", len(text)), text], (_content(own[name].tensor) for name in order)))


def _content(tensor: Tensor) -> Any:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy()


def _written(path: Path, blocks: Iterable[Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = blake2b(digest_size=32)
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            mark.update(block)
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "blake2b": mark.hexdigest()}


def forms(folder: Path) -> dict[str, Form]:
    """Whole shape and type of every tensor in the files of a folder; nothing where there are none."""
    if not folder.is_dir():
        return {}
    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in found.items()}


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, of a sharded one this process' part; each process reads for itself what it needs."""
    if not into:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said of any reading alone
        state = {name: tensor.detach() for name, tensor in into.items()}
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
