"""Decoding steps that requests take together.

Each request prefills alone. From then on a step is one forward for the newest tokens of all that
decode: products of many rows cost little more than those of one, since reading the weights is what
takes the time. A request that comes or goes changes nothing for the others.
"""

from __future__ import annotations

import threading

from transformers import PreTrainedModel

from a3_engine.decoding.active_request import Reply
from a3_engine.decoding.graphs import GraphedSteps
from a3_engine.devices import input_device
from a3_engine.fusion.fusion_pass import arguments
from a3_engine.model.executor import Computing
from a3_engine.processes import make_anew_in_child


class SharedDecoding:
    """The requests of one model that decode at this moment.

    Parameters
    ----------
    model : PreTrainedModel
        With the hooks of the fusion pass.

    Attributes
    ----------
    computing : Computing
        Where the model computes.
    settings : GenerationConfig
        The model's own generation settings.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = input_device(model)
        self.computing = Computing.on(self._device)
        self.settings = model.generation_config
        self._renew()
        make_anew_in_child(self._renew)

    def _renew(self) -> None:
        self._meeting = threading.Condition()
        self._replies: list[Reply] = []
        self._led = False
        self._graphs = GraphedSteps(self._model)

    def run(self, reply: Reply) -> None:
        """Prefill a reply, and decode it to its end; one thread of those that wait leads."""
        self.computing.run(lambda: self._prefill(reply), rest=False)
        with self._meeting:
            self._replies.append(reply)
        try:
            while self._leads(reply):
                try:
                    self.computing.run(self._step, rest=False)
                finally:
                    with self._meeting:
                        self._led = False
                        self._meeting.notify_all()
        finally:  # also when the thread that waits is interrupted
            self._graphs.leave(reply.cache)
            self.computing.rest()
            with self._meeting:
                self._replies = [other for other in self._replies if other is not reply]
        if reply.error is not None:
            raise reply.error

    def _prefill(self, reply: Reply) -> None:
        logits = self._model(
            **arguments(self._model, reply.ids, reply.cache), logits_to_keep=1
        ).logits
        reply.take(logits[:, -1])

    def _leads(self, reply: Reply) -> bool:
        """Wait until this reply has ended, or nobody steps: then this thread does."""
        with self._meeting:
            self._meeting.wait_for(lambda: reply.ended or not self._led)
            if not reply.ended:
                self._led = True
            return not reply.ended

    def _step(self) -> None:
        with self._meeting:
            replies = [reply for reply in self._replies if not reply.ended]
        try:
            tokens = [int(reply.ids[0, -1]) for reply in replies]
            caches = [reply.cache for reply in replies]
            logits = self._graphs.step(tokens, caches)
        except BaseException as error:
            for reply in replies:
                reply.error = error
            return
        for place, reply in enumerate(replies):
            try:
                reply.take(logits[place])
            except BaseException as error:  # its own affair
                reply.error = error
