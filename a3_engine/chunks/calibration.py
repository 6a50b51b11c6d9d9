"""What the codec `compact` has to know of a model: found once, from shipped texts, and stored.

The basis is an entry of the chunk store, so it is checked, shared and carried as chunks are. A
digest of its content is in the key of every chunk that needs it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from importlib.resources import files

import torch

from a3_engine.chunks.codecs import CODECS, coder
from a3_engine.chunks.codecs.base import Codec, Tensors
from a3_engine.chunks.codecs.compact import (
    BASIS,
    STRENGTHS,
    TABLES,
    Compact,
    is_sound,
    rounded,
)
from a3_engine.chunks.fingerprint import digest
from a3_engine.chunks.library import Encoder
from a3_engine.chunks.payload import Header, Payload
from a3_engine.chunks.store import ChunkStore
from a3_engine.errors import StoreError
from a3_engine.kv import ChunkKV

logger = logging.getLogger(__name__)

TOKENS = 10_000  # to learn from
TEXT_TOKENS = 192  # of a text at most: about a passage
RIDGE = 1e-3  # of the scaled states' mean square
LEAST, OCTAVE = 0.02, 4  # root mean square of the first table's numbers; tables an octave
FARTHEST = 10  # number that a table has, in those
PRIOR = 200  # numbers that a table has seen before it is counted


def texts() -> list[str]:
    """Passages that ship with the package; see `evaluation/data/README.md`."""
    source = files("a3_engine") / "evaluation" / "data" / "sample.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(passage["text"] for row in rows for passage in row["ctxs"]))


def make_codec(
    name: str,
    engine: str,
    store: ChunkStore,
    encoder: Encoder,
    tokenize: Callable[[str], Sequence[int]],
    prefix_ids: Sequence[int],
) -> tuple[Codec, tuple[str, ...]]:
    """A codec by name, and the keys of what the store has to keep for it.

    One that has to know the model finds its basis in the store, or makes it now, in seconds.

    Parameters
    ----------
    engine : str
        Fingerprint of model, tokenizer, dtype and rotary parameters.
    """
    if name in CODECS:
        return CODECS[name], ()
    keys, values = encoder.shape.of_chunk(1)
    header = Header(
        digest(BASIS, name, STRENGTHS[name], TOKENS, engine),
        engine,
        keys,
        encoder.dtype,
        BASIS,
        value_dim=0 if values == keys else values[3],
    )
    payload = store.get(header)
    if payload is None or not is_sound(payload.tensors):
        logger.info("The codec %s is calibrated to this model, once.", name)
        payload = Payload(header, fit(_seen(encoder, tokenize, prefix_ids), STRENGTHS[name]))
        try:
            store.put(payload)
        except StoreError as error:
            logger.warning("%s Compact chunks serve this process only.", error)
    codec = Compact(name, payload.tensors, payload.digest().hex())
    return codec, (header.key,)


def _seen(
    encoder: Encoder, tokenize: Callable[[str], Sequence[int]], prefix_ids: Sequence[int]
) -> list[ChunkKV]:
    """Keys and values of the shipped texts, as those of chunks."""
    ids: list[Sequence[int]] = []
    for text in texts():
        if sum(map(len, ids)) < TOKENS:
            ids.append(tokenize(text)[:TEXT_TOKENS])
    prefix = encoder.encode([prefix_ids], None)[0][0] if prefix_ids else None
    batches = encoder.batches(ids, [len(each) for each in ids])
    return [kv for batch in batches for kv in encoder.encode(batch, prefix)[0]]


@torch.inference_mode()
def fit(seen: Sequence[ChunkKV], step: float) -> Tensors:
    """A basis from keys and values of one model.

    Layer by layer, on what decoding gives of the layer below: a linear map by ridge regression, the
    principal axes of the rest, and how large the numbers along each axis are. Axes with numbers of
    about one size share a table of frequencies.
    """
    exact = {
        kind: torch.cat([getattr(kv, f"{kind}s").cpu().float() for kv in seen], dim=2)
        .transpose(1, 2)
        .flatten(2)
        for kind in ("key", "value")
    }
    n_rows, n_tokens = exact["key"].shape[:2]
    sizes = {kind: states.shape[2] for kind, states in exact.items()}
    basis: Tensors = {
        "value_beside": torch.zeros(n_rows, sizes["key"], sizes["value"], dtype=torch.float16)
    }
    for kind, size in sizes.items():
        for name in ("axes", "before"):
            basis[f"{kind}_{name}"] = torch.zeros(n_rows, size, size, dtype=torch.float16)
        basis[f"{kind}_table"] = torch.zeros(n_rows, size, dtype=torch.uint8)
        basis[f"{kind}_mean"] = mean = exact[kind].mean(1)
        scale = (exact[kind] - mean[:, None]).square().mean((1, 2)).sqrt()
        basis[f"{kind}_scale"] = torch.where(scale > 0, scale, 1)[:, None]
    counted = torch.zeros(TABLES, coder.SYMBOLS)
    below: dict[str, torch.Tensor] = {}
    for row in range(n_rows):
        done: dict[str, torch.Tensor] = {}
        for kind, states in exact.items():
            scaled = (states[row] - basis[f"{kind}_mean"][row]) / basis[f"{kind}_scale"][row]
            known = {"before": below[kind]} if below else {}
            if kind == "value":
                known["beside"] = done["key"]
            guess = torch.zeros_like(scaled)
            if known:
                maps = _regression(torch.cat(list(known.values()), dim=1), scaled).half()
                for name, part in zip(
                    known,
                    torch.split(maps, [each.shape[1] for each in known.values()]),
                    strict=True,
                ):
                    basis[f"{kind}_{name}"][row] = part
                    guess += known[name] @ part.float()
            axes = _principal_axes(scaled - guess).half()
            numbers = rounded((scaled - guess) @ axes.float() / step)
            tables = _tables_of(numbers)
            basis[f"{kind}_axes"][row], basis[f"{kind}_table"][row] = axes, tables
            places = numbers.clamp(-coder.REACH, coder.REACH).long() + coder.REACH
            places += tables * coder.SYMBOLS
            counted += torch.bincount(places.flatten(), minlength=counted.numel()).view_as(counted)
            done[kind] = torch.addmm(guess, numbers, step * axes.float().T)
        below = done
    basis["counts"] = counts = _counts(counted)
    bits = coder.BITS - counts.clamp(min=1).float().log2()
    basis["token_nbytes"] = ((bits * counted).sum() / 8 / n_tokens).reshape(1)
    return basis


def _regression(sources: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The linear map from one to the other with the least squared error, nearly."""
    square = sources.T @ sources
    square.diagonal().add_(RIDGE * len(sources))
    return torch.linalg.solve(square, sources.T @ target)


def _principal_axes(states: torch.Tensor) -> torch.Tensor:
    """Columns, the one with the largest numbers first."""
    return torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)


def _tables_of(numbers: torch.Tensor) -> torch.Tensor:
    """Each column's table, by its root mean square."""
    size = numbers.square().mean(0).sqrt().clamp(min=LEAST)
    return ((size / LEAST).log2() * OCTAVE).long().clamp(max=TABLES - 1)


def _counts(seen: torch.Tensor) -> torch.Tensor:
    """Frequencies of every table: what was seen of both signs, and Laplace's law before it."""
    size = LEAST * 2 ** ((torch.arange(TABLES) + 0.5) / OCTAVE)[:, None]
    far = torch.arange(-coder.REACH, coder.REACH + 1).abs()[None]
    law = (-far * (math.sqrt(2) / size)).exp()
    share = (seen + seen.flip(1)) / 2 + PRIOR * law / law.sum(1, keepdim=True)
    within = far <= (FARTHEST * size).ceil() + 1
    share = share * within / (share * within).sum(1, keepdim=True)
    counts = (share * (coder.TOTAL - within.sum(1, keepdim=True))).floor().int() + within.int()
    counts[:, coder.REACH] += coder.TOTAL - counts.sum(1)
    return counts.short()
