"""One fusion pass, run to its end."""

from __future__ import annotations

import torch

from a3_engine import A3Engine
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.model.cache_argument import with_cache


def run(engine: A3Engine, prompt, selector: Mend, observer=None):
    _, cache = engine.prepare(prompt, selector=selector)
    cache.fusion.observer = observer
    model = engine.runtime.model
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt.ids]), **with_cache(model, cache))
    return cache
