"""The fused cache: one preallocated buffer a layer for the whole prompt, and then the answer.

It is an ordinary transformers `Cache`, so the model's forward and `generate` work with it. A layer
starts *pending*: it holds loaded keys and values, but says that it is empty, and the first `update`
writes the fusion pass's rows into their places. From then on it grows like a `DynamicLayer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from a3_engine.devices import send
from a3_engine.kv import ChunkKV, KVShape, LayerShape
from a3_engine.model.folding import Folding
from a3_engine.model.hooks import Args, Kwargs, SteeringCache, unmade_mask
from a3_engine.model.masks import Observer, RowMask
from a3_engine.segments import Segment

# Called with (layer's index, its cache, positions of the rows, their keys, their values) before the
# rows are written; may change in place what is stored, and the rows.
BeforeWrite = Callable[[int, "FusedLayer", torch.Tensor, torch.Tensor, torch.Tensor], None]
ROOM = 256  # tokens added when a buffer is full; a doubled 4k prompt would waste memory


class Steering(Protocol):
    """What rewrites a decoder layer's input during the first forward over a pending cache.

    ``last_token_only`` says whether the forward's caller wants the last token's logits alone.
    """

    last_token_only: bool

    def before_layer(
        self,
        cache: FusedCache,
        layer: nn.Module,
        index: int,
        args: Args,
        kwargs: Kwargs,
    ) -> tuple[Args, Kwargs]:
        """The arguments that the layer gets instead of these."""
        ...

    def computed(self) -> torch.Tensor | None:
        """Sorted positions of the tokens that the forward needs, or None for all of them."""
        ...


class Compressor(Protocol):
    """What cuts a completed cache after the answer's first token."""

    def compress(self, model: PreTrainedModel, cache: FusedCache, token: int) -> None: ...


class FusedLayer(DynamicLayer):
    """Keys and values of one layer.

    ========== ========== ===================================== ==============================
    State      ``length`` what `update` does                    what led here
    ========== ========== ===================================== ==============================
    pending    0          writes ``rows``, then shows the       allocated; `FusedCache.rewind`
                          prompt
    rows set   0          the same                              the pass's ``before_layer``
    completed  0          shows the prompt                      `complete`, where a pass needs
                                                                no more of the last layer
    whole      n_prompt   appends, as a `DynamicLayer` does     the first `update`
    growing    beyond it  appends                               decoding
    ========== ========== ===================================== ==============================

    Parameters
    ----------
    keys, values : torch.Tensor
        Buffers of shape ``(1, kv_heads, capacity, head_dim)``; where chunks are computed together,
        with an entry for each.
    n_prompt : int
        Slots of the prompt; those beyond take the answer.
    n_evicted : int
        Tokens of the prompt that have no slot, as after compression. The model goes on counting
        positions as if they were there.
    is_sliding : bool
        Whether the layer attends within a sliding window; it holds all tokens all the same.
    latent : bool
        See :class:`~a3_engine.kv.LayerShape`. What transformers sees, ``keys`` and ``values``, is
        then the other way round.

    Attributes
    ----------
    on_arrival : callable or None
        Lays into the buffers what is still on its way to them; called before anybody looks.
    after_arrival : callable or None
        Called once with the layer, as soon as all is there and before anybody looks.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        n_prompt: int,
        n_evicted: int = 0,
        is_sliding: bool = False,
        latent: bool = False,
    ) -> None:
        super().__init__()
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], latent)
        self.is_sliding = is_sliding  # transformers makes one mask for each kind of layer
        self._keys, self._values = keys, values
        self.n_prompt = n_prompt
        self.n_evicted = n_evicted
        self.length = 0
        self.rows: torch.Tensor | None = None
        self.on_arrival: Callable[[], None] | None = None
        self.after_arrival: Callable[[FusedLayer], None] | None = None
        self.before_write: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show()

    @property
    def pending(self) -> bool:
        """Whether the fusion pass has yet to write this layer's rows."""
        return self.length == 0

    def _show(self) -> None:
        self.keys, self.values = self.shape.ours(*self._first(self.length))

    def _first(self, n_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys.narrow(2, 0, n_slots), self._values.narrow(2, 0, n_slots)

    def arrive(self) -> None:
        """Lay into the buffers what is still on its way to them."""
        if self.on_arrival is not None:
            bring, self.on_arrival = self.on_arrival, None
            bring()
        if self.after_arrival is not None:
            then, self.after_arrival = self.after_arrival, None
            then(self)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's keys and values as views, each of the buffers' shape up to ``n_prompt``."""
        self.arrive()
        return self._first(self.n_prompt)

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values, each ``(prompts, kv_heads, rows, head_dim)``, into these slots."""
        rows = send(rows, self.device)
        self._keys.index_copy_(2, rows, keys)
        self._values.index_copy_(2, rows, values)

    def complete(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the pass's rows, unless that is done."""
        self.arrive()
        if self.rows is None:
            return
        if self.before_write is not None:
            self.before_write(keys, values)
        self.write(self.rows, keys, values)
        self.rows = self.before_write = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_states, value_states = self.shape.ours(key_states, value_states)
        if self.pending:
            self.complete(key_states, value_states)
            self.length = self.n_prompt
        else:
            self.make_room(key_states.shape[2])
            stop = self.length + key_states.shape[2]
            self._keys[:, :, self.length : stop] = key_states
            self._values[:, :, self.length : stop] = value_states
            self.length = stop
        self._show()
        return self.keys, self.values

    @classmethod
    def following(cls, layer: DynamicLayer) -> FusedLayer:
        """One that goes on where a layer of transformers' own stands."""
        n_tokens = layer.keys.shape[2]
        own = cls(layer.keys, layer.values, n_tokens)
        own.length = n_tokens
        own.make_room(1)
        own._show()
        return own

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with the slots that are free."""
        return self._keys, self._values

    def make_room(self, n_tokens: int) -> int:
        """Have at least ``n_tokens`` free slots; returns how many there are."""
        missing = self.length + n_tokens - self._keys.shape[2]
        if missing > 0:
            more = (0, 0, 0, missing + ROOM)
            self._keys = torch.nn.functional.pad(self._keys, more)
            self._values = torch.nn.functional.pad(self._values, more)
        return self._keys.shape[2] - self.length

    def lengthen(self, n_tokens: int) -> None:
        """Count tokens that were written into the free slots."""
        self.length += n_tokens
        self._show()

    def gather(self, slots: torch.Tensor, room: int) -> FusedLayer:
        """A layer of its own with only these slots of the prompt; there is no answer yet.

        Parameters
        ----------
        slots : torch.Tensor
            Sorted; shape ``(slots,)``, or ``(kv_heads, slots)`` where each head keeps others.
        room : int
            Empty slots after them.
        """
        self.arrive()
        slots = send(slots, self.device).expand(self._keys.shape[1], -1)
        at = slots[None, :, :, None]
        n_kept = slots.shape[1]
        keys, values = (
            torch.nn.functional.pad(
                buffer.gather(2, at.expand(1, -1, -1, buffer.shape[3])), (0, 0, 0, room)
            )
            for buffer in (self._keys, self._values)
        )
        n_evicted = self.n_evicted + self.n_prompt - n_kept
        layer = self._alike(keys, values, n_kept, n_evicted)
        layer.length = 0 if self.pending else n_kept
        layer._show()
        return layer

    def _alike(
        self, keys: torch.Tensor, values: torch.Tensor, n_prompt: int, n_evicted: int
    ) -> FusedLayer:
        """Another layer of its kind."""
        return FusedLayer(keys, values, n_prompt, n_evicted, self.is_sliding, self.shape.latent)

    def get_seq_length(self) -> int:
        return 0 if self.pending else self.length + self.n_evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0 if self.pending else self.n_evicted

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)
        self._show()


class FoldedLayer(FusedLayer, Folding):
    """A layer that folds its inputs into a state; they stand where others have keys and values."""

    lazy_initialization = LinearAttentionLayer.lazy_initialization  # type: ignore[assignment]

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        n_prompt: int,
        n_evicted: int = 0,
        n_states: int = 1,
    ) -> None:
        LinearAttentionLayer.__init__(self, n_states)
        FusedLayer.__init__(self, keys, values, n_prompt, n_evicted)
        self.shape = self.shape._replace(folds=n_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self._keys.dtype  # Nemotron H has inputs in fp32 beside weights in bf16
        return super().update(key_states.to(dtype), value_states.to(dtype))

    def _alike(
        self, keys: torch.Tensor, values: torch.Tensor, n_prompt: int, n_evicted: int
    ) -> FusedLayer:
        return FoldedLayer(keys, values, n_prompt, n_evicted, self.shape.folds)


class FusedCache(SteeringCache):
    """The prompt's cache and the pass that completes it.

    Attributes
    ----------
    positions : torch.Tensor or None
        Sorted positions of the prompt's slots; None where every token has one.
    fusion : Steering or None
        What steers the first forward.
    passing : bool
        Whether the forward that goes on now is the first.
    observer : callable or None
        Sees every attention of the tokens after the prompt; see
        :class:`~a3_engine.model.masks.RowMask`, whose positions are slots here.
    compressor : Compressor or None
        Cuts the cache after the first token.
    on_device : list of (Segment, ChunkKV)
        What was brought to the device for it, whole once its pass is over.
    """

    layers: list[FusedLayer]

    def __init__(self, layers: list[FusedLayer]) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.positions: torch.Tensor | None = None
        self.fusion: Steering | None = None
        self.passing = False
        self.observer: Observer | None = None
        self.compressor: Compressor | None = None
        self.on_device: list[tuple[Segment, ChunkKV]] = []

    def before_layer(
        self, layer: nn.Module, index: int, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if index == 0:
            self.passing = self.layers[0].pending
        if self.fusion is not None and self.passing:
            return self.fusion.before_layer(self, layer, index, args, kwargs)
        if self.observer is not None and index < len(self.layers):
            hidden = args[0] if args else kwargs["hidden_states"]
            slots = self.layers[index].length + torch.arange(hidden.shape[1])
            return args, {**kwargs, "attention_mask": RowMask(slots, observer=self.observer)}
        return None

    def inputs(self, ids: torch.Tensor) -> Kwargs:
        """All tokens; or those alone that a pass computes, where it knows them by now.

        The others are not even embedded then.
        """
        computed = None
        if self.fusion is not None and self.layers[0].pending:
            computed = self.fusion.computed()
        if computed is None:
            return {"input_ids": ids}
        rows = send(computed, ids.device)
        return {
            "input_ids": ids.index_select(1, rows),
            "position_ids": rows[None],
            "attention_mask": unmade_mask(ids.device),
        }

    def gathered(self, slots: Sequence[torch.Tensor | None], room: int = 0) -> FusedCache:
        """A cache of its own with each layer's given slots of the prompt, or with all for None."""
        return FusedCache(
            [
                layer.gather(torch.arange(layer.n_prompt) if at is None else at, room)
                for layer, at in zip(self.layers, slots, strict=True)
            ]
        )

    def retain(self, slots: Sequence[torch.Tensor | None]) -> None:
        """Evict all but the given slots of the prompt, layer by layer; None keeps a whole layer."""
        for index, at in enumerate(slots):
            if at is not None:
                self.layers[index] = self.layers[index].gather(at, ROOM)

    def subset(self, positions: torch.Tensor, room: int = 0) -> FusedCache:
        """A cache of its own with only these tokens of the prompt, given as sorted positions."""
        cache = self.gathered([positions] * len(self.layers), room)
        cache.positions = positions
        return cache

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer is."""
        return [layer.device for layer in self.layers]

    @property
    def shape(self) -> KVShape:
        """Shapes of its layers."""
        return KVShape(tuple(layer.shape for layer in self.layers))

    @property
    def prompt_nbytes(self) -> int:
        """Bytes of the prompt's keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.stored())

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        return self.shape.token_size * self.layers[0].dtype.itemsize

    def stored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's :meth:`FusedLayer.stored`."""
        return (layer.stored() for layer in self.layers)

    def rewind(self) -> None:
        """Make every layer pending again, as after loading; rows already written stay.

        A pass that lets go of rows on its way up runs once.
        """
        for layer in self.layers:
            layer.length = 0
            layer._show()
