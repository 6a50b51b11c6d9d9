"""How far a method's distributions are from a full prefill's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from a3_engine.engine import A3Engine
from a3_engine.evaluation.datasets import Example
from a3_engine.evaluation.fidelity import fidelity, full_prefill
from a3_engine.evaluation.tasks.base import Figures, Task
from a3_engine.method import Method


class FidelityTask(Task):
    """Every method against one full prefill of the same ids."""

    name = "fidelity"
    about = "distance from a full prefill of the same ids: KL, agreement, likelihood"

    def measure(
        self, engine: A3Engine, example: Example, methods: Sequence[Method]
    ) -> Iterator[Figures]:
        reference = full_prefill(engine, example)
        for method in methods:
            yield {
                **asdict(fidelity(engine, reference, method)),
                "full_prefill_ttft_s": reference.ttft_s,
            }
