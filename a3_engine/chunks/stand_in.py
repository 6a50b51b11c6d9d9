"""Stand-ins: the passages that chunks are computed after, in place of a prompt's other documents.

In a prompt a chunk stands after other documents, and its keys and values are those of a text that
does. Computed after the chat template's start alone they are those of a text that opens the
conversation. So a chunk is computed after a few passages of about the form and length of
retrieved ones; only its own keys and values are stored. After FusionRAG (arXiv 2601.12904), which
computes chunks after their nearest neighbours.

Whose text that is matters: who chooses what another's chunks are computed after can steer their
answers (HijackKV, arXiv 2607.19957). The stand-in is therefore this file's text, or what the
engine's owner gives, and never what a request or another document brings.

The passages below were written for this package, under its licence; people and places in them are
made up.
"""

from __future__ import annotations

from collections.abc import Sequence

AUTO, SHIPPED, NONE = "auto", "shipped", "none"

PASSAGES = (
    "Old Market Hall\n"
    "The Old Market Hall is a building of brick and iron in the centre of Linden. It was "
    "designed by two local architects and opened in 1889 in place of an open market that had "
    "been held on the square since the Middle Ages. The hall had room for 120 stalls on the "
    "ground floor, while cellars below it were used for storing meat and fish on ice. It was "
    "damaged by fire in 1923 and repaired within two years with a roof of steel. After the "
    "wholesale trade had moved to the edge of the city in 1971 the hall stood empty for a "
    "decade. Since 1984 it has housed a library, a small museum of the town's history and "
    "several shops, and about half a million people visit it every year.",
    "Tidal friction\n"
    "Tidal friction is the resistance that a body meets as it is stretched and turned in the "
    "gravity of another one. The tides that the Moon raises in the oceans and in the solid "
    "Earth do not point exactly towards it, since the Earth turns faster than the Moon moves "
    "around it. The pull on these bulges slows the rotation of the Earth by about two "
    "thousandths of a second in a century, and the energy that is lost appears as heat, most of "
    "it in shallow seas. At the same time the Moon is driven outwards by nearly four "
    "centimetres a year. Growth lines in fossil corals show that a year had about four hundred "
    "days some four hundred million years ago.",
    "The Long Way Back (film)\n"
    "The Long Way Back is a drama film about two brothers who return to the village of their "
    "childhood after the death of their father. It was written and directed by Anna Reuter, and "
    "stars Thomas Hale, Peter Lindqvist and Ines Moreau. Most of it was filmed in the autumn on "
    "the west coast, with a budget of about three million dollars. The film was first shown at "
    "a festival in September and came to cinemas in February of the next year. Critics praised "
    "the acting and the photography, though some found the second half too slow. It received "
    "four nominations for national awards and won the one for the best music, which was "
    "composed by the director's sister.",
    "Travel and expenses\n"
    "Employees who travel on behalf of the company are paid back what they spend within reason "
    "and against receipts. Journeys of more than four hours by train may be booked in first "
    "class, and flights have to be approved by the head of the department before they are "
    "booked. For meals there is a daily amount that depends on the country; it is not paid for "
    "meals that are part of an invitation. Claims have to be entered within thirty days after "
    "the end of the journey. The finance team checks each claim and pays it with the next "
    "salary. Questions about special cases, such as journeys with family members or damage to a "
    "rented car, should be sent to the travel desk in advance.",
)


def passages_of(stand_in: str | Sequence[str]) -> tuple[str, ...]:
    """The passages that a setting means.

    Parameters
    ----------
    stand_in : str or sequence of str
        ``"auto"`` or ``"shipped"``, ``"none"``, or passages of one's own.

    Raises
    ------
    ValueError
        It is another string, or one of the passages is empty.
    """
    if isinstance(stand_in, str):
        if stand_in not in (AUTO, SHIPPED, NONE):
            raise ValueError(
                f"stand_in is {AUTO!r}, {SHIPPED!r}, {NONE!r} or a list of passages, not "
                f"{stand_in[:40]!r}."
            )
        return () if stand_in == NONE else PASSAGES
    if not all(isinstance(text, str) and text.strip() for text in stand_in):
        raise ValueError(f"A stand-in is a list of passages with text; use {NONE!r} for none.")
    return tuple(stand_in)
