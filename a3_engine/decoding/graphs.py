"""Decoding steps as CUDA graphs.

A step of one token is a thousand small launches, which the host takes longer to make than the
device to run (docs/gpu.md). Captured once for a number of requests, they are replayed as one.
Requests come and go by what stands in a table of addresses; see :mod:`a3_engine.fusion.addressed`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from a3_engine.devices import input_device, send
from a3_engine.fusion.addressed import COLUMNS, AddressedCache, Seat
from a3_engine.model.batch_cache import step
from a3_engine.model.cache_argument import with_cache
from a3_engine.model.kv_shape import kv_shape
from a3_engine.native import kernels_on
from a3_engine.processes import Lock

logger = logging.getLogger(__name__)

# Requests of a captured step. Steps of 2, 4, 8 and 16 were tried on a GPU too; with two engines and
# eight threads one of eight answers differed there, so that several requests step without a graph
# until that is explained (docs/gpu.md).
SIZES = (1,)


class Captured(NamedTuple):
    """A step, and what it reads and writes."""

    replay: Callable[[], None]
    ids: torch.Tensor
    positions: torch.Tensor
    grown: torch.Tensor
    table: torch.Tensor
    logits: torch.Tensor


class GraphedSteps:
    """The decoding steps of one model; captured where it computes on one GPU.

    Parameters
    ----------
    model : PreTrainedModel
        With the hooks of the fusion pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = input_device(model)
        self._captured: dict[int, Captured] = {}
        self._seats: dict[int, Seat] = {}
        self._shown: tuple[int, list[Seat]] = (0, [])  # whose addresses a size's table holds
        one_device = {weight.device for weight in model.parameters()} == {self._device}
        self._usable = one_device and kernels_on(self._device) is not None
        self._usable = self._usable and kv_shape(model.get_decoder()).plain
        self._lock = Lock()  # seats are left by the threads that waited for their answers

    def step(self, tokens: Sequence[int], caches: Sequence[Cache]) -> torch.Tensor:
        """Logits after one token of each request, ``(requests, 1, vocabulary)``.

        Each cache grows by its token, but knows of it only after :meth:`leave`.
        """
        with self._lock:
            return self._step(tokens, caches)

    def _step(self, tokens: Sequence[int], caches: Sequence[Cache]) -> torch.Tensor:
        size = next((size for size in SIZES if size >= len(tokens)), None)
        if not self._usable or size is None:
            return self._plain(tokens, caches)
        if size in self._captured:
            return self._replay(self._captured[size], tokens, caches)
        # The first step of a size is taken both ways, which write the same keys and values.
        expected = self._plain(tokens, caches)
        try:
            self._captured[size] = self._capture(size)
            for cache in caches:
                cache.crop(-1)
            got = self._replay(self._captured[size], tokens, caches)
        except RuntimeError as error:
            logger.warning("Decoding goes on without CUDA graphs: %s", error)
            self._usable = False
            return expected
        if not _close(got, expected):
            logger.warning("Decoding goes on without CUDA graphs, whose logits differ.")
            self._usable = False
            self._settle()
            for cache in caches:
                cache.crop(-1)
            return self._plain(tokens, caches)
        return expected

    def _plain(self, tokens: Sequence[int], caches: Sequence[Cache]) -> torch.Tensor:
        self._settle()
        return step(self._model, tokens, caches, self._device)

    def _replay(
        self, step: Captured, tokens: Sequence[int], caches: Sequence[Cache]
    ) -> torch.Tensor:
        seats = [self._seat(cache) for cache in caches]
        moved = [seat.make_room() for seat in seats]
        size = len(step.ids)
        if any(moved) or self._shown != (size, seats):
            self._show(step, seats)
        nobody = [0] * (size - len(seats))
        sent = send(
            torch.tensor(
                [
                    [*tokens, *nobody],
                    [seat.position + seat.grown for seat in seats] + nobody,
                    [seat.grown for seat in seats] + nobody,
                ]
            ),
            self._device,
        )
        step.ids.copy_(sent[0, :, None])
        step.positions.copy_(sent[1, :, None])
        step.grown.copy_(sent[2])
        step.replay()
        for seat in seats:
            seat.grown += 1
        return step.logits[: len(seats)].clone()  # the next replay writes over them

    def leave(self, cache: Cache) -> None:
        """A request decodes no more; its cache is whole from now on."""
        with self._lock:
            if (seat := self._seats.pop(id(cache), None)) is not None:
                seat.settle()
                self._shown = (0, [])

    def _settle(self) -> None:
        """Let every cache know what the steps have added, as before a step without a graph."""
        for seat in self._seats.values():
            seat.settle()
        self._seats.clear()
        self._shown = (0, [])

    def _seat(self, cache: Cache) -> Seat:
        if id(cache) not in self._seats:
            self._seats[id(cache)] = Seat(cache)
        return self._seats[id(cache)]

    def _show(self, step: Captured, seats: Sequence[Seat]) -> None:
        """Fill in a step's table; where there are fewer requests, the rest writes nowhere."""
        size = step.table.shape[1]
        rows = torch.tensor([seat.rows for seat in seats]).transpose(0, 1)
        step.table[:, : len(seats)].copy_(send(rows.contiguous(), self._device))
        if size > len(seats):
            step.table[:, len(seats) :].copy_(self._empty[:, None])
        self._shown = (size, list(seats))

    def _capture(self, size: int) -> Captured:
        decoder, device = self._model.get_decoder(), self._device
        (layers, kv_heads, _, head_dim), _ = kv_shape(decoder).of_chunk(1)
        if not self._captured:
            # A slot for requests that are not there.
            self._slot = torch.zeros(2, kv_heads, 1, head_dim, dtype=decoder.dtype, device=device)
            row = [self._slot[0].data_ptr(), self._slot[1].data_ptr(), self._slot.stride(1), 0]
            self._empty = torch.tensor(row, device=device).expand(layers, -1)
        ids, positions = (torch.zeros(size, 1, dtype=torch.long, device=device) for _ in "ip")
        grown = torch.zeros(size, dtype=torch.long, device=device)
        table = torch.empty(layers, size, COLUMNS, dtype=torch.long, device=device)
        table.copy_(self._empty[:, None])
        cache = AddressedCache(table, grown, kv_heads)
        mask = torch.empty(1, 1, 1, 1, device=device)

        def forward() -> torch.Tensor:
            logits: torch.Tensor = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                **with_cache(self._model, cache),
                use_cache=True,
            ).logits
            return logits

        if device.type != "cuda":  # Triton's interpreter: the same step, launch by launch
            logits = forward()

            def again() -> None:
                logits.copy_(forward())

            return Captured(again, ids, positions, grown, table, logits)
        aside = _capturing(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            # Compiles and loads what it needs. On the stream that captures, so that cuBLAS takes
            # its workspace there from memory that outlives this graph: all later ones share it.
            forward()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on reading chunks meanwhile.
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            logits = forward()
        return Captured(graph.replay, ids, positions, grown, table, logits)


@functools.cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _close(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether two ways of one step differ by no more than rounding does.

    A step that reads or writes in the wrong place is off by more than the logits' own length; eight
    billion random weights in bf16 make a tenth of it of another order of sums.
    """
    bound = 1e-2 if ours.dtype == torch.float32 else 0.25
    return bool((ours.float() - reference.float()).norm() <= bound * reference.float().norm())
