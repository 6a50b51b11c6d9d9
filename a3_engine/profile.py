"""What `a3 tune` found best for one model: read by every engine of that model in the same folder.

A profile is used where the engine's settings leave the choice open: with ``stand_in="auto"``, and
its selector where neither selector, ratio nor quality is given. Its passages decide what chunks are
computed after, so it is believed only where nobody else can write it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from a3_engine.chunks.fingerprint import digest
from a3_engine.chunks.stand_in import passages_of
from a3_engine.fusion.selectors.mend import Mend
from a3_engine.owners import why_not_ours_alone

logger = logging.getLogger(__name__)

FOLDER = "profiles"


@dataclass(frozen=True)
class Profile:
    """Settings of the default method for one model.

    Parameters
    ----------
    stand_in : str or tuple of str
        What chunks are computed after; see :mod:`a3_engine.chunks.stand_in`.
    ratio : float
        Share of the chunk tokens to recompute, 0 to 1.
    strength : float
        Of the KV correction of the others, 0 to 1.
    """

    stand_in: str | tuple[str, ...]
    ratio: float
    strength: float

    def __post_init__(self) -> None:
        passages_of(self.stand_in)
        for name, share in (("ratio", self.ratio), ("strength", self.strength)):
            if not (isinstance(share, (int, float)) and 0.0 <= share <= 1.0):
                raise ValueError(f"{name} lies between 0 and 1, not at {share!r}.")

    @property
    def selector(self) -> Mend:
        """The default method with these settings; where it recomputes, its least number holds."""
        default = Mend()
        assert default.correction is not None
        correction = replace(default.correction, strength=self.strength)
        return replace(default, ratio=self.ratio, correction=correction)


def profile_path(cache_dir: Path, weights: str, tokenizer: str, encode_prefix: str) -> Path:
    """Where the profile of a model lies; it is another one with other weights or another prefix."""
    return cache_dir / FOLDER / f"{digest(weights, tokenizer, encode_prefix)[:32]}.json"


def write_profile(path: Path, profile: Profile, measured: dict[str, Any]) -> None:
    """Save a profile, readable by its owner alone; ``measured`` says what it rests on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_suffix(f".{os.getpid()}.new")
    text = json.dumps({**asdict(profile), "measured": measured}, ensure_ascii=False, indent=1)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    os.replace(new, path)


def read_profile(path: Path) -> Profile | None:
    """A saved profile; None, with a warning, where it is damaged or others can write it."""
    if not path.exists():
        return None
    try:
        if (reason := why_not_ours_alone(path) or why_not_ours_alone(path.parent)) is not None:
            raise ValueError(reason)
        found = json.loads(path.read_text(encoding="utf-8"))
        stand_in = found["stand_in"]
        return Profile(
            stand_in if isinstance(stand_in, str) else tuple(stand_in),
            found["ratio"],
            found["strength"],
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("The profile %s is not used: %s. Run a3 tune again.", path, error)
        return None
