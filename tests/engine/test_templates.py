"""Whatever a chat template writes around the turns, a prompt is its own text."""

from __future__ import annotations

import json

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from a3_engine.messages import Chunk, Message
from a3_engine.prompt import PromptPlanner
from tests.engine.templates import TEMPLATES
from tests.tiny import CORPUS, VOCABULARY, tiny_tokenizer

LAMP = "The lamp of the lighthouse burns through the night."
SHORE = "The northern shore is steep, and few boats land there."
READ = ["Read this: \n", Chunk(LAMP), "\n\n", Chunk(SHORE), "\n\nWho keeps the lamp?"]
BRIEF, HELLO = Message("system", "Be brief."), Message("user", "Hello there")
EARLIER = [HELLO, Message("assistant", "Hello. How can I help?")]
CONVERSATIONS = {
    "one turn": [HELLO],
    "chunks": [Message("user", READ)],
    "white space": [Message("user", ["  Who?\n\n", Chunk(LAMP), " \n"])],
    "a system": [BRIEF, Message("user", READ)],
    "earlier turns": [*EARLIER, Message("user", READ)],
    "all of it": [BRIEF, *EARLIER, Message("user", READ), EARLIER[1], HELLO],
}


def plain(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


def own(tokenizer: PreTrainedTokenizerFast, messages: list[Message], **options: object) -> object:
    """What the template itself makes of them; a system that it refuses is the user's."""
    turns = plain(messages)
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    except TemplateError:
        turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        return tokenizer.apply_chat_template(turns[1:], add_generation_prompt=True, **options)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_templates_text(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    planner = PromptPlanner(tokenizer)
    for kind, messages in CONVERSATIONS.items():
        prompt = planner.plan(messages)
        assert tokenizer.decode(prompt.ids) == own(tokenizer, messages, tokenize=False), kind
        chunks = [segment.text for segment in prompt.segments if segment.kind == "chunk"]
        given = [part for message in messages for part in message.parts if isinstance(part, Chunk)]
        assert chunks == [chunk.text for chunk in given], kind


BYTES = [(byte, f"<0x{byte:02X}>") for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>"]
SPECIAL += ["<|assistant|>"]
BLANKS = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()


def trained(tokenizer: Tokenizer, kind: str = "bpe") -> PreTrainedTokenizerFast:
    options = {"vocab_size": VOCABULARY, "special_tokens": SPECIAL, "show_progress": False}
    alphabet = [chr(each) for each in range(32, 127)]
    if kind == "bpe":
        trainer = trainers.BpeTrainer(**options, initial_alphabet=alphabet)
    elif kind == "unigram":
        options |= {"unk_token": "<unk>", "initial_alphabet": [*alphabet, "\n"]}
        trainer = trainers.UnigramTrainer(**options)
    else:
        trainer = trainers.WordPieceTrainer(**options, initial_alphabet=alphabet)
    normalizer, tokenizer.normalizer = tokenizer.normalizer, None
    splits = tokenizer.pre_tokenizer
    if kind != "words":  # SentencePiece learns no token that goes on into the next word
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([*CORPUS, LAMP, SHORE], trainer)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splits
    if kind == "bpe":
        rules = json.loads(tokenizer.to_str())
        rules["model"]["vocab"] |= {byte: len(rules["model"]["vocab"]) + at for at, byte in BYTES}
        tokenizer = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama 3's, Qwen's, and SmolLM2's, which takes digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, LAMP, SHORE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def blank_ahead() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank ahead of each text, and of what follows a control token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([*BLANKS, decoders.Strip(" ", 1, 0)])
    return trained(tokenizer)


def blank_ahead_once() -> PreTrainedTokenizerFast:
    """As Mistral's of version 3: a blank ahead of the whole text alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([*BLANKS, decoders.Strip(" ", 1, 0)])
    return trained(tokenizer)


def no_blank_ahead() -> PreTrainedTokenizerFast:
    """As Gemma's: SentencePiece too, with the text's own blanks alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(list(BLANKS))
    return trained(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: the likeliest pieces, of words with a blank ahead."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, "unigram")


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: words, without the white space between them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, "words")


KINDS = [byte_level, blank_ahead, blank_ahead_once, no_blank_ahead, unigram, word_pieces]
FORMS = ["chatml", "zephyr", "alpaca", "deepseek 3", "metharme"]
SPACED = ["llama 2", "mistral v3", "vicuna"]  # whose last blank is one token with the next word
TURNS = [*EARLIER, Message("user", "Query: who keeps the lamp?\n  - the keeper, since 1874.")]


@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_a_prompt_has_the_templates_tokens(build):
    """As if the whole text of the conversation were tokenized at once."""
    tokenizer = build()
    spaced = SPACED if PromptPlanner(tokenizer).joint else []
    for form in (*FORMS, *spaced):
        tokenizer.chat_template = TEMPLATES[form]
        planner = PromptPlanner(tokenizer)
        for messages in (TURNS[:1], TURNS, [BRIEF, *TURNS]):
            whole = own(tokenizer, messages, tokenize=True, return_dict=False)
            ids = planner.plan(messages).ids
            shown = tokenizer.convert_ids_to_tokens
            assert shown(ids) == shown(whole), form
