"""Other forms of the default method, side by side: the ablation in docs/results.md.

`python benchmarks/mend_forms.py FILE --skip 20 --limit 5` takes questions of the file's first half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from a3_engine import A3Engine
from a3_engine.evaluation.datasets import read_examples
from a3_engine.evaluation.run import evaluate
from a3_engine.evaluation.summary import summarize
from a3_engine.fusion.cache import BeforeWrite, FusedLayer
from a3_engine.fusion.correction import KVCorrection
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.fusion.topk import top_candidates
from a3_engine.layout import Layout
from a3_engine.method import Method, make_method
from a3_engine.model.rotary import Rotation, rotate_


@dataclass(frozen=True)
class Spread(Mend):
    """A fifth of the recomputed tokens is spread evenly."""

    name: ClassVar[str] = "spread"

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        budget, candidates = self.budget(layout), layout.inexact_positions
        at = torch.linspace(0, len(candidates) - 1, budget // 5).long()
        even = candidates[at].to(attention.device)
        scores = self.scores(layout, attention)
        scores[even] = 0.0
        return torch.cat([even, top_candidates(scores, candidates, budget - len(even))])


@dataclass(frozen=True)
class Adaptive(Mend):
    """As many tokens as hold a share of the question's attention; ``ratio`` is ignored."""

    name: ClassVar[str] = "adaptive"
    mass: float = 0.6

    def select(self, layout: Layout, attention: torch.Tensor) -> torch.Tensor:
        scores, candidates = self.scores(layout, attention), layout.inexact_positions
        held = scores[candidates].sort(descending=True).values.cumsum(0)
        enough = int((held < self.mass * held[-1]).sum()) + 1
        return top_candidates(scores, candidates, enough)


@dataclass(frozen=True)
class OtherRepair(Mend):
    """The repair's strength follows how well the probes agree, or the repair is a linear map."""

    form: str = "agree"

    def before_write(
        self, layout: Layout, rotation: Rotation, devices: Sequence[torch.device]
    ) -> BeforeWrite:
        movable = torch.zeros(layout.n_tokens, dtype=torch.bool)
        movable[layout.inexact_positions] = True
        tables = rotation.tables(torch.arange(layout.n_tokens), devices)

        def move(
            index: int,
            layer: FusedLayer,
            rows: torch.Tensor,
            fresh_key: torch.Tensor,
            fresh_value: torch.Tensor,
        ) -> None:
            which = movable[rows].nonzero()[:, 0]
            if not len(which):
                return
            if len(which) > 64:
                which = which[torch.linspace(0, len(which) - 1, 64).long()]
            at = rows[which]
            keys, values = (state[0] for state in layer.stored())
            cos, sin = tables[index]
            key_move = (fresh_key[0, :, which] - keys[:, at]).float()
            rotate_(key_move, cos[at], sin[at], inverse=True)
            value_move = (fresh_value[0, :, which] - values[:, at]).float()
            moves = torch.cat([flat(key_move), flat(value_move)], dim=1)
            everyone = torch.nn.functional.normalize(flat(values[:, movable]).float(), dim=1)
            probes = torch.nn.functional.normalize(flat(values[:, at]).float(), dim=1)
            if self.form == "agree":
                weights = torch.softmax(everyone @ probes.T / 0.1, dim=-1)
                shift = weights @ moves
                lengths = weights @ moves.norm(dim=1, keepdim=True)
                shift *= 0.9 * shift.norm(dim=1, keepdim=True) / lengths.clamp(min=1e-9)
            else:
                mean = moves.mean(0)
                gram = probes @ probes.T + 0.3 * torch.eye(len(probes))
                shift = 0.6 * (
                    everyone @ (probes.T @ torch.linalg.solve(gram, moves - mean)) + mean
                )
            heads, _, size = keys.shape
            key_shift, value_shift = (
                part.view(-1, heads, size).transpose(0, 1).contiguous()
                for part in shift.split(heads * size, dim=1)
            )
            rotate_(key_shift, cos[movable], sin[movable])
            keys[:, movable] += key_shift.to(keys.dtype)
            values[:, movable] += value_shift.to(values.dtype)

        return move


def flat(states: torch.Tensor) -> torch.Tensor:
    """``(kv_heads, tokens, head_dim)`` as ``(tokens, kv_heads * head_dim)``."""
    return states.transpose(0, 1).flatten(1)


def forms() -> dict[str, Method]:
    """The methods by what the page calls them."""
    listed = {"a3 @ 0.15": make_method("a3", 0.15)}
    for ratio in (0.15, 0.05):
        each = {
            "as shipped": Mend(ratio, least=0),
            "strength by agreement": OtherRepair(ratio, least=0, form="agree"),
            "linear map": OtherRepair(ratio, least=0, form="map"),
            "strength 0.2": Mend(ratio, least=0, correction=KVCorrection(0.2)),
            "strength 0.6": Mend(ratio, least=0, correction=KVCorrection(0.6)),
            "spread": Spread(ratio, least=0),
            "depth 1.0": Mend(ratio, least=0, depth=1.0),
            "all probes": Mend(ratio, least=0, correction=KVCorrection(0.3, probes=10**6)),
        }
        listed |= {f"{name} @ {ratio}": Method(selector) for name, selector in each.items()}
    return listed | {f"mass {mass}": Method(Adaptive(0.5, mass=mass)) for mass in (0.7, 0.45)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="questions at the file's start")
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--encode-prefix", default="template")
    parser.add_argument("--only", help="forms, separated by commas; all if absent")
    options = parser.parse_args()
    examples = read_examples(options.data)
    chosen = examples[: len(examples) // 2][options.skip : options.skip + options.limit]
    wanted = options.only.split(",") if options.only else list(forms())
    engine = A3Engine.from_pretrained("smollm2-135m-instruct", encode_prefix=options.encode_prefix)
    methods = forms()
    rows = evaluate(engine, "fidelity", chosen, [methods[name] for name in wanted])
    for at, name in enumerate(wanted):
        (summary,) = summarize(rows[at :: len(wanted)])
        figures = {key: summary[key] for key in ("n", "kl_answer", "nll_change")}
        print(json.dumps({"form": name, "encode_prefix": options.encode_prefix, **figures}))


if __name__ == "__main__":
    main()
