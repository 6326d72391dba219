"""The texts of an ALFWorld game, derived from its grammar and the facts of a state.

The result equals TextWorld's text in every character.
"""

from collections.abc import Callable, Iterator, Set
from typing import Any

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld.expressions import compile_expression
from epo_jax.envs.alfworld.grammar import Query, Rules, Symbols

Binding = dict[tuple[str, str], str]  # (placeholder, type) -> object id
Facts = Callable[[str], Set[tuple[str, ...]]]  # predicate -> its true argument tuples, sorted

MAX_SYMBOLS = 50_000  # of one text; the longest of the real grammar needs about a thousand
_ROOT_TYPE = "object"  # every PDDL type is a subtype of it


def solve(query: Query, binding: Binding, facts: Facts, types: dict[str, str]) -> Iterator[Binding]:
    """Yields all extensions of `binding` for which every predicate of `query` holds, in TextWorld's order.

    As in TextWorld, no two placeholders are bound to the same object.
    """
    if not query:
        yield binding
        return
    (predicate, placeholders), rest = query[0], query[1:]
    for arguments in facts(predicate):
        extended = dict(binding)
        for (name, type_), value in zip(placeholders, arguments, strict=True):
            bound = extended.get((name, type_))
            if bound is None:
                if value in extended.values() or type_ not in (types[value], _ROOT_TYPE):
                    break
                extended[name, type_] = value
            elif bound != value:
                break
        else:
            yield from solve(rest, extended, facts, types)


class Grammar:
    """The rules of a game, which derive text from facts.

    Args:
        rules: as from `parse_document`.
        entities: object id -> its fields {id, name, type, definite, indefinite}.
    """

    def __init__(self, rules: Rules, entities: dict[str, dict[str, str]]):
        self._rules = rules
        self._entities = entities
        self._types = {key: entity["type"] for key, entity in entities.items()}
        self._left = 0

    def derive(self, symbols: Symbols, binding: Binding, facts: Facts) -> str:
        """Derives the text of `symbols` from a binding of placeholders and facts.

        Raises:
            UserError: no rule fits, or the derivation does not end.
        """
        self._left = MAX_SYMBOLS
        try:
            return self._text(symbols, binding, facts)
        except RecursionError:
            raise UserError("the game's grammar has no end.") from None

    def _text(self, symbols: Symbols, binding: Binding, facts: Facts) -> str:
        return "".join(self._derive(symbol, binding, facts) for symbol in symbols)

    def _derive(self, symbol: list[Any], binding: Binding, facts: Facts) -> str:
        self._left -= 1
        if self._left < 0:
            raise UserError("the game's grammar has no end.")
        kind, content = symbol[0], symbol[1]
        if kind == "text":
            return content
        if kind == "value":
            return str(compile_expression(content)({name: self._entities[v] for (name, _), v in binding.items()}))
        if kind == "rule":
            return self._text(self._choose(content, binding, facts), binding, facts)
        if kind == "each":
            return "".join(self._each(symbol, binding, facts))
        return self._join(self._each(content, binding, facts), binding, facts)

    def _choose(self, name: str, binding: Binding, facts: Facts) -> Symbols:
        for condition, symbols in self._rules.get(name, ()):
            if condition is None or any(True for _ in solve(condition, binding, facts, self._types)):
                return symbols
        raise UserError(f"the game's grammar has no rule that fits #{name}#.")

    def _each(self, symbol: list[Any], binding: Binding, facts: Facts) -> list[str]:
        _, expression, query = symbol
        if query is None:
            return [self._derive(expression, binding, facts)]
        return [self._derive(expression, bound, facts) for bound in solve(query, binding, facts, self._types)]

    def _join(self, items: list[str], binding: Binding, facts: Facts) -> str:
        if len(items) < 2:
            return items[0] if items else self._derive(["rule", "list_empty"], binding, facts)
        separator = self._derive(["rule", "list_separator"], binding, facts)
        last = self._derive(["rule", "list_last_separator"], binding, facts)
        return separator.join(items[:-1]) + last + items[-1]
