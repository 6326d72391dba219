"""A searching expert for ALFWorld, which sees only the texts.

It searches the receptacles in the order of the room's description, opens closed ones, visits the target's type last and none
twice. It remembers what it saw and takes no action without new information. A search by likely places would be shorter, but
much harder to clone from a few hundred episodes: a policy can copy the next name of a list, but must memorize a table of likely
places. The expert of the package is similar, but takes random actions when it is stuck and never finishes a two-object task
with the current grammar.
"""

import random
import re
from collections.abc import Generator
from typing import NamedTuple

from epo_jax.envs.alfworld import rooms

Moves = Generator[str, str, None]  # yields an action, receives the observed text


class Goal(NamedTuple):
    """The goal of a game; object and receptacle types in lower case.

    Attributes:
        target: the type of the receptacle for the object, or of the lamp to look at it with.
    """

    task_type: str
    object: str
    target: str


def hesitating(moves: Moves, rate: float, seed: str) -> Moves:
    """Yields `moves`; with probability `rate`, the whole episode has an "inventory" before each of them.

    A policy cloned from such an expert knows what to do but wastes turns, which RL can unlearn. The habit belongs to the
    episode, so that reward within a group separates episodes with and without it.
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
    """A deliberate mistake: context for the action after it, excluded from imitation."""


def erring(moves: Moves, rate: float, seed: str, text: str, object_: str) -> Moves:
    """Yields `moves`, each preceded by an impossible action with probability `rate`.

    The mistakes: going to the current or to a missing receptacle, taking an `object_` that is not there; `text` lists the
    receptacles. A policy cloned from a perfect expert has never seen a mistake and cannot recover from its own. Noise in the
    demonstrations, excluded from the loss, shows the recovery (DART, arXiv 1703.09327).
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
    """Yields the expert's actions for an episode that starts with `text`; ends if nothing is left to search."""
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
    """The objects seen so far, and the actions that find more."""

    def __init__(self, target: str, receptacles: list[str]):
        self._target = target
        self._receptacles = receptacles
        self._seen: dict[str, list[str]] = {}  # receptacle -> the objects seen there last
        self._here = ""

    def nearest(self, type_: str) -> str:
        """Returns a receptacle of a type: the current one, else the first of the room's description."""
        if _type(self._here) == type_:
            return self._here
        return next((r for r in self._receptacles if _type(r) == type_), f"{type_} 1")

    def reach(self, receptacle: str, inside: bool = True) -> Moves:
        """Goes to a receptacle and, with `inside`, opens it if it is closed."""
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
        """Goes to an object of this type; returns its name, or None after a search of the whole room."""
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
        """Finds an object of this type and takes it."""
        thing = yield from self.find(type_)
        if thing is not None:
            yield f"take {thing} from {self._here}"
            self._seen[self._here].remove(thing)
        return thing


def _type(name: str) -> str:
    return name.split(" ")[0]
