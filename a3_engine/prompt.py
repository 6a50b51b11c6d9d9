"""From messages to segments of token ids.

    messages ─► chat template around placeholders ─► template text | contents ─► segments

The template is never taken apart by rules of ours: its messages are filled with placeholders, and
the rendered text is cut at them. Template text may hold control tokens; what users and documents
say is always tokenized as text. Every segment is tokenized by itself, in every method and baseline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from a3_engine.conversations import Conversation
from a3_engine.exchanges import Divided, divide, finished
from a3_engine.messages import Chunk, Message, clean
from a3_engine.processes import Lock, cached_property
from a3_engine.segments import Match, Prompt, Segment
from a3_engine.tools import Tool, spelled_out

__all__ = ["Chunk", "Message", "PromptPlanner"]

PLACEHOLDER = "a3placeholder{}end"
IN_TOOL_TURN = 'a3placeholder{}"end'  # which shows whether a template writes it as JSON
JOINT = "\n"  # stands ahead of what is tokenized as the inside of a prompt, and is cut off again
# Some templates write today's date, and chunks computed behind it would be others every night. With
# this ahead of a template, it is always the same day.
DAY = {"d": "01", "-d": "1", "e": "1", "j": "001", "m": "01", "-m": "1", "b": "Jan", "B": "January"}
DAY |= {"Y": "2025", "y": "25", "a": "Wed", "A": "Wednesday", "H": "12", "I": "12", "p": "PM"}
DAY |= {"M": "00", "S": "00", "F": "2025-01-01"}
ANY_DAY = "".join(
    [
        "{%- macro strftime_now(format) -%}{{- format",
        *(f" | replace('%{directive}', '{value}')" for directive, value in DAY.items()),
        " -}}{%- endmacro %}\n",
    ]
)
REMEMBERED_CHUNKS = 256  # their ids, some kilobytes each; the same documents are asked again
PROBE: Tool = {
    "type": "function",
    "function": {
        "name": "a3probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}


class Contents(NamedTuple):
    """What a message says; ``as_json`` is how Llama's templates write what tools answer."""

    place: int
    parts: list[str | Chunk]
    as_json: bool = False


Piece = str | Contents

_locks: WeakKeyDictionary[PreTrainedTokenizerBase, Lock] = WeakKeyDictionary()
_locks_lock = Lock()


class PromptPlanner:
    """Plans prompts for one tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With or without a chat template.
    encode_prefix : str
        What chunks are computed behind: ``"template"`` (what the chat template puts before the
        first user text, always on the same day; BOS where there is no template), ``"bos"``,
        ``"none"``, or any other text, in which control tokens count.
    stand_in : sequence of str
        Passages that chunks are computed behind as well, joined as documents in a prompt are.
    find : callable
        Finds known chunks in plain text; see :class:`~a3_engine.chunks.text_index.TextIndex`.
    stored : callable
        Says which turns of a conversation are stored; see :class:`~a3_engine.turns.Turns`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encode_prefix: str = "template",
        stand_in: Sequence[str] = (),
        find: Callable[[str], list[Match]] | None = None,
        stored: Callable[[Sequence[Segment]], list[bool]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.find, self.stored = find, stored
        self._lock = _lock_of(tokenizer)
        self._remembered_ids = lru_cache(REMEMBERED_CHUNKS)(self.tokenize_text)
        self._joint = self._blank_ahead()
        self._bos = self._leading_ids()
        self._trims = self._knows_tools = False
        if tokenizer.chat_template:
            probe = f" {PLACEHOLDER.format(0)} "
            turn = [{"role": "user", "content": probe}]
            self._trims = probe not in self._render(turn)
            self._knows_tools = PROBE["function"]["name"] in self._render(turn, [PROBE])
        self.prefix_ids = self._prefix(encode_prefix)
        gap = self.tokenize_text("\n\n")
        self.stand_in_ids = tuple(
            token for text in stand_in for token in (*self.chunk_ids(text), *gap)
        )

    def plan(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        match: bool = True,
        blank: bool = False,
        conversation: str | None = None,
    ) -> Prompt:
        """Segments of a conversation, ready for an answer.

        Parameters
        ----------
        messages : sequence of Message
            In order. An assistant message at the end is continued.
        tools : sequence of dict
            Functions that the model may call, as OpenAI's schemas; shown by the chat template, or
            spelled out where it has no place for them.
        match : bool
            Also look for stored chunks inside plain text.
        blank : bool
            Also take messages that say nothing, as frameworks count and send them.
        conversation : str or None
            Whose turns these are, in place of what was said in it; see
            :class:`~a3_engine.conversations.Conversation`.

        Raises
        ------
        ValueError
            There is no message, or nothing in them to answer.
        """
        if not messages or not (blank or any(message.text.strip() for message in messages)):
            raise ValueError("The prompt is empty: give at least one message with text.")
        messages, pieces = self._with_tools(list(messages), tools)
        last_user = max(
            (i for i, message in enumerate(messages) if message.role == "user"),
            default=len(messages) - 1,
        )
        segments: list[Segment] = []
        places: list[int] = []  # the message that each belongs to
        question_from = 0
        lent = ""
        for place, piece in enumerate(pieces):
            if isinstance(piece, str):
                lent = self._lent(piece, pieces[place + 1 :])
                ids = self.tokenize_template(piece.removesuffix(lent), begins=not place)
                self._append_fresh(segments, ids)
                behind = next((p.place for p in pieces[place:] if not isinstance(p, str)), None)
                index = len(messages) if behind is None else behind
                places += [index] * (len(segments) - len(places))
                continue
            index, parts, as_json = piece
            if lent:
                parts, lent = [f"{lent}{parts[0]}", *parts[1:]], ""
            first = len(segments)
            behind_chunks = first
            cut = self._matched(parts, asks=index == last_user) if match else parts
            if as_json:  # documents stay as they are stored
                cut = [part if isinstance(part, Chunk) else _inside_json(part) for part in cut]
            for part in cut:
                if isinstance(part, Chunk):
                    self._append_chunk(segments, part)
                    behind_chunks = len(segments)
                else:
                    self._append_fresh(segments, self.tokenize_text(part, begins=not segments))
            places += [index] * (len(segments) - len(places))
            if index == last_user:
                # The turn's own words behind its chunks; all its words where none follow.
                asks = isinstance(cut[-1], str) and cut[-1].strip()
                question_from = behind_chunks if asks else first
        whose = Conversation.of(messages, conversation) if self.stored is not None else None
        if whose is None or messages[-1].role == "assistant":
            return self._finish(segments, question_from)
        opens = segments[0].kind == "fresh" and isinstance(pieces[0], str)
        opening = self._with_bos(segments[0].ids) if opens else None
        divided = divide(segments, places, messages, whose, last_user, opening)
        question_from -= len(segments) - len(divided.segments)
        prompt = self._finish(self._known(divided), question_from)
        return replace(
            prompt, conversation=whose, turns=divided.turns, unanswered=divided.unanswered
        )

    def answered(self, prompt: Prompt, answer: str) -> list[Segment]:
        """The turns of a prompt's conversation, its answer with the last, as later prompts have it.

        An answer that later prompts show in another way is none of theirs, and stored when they do.
        """
        whose, turns = prompt.conversation, list(prompt.turns)
        if whose is not None and prompt.unanswered is not None:
            ids = self.tokenize_text(answer.strip() if self._trims else answer)
            turns.append(finished(prompt.unanswered, ids, whose.behind(answer)))
        return turns

    def plan_raw(self, text: str) -> Prompt:
        """Segments of a finished prompt, in which control tokens count outside known chunks."""
        if not isinstance(text, str):
            raise TypeError(f"A finished prompt is a text, not {type(text).__name__}.")
        text = clean(text)
        if not text:
            raise ValueError("The prompt is empty.")
        segments: list[Segment] = []
        for part in self._matched([text], asks=True):
            if isinstance(part, Chunk):
                self._append_chunk(segments, part)
            else:
                self._append_fresh(segments, self.tokenize_template(part, begins=not segments))
        last_chunk = max((i for i, s in enumerate(segments) if s.kind == "chunk"), default=-1)
        return self._finish(segments, last_chunk + 1)

    @cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for at most."""
        return max(map(len, self.tokenizer.get_vocab()))

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a chunk: its text without white space around it, never control tokens."""
        return self._remembered_ids(text.strip())

    def segments(self, chunks: Iterable[str | Chunk]) -> list[Segment]:
        """What chunks are in a prompt; those without a token are left out."""
        found: list[Segment] = []
        for chunk in chunks:
            self._append_chunk(found, Chunk.read(chunk))
        return found

    def tokenize_text(self, text: str, begins: bool = False) -> tuple[int, ...]:
        """Ids of text in which control tokens are only characters; it may begin the prompt."""
        return self._tokenize(clean(text), begins, split_special_tokens=True)

    def tokenize_template(self, text: str, begins: bool = True) -> tuple[int, ...]:
        """Ids of template text, in which control tokens count; it may begin the prompt."""
        return self._tokenize(clean(text), begins, split_special_tokens=False)

    def _tokenize(self, text: str, begins: bool, **options: bool) -> tuple[int, ...]:
        """SentencePiece puts a blank ahead of each text, which only a prompt's beginning has."""
        joint = () if begins else self._joint
        with self._lock:
            encoded = self.tokenizer(
                JOINT * bool(joint) + text, add_special_tokens=False, **options
            )
        ids = tuple(encoded.input_ids)
        if ids[: len(joint)] == joint:
            return ids[len(joint) :]
        return self._tokenize(text, True, **options)  # the joint became one token with the text

    def _blank_ahead(self) -> tuple[int, ...]:
        """Ids of `JOINT` where the tokenizer puts a blank ahead of what stands alone."""
        with self._lock:
            joint, alone, joined = (
                tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
                for text in (JOINT, "a", JOINT + "a")
            )
        adds = joined[: len(joint)] == joint and joined[len(joint) :] != alone
        return joint if adds else ()

    def _lent(self, piece: str, behind: Sequence[Piece]) -> str:
        """The blank of template text that SentencePiece makes one token with the word behind it.

        It stays where it is ahead of a chunk, whose tokens are its own wherever it stands.
        """
        parts = behind[0][1] if behind and not isinstance(behind[0], str) else []
        text = parts[0] if parts else None
        if not self._joint or not piece.endswith(" ") or not isinstance(text, str) or not text:
            return ""
        known = self.find(text) if self.find is not None else []
        return "" if known and known[0][0] == 0 else " "

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before any text: BOS, or nothing."""
        with self._lock:
            plain = self.tokenizer("a", add_special_tokens=False).input_ids
            full = self.tokenizer("a", add_special_tokens=True).input_ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def _prefix(self, encode_prefix: str) -> tuple[int, ...]:
        if encode_prefix == "none":
            return ()
        if encode_prefix == "bos":
            bos = self.tokenizer.bos_token_id
            return self._bos or (() if bos is None else (bos,))
        if encode_prefix != "template":
            return self._with_bos(self.tokenize_template(encode_prefix))
        if not self.tokenizer.chat_template:
            return self._bos
        template = ANY_DAY + self.tokenizer.get_chat_template()
        head = self._pieces([Message("user", "x")], template=template)[0]
        return self._with_bos(self.tokenize_template(head) if isinstance(head, str) else ())

    def _render(
        self,
        conversation: list[dict[str, Any]],
        tools: Sequence[Tool] = (),
        template: str | None = None,
    ) -> str:
        last = conversation[-1]
        continued = last["role"] == "assistant" and bool(last["content"])
        rendered = self.tokenizer.apply_chat_template(
            conversation,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            chat_template=template,
        )
        assert isinstance(rendered, str)
        return rendered

    def _with_tools(
        self, messages: list[Message], tools: Sequence[Tool]
    ) -> tuple[list[Message], list[Piece]]:
        """Pieces of the conversation as the template shows tools, else of it spelled out."""
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return messages, self._pieces(messages)
        if self._knows_tools:
            try:
                return messages, self._pieces(messages, tools)
            except ValueError:
                pass  # some templates know tools and refuse, say, the form of a call's id
        messages = spelled_out(messages, tools)
        return messages, self._pieces(messages)

    def _pieces(
        self, messages: list[Message], tools: Sequence[Tool] = (), template: str | None = None
    ) -> list[Piece]:
        """Template text, and contents with the index of their message, in the order they stand."""
        if not self.tokenizer.chat_template:
            plain: list[Piece] = []
            for index, message in enumerate(messages):
                plain += ["\n\n"] * (index > 0) + [Contents(index, message.parts)]
            return plain
        conversation = []
        for index, message in enumerate(messages):
            silent = message.tool_calls and not message.text
            mark = "" if silent else _mark(index, message)
            conversation.append(message.in_template(mark))
        try:
            return self._cut(messages, self._render(conversation, tools, template))
        except (TemplateError, ValueError) as error:
            if tools or any(message.tool_calls for message in messages):
                raise ValueError(f"The chat template refuses these tools: {error}") from error
            strict = _for_strict_templates(conversation)
            with suppress(TemplateError, ValueError):
                if strict != conversation:
                    return self._cut(messages, self._render(strict, template=template))
            raise ValueError(f"The chat template refuses this conversation: {error}") from error

    def _cut(self, messages: list[Message], text: str) -> list[Piece]:
        """Cut a rendered conversation at the marks that stand for its contents."""
        pieces: list[Piece] = []
        for index, message in enumerate(messages):
            mark = _mark(index, message)
            as_json = mark not in text and _inside_json(mark) in text
            mark = _inside_json(mark) if as_json else mark
            if message.tool_calls and mark not in text:
                continue  # nothing to show, or a template that shows a turn's calls only
            before, found, text = text.partition(mark)
            if not found or mark in text:
                raise ValueError(
                    f"The chat template does not show message {index} ({message.role!r}) exactly "
                    "once and in order; pass such a conversation as one user message."
                )
            pieces += [before] * bool(before)
            parts = _stripped(message.parts) if self._trims else message.parts
            pieces.append(Contents(index, parts, as_json))
        return pieces + [text] * bool(text)

    def _matched(self, parts: Sequence[str | Chunk], asks: bool) -> list[str | Chunk]:
        """Cut plain parts at the known chunks inside them, but for a question that is known too."""
        if self.find is None:
            return list(parts)
        cut: list[str | Chunk] = []
        given = max((i for i, part in enumerate(parts) if isinstance(part, Chunk)), default=-1)
        for place, part in enumerate(parts):
            # Where documents are given as such, the words behind the last one ask.
            if isinstance(part, Chunk) or (asks and 0 <= given < place):
                cut.append(part)
                continue
            at = 0
            for start, stop in self.find(part):
                cut += [part[at:start], Chunk(part[start:stop])]
                at = stop
            cut.append(part[at:])
        return _with_its_question(cut) if asks and given < 0 else cut

    def _append_chunk(self, segments: list[Segment], chunk: Chunk) -> None:
        text = chunk.text.strip()
        if ids := self.chunk_ids(text):
            segments.append(Segment("chunk", ids, text, chunk.tag))

    def _known(self, divided: Divided) -> list[Segment]:
        """Segments with the turns that are stored as chunks, and the others fresh."""
        if self.stored is None:
            return divided.segments
        there = iter(self.stored(divided.turns))
        return [
            replace(each, kind="chunk" if next(there) else "fresh") if each.kind == "turn" else each
            for each in divided.segments
        ]

    @staticmethod
    def _append_fresh(segments: list[Segment], ids: tuple[int, ...]) -> None:
        if ids:
            segments.append(Segment("fresh", ids))

    def _finish(self, segments: list[Segment], question_from: int) -> Prompt:
        """Put BOS and the encode prefix in place."""
        added = 0
        if not segments:
            raise ValueError("The prompt is empty: give at least one message with text.")
        head = segments[0]
        if self._bos and head.kind == "chunk":
            segments.insert(0, Segment("fresh", self._bos))
            added += 1
        elif self._bos and head.ids[: len(self._bos)] != self._bos:
            segments[0] = replace(head, ids=self._bos + head.ids)
        head, n_prefix = segments[0], len(self.prefix_ids)
        if n_prefix and head.kind == "fresh" and head.ids[:n_prefix] == self.prefix_ids:
            rest = head.ids[n_prefix:]
            segments[0] = Segment("prefix", self.prefix_ids)
            if rest:
                segments.insert(1, replace(head, ids=rest))
                added += 1
        if segments[-1].kind == "prefix" or len(segments[-1].ids) == 1:
            # The last token is always computed, and a cached segment has one beside it.
            segments[-1] = replace(segments[-1], kind="fresh")
        return Prompt(tuple(segments), min(question_from + added, len(segments) - 1))


def _mark(index: int, message: Message) -> str:
    return (IN_TOOL_TURN if message.role == "tool" else PLACEHOLDER).format(index)


def _inside_json(text: str) -> str:
    """As it stands between the quotes of a JSON string, in the way of transformers' templates."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _lock_of(tokenizer: PreTrainedTokenizerBase) -> Lock:
    """Fast tokenizers keep the handling of special tokens as state, which engines may share."""
    with _locks_lock:
        return _locks.setdefault(tokenizer, Lock(around_foreign=True))


def _with_its_question(cut: list[str | Chunk]) -> list[str | Chunk]:
    """Plain text cut at known chunks, whose last one is text again where it is the question.

    A question may be a stored text too, as in an index of questions and answers. It is taken for
    one where it is all that the turn says, or where other words stand before it in its line than
    before the document ahead of it ("Query: ").
    """
    places = [place for place, part in enumerate(cut) if isinstance(part, Chunk)]
    if not places:
        return cut
    last = places[-1]
    if len(places) == 1:
        asked = not any(part.strip() for part in cut if isinstance(part, str))
    else:
        label = _label(cut[last - 1])
        asked = label != "" and label != _label(cut[places[-2] - 1])
    if asked:
        question = cut[last]
        assert isinstance(question, Chunk)
        cut[last] = question.text
    return cut


def _label(before: str | Chunk) -> str:
    """What stands before a chunk in its line, whatever its number."""
    line = before.rpartition("\n")[2] if isinstance(before, str) else ""
    return "".join(letter for letter in line if letter.isalpha())


def _for_strict_templates(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same texts in the same order for templates without a system role or with strict turns."""
    merged: list[dict[str, Any]] = []
    for turn in conversation:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + turn["content"]
        else:
            merged.append({"role": role, "content": turn["content"]})
    return merged


def _stripped(parts: list[str | Chunk]) -> list[str | Chunk]:
    """Parts as a template that trims its messages would show them; at least one."""
    rest = list(parts)
    while rest and isinstance(rest[0], str):
        rest[0] = rest[0].lstrip()
        if rest[0]:
            break
        del rest[0]
    while rest and isinstance(rest[-1], str):
        rest[-1] = rest[-1].rstrip()
        if rest[-1]:
            break
        del rest[-1]
    return rest or [""]
