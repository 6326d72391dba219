"""Rooms, which object fits where, and the goals that follow, from the data of the `alfworld` package.

Rooms carry AI2-THOR's numbers: kitchens 1-30, living rooms 201-230, bedrooms 301-330, bathrooms 401-430.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
UNSEEN_ROOMS = (10, 219, 308, 424)
HELD_OUT_SHARE = 0.3  # of the pairings that the unseen rooms allow
HELD_OUT_MINIMUM = 3  # in each task type

# The treatment of the object before it is placed: property, verb, receptacle type.
TREATMENTS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "clean", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "heat", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "cool", "Fridge"),
}
LAMP = "DeskLamp"
LAMP_SURFACES = ("CoffeeTable", "Desk", "DiningTable", "Dresser", "Shelf", "SideTable")
# Receptacles that a room lists without a position, and how many to place (one unless listed).
UNPLACED_COUNTS = {"StoveBurner": 4, "HandTowelHolder": 2}

Location = tuple[int, int, int, int]  # x, z, rotation, horizon


class Pairing(NamedTuple):
    object: str
    target: str  # receptacle type, or the lamp's for `look_at_obj_in_light`


@dataclasses.dataclass
class Room:
    """The furniture of a room, and the objects that may be in it."""

    object_types: list[str]  # that can be picked up, sorted
    has_lamp: bool
    receptacles: dict[str, tuple[str, Location]]  # id -> type, where the agent stands to use it
    start: Location
    taken_ids: set[str]


@contextlib.contextmanager
def package_import():
    """Context for imports of `alfworld`, which would make ~/.cache/alfworld and set ALFWORLD_DATA to it."""
    before = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["ALFWORLD_DATA"]
        if before is not None:
            os.environ["ALFWORLD_DATA"] = before


@functools.cache
def constants():
    """ALFWorld's tables of objects, receptacles and affordances."""
    with package_import():
        import alfworld.gen.constants as tables

    return tables


def fixed_receptacles() -> set[str]:
    """Receptacle types that stay where they are."""
    return set(constants().RECEPTACLES) - set(constants().MOVABLE_RECEPTACLES)


def fits(receptacle_type: str, object_type: str) -> bool:
    """Whether ALFWorld allows an object of this type there."""
    return object_type in constants().VAL_RECEPTACLE_OBJECTS.get(receptacle_type, ())


@functools.cache
def _layouts() -> dict[int, tuple[dict[str, list[float]], list[str]]]:
    """Returns room number -> ({receptacle id: [x, z, rotation, horizon]}, object types), from the package."""
    folder = Path(constants().__file__).parent / "layouts"
    rooms = {}
    for path in sorted(folder.glob("FloorPlan*-openable.json")):
        number = int(re.search(r"FloorPlan(\d+)-", path.name).group(1))
        objects = json.loads((folder / f"FloorPlan{number}-objects.json").read_text())
        rooms[number] = (json.loads(path.read_text()), objects)
    return dict(sorted(rooms.items()))


def _room_kind(number: int) -> str:
    return "Kitchen" if number < 100 else "LivingRoom" if number < 300 else "Bedroom" if number < 400 else "Bathroom"


def rooms_of(task_type: str, unseen: bool) -> list[int]:
    """Returns the rooms in which this task type occurs, held-out ones or the others."""
    kinds = constants().GOALS_VALID[task_type]
    return [n for n in _layouts() if (n in UNSEEN_ROOMS) == unseen and _room_kind(n) in kinds]


def _receptacle_type(identifier: str) -> str:
    return identifier.split("|")[-1] if identifier.endswith("Basin") else identifier.split("|")[0]


def build_room(number: int, rng: random.Random) -> Room:
    """Returns a room with empty receptacles; `rng` draws the positions that the package lacks."""
    placed, types = _layouts()[number]
    taken, locations = set(placed), set()

    def unique(location: Location) -> Location:
        while location in locations:
            location = (location[0] + 1, *location[1:])
        locations.add(location)
        return location

    def anywhere() -> Location:
        return unique((rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(0, 3), 30))

    receptacles = {}
    for identifier, (x, z, rotation, horizon) in sorted(placed.items()):
        if _receptacle_type(identifier) in fixed_receptacles():
            where = unique((round(x / 0.25), round(z / 0.25), int(rotation) // 90, int(horizon)))
            receptacles[identifier] = (_receptacle_type(identifier), where)
    present = {type_ for type_, _ in receptacles.values()}
    for type_ in sorted(set(types) & fixed_receptacles() - present):
        for _ in range(UNPLACED_COUNTS.get(type_, 1)):
            receptacles[new_id(type_, rng, taken)] = (type_, anywhere())
    holdable = {type_ for fitting in constants().VAL_RECEPTACLE_OBJECTS.values() for type_ in fitting}
    pickable = sorted(type_ for type_ in set(types) & holdable if not type_.endswith("Sliced"))
    return Room(pickable, LAMP in types, receptacles, anywhere(), taken)


def new_id(type_: str, rng: random.Random, taken: set[str]) -> str:
    """Returns a new identifier in ALFRED's style, type and position, and adds it to `taken`.

    A basin is a part: `Sink|x|y|z|SinkBasin`; names in the texts depend on this.
    """
    whole, part = (type_.removesuffix("Basin"), f"|{type_}") if type_.endswith("Basin") else (type_, "")
    while True:
        x, y, z = rng.uniform(-4, 4), rng.uniform(0.1, 2), rng.uniform(-4, 4)
        identifier = f"{whole}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}{part}"
        if identifier not in taken:
            taken.add(identifier)
            return identifier


@functools.cache
def pairings(task_type: str, room: int) -> tuple[Pairing, ...]:
    """Returns the possible goals in a room: the object can be treated, fits the target, and has another receptacle."""
    built = build_room(room, random.Random(0))
    types = {type_ for type_, _ in built.receptacles.values()}
    movable = set(constants().MOVABLE_RECEPTACLES)
    if task_type == "look_at_obj_in_light":
        if not built.has_lamp or not types & set(LAMP_SURFACES):
            return ()
        liftable = [o for o in built.object_types if o not in movable and any(fits(t, o) for t in types)]
        return tuple(Pairing(o, LAMP) for o in liftable)
    needed, _, station = TREATMENTS.get(task_type, ("", "", ""))
    if station and station not in types:
        return ()
    goals = []
    for object_type in built.object_types:
        if needed and object_type not in constants().VAL_ACTION_OBJECTS[needed]:
            continue
        homes = sorted(t for t in types if fits(t, object_type))
        goals += [Pairing(object_type, target) for target in homes if len(homes) >= 2]
    return tuple(goals)


@functools.cache
def held_out_pairings(seed: int) -> frozenset[Pairing]:
    """Returns the pairings reserved for valid_unseen, for all task types: a seeded sample of those in its rooms."""
    by_type = [{p for room in rooms_of(t, unseen=True) for p in pairings(t, room)} for t in TASK_TYPES]
    possible = sorted(set().union(*by_type))
    attempt = 0
    while True:
        rng = random.Random(f"{seed}/held out/{attempt}")
        chosen = frozenset(rng.sample(possible, round(HELD_OUT_SHARE * len(possible))))
        if all(len(chosen & allowed) >= HELD_OUT_MINIMUM for allowed in by_type):
            return chosen
        attempt += 1
