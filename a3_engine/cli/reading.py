"""What a command is given: sizes, ages, folders, files; one line says what is wrong with it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LARGEST = 2**62
TEXT_FILES = {".txt", ".md", ".rst"}


class InputError(ValueError):
    """What the command was given cannot be used; its status is 2."""


def nbytes(text: str) -> int:
    """A size such as 500M."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)(?:i?B)?", text.strip())
    size = int(float(found[1]) * BYTES[found[2]]) if found else 0
    if not 0 < size < LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no size; write 500M or 20G")
    return size


def seconds(text: str) -> float:
    """An age such as 7d."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)([smhdw])", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no age; write 30m, 12h or 7d")
    return float(found[1]) * SECONDS[found[2]]


def folder(text: str) -> Path:
    """A folder's path, with the home that a ~ stands for."""
    try:
        path = Path(text).expanduser()
        if "\0" in text:
            raise ValueError("its name has a zero byte")
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no folder: {error}") from error
    return path


def text_of(path: Path) -> str:
    """A text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error}.") from error


def texts_of_lines(path: Path) -> Iterator[str]:
    """The ``text`` of each line of JSON."""
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: no JSON ({error}).") from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise InputError(f'{path}, line {number}: no object with a "text" of letters.')
        yield found["text"]


def documents(where: Path) -> list[tuple[str, str]]:
    """Texts of a folder's files, in the order of their names, each with its path in the folder.

    Raises
    ------
    ValueError
        There is no such folder, or no text in it.
    """
    if not where.is_dir():
        raise ValueError(f"There is no folder {where}.")
    found: list[tuple[str, str]] = []
    for path in sorted(path for path in where.rglob("*") if path.is_file()):
        tag = path.relative_to(where).as_posix()
        if path.suffix in TEXT_FILES:
            found.append((text_of(path), tag))
        elif path.suffix == ".jsonl":
            found += [(text, tag) for text in texts_of_lines(path)]
    found = [(text, tag) for text, tag in found if text.strip()]
    if not found:
        raise ValueError(f"{where} holds no .txt, .md, .rst or .jsonl file with text.")
    return found
