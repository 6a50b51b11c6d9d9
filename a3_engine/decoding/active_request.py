"""An answer in the making: takes logits, chooses tokens, and knows when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from a3_engine.decoding.sampling import Sampling, draw
from a3_engine.decoding.text_emitter import TextEmitter
from a3_engine.devices import input_device, send
from a3_engine.fusion.cache import FusedCache


class ActiveRequest:
    """One request between its prompt and its last token.

    Parameters
    ----------
    ids : sequence of int
        The prompt.
    cache : Cache
        Of this request alone: a pending `FusedCache`, or an empty one.
    processors : LogitsProcessorList
        What logits go through before a token is chosen.
    ends : collection of int
        Tokens that end the answer.
    abandoned : callable
        Whether nobody waits for the answer any more.

    Attributes
    ----------
    reason : str or None
        Why it ended: ``"stop"``, ``"length"``, ``"abandoned"``; None before.
    error : BaseException or None
        What ended it instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Sequence[int],
        cache: Cache,
        sampling: Sampling,
        processors: LogitsProcessorList,
        ends: Collection[int],
        emitter: TextEmitter,
        abandoned: Callable[[], bool],
    ) -> None:
        self.cache = cache
        self.reason: str | None = None
        self.error: BaseException | None = None
        self._model = model
        self.ids = send(torch.tensor([list(ids)]), input_device(model))
        self._sampling, self._processors = sampling, processors
        self._generator = torch.Generator(self.ids.device)
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        self._ends, self._emitter, self._abandoned = ends, emitter, abandoned

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None

    def take(self, logits: torch.Tensor) -> None:
        """Choose the token after these logits, ``(1, vocabulary)``, and hand it on."""
        scores = self._processors(self.ids, logits.float())
        if self._sampling.temperature > 0:
            chosen = draw(torch.softmax(scores, dim=-1), self._generator)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        self.ids = torch.cat([self.ids, chosen], dim=1)
        token, emitter = int(chosen), self._emitter
        emitter.put(token)
        if self._abandoned():
            self.reason = "abandoned"
        elif emitter.stopped or token in self._ends:
            self.reason = "stop"
        elif emitter.n_tokens >= self._sampling.max_new_tokens:
            self.reason = "length"
        elif emitter.n_tokens == 1:
            compressor = self.cache.compressor if isinstance(self.cache, FusedCache) else None
            if compressor is not None:
                compressor.compress(self._model, self.cache, token)
