"""RULER's variable tracking: a chain of assignments among noise; who has the value?"""

from __future__ import annotations

import string
from random import Random

from a3_engine.evaluation.ruler.form import Kind, Material, Sample
from a3_engine.evaluation.ruler.needles import NOISE

HOPS = 4
EXAMPLE_SHARE = 8  # RULER's solved example has 500 of at least 4,096 tokens


def build(size: int, rng: Random, material: Material) -> Sample:
    """A solved example with a chain of short names, then a chain among ``size`` lines of noise."""
    lines = HOPS + 1
    while material.count(_chain(lines + 1, Random(0), 3).context) * EXAMPLE_SHARE < material.length:
        lines += 1
    solved, asked = _chain(lines, rng, 3), _chain(size, rng, 5)
    shown = f"{solved.context}\n{solved.question}{solved.begin}{' '.join(solved.answers)}"
    return asked._replace(context=f"{shown}\n\n{asked.context}")


def _chain(size: int, rng: Random, letters: int) -> Sample:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    value = rng.randint(10000, 99998)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[hop + 1]} = VAR {names[hop]}" for hop in range(HOPS)]
    lines = [NOISE] * size
    for placed, at in enumerate(sorted(rng.sample(range(size), len(chain)))):
        lines.insert(at + placed, chain[placed])
    return Sample(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines),
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are: ",
        tuple(names),
    )


KINDS = {"vt": Kind(build, answer_tokens=30, least=HOPS + 1)}
