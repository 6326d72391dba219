"""More expert episodes out of few: the same episode with other things in it.

What an expert does in ALFWorld hangs on which names match, seldom on what they mean. Swapping names consistently through an
episode (every apple becomes a mug, every shelf a drawer, and object numbers trade places) gives another episode in which the
same moves are right, so that a small model cannot learn a few hundred episodes by heart and has to learn to read.
Appliances that a task names by their function keep their names.
"""

import random
import re

from epo_jax.envs.base import Demonstration

_FUNCTIONAL = frozenset({"microwave", "fridge", "sinkbasin", "desklamp"})
_THING = re.compile(r"\b([a-z]+) (\d+)\b")


def rename(demonstrations: list[Demonstration], seed: int) -> list[Demonstration]:
    """Each episode with other names.

    Names are drawn from those that the episodes themselves hold; places (listed in an episode's first observation) and
    objects are permuted apart.
    """
    places = {noun for d in demonstrations for noun, _ in _THING.findall(d.observations[0])} - _FUNCTIONAL
    things = {noun for d in demonstrations for text in d.observations for noun, _ in _THING.findall(text)}
    objects = things - places - _FUNCTIONAL
    pattern = re.compile(rf"\b({'|'.join(sorted(places | objects))})\b(?: (\d+)\b)?")
    rng = random.Random(seed)
    return [_renamed(d, sorted(places), sorted(objects), pattern, rng) for d in demonstrations]


def _renamed(demonstration, places, objects, pattern, rng) -> Demonstration:
    names = dict(zip(places, rng.sample(places, len(places)), strict=True))
    names |= dict(zip(objects, rng.sample(objects, len(objects)), strict=True))
    texts = "\n".join(demonstration.observations)
    numbers = {}
    for noun in objects:
        held = sorted({number for name, number in _THING.findall(texts) if name == noun})
        numbers[noun] = dict(zip(held, rng.sample(held, len(held)), strict=True))

    def swap(match: re.Match) -> str:
        noun, number = match.groups()
        return names[noun] if number is None else f"{names[noun]} {numbers.get(noun, {}).get(number, number)}"

    return Demonstration(
        task=demonstration.task,
        goal=pattern.sub(swap, demonstration.goal),
        observations=tuple(pattern.sub(swap, text) for text in demonstration.observations),
        actions=tuple(pattern.sub(swap, action) for action in demonstration.actions),
        won=demonstration.won,
        mistakes=demonstration.mistakes,
    )
