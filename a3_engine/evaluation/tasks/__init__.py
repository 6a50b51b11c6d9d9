"""The tasks by name. A new task is one file in this folder and one line here."""

from __future__ import annotations

from a3_engine.evaluation.tasks.base import Task
from a3_engine.evaluation.tasks.fidelity import FidelityTask
from a3_engine.evaluation.tasks.needle import Needle
from a3_engine.evaluation.tasks.qa import QA
from a3_engine.evaluation.tasks.ruler import Ruler
from a3_engine.evaluation.tasks.summarize import Summarize

TASKS: dict[str, Task] = {
    task.name: task for task in (FidelityTask(), Needle(), QA(), Ruler(), Summarize())
}


def make_task(task: str | Task) -> Task:
    """A task by name, or the given one.

    Raises
    ------
    ValueError
        No task has this name.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[task]
