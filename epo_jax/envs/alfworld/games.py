"""Generates household games in ALFWorld's format from the data of the `alfworld` package.

The package contains no games, but the rules (PDDL domain, grammar, goal library, which object fits where) and, for each of its
120 rooms, the receptacles and object types. A game is a room, objects placed at random on receptacles that may contain them,
and a goal of one of the six task types. It is a pure function of (options, split, index). The hidden state gives its
walkthrough.

Splits:
    train, valid_seen   all rooms but four, without held-out pairings of (object, target receptacle);
    valid_unseen        the four rooms that the original data reserves for it, with held-out pairings only.
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import rooms
from epo_jax.envs.alfworld.names import display_names, escape

GENERATOR_VERSION = 3  # part of the name of the cache folder; raise it if the same options give other games
COMPACT_OBJECTS_PER_RECEPTACLE = 1.5
ATTEMPTS = 1000


@dataclasses.dataclass(frozen=True)
class Generated:
    """The three files of a game, and its folder below that of the split."""

    folder: str
    task_type: str
    files: dict[str, str]
    walkthrough: tuple[str, ...]


def _draw_goal(task_type: str, unseen: bool, seed: int, rng: random.Random) -> tuple[int, rooms.Pairing]:
    held_out = rooms.held_out_pairings(seed)
    choices = {}
    for room in rooms.rooms_of(task_type, unseen):
        allowed = [p for p in rooms.pairings(task_type, room) if (p in held_out) == unseen]
        if allowed:
            choices[room] = allowed
    room = rng.choice(sorted(choices))
    return room, rng.choice(choices[room])


# ---------------------------------------------------------------------------------------------- placing


class _Placement(NamedTuple):
    receptacles: dict[str, tuple[str, rooms.Location]]
    objects: dict[str, str]  # id -> type
    places: dict[str, str]  # object id -> receptacle id


def _place(room: rooms.Room, task_type: str, goal: rooms.Pairing, limit: int | None, rng: random.Random) -> _Placement | None:
    """Places all objects; those of the goal are never on the target.

    Args:
        limit: number of receptacles to keep: those that the goal needs and a random choice of the others. It also limits the
            number of other objects, so that the texts of a compact room are shorter.

    Returns:
        None if this draw needs more receptacles than `limit`.
    """
    looks = task_type == "look_at_obj_in_light"
    copies = rooms.constants().MAX_NUM_OF_OBJ_INSTANCES
    available = {r: type_ for r, (type_, _) in sorted(room.receptacles.items())}

    def homes(object_type: str) -> list[str]:
        return [r for r, type_ in available.items() if rooms.fits(type_, object_type)]

    def one_of(types: Iterable[str]) -> str:
        return rng.choice([r for r, type_ in available.items() if type_ in types])

    count = max(2 if task_type == "pick_two_obj_and_place" else 1, rng.randint(1, copies))
    hiding = [r for r in homes(goal.object) if available[r] != goal.target]
    things = [(goal.object, rng.choice(hiding)) for _ in range(count)]
    if room.has_lamp and any(type_ in rooms.LAMP_SURFACES for type_ in available.values()):
        things.append((rooms.LAMP, one_of(rooms.LAMP_SURFACES)))
    if limit is not None:
        needed = {receptacle for type_, receptacle in things if looks or type_ != rooms.LAMP}
        if not looks:
            needed.add(one_of([goal.target]))
        if task_type in rooms.TREATMENTS:
            needed.add(one_of([rooms.TREATMENTS[task_type][2]]))
        if len(needed) > limit:
            return None
        others = [r for r in available if r not in needed]
        chosen = needed | set(rng.sample(others, min(len(others), limit - len(needed))))
        available = {r: type_ for r, type_ in available.items() if r in chosen}
        things = [(type_, receptacle) for type_, receptacle in things if receptacle in chosen]
    others = [t for t in room.object_types if t != goal.object for _ in range(rng.randint(1, copies)) if homes(t)]
    if limit is not None:
        rng.shuffle(others)
        others = others[: round(COMPACT_OBJECTS_PER_RECEPTACLE * len(available))]
    things += [(type_, rng.choice(homes(type_))) for type_ in others]
    objects, places = {}, {}
    for type_, receptacle in things:
        identifier = rooms.new_id(type_, rng, room.taken_ids)
        objects[identifier], places[identifier] = type_, receptacle
    return _Placement({r: room.receptacles[r] for r in available}, objects, places)


# ---------------------------------------------------------------------------------------------- writing


def _escape(text: str) -> str:
    """Escapes identifiers for ALFWorld's PDDL; `#` in `text` stands for the type separator `-`."""
    return escape(text).replace("#", "-")


def _location(location: rooms.Location) -> str:
    return "|".join(["loc", *map(str, location)])


def _problem(name: str, room: rooms.Room, placement: _Placement, goal_text: str) -> str:
    """Returns the PDDL problem, with the sections of the original data."""
    tables = rooms.constants()
    objects, receptacles = sorted(placement.objects.items()), sorted(placement.receptacles.items())
    movable = set(tables.MOVABLE_RECEPTACLES)
    fixed = sorted(rooms.fixed_receptacles())
    generic = sorted(set(tables.OBJECTS_SET) - set(fixed))
    places = sorted({where for _, (_, where) in receptacles} | {room.start})
    pickable = set(room.object_types)
    lines = [f"(define (problem plan_{name})", "(:domain alfred)", "(:objects", "agent1 # agent"]
    lines += [f"{o} # object" for o in generic]
    lines += [f"{o}Type # otype" for o in generic] + [f"{r}Type # rtype" for r in fixed]
    lines += [f"{o} # object" for o, _ in objects] + [f"{r} # receptacle" for r, _ in receptacles]
    lines += [f"{_location(where)} # location" for where in places] + [")", "(:init"]
    lines += [f"(receptacleType {r} {type_}Type)" for r, (type_, _) in receptacles]
    lines += [f"(objectType {o} {type_}Type)" for o, type_ in objects]
    lines += [
        f"(canContain {r}Type {o}Type)"
        for r in sorted({type_ for _, (type_, _) in receptacles})
        for o in sorted({type_ for _, type_ in objects})
        if rooms.fits(r, o)
    ]
    lines += [f"(pickupable {o})" for o, type_ in objects if type_ in pickable]
    lines += [f"(isReceptacleObject {o})" for o, type_ in objects if type_ in movable]
    lines += [f"(openable {r})" for r, (type_, _) in receptacles if type_ in tables.OPENABLE_CLASS_SET]
    lines += [f"(atLocation agent1 {_location(room.start)})"]
    for quality in ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"):
        able = tables.VAL_ACTION_OBJECTS[quality]
        lines += [f"({quality.lower()} {o})" for o, type_ in objects if type_ in able]
    inside = sorted(placement.places.items())
    lines += [f"(inReceptacle {o} {r})" for o, r in inside]
    lines += [f"(objectAtLocation {o} {_location(placement.receptacles[r][1])})" for o, r in inside]
    lines += [f"(receptacleAtLocation {r} {_location(where)})" for r, (_, where) in receptacles] + [")"]
    return _escape("\n".join(lines)) + "\n" + _escape(goal_text)


def _walkthrough(task_type: str, goal: rooms.Pairing, placement: _Placement) -> tuple[str, ...]:
    """Returns commands that win, from the hidden state."""
    spelled = {i: escape(i).lower() for i in (*placement.objects, *placement.receptacles)}
    displayed = display_names(spelled.values())
    names = {i: displayed[text] for i, text in spelled.items()}
    commands: list[str] = []
    opened: set[str] = set()
    here = ""

    def reach(receptacle: str, inside: bool = True) -> None:
        nonlocal here
        if here != receptacle:
            commands.append(f"go to {names[receptacle]}")
            here = receptacle
        openable = placement.receptacles[receptacle][0] in rooms.constants().OPENABLE_CLASS_SET
        if inside and openable and receptacle not in opened:
            commands.append(f"open {names[receptacle]}")
            opened.add(receptacle)

    def first(type_: str) -> str:
        return min(r for r, (other, _) in placement.receptacles.items() if other == type_)

    targets = [o for o, type_ in placement.objects.items() if type_ == goal.object]
    for target in targets[: 2 if task_type == "pick_two_obj_and_place" else 1]:
        place = placement.places[target]
        reach(place)
        commands.append(f"take {names[target]} from {names[place]}")
        if task_type == "look_at_obj_in_light":
            lamp = next(o for o, type_ in placement.objects.items() if type_ == rooms.LAMP)
            reach(placement.places[lamp])
            commands.append(f"use {names[lamp]}")
            continue
        if task_type in rooms.TREATMENTS:
            _, verb, station = rooms.TREATMENTS[task_type]
            reach(first(station), inside=False)
            commands.append(f"{verb} {names[target]} with {names[first(station)]}")
        reach(first(goal.target))
        commands.append(f"move {names[target]} to {names[first(goal.target)]}")
    return tuple(commands)


@functools.cache
def _rules() -> tuple[str, str]:
    """Returns PDDL domain and grammar of the package."""
    with rooms.package_import():
        from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    return Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()


def generate(split: str, index: int, seed: int, max_receptacles: int | None) -> Generated:
    """Generates game number `index` of a split; task types alternate.

    Args:
        max_receptacles: None for the whole room; else a compact room: a random part of the room that contains what the goal
        needs,
            with fewer objects.

    Raises:
        UserError: `max_receptacles` is too small for any game of the type.
    """
    with rooms.package_import():
        import alfworld.gen.goal_library as goal_library

    task_type = rooms.TASK_TYPES[index % len(rooms.TASK_TYPES)]
    rng = random.Random(f"{seed}/{split}/{index}")
    placement = None
    for _ in range(ATTEMPTS):
        number, goal = _draw_goal(task_type, split == "valid_unseen", seed, rng)
        room = rooms.build_room(number, rng)
        placement = _place(room, task_type, goal, max_receptacles, rng)
        if placement is not None:
            break
    if placement is None:
        raise UserError(f"env.max_receptacles={max_receptacles} leaves no room for a game of type {task_type}; use 5 or more.")
    looks = task_type == "look_at_obj_in_light"
    parent, toggle = ("", goal.target) if looks else (goal.target, "")
    slots = {"obj": goal.object, "recep": parent, "toggle": toggle, "mrecep": ""}
    template = rng.choice(goal_library.gdict[task_type]["templates"])
    description = template.format(**{key: value.lower() for key, value in slots.items()})
    digest = int(hashlib.sha256(f"{seed}/{split}/{index}/{max_receptacles}".encode()).hexdigest(), 16)
    trial = f"trial_T2019{digest % 10**4:04d}_{digest // 10**4 % 10**6:06d}_{digest // 10**10 % 10**6:06d}"
    problem = _problem(trial, room, placement, goal_library.gdict[task_type]["pddl"].format(**slots))
    walkthrough = _walkthrough(task_type, goal, placement)
    domain, grammar = _rules()
    game = {
        "pddl_domain": domain,
        "grammar": grammar.replace("UNKNOWN GOAL", description),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": walkthrough,
    }
    files = {
        "game.tw-pddl": json.dumps(game),
        "initial_state.pddl": problem,
        "traj_data.json": json.dumps(_trajectory(trial, task_type, goal, number, description), indent=1),
    }
    folder = f"{task_type}-{goal.object}-None-{goal.target}-{number}/{trial}"
    return Generated(folder, task_type, files, walkthrough)


def _trajectory(trial: str, task_type: str, goal: rooms.Pairing, room: int, description: str) -> dict[str, Any]:
    """Returns the fields of traj_data.json that the tools of the text game read."""
    looks = task_type == "look_at_obj_in_light"
    return {
        "task_id": trial,
        "task_type": task_type,
        "pddl_params": {
            "object_target": goal.object,
            "parent_target": "" if looks else goal.target,
            "toggle_target": goal.target if looks else "",
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{room}", "scene_num": room},
        "turk_annotations": {"anns": [{"task_desc": description[0].upper() + description[1:] + "."}]},
    }
