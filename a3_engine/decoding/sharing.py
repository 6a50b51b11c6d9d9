"""One forward of the model for all requests that decode at the same time.

Every request runs transformers' `generate` in a thread of its own. Its prefill is a forward of its
own too; its later steps meet here: whoever comes first waits for the others that decode, and takes
one step for all. Products of many rows cost little more than those of one, since reading the
weights is what takes the time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from a3_engine.fusion.batch import step
from a3_engine.model.computing import ComputeThread

# How long a step waits for a request that is slow to choose its token, in seconds.
PATIENCE = 0.05


@dataclass
class _Step:
    """A request's wish for the logits behind its newest token."""

    token: int
    cache: Cache
    logits: torch.Tensor | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.logits is not None or self.error is not None


class SharedForward:
    """Stands in for a model's forward; calls outside :meth:`request` go through untouched.

    Attributes
    ----------
    computing : ComputeThread
        Where all of the model's forwards run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.computing = ComputeThread()
        self._model = model
        self._own_settings = GenerationConfig()
        self._generating = 0
        self._forward = model.forward
        self._device = model.get_input_embeddings().weight.device
        self._meeting = threading.Condition()
        self._requests: set[int] = set()
        self._decoding: set[int] = set()
        self._steps: list[_Step] = []
        self._led = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> SharedForward:
        """The model's own one; engines around one model share it."""
        shared = getattr(model, "_a3_shared", None)
        if shared is None:
            shared = cls(model)

            @functools.wraps(model.forward)  # `generate` reads the signature
            def forward(*args: Any, **kwargs: Any) -> Any:
                return shared._call(*args, **kwargs)

            model._a3_shared = shared  # type: ignore[assignment]
            model.forward = forward
        return shared

    @contextmanager
    def request(self, cache: Cache) -> Iterator[None]:
        """Meanwhile forwards with this cache belong to one request, and share their steps."""
        self._requests.add(id(cache))
        try:
            yield
        finally:
            with self._meeting:
                self._requests.discard(id(cache))
                self._decoding.discard(id(cache))
                self._meeting.notify_all()

    @contextmanager
    def own_settings_aside(self) -> Iterator[GenerationConfig]:
        """Meanwhile the model has no generation settings of its own; yields those that it has.

        transformers fills what a request leaves open from them, also where the request leaves it
        off.
        """
        with self._meeting:
            if self._generating == 0:
                self._own_settings = self._model.generation_config
                self._model.generation_config = GenerationConfig()
            self._generating += 1
        try:
            yield self._own_settings
        finally:
            with self._meeting:
                self._generating -= 1
                if self._generating == 0:
                    self._model.generation_config = self._own_settings

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None or id(cache) not in self._requests:
            return self._forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1 or cache.get_seq_length() == 0:
            return self.computing.run(lambda: self._forward(*args, **kwargs))
        logits = self._meet(_Step(int(ids), cache))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _meet(self, mine: _Step) -> torch.Tensor:
        with self._meeting:
            self._decoding.add(id(mine.cache))
            self._steps.append(mine)
            self._meeting.notify_all()
            self._meeting.wait_for(lambda: mine.done or not self._led)
            if not mine.done:
                self._led = True
                self._meeting.wait_for(self._everyone_is_here, PATIENCE)
                together, self._steps = self._steps, []
        if not mine.done:
            try:
                self._take(together)
            finally:
                with self._meeting:
                    self._led = False
                    self._meeting.notify_all()
        if mine.error is not None:
            raise mine.error
        assert mine.logits is not None
        return mine.logits

    def _everyone_is_here(self) -> bool:
        return len(self._steps) >= len(self._decoding)

    def _take(self, steps: list[_Step]) -> None:
        try:
            tokens, caches = [each.token for each in steps], [each.cache for each in steps]
            logits = self.computing.run(lambda: step(self._forward, tokens, caches, self._device))
        except BaseException as error:
            for each in steps:
                each.error = error
            raise
        for place, each in enumerate(steps):
            each.logits = logits[place : place + 1]
