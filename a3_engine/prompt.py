"""From messages to segments of token ids.

    messages ─► chat template around placeholders ─► template text | contents ─► segments

`template.py` renders and cuts, `tokens.py` tokenizes, and here the pieces become segments: known
chunks inside plain text, finished turns, the question, the encode prefix. Every segment is
tokenized by itself, in every method and baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from a3_engine.conversations import Conversation
from a3_engine.exchanges import Divided, divide, finished
from a3_engine.messages import Chunk, Message, clean
from a3_engine.segments import Match, Prompt, Segment
from a3_engine.template import ChatTemplate, Piece, inside_json
from a3_engine.tokens import PromptTokenizer
from a3_engine.tools import Tool

__all__ = ["Chunk", "Message", "PromptPlanner"]


class PromptPlanner(PromptTokenizer):
    """Plans prompts for one tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With or without a chat template.
    encode_prefix : str
        What chunks are computed after: ``"template"`` (what the chat template puts before the
        first user text, always on the same day; BOS where there is no template), ``"bos"``,
        ``"none"``, or any other text, in which control tokens count.
    stand_in : sequence of str
        Passages that chunks are computed after as well, joined as documents in a prompt are.
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
        super().__init__(tokenizer)
        self.find, self.stored = find, stored
        self._template = ChatTemplate(tokenizer)
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
        messages, pieces = self._template.pieces(list(messages), tools)
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
                following = next((p.place for p in pieces[place:] if not isinstance(p, str)), None)
                index = len(messages) if following is None else following
                places += [index] * (len(segments) - len(places))
                continue
            index, parts, as_json = piece
            if lent:
                parts, lent = [f"{lent}{parts[0]}", *parts[1:]], ""
            first = len(segments)
            after_chunks = first
            cut = self._matched(parts, asks=index == last_user) if match else parts
            if as_json:  # documents stay as they are stored
                cut = [part if isinstance(part, Chunk) else inside_json(part) for part in cut]
            for part in cut:
                if isinstance(part, Chunk):
                    self._append_chunk(segments, part)
                    after_chunks = len(segments)
                else:
                    begins = self.begins_after(segments[-1].ids if segments else ())
                    self._append_fresh(segments, self.tokenize_text(part, begins))
            places += [index] * (len(segments) - len(places))
            if index == last_user:
                # The turn's own words after its chunks; all its words where none follow.
                asks = isinstance(cut[-1], str) and cut[-1].strip()
                question_from = after_chunks if asks else first
        whose = Conversation.of(messages, conversation) if self.stored is not None else None
        if whose is None or messages[-1].role == "assistant":
            return self._finish(segments, question_from)
        opens = segments[0].kind == "fresh" and isinstance(pieces[0], str)
        opening = self.with_bos(segments[0].ids) if opens else None
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
            text = answer.strip() if self._template.trims else answer
            ids = self.tokenize_text(text, self.begins_after(prompt.ids))
            turns.append(finished(prompt.unanswered, ids, whose.after(answer)))
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

    def segments(self, chunks: Iterable[str | Chunk]) -> list[Segment]:
        """What chunks are in a prompt; those without a token are left out."""
        found: list[Segment] = []
        for chunk in chunks:
            self._append_chunk(found, Chunk.read(chunk))
        return found

    def _lent(self, piece: str, following: Sequence[Piece]) -> str:
        """The blank of template text that SentencePiece makes one token with the word after it.

        It stays where it is before a chunk, whose tokens are its own wherever it stands.
        """
        parts = following[0][1] if following and not isinstance(following[0], str) else []
        text = parts[0] if parts else None
        if not self.joint or not piece.endswith(" ") or not isinstance(text, str) or not text:
            return ""
        known = self.find(text) if self.find is not None else []
        return "" if known and known[0][0] == 0 else " "

    def _prefix(self, encode_prefix: str) -> tuple[int, ...]:
        if encode_prefix == "none":
            return ()
        if encode_prefix == "bos":
            bos = self.tokenizer.bos_token_id
            return self.bos or (() if bos is None else (bos,))
        if encode_prefix != "template":
            return self.with_bos(self.tokenize_template(encode_prefix))
        return self.with_bos(self.tokenize_template(self._template.opening()))

    def _matched(self, parts: Sequence[str | Chunk], asks: bool) -> list[str | Chunk]:
        """Cut plain parts at the known chunks inside them, but for a question that is known too."""
        if self.find is None:
            return list(parts)
        cut: list[str | Chunk] = []
        given = max((i for i, part in enumerate(parts) if isinstance(part, Chunk)), default=-1)
        for place, part in enumerate(parts):
            # Where documents are given as such, the words after the last one ask.
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
        if self.bos and head.kind == "chunk":
            segments.insert(0, Segment("fresh", self.bos))
            added += 1
        elif self.bos and head.ids[: len(self.bos)] != self.bos:
            segments[0] = replace(head, ids=self.bos + head.ids)
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


def _with_its_question(cut: list[str | Chunk]) -> list[str | Chunk]:
    """Plain text cut at known chunks, whose last one is text again where it is the question.

    A question may be a stored text too, as in an index of questions and answers. It is taken for
    one where it is all that the turn says, or where other words stand before it in its line than
    before the document that precedes it ("Query: ").
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
