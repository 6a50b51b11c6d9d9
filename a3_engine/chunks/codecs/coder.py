"""An entropy coder: whole numbers whose frequencies are known, in little more than their entropy.

Interleaved rANS (Duda 2013, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392) with states of 32 bits,
words of 16 and frequencies of 12. A column's numbers share a table; the columns are cut into
`STREAMS` runs, and each run into `LANES` states that take turns along the tokens and read from one
sequence of words. The loops in C++ do it; where there are none numpy does, to the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from a3_engine.native import coding

BITS = 12  # of frequencies
TOTAL = 1 << BITS
LANES, STREAMS = 64, 4
REACH = 127  # of the numbers: from -REACH to REACH
SYMBOLS = 2 * REACH + 1
LOW = 1 << 16  # of a state

Numbers = npt.NDArray[Any]


class Coded(NamedTuple):
    """States ``(STREAMS, lanes)`` and ends of the streams in the words, as signed numbers."""

    states: torch.Tensor
    words: torch.Tensor
    ends: torch.Tensor


class Tables:
    """What the coder needs to know of frequencies.

    Parameters
    ----------
    counts : torch.Tensor
        int16, ``(tables, SYMBOLS)``: frequencies, which sum to ``TOTAL``; 0 for numbers that a
        table does not have. At least two are above 0.
    columns : torch.Tensor
        uint8: each column's table.
    """

    def __init__(self, counts: torch.Tensor, columns: torch.Tensor) -> None:
        freq = counts.numpy().astype(np.uint32)
        self.freq, self.start = freq, freq.cumsum(1, dtype=np.uint32) - freq
        spare = -len(columns) % STREAMS  # that all streams have as many columns
        self.n_columns = len(columns)
        self.columns = np.pad(columns.numpy(), (0, spare))
        slots = np.arange(TOTAL, dtype=np.uint32)
        # What a slot says: the number, its frequency, and how far it is from the number's start.
        self.slots = np.empty((len(freq), TOTAL), np.uint32)
        for table in range(len(freq)):
            symbol = np.repeat(np.arange(SYMBOLS, dtype=np.uint32), freq[table])
            bias = slots - self.start[table, symbol]
            self.slots[table] = freq[table, symbol] << 20 | bias << 8 | symbol
        self.most = torch.from_numpy(  # of a column's numbers, by magnitude
            ((freq > 0) * np.abs(np.arange(-REACH, REACH + 1)))
            .max(1)
            .astype(np.int32)[self.columns[: self.n_columns]]
        )


def encode(numbers: torch.Tensor, tables: Tables) -> Coded:
    """Code whole numbers that their columns' tables have.

    Parameters
    ----------
    numbers : torch.Tensor
        int32, ``(columns, tokens)``.
    """
    symbols = (numbers + REACH).to(torch.uint8).numpy()
    spare = len(tables.columns) - len(symbols)
    symbols = np.pad(symbols, ((0, spare), (0, 0)), constant_values=REACH)
    states = np.empty((STREAMS, min(LANES, symbols.shape[1])), np.uint32)
    if coding.codes():
        words, ends = coding.encode(symbols, tables.columns, tables.freq, tables.start, states)
    else:
        words, ends = _encode(symbols, tables, states)
    return Coded(
        torch.from_numpy(states.view(np.int32)),
        torch.from_numpy(words.view(np.int16)),
        torch.from_numpy(ends),
    )


def decode(coded: Coded, tables: Tables, n_tokens: int) -> torch.Tensor:
    """The numbers, as fp32; of words that nobody coded, some numbers."""
    states = coded.states.numpy().view(np.uint32).copy()
    words = coded.words.numpy().view(np.uint16)
    ends = coded.ends.numpy().clip(0, len(words))
    out = np.empty((len(tables.columns), n_tokens), np.float32)
    if coding.codes():
        coding.decode(states, words, ends, tables.columns, tables.slots, out)
    else:
        _decode(states, words, ends, tables, out)
    return torch.from_numpy(out[: tables.n_columns])


def _turns(n_columns: int, n_tokens: int) -> list[tuple[int, slice]]:
    """A stream's columns and tokens in the order in which they are decoded."""
    return [
        (column, slice(at, min(at + LANES, n_tokens)))
        for column in range(n_columns // STREAMS)
        for at in range(0, n_tokens, LANES)
    ]


def _encode(symbols: Numbers, tables: Tables, states: Numbers) -> tuple[Numbers, Numbers]:
    by_stream = symbols.reshape(STREAMS, -1, symbols.shape[1])
    columns = tables.columns.reshape(STREAMS, -1)
    turns = _turns(*symbols.shape)
    given = np.zeros((STREAMS, len(turns), states.shape[1]), bool)
    words = np.zeros(given.shape, np.uint16)
    state = np.full(states.shape, LOW, np.uint64)
    for turn in reversed(range(len(turns))):
        column, tokens = turns[turn]
        table, symbol = columns[:, column, None], by_stream[:, column, tokens]
        freq = tables.freq[table, symbol].astype(np.uint64)
        x = state[:, : symbol.shape[1]]
        full = x >= freq << np.uint64(32 - BITS)
        given[:, turn, : symbol.shape[1]] = full
        words[:, turn, : symbol.shape[1]] = x & np.uint64(0xFFFF)
        x[...] = np.where(full, x >> np.uint64(16), x)
        x[...] = (x // freq << np.uint64(BITS)) + x % freq + tables.start[table, symbol]
    states[...] = state
    ends = given.reshape(STREAMS, -1).sum(1).cumsum().astype(np.int64)
    return words[given], ends


def _decode(states: Numbers, words: Numbers, ends: Numbers, tables: Tables, out: Numbers) -> None:
    by_stream = out.reshape(STREAMS, -1, out.shape[1])
    columns = tables.columns.reshape(STREAMS, -1).astype(np.int64)
    at = np.concatenate([[0], ends[:-1]])[:, None]
    padded = np.append(words, np.uint16(0)).astype(np.uint32)  # beyond a stream's end
    for column, tokens in _turns(*out.shape):
        x = states[:, : tokens.stop - tokens.start]
        slot = tables.slots[columns[:, column, None], x & np.uint32(TOTAL - 1)]
        x[...] = (slot >> 20) * (x >> np.uint32(BITS)) + (slot >> 8 & np.uint32(TOTAL - 1))
        empty = x < LOW
        place = at + empty.cumsum(1) - 1
        place = np.where(empty & (place < ends[:, None]), place, len(words))
        x[...] = np.where(empty, x << np.uint32(16) | padded[place], x)
        at = np.minimum(at + empty.sum(1, keepdims=True), ends[:, None])
        by_stream[:, column, tokens] = (slot & np.uint32(0xFF)).astype(np.int32) - REACH
