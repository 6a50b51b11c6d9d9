"""Log probabilities: those of the model's own distribution, whatever was chosen from it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from a3_engine.decoding.logprobs import RecordLogprobs
from a3_engine.tools import json_grammar
from tests.texts import ASK, LAMP


def log_probabilities(engine, report, ids):
    """Of each next token, by one plain forward pass over the prompt and the answer."""
    model = engine.runtime.model
    prompt = list(report.trace.prompt.ids)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.5, "top_k": 40}, {"grammar": json_grammar({"type": "array"})}],
    ids=["greedy", "sampled", "grammar"],
)
def test_they_are_the_models_own(tiny_engine, sampling):
    engine = tiny_engine()
    torch.manual_seed(0)
    answer = engine.generate(ASK, max_new_tokens=12, logprobs=3, **sampling)
    (turn,) = engine.runtime.prefix_cache._prefixes
    ids = list(turn.ids[answer.report.prompt_tokens :])
    expected = log_probabilities(engine, answer.report, ids)
    entries = answer.report.logprobs
    decode = engine.runtime.tokenizer.decode
    special = engine.runtime.tokenizer.all_special_ids
    kept = [at for at, token in enumerate(ids) if token not in special]
    assert len(entries) == len(kept) > 0
    for at, entry in zip(kept, entries, strict=True):
        assert entry.logprob == pytest.approx(float(expected[at, ids[at]]), abs=1e-3)
        values, tokens = expected[at].topk(3)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
        assert [text for text, _ in entry.top] == [decode([token]) for token in tokens]


def test_tokens_keep_their_blanks():
    """Of tokenizers too that drop one where decoding begins; special tokens are left out."""
    words = {"a": 0, "▁a": 1, "▁lamp": 2, "▁burns": 3, "</s>": 4}
    fast = Tokenizer(models.WordLevel(words, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    assert tokenizer.decode([2]) == "lamp"
    recorder = RecordLogprobs(n_top=1)
    prompt, answer = [1], [2, 3, 4]
    for at in range(len(answer)):
        recorder(torch.tensor([prompt + answer[:at]]), torch.arange(5.0)[None])
    entries = recorder.result(tokenizer, answer)
    assert [entry.token for entry in entries] == [" lamp", " burns"]
    assert [entry.top[0][0] for entry in entries] == ["</s>"] * 2
    assert entries[1].logprob - entries[0].logprob == pytest.approx(1.0)


def test_a_fused_answer_has_them_too(endless):
    options = {"chunks": [LAMP], "max_new_tokens": 6, "ratio": 1.0}
    fused = endless.generate(ASK, logprobs=1, **options).report
    plain = endless.generate(ASK, logprobs=1, selector="full_prefill", **options).report
    assert fused.fused
    assert [entry.token for entry in fused.logprobs] == [entry.token for entry in plain.logprobs]
    assert [e.logprob for e in fused.logprobs] == pytest.approx(
        [e.logprob for e in plain.logprobs], abs=1e-3
    )
    assert "logprobs" not in fused.to_dict()


def test_nothing_is_taken_down_unless_asked_for(endless):
    assert endless.generate(ASK, max_new_tokens=2).report.logprobs is None
    assert all(
        e.top == () for e in endless.generate(ASK, max_new_tokens=2, logprobs=0).report.logprobs
    )
    with pytest.raises(ValueError, match="logprobs"):
        endless.generate(ASK, logprobs=-1)
