"""Text that is handed on while it is generated is the text of the finished answer."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from a3_engine.decoding.text_emitter import TextEmitter
from tests.tiny import tiny_tokenizer

TEXTS = {
    "plain": "The lamp burns.",
    "multi-byte": "naïve 🙂 日本語 — ü👩‍👩‍👧é",
    "line breaks": "\n\none\n two\n\n\n  three\r\n\tfour \n \n",
    "code": "def f(x):\n    if x:\n        return x\n\n    return None\n",
    "mixed": "🙂\n\n é\n  日本\n— ",
}


def like_llama_2() -> PreTrainedTokenizerBase:
    """Blanks are letters of the words, one of them is dropped at the start; rare ones are bytes."""
    special = ["<unk>", "<s>", "</s>"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁"), ("r", "e")]
    vocabulary = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefhijklmnoprtuwx",
    ]
    vocabulary += [first + second for first, second in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(vocabulary)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"byte level": tiny_tokenizer, "like llama 2": like_llama_2}


def emitted(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()):
    """Pieces of the text, fed until it stops."""
    pieces: list[str] = []
    emitter = TextEmitter(tokenizer, pieces.append, stop)
    for token in ids:
        emitter.put(token)
        if emitter.stopped:
            break
    emitter.end()
    assert all(pieces)
    return pieces, emitter


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_are_the_text(kind, text):
    """Characters split over tokens arrive whole; blanks after line breaks are kept."""
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(TEXTS[text], add_special_tokens=False).input_ids
    pieces, emitter = emitted(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[text]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert emitter.n_tokens == len(ids)


def test_any_tokens_give_the_text_of_all_of_them():
    """Also such as are no valid text, and control tokens, which do not show."""
    tokenizer, chance = tiny_tokenizer(), random.Random(0)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    for _ in range(40):
        ids = chance.choices([*range(len(tokenizer)), *[newline] * 30], k=40)
        pieces, _ = emitted(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_comes_as_soon_as_it_is_certain(kind):
    """Nothing is held back that no stop string could begin with."""
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    pieces: list[str] = []
    emitter = TextEmitter(tokenizer, pieces.append, ("\nUser:",))
    for count, token in enumerate(ids, start=1):
        emitter.put(token)
        assert "".join(pieces) == tokenizer.decode(ids[:count])


@pytest.mark.parametrize("stop", ["END", "e END", "\nEND", "🙂", "two\nlines", "\n\n", " "])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_stop_strings_end_the_text_and_never_show(kind, stop):
    """Not even their beginning, however many tokens or lines they take."""
    tokenizer = TOKENIZERS[kind]()
    before, after = "one tw\nE EN eEN\nEN two\n🙁", f"{stop} and more {stop}"
    ids = tokenizer(before + after, add_special_tokens=False).input_ids
    text = before + after
    expected = text[: text.index(stop)]
    pieces, emitter = emitted(tokenizer, ids, (stop, "never seen"))
    assert emitter.stopped
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:  # at no time was more to be seen
        shown += piece
        assert expected.startswith(shown)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_first_of_several_stop_strings_counts(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("one two three four", add_special_tokens=False).input_ids
    assert "".join(emitted(tokenizer, ids, ("four", "three", "o t"))[0]) == "one tw"
    pieces, emitter = emitted(tokenizer, ids, ("four!", "fours", ""))
    assert "".join(pieces) == "one two three four"  # a half stop string was held back, then shown
    assert not emitter.stopped
