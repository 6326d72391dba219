"""The searching expert on rooms that are written out by hand."""

from epo_jax.envs.alfworld import experts

ROOM = (
    "You are in the middle of a room. Looking quickly around you, "
    "you see a cabinet 1, a desk 2, a desk 1, a fridge 1, and a safe 1."
)


class House:
    """A tiny room that answers in the game's words."""

    def __init__(self, contents: dict[str, list[str]], closed: tuple[str, ...] = ()):
        self.contents = {name: list(things) for name, things in contents.items()}
        self.closed = set(closed)
        self.moves: list[str] = []

    def listing(self, place: str) -> str:
        things = [f"a {thing}" for thing in self.contents.get(place, [])]
        return "you see nothing." if not things else "you see " + ", ".join(things) + "."

    def answer(self, action: str) -> str:
        self.moves.append(action)
        verb, *words = action.split()
        place = " ".join(words[-2:])
        if verb == "go":
            return f"You arrive at {place}. " + (
                f"The {place} is closed." if place in self.closed else f"On the {place}, {self.listing(place)}"
            )
        if verb == "open":
            self.closed.remove(place)
            return f"You open the {place}. The {place} is open. In it, {self.listing(place)}"
        thing = " ".join(words[:2])
        if verb == "take":
            self.contents[place].remove(thing)
        if verb == "move":
            self.contents.setdefault(place, []).append(thing)
        return f"You {verb} the {thing}."


def play(goal: experts.Goal, house: House) -> list[str]:
    moves = experts.expert_moves(goal, ROOM)
    action = next(moves, None)
    while action is not None:
        try:
            action = moves.send(house.answer(action))
        except StopIteration:
            action = None
    return house.moves


def test_places_are_searched_in_the_order_of_the_text_and_the_target_last():
    house = House({"safe 1": ["watch 1"]}, closed=("cabinet 1", "fridge 1", "safe 1"))
    assert play(experts.Goal("pick_and_place_simple", "watch", "desk"), house) == [
        "go to cabinet 1",
        "open cabinet 1",
        "go to fridge 1",
        "open fridge 1",
        "go to safe 1",
        "open safe 1",
        "take watch 1 from safe 1",
        "go to desk 2",
        "move watch 1 to desk 2",
    ]


def test_nothing_found_means_every_place_was_looked_at_once():
    house = House({}, closed=("cabinet 1", "fridge 1", "safe 1"))
    moves = play(experts.Goal("pick_and_place_simple", "mug", "desk"), house)
    assert [m for m in moves if m.startswith("go")] == [
        f"go to {place}" for place in ("cabinet 1", "fridge 1", "safe 1", "desk 2", "desk 1")
    ]
    assert [m for m in moves if m.startswith("open")] == ["open cabinet 1", "open fridge 1", "open safe 1"]


def test_two_things_seen_together_are_fetched_without_another_search():
    house = House({"desk 2": ["pen 1", "pen 2"]}, closed=("cabinet 1", "fridge 1", "safe 1"))
    assert play(experts.Goal("pick_two_obj_and_place", "pen", "cabinet"), house) == [
        "go to desk 2",
        "take pen 1 from desk 2",
        "go to cabinet 1",
        "open cabinet 1",
        "move pen 1 to cabinet 1",
        "go to desk 2",
        "take pen 2 from desk 2",
        "go to cabinet 1",
        "move pen 2 to cabinet 1",
    ]


def test_what_lies_in_the_fridge_is_cooled_on_the_spot():
    house = House({"fridge 1": ["mug 1"]}, closed=("cabinet 1", "fridge 1"))
    moves = play(experts.Goal("pick_cool_then_place_in_recep", "mug", "desk"), house)
    assert moves[-5:] == [
        "open fridge 1",
        "take mug 1 from fridge 1",
        "cool mug 1 with fridge 1",
        "go to desk 2",
        "move mug 1 to desk 2",
    ]


def test_a_lamp_seen_on_the_way_is_used():
    house = House({"desk 2": ["desklamp 1"], "desk 1": ["book 1"]}, closed=("cabinet 1", "safe 1"))
    assert play(experts.Goal("look_at_obj_in_light", "book", "desklamp"), house)[-3:] == [
        "take book 1 from desk 1",
        "go to desk 2",
        "use desklamp 1",
    ]


def script():
    """Moves that check that they hear what they caused."""
    for action in ("go to shelf 1", "take mug 1 from shelf 1", "go to desk 1", "move mug 1 to desk 1"):
        assert (yield action) == f"text of {action}"


def recite(expert):
    """What an expert does who always hears `text of ACTION`."""
    actions, action = [], next(expert, None)
    while action is not None:
        actions.append(action)
        try:
            action = expert.send(f"text of {action}")
        except StopIteration:
            action = None
    return actions


def test_a_hesitating_expert_wastes_a_turn_before_every_move_or_before_none():
    moves = recite(script())
    wasteful = [action for move in moves for action in ("inventory", move)]
    played = [recite(experts.hesitating(script(), 0.7, str(seed))) for seed in range(400)]
    assert all(actions in (moves, wasteful) for actions in played)
    # 400 coins of probability 0.7; 6 sigma.
    assert abs(played.count(wasteful) - 280) < 6 * (400 * 0.7 * 0.3) ** 0.5
    assert recite(experts.hesitating(script(), 0.0, "a")) == moves
    assert recite(experts.hesitating(script(), 0.5, "a")) == recite(experts.hesitating(script(), 0.5, "a"))


def test_an_erring_expert_makes_the_same_moves_with_impossible_ones_between():
    moves = recite(script())
    room = "you see a desk 1, a shelf 2, and a shelf 1."
    played = [recite(experts.erring(script(), 0.3, str(seed), room, "mug")) for seed in range(400)]
    mistakes = [a for actions in played for a in actions if isinstance(a, experts.Mistake)]
    assert all([a for a in actions if not isinstance(a, experts.Mistake)] == moves for actions in played)
    # Never before the first move; three more moves of 400 episodes; 6 sigma.
    assert all(actions[0] == moves[0] for actions in played)
    assert abs(len(mistakes) - 360) < 6 * (1200 * 0.3 * 0.7) ** 0.5
    for kind in ("go to shelf 1", "go to shelf 3", "go to desk 2", "go to desk 1", "take mug 3 from shelf 1"):
        assert kind in mistakes
    assert not {"go to shelf 2", "move mug 1 to desk 1"} & set(mistakes)
