"""Decoding steps that requests take together.

Each request prefills alone. From then on a step is one forward for the newest tokens of all that
decode: products of many rows cost little more than those of one, since reading the weights is what
takes the time. A request that comes or goes changes nothing for the others.
"""

from __future__ import annotations

import threading

from transformers import PreTrainedModel

from a3_engine.decoding.active_request import ActiveRequest
from a3_engine.decoding.graphs import GraphedSteps
from a3_engine.devices import input_device
from a3_engine.model.executor import DeviceExecutor
from a3_engine.model.hooks import arguments
from a3_engine.processes import make_anew_in_child


class BatchedDecoder:
    """The requests of one model that decode at this moment.

    Parameters
    ----------
    model : PreTrainedModel
        With the hooks of the fusion pass.

    Attributes
    ----------
    executor : DeviceExecutor
        Where the model computes.
    settings : GenerationConfig
        The model's own generation settings.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = input_device(model)
        self.executor = DeviceExecutor.on(self._device)
        self.settings = model.generation_config
        self._renew()
        make_anew_in_child(self._renew)

    def _renew(self) -> None:
        self._meeting = threading.Condition()
        self._requests: list[ActiveRequest] = []
        self._led = False
        self._graphs = GraphedSteps(self._model)

    def run(self, request: ActiveRequest) -> None:
        """Prefill a reply, and decode it to its end; one thread of those that wait leads."""
        self.executor.run(lambda: self._prefill(request), release_helpers=False)
        with self._meeting:
            self._requests.append(request)
        try:
            while self._leads(request):
                try:
                    self.executor.run(self._step, release_helpers=False)
                finally:
                    with self._meeting:
                        self._led = False
                        self._meeting.notify_all()
        finally:  # also when the thread that waits is interrupted
            self._graphs.leave(request.cache)
            self.executor.release_helpers()
            with self._meeting:
                self._requests = [other for other in self._requests if other is not request]
        if request.error is not None:
            raise request.error

    def _prefill(self, request: ActiveRequest) -> None:
        logits = self._model(
            **arguments(self._model, request.ids, request.cache), logits_to_keep=1
        ).logits
        request.take(logits[:, -1])

    def _leads(self, request: ActiveRequest) -> bool:
        """Wait until this reply has ended, or nobody steps: then this thread does."""
        with self._meeting:
            self._meeting.wait_for(lambda: request.ended or not self._led)
            if not request.ended:
                self._led = True
            return not request.ended

    def _step(self) -> None:
        with self._meeting:
            requests = [request for request in self._requests if not request.ended]
        try:
            tokens = [int(request.ids[0, -1]) for request in requests]
            caches = [request.cache for request in requests]
            logits = self._graphs.step(tokens, caches)
        except BaseException as error:
            for request in requests:
                request.error = error
            return
        for place, request in enumerate(requests):
            try:
                request.take(logits[place])
            except BaseException as error:  # its own affair
                request.error = error
