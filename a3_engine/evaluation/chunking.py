"""Long texts cut into chunks of a given length, at the borders that a reader would choose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from a3_engine.engine import A3Engine
from a3_engine.prompt import PromptPlanner

CHUNK_TOKENS = 512
# Where a piece that is too long is split: before a line, a sentence, a word, a character.
BORDERS = (r"(?<=\S)(?=\n)", r"(?<=[.!?])(?=\s)", r"(?<=\S)(?=\s)", r"(?s)(?<=.)(?=.)")


@dataclass(frozen=True)
class Chunker:
    """Counts and cuts in the tokens of one model.

    Parameters
    ----------
    planner : PromptPlanner
        Whose tokenizer counts.
    chunk_tokens : int
        Upper bound of a chunk.
    window : int
        Tokens that the model's context window holds.
    """

    planner: PromptPlanner
    chunk_tokens: int = CHUNK_TOKENS
    window: int = 2**31

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"A chunk has at least 1 token, not {self.chunk_tokens}.")

    @classmethod
    def of(cls, engine: A3Engine, chunk_tokens: int = CHUNK_TOKENS) -> Chunker:
        """For an engine's tokenizer and context window."""
        return cls(engine.runtime.planner, chunk_tokens, engine.context_window)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.planner.tokenize_text(text))

    def cut(self, text: str) -> list[str]:
        """Chunks that hold the whole text but for the white space between them.

        A line, sentence or word that fits into a chunk stands in one chunk.
        """
        pieces = [(text, self.count(text))]
        for border in BORDERS:
            pieces = [finer for piece in pieces for finer in self._split(*piece, border)]
        chunks: list[str] = []
        size = 0
        for piece, n_tokens in pieces:
            if chunks and size + n_tokens <= self.chunk_tokens:
                chunks[-1] += piece
                size += n_tokens
            else:
                chunks.append(piece)
                size = n_tokens
        return [chunk.strip() for chunk in chunks if chunk.strip()]

    def fit(self, text: str, reserved: int) -> str:
        """The text, or its first and last half where the window would not hold it (LongBench).

        Parameters
        ----------
        reserved : int
            Tokens of the window that the rest of the prompt and the answer take.
        """
        ids = list(self.planner.tokenize_text(text))
        room = self.window - reserved
        room -= 2 * room // self.chunk_tokens  # the blank lines between the chunks
        if len(ids) <= room:
            return text
        if room < 2:
            raise ValueError(
                f"The model's window of {self.window} tokens has no room for a context beside "
                f"{reserved} tokens of question and answer."
            )
        decode = self.planner.tokenizer.decode
        return f"{decode(ids[: room // 2])}{decode(ids[-(room // 2) :])}"

    def _split(self, piece: str, n_tokens: int, border: str) -> list[tuple[str, int]]:
        if n_tokens <= self.chunk_tokens:
            return [(piece, n_tokens)]
        return [(part, self.count(part)) for part in re.split(border, piece)]
