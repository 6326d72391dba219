"""Data augmentation: expert episodes with other names.

In ALFWorld, the right action depends on which names match, seldom on their meaning. Consistent renaming within an episode
(every apple becomes a mug, every shelf a drawer, object numbers are permuted) gives another episode in which the same actions
are right. A small model then cannot memorize a few hundred episodes and has to learn to read. Appliances that a task names by
their function keep their names.
"""

import dataclasses
import random
import re

from epo_jax.envs.base import Demonstration, Observation

_FUNCTIONAL = frozenset({"microwave", "fridge", "sinkbasin", "desklamp"})
_THING = re.compile(r"\b([a-z]+) (\d+)\b")


def rename(demonstrations: list[Demonstration], seed: int) -> list[Demonstration]:
    """Returns each episode with other names.

    New names come from the episodes. Receptacles (listed in the first observation) and objects are permuted separately.
    """
    places = {noun for d in demonstrations for noun, _ in _THING.findall(d.observations[0].text)} - _FUNCTIONAL
    things = {noun for d in demonstrations for o in d.observations for noun, _ in _THING.findall(o.text)}
    objects = things - places - _FUNCTIONAL
    pattern = re.compile(rf"\b({'|'.join(sorted(places | objects))})\b(?: (\d+)\b)?")
    rng = random.Random(seed)
    return [_renamed(d, sorted(places), sorted(objects), pattern, rng) for d in demonstrations]


def _renamed(demonstration, places, objects, pattern, rng) -> Demonstration:
    names = dict(zip(places, rng.sample(places, len(places)), strict=True))
    names |= dict(zip(objects, rng.sample(objects, len(objects)), strict=True))
    texts = "\n".join(observation.text for observation in demonstration.observations)
    numbers = {}
    for noun in objects:
        present = sorted({number for name, number in _THING.findall(texts) if name == noun})
        numbers[noun] = dict(zip(present, rng.sample(present, len(present)), strict=True))

    def swap(match: re.Match) -> str:
        noun, number = match.groups()
        return names[noun] if number is None else f"{names[noun]} {numbers.get(noun, {}).get(number, number)}"

    def renamed(text: str) -> str:
        return pattern.sub(swap, text)

    def observation(o: Observation) -> Observation:
        # The engine lists commands in alphabetical order.
        commands = sorted(map(renamed, o.admissible))
        return dataclasses.replace(o, text=renamed(o.text), goal=renamed(o.goal), admissible=tuple(commands))

    observations = tuple(map(observation, demonstration.observations))
    return dataclasses.replace(demonstration, observations=observations, actions=tuple(map(renamed, demonstration.actions)))
