"""A searching expert for ALFWorld: what a sensible person would do who sees only the texts.

It looks through the receptacles in the order in which the room's description lists them, opening what is closed, the
target's kind last of all and never the same one twice. It remembers what it saw, and makes no move that tells it nothing.
An order that went by where an object is likely to be would be shorter, and much harder to clone from a few hundred
episodes: the next name of a list can be copied, a table of likely places must be learnt by heart. The package's own expert
does the same in spirit, but draws moves at random when it is stuck and never finishes a two-object task with the present
grammar.
"""

import random
import re
from collections.abc import Generator
from typing import NamedTuple

from epo_jax.envs.alfworld import rooms

Moves = Generator[str, str, None]  # yields an action, is sent the text that it brought


class Goal(NamedTuple):
    """What a game asks for; object and receptacle types in lower case.

    Attributes:
        target: the type of receptacle to put the object on, or of lamp to look at it by.
    """

    task_type: str
    object: str
    target: str


def hesitating(moves: Moves, rate: float, seed: str) -> Moves:
    """`moves`; with probability `rate` the expert looks into its bag before each of them, in the whole episode or never.

    Clones of such an expert know what to do and waste turns all the same, which leaves something to learn from reward. The
    habit is an episode's, so that what a group of episodes is rewarded for is having it or not.
    """
    hesitates = random.Random(seed).random() < rate
    action = next(moves, None)
    while action is not None:
        if hesitates:
            yield "inventory"
        text = yield action
        try:
            action = moves.send(text)
        except StopIteration:
            return


class Mistake(str):
    """A move that shows what to do after it, and is not for imitation."""


def erring(moves: Moves, rate: float, seed: str, text: str, object_: str) -> Moves:
    """`moves`, before each of which the expert, with probability `rate`, tries something that cannot be done.

    It goes where it is or to a place that does not exist, or takes an `object_` that is not there; `text` lists the places.
    The clone of a faultless expert never saw a mistake, and its own first one leads it where it knows nothing. Noise of the
    demonstrator's, left out of the loss, shows it the way back (DART, arXiv 1703.09327).
    """
    rng = random.Random(seed)
    places = re.findall(r"\ba ([a-z]+ \d+)", text)
    kinds = sorted({_type(place) for place in places})
    here, there = "", ""
    action = next(moves, None)
    while action is not None:
        if here and rng.random() < rate:
            kind = rng.choice(kinds)
            count = sum(_type(place) == kind for place in places)
            thing = f"{object_} {rng.randint(1, 3)}"
            errors = [f"go to {here}", f"go to {kind} {count + 1}"]
            errors += [f"take {thing} from {here}"] * 2 if f"{thing}" not in there else []
            yield Mistake(rng.choice(errors))
        text = yield action
        if action.startswith("go to "):
            here, there = action.removeprefix("go to "), text
        elif action.startswith("open "):
            there = text
        try:
            action = moves.send(text)
        except StopIteration:
            return


def expert_moves(goal: Goal, text: str) -> Moves:
    """The expert's actions for an episode that starts with `text`. Ends when it has nothing left to try."""
    search = _Search(goal.target, re.findall(r"\ba ([a-z]+ \d+)", text))
    for _ in range(2 if goal.task_type == "pick_two_obj_and_place" else 1):
        item = yield from search.fetch(goal.object)
        if item is None:
            return
        if goal.task_type == "look_at_obj_in_light":
            lamp = yield from search.find(goal.target)
            if lamp is not None:
                yield f"use {lamp}"
            return
        if goal.task_type in rooms.TREATMENTS:
            _, verb, station_type = rooms.TREATMENTS[goal.task_type]
            station = search.nearest(station_type.lower())
            yield from search.reach(station, inside=False)
            yield f"{verb} {item} with {station}"
        target = search.nearest(goal.target)
        yield from search.reach(target)
        yield f"move {item} to {target}"


class _Search:
    """What has been seen so far, and the moves that see more."""

    def __init__(self, target: str, receptacles: list[str]):
        self._target = target
        self._receptacles = receptacles
        self._seen: dict[str, list[str]] = {}  # receptacle -> what was there when last looked at
        self._here = ""

    def nearest(self, type_: str) -> str:
        """A receptacle of a type: this one, or else the first in the order of the room's description."""
        if _type(self._here) == type_:
            return self._here
        return next((r for r in self._receptacles if _type(r) == type_), f"{type_} 1")

    def reach(self, receptacle: str, inside: bool = True) -> Moves:
        """Go there, and open it if it is closed and its inside is wanted."""
        if self._here != receptacle:
            text = yield f"go to {receptacle}"
            self._here = receptacle
            if inside and "is closed" in text:
                text = yield f"open {receptacle}"
            if "is closed" not in text:
                self._seen[receptacle] = re.findall(r"\ba ([a-z]+ \d+)", text)
        elif inside and receptacle not in self._seen:
            text = yield f"open {receptacle}"
            self._seen[receptacle] = re.findall(r"\ba ([a-z]+ \d+)", text)

    def find(self, type_: str) -> Generator[str, str, str | None]:
        """Go where a thing of this type is; its name, or None when the whole room has been searched."""
        while True:
            for receptacle, things in self._seen.items():
                thing = next((t for t in things if _type(t) == type_), None)
                if thing is not None and _type(receptacle) != self._target:
                    yield from self.reach(receptacle)
                    return thing
            unseen = [r for r in self._receptacles if r not in self._seen]
            if not unseen:
                return None
            yield from self.reach(min(unseen, key=lambda r: _type(r) == self._target))

    def fetch(self, type_: str) -> Generator[str, str, str | None]:
        """Find a thing of this type and take it."""
        thing = yield from self.find(type_)
        if thing is not None:
            yield f"take {thing} from {self._here}"
            self._seen[self._here].remove(thing)
        return thing


def _type(name: str) -> str:
    return name.split(" ")[0]
