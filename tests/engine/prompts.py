"""Prompts of random ids for tiny models, and what a model makes of them by other ways."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

import a3_engine.chunks.library as library_module
from a3_engine import A3Engine
from a3_engine.model.cache_argument import with_cache
from a3_engine.segments import Prompt, Segment
from tests.tiny import VOCABULARY

SHAPES = {
    "one chunk": ["prefix", 20, "fresh"],
    "many chunks": ["prefix", 9, 14, 7, "fresh"],
    "fresh between": ["prefix", "fresh", 9, "fresh", 14, "fresh"],
    "no prefix": [17, "fresh", 9, "fresh"],
    "ends in a chunk": ["prefix", "fresh", 9, 14],
}


def build_prompt(engine: A3Engine, shape: list[str | int]) -> Prompt:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist())

    segments = []
    for part in shape:
        if part == "prefix":
            segments.append(Segment("prefix", engine.runtime.planner.prefix_ids))
        elif part == "fresh":
            segments.append(Segment("fresh", ids(5)))
        else:
            segments.append(Segment("chunk", ids(int(part))))
    return Prompt(tuple(segments), len(segments) - 1)


def fused_logits(engine: A3Engine, prompt: Prompt, selector: str, ratio: float) -> torch.Tensor:
    _, cache = engine.prepare(prompt, selector=selector, ratio=ratio)
    ids = torch.tensor([prompt.ids])
    with torch.inference_mode():
        return engine.runtime.model(
            input_ids=ids, **with_cache(engine.runtime.model, cache)
        ).logits[0, -1]


def full_prefill(engine: A3Engine, prompt: Prompt):
    with torch.inference_mode():
        return engine.runtime.model(
            input_ids=torch.tensor([prompt.ids]),
            **with_cache(engine.runtime.model, empty_cache(engine.runtime.model)),
        )


def empty_cache(model) -> Cache:
    """transformers' own, in which sliding layers keep all tokens."""
    layers = DynamicCache(config=model.config).layers
    if not any(isinstance(layer, LinearAttentionLayer) for layer in layers):
        return DynamicCache()
    kinds = [DynamicLayer() if isinstance(layer, DynamicLayer) else layer for layer in layers]
    return Cache(layers=kinds)


class Folded:
    """What a hybrid's linear layers were given of each token, and their states after it all."""

    def __init__(self, model) -> None:
        layers = model.get_decoder().layers
        names = ("linear_attn", "conv", "mamba", "mixer", "self_attn")
        self.kinds = [type(layer) for layer in empty_cache(model).layers]
        self.mixers = {
            index: next(
                getattr(layers[index], name) for name in names if hasattr(layers[index], name)
            )
            for index, kind in enumerate(self.kinds)
            if kind is LinearAttentionLayer
        }
        self.inputs = {index: [] for index in self.mixers}
        self.last = {}

    def __enter__(self):
        def note(index):
            def hook(mixer, args, kwargs):
                self.last[index] = (args[0] if args else kwargs["hidden_states"]).clone()

            return hook

        self.hooks = [
            mixer.register_forward_pre_hook(note(index), with_kwargs=True)
            for index, mixer in self.mixers.items()
        ]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def keep(self, tokens: slice) -> None:
        for index, inputs in self.last.items():
            self.inputs[index].append(inputs[:, tokens])

    def fold(self, cache: Cache) -> None:
        """Give a cache the states after all inputs that were kept."""
        for index, mixer in self.mixers.items():
            states = LinearAttentionLayer(cache.layers[index].number_of_states)
            cache.layers[index] = states
            if self.inputs[index]:
                inputs = torch.cat(self.inputs[index], 1)
                mixer(hidden_states=inputs, **with_cache(mixer, cache))


def independent_full_reuse(engine: A3Engine, model, prompt: Prompt, stand_in=(), **options):
    """The model's output for the last segment, over transformers' own cache of the ones before.

    Segment by segment: a chunk runs after prefix and stand-in, all at positions that put the chunk
    where it stands in the prompt; the first tokens of one that stands just after the prefix run
    after that alone; fresh text, and the prompt's last token, runs after all that.
    """
    prefix = list(engine.runtime.planner.prefix_ids)
    past, position, folded = empty_cache(model), 0, Folded(model)

    def run_alone(before: list[int], ids: tuple[int, ...], first: int, stop: int) -> None:
        both = torch.tensor([before + list(ids)])
        places = torch.arange(both.shape[1])[None] + position - len(before) + 200
        alone = empty_cache(model)
        model(input_ids=both, position_ids=places, **with_cache(model, alone))
        own = slice(len(before) + first, len(before) + stop)
        folded.keep(own)
        for index, layer in enumerate(alone.layers):
            if isinstance(layer, DynamicLayer):
                past.update(layer.keys[:, :, own], layer.values[:, :, own], index)

    with torch.inference_mode(), folded:
        for segment in prompt.segments:
            n = len(segment.ids)
            if segment.kind == "chunk":
                opens = stand_in and prompt.ids[:position] == prefix
                head = min(n, library_module.HEAD_TOKENS) if opens else 0
                if head:
                    run_alone(prefix, segment.ids, 0, head)
                kept = min(n, prompt.n_tokens - 1 - position)
                if head < kept:
                    run_alone([*prefix, *stand_in], segment.ids, head, kept)
            else:
                kept = 0
            if kept < n:
                ids = torch.tensor([list(segment.ids[kept:])])
                places = torch.arange(kept, n)[None] + position + 200
                folded.fold(past)
                output = model(
                    input_ids=ids, position_ids=places, **with_cache(model, past), **options
                )
                folded.keep(slice(None))
            position += len(segment.ids)
    return output
