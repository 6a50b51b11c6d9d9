"""The best of some candidates."""

from __future__ import annotations

import torch

from a3_engine.devices import send


def top_candidates(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` candidate positions with the highest scores.

    Parameters
    ----------
    scores : torch.Tensor
        One score a position of the prompt, shape ``(tokens,)``.
    candidates : torch.Tensor
        Positions that may be picked.
    """
    candidates = send(candidates, scores.device)
    best = torch.topk(scores[candidates], min(k, len(candidates))).indices
    return candidates[best]
