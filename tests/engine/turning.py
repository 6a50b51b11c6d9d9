"""Rotations pair by pair, and a real prompt to try methods on."""

from __future__ import annotations

import math

import torch

QUESTION = "Why did the keeper of the lighthouse light the lamp by hand in the winter of 1887?"


PARAGRAPHS = [
    "The lighthouse at Skerry Point was built in 1851 from granite that was cut on the island. "
    "Its tower is thirty metres high, and a stair of one hundred and forty steps leads up.",
    "Bread dough should rest for at least an hour before it is shaped. A longer rest in a cool "
    "place, overnight for example, gives the crust a better colour and the crumb more flavour.",
    "In the winter of 1887 the clockwork that turned the lamp froze. The keeper, Anna Lindqvist, "
    "lit the lamp by hand every evening for five weeks, so that no ship would miss the harbour.",
    "The harbour railway carried herring to the city until the road was opened in 1934. Two of its "
    "engines stand in the museum today, and children may sit in the driver's seat.",
    "Gulls nest on the northern cliffs from April to July. Visitors are asked to keep to the path "
    "and to leave their dogs at home, because a frightened bird does not return to its eggs.",
]


def turned(vector: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """A head's query or key, rotated to its position."""
    out, half = vector.clone(), len(vector) // 2
    for i in range(half):
        angle = position / theta ** (2 * i / len(vector))
        a, b = float(vector[i]), float(vector[i + half])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out
