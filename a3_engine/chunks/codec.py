"""Bytes and tensors of one chunk: a safetensors payload with a header that says what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from a3_engine.chunks.fingerprint import FORMAT_VERSION


@dataclass(frozen=True)
class ChunkKV:
    """One chunk's keys, without position, and values.

    Parameters
    ----------
    keys : torch.Tensor
        Rotated to position 0, shape ``(layers, kv_heads, tokens, head_dim)``.
    values : torch.Tensor
        Same shape; its last dimension may differ.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Header:
    """What a payload must say of itself to be used for a request."""

    key: str
    engine: str
    n_tokens: int
    dtype: str
    version: int = FORMAT_VERSION


class DamagedPayload(Exception):
    """The payload cannot be what was asked for."""


def encode(kv: ChunkKV, header: Header) -> bytes:
    """The payload of a chunk. Its header carries a sha256 of the tensors' bytes."""
    tensors = {"keys": kv.keys.cpu().contiguous(), "values": kv.values.cpu().contiguous()}
    metadata = {"a3": json.dumps(asdict(header)), "sha256": _checksum(tensors)}
    return save(tensors, metadata)


def decode(path: Path, expected: Header, *, check: bool = False) -> ChunkKV:
    """Read a payload by memory mapping; its bytes are touched when the tensors are used.

    Parameters
    ----------
    check : bool
        Also compare the checksum, which reads every byte.

    Raises
    ------
    DamagedPayload
        It is cut, is no safetensors file, or holds another chunk than expected.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if json.loads(metadata.get("a3", "null")) != asdict(expected):
                raise DamagedPayload("its header names another chunk, model or format")
            tensors = {name: file.get_tensor(name) for name in ("keys", "values")}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedPayload(str(error)) from error
    kv = ChunkKV(**tensors)
    wrong_shape = kv.keys.dim() != 4 or kv.keys.shape[:3] != kv.values.shape[:3]
    if wrong_shape or kv.n_tokens != expected.n_tokens or str(kv.keys.dtype) != expected.dtype:
        raise DamagedPayload("its tensors have another shape or dtype than its header says")
    if check and metadata.get("sha256") != _checksum(tensors):
        raise DamagedPayload("its checksum does not match its content")
    return kv


def read_header(path: Path) -> Header:
    """The header of any payload.

    Raises
    ------
    DamagedPayload
        The file has no readable header.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return Header(**json.loads((file.metadata() or {})["a3"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedPayload(str(error)) from error


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
