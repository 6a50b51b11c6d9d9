"""Whose a turn is: a finished turn serves its own conversation, and no other finds it.

A conversation goes by the name that its caller gives it. Without one, a turn is known by all that
user and assistant said up to it, so that it is found by prompts alone that say the same up to
there. What system and tools say does not count: documents stand there, which change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from a3_engine.messages import Message, clean

TAG = "a3:conversation:"  # what the tags of all conversations begin with
SPEAKERS = ("user", "assistant")
FINISHED = ("assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One prompt's conversation.

    Parameters
    ----------
    tag : str
        Evicts its turns: made of its name, or of the first words that were said.
    owners : tuple of str
        A digest for each message, which is part of the keys of what it says.
    named : bool
        Whether the caller gave the name.
    """

    tag: str
    owners: tuple[str, ...]
    named: bool

    @classmethod
    def of(cls, messages: Sequence[Message], name: str | None = None) -> Conversation | None:
        """None for a single question without a name, after which no turn need follow."""
        if name is not None:
            name = clean(name)
            return cls(TAG + name, (_link("", "name", name),) * len(messages), True)
        if not any(message.role in FINISHED for message in messages):
            return None
        links: list[str] = []
        link = ""
        for message in messages:
            if message.role in SPEAKERS:
                link = _link(link, message.role, message.text)
            links.append(link)
        first = next((each for each in links if each), _link("", "nobody", ""))
        return cls(TAG + first[:16], tuple(each or first for each in links), False)

    def after(self, answer: str) -> str:
        """The owner of the answer to the last message."""
        last = self.owners[-1]
        return last if self.named else _link(last, "assistant", answer)


def _link(before: str, role: str, text: str) -> str:
    return hashlib.sha256(json.dumps([before, role, text.strip()]).encode()).hexdigest()
