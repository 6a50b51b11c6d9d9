"""The entropy coder's loops in C++, for any CPU, with numpy arrays as arguments."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from a3_engine.native.build import CODER, library

Array = np.ndarray[Any, Any]


def codes() -> bool:
    """Whether there are loops."""
    return library(CODER) is not None


def encode(
    symbols: Array, columns: Array, freq: Array, start: Array, states: Array
) -> tuple[Array, Array]:
    """Words and their streams' ends; fills the states. See `a3_engine.chunks.codecs.coder`."""
    n_streams, n_lanes = states.shape
    n_columns, n_tokens = symbols.shape
    room = np.empty((n_streams, n_columns // n_streams * n_tokens), np.uint16)
    counts = np.empty(n_streams, np.int64)
    arrays = [np.ascontiguousarray(each) for each in (symbols, columns, freq, start)]
    _run(
        "a3_encode",
        *arrays,
        *(freq.shape[1], n_streams, n_columns // n_streams, n_tokens, n_lanes),
        *(states, room, counts),
        torch.get_num_threads(),
    )
    # Words come last first, at the end of a stream's room.
    return np.concatenate(
        [line[len(line) - count :] for line, count in zip(room, counts, strict=True)]
    ), counts.cumsum()


def decode(
    states: Array, words: Array, ends: Array, columns: Array, slots: Array, out: Array
) -> None:
    """Fill ``out``; reads no word beyond its stream's end."""
    n_streams, n_lanes = states.shape
    n_columns, n_tokens = out.shape
    _run(
        "a3_decode",
        *(states, np.ascontiguousarray(words), ends, columns, slots),
        *(n_streams, n_columns // n_streams, n_tokens, n_lanes),
        out,
        torch.get_num_threads(),
    )


def _run(name: str, *arguments: object) -> None:
    loops = library(CODER)
    assert loops is not None
    loops[name](
        *(
            ctypes.c_void_p(one.ctypes.data) if isinstance(one, np.ndarray) else ctypes.c_long(one)  # type: ignore[arg-type]
            for one in arguments
        )
    )
