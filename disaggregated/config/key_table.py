"""One row for each key that a configuration file may hold, and what a row can say about it.

The rows themselves are in `server_keys.py` and `deployment_keys.py`. A row sends its key to a field, or says why the
key has no effect, is not built yet, or is refused; `docs/config.md` is printed from the same rows, so the two cannot
disagree.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence

from disaggregated.config.kinds import Kind, did_you_mean


class Outcome(enum.Enum):
    HONOURED = "honoured"
    NO_EFFECT = "no effect"
    NOT_BUILT = "not built yet"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    name: str
    """As in the file; a key inside a section is `section.key`."""
    kind: Kind
    outcome: Outcome
    says: str
    """Honoured: what it does. Otherwise: the reason, as the operator reads it."""
    target: str = ""
    """Honoured: the dotted field it fills."""
    harmless: tuple[object, ...] = ()
    """Values that ask for what is done anyway: nothing needs to be said about them."""
    not_built_values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Values of an honoured key that do not exist yet, with the reason."""
    substitutes: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Values of an honoured key that stand for another one for now: value -> (what is used, the reason)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    name: str
    of: str
    says: str = ""
    """A note for the operator; empty where both spellings are equally good."""
    yields: bool = False
    """The key itself wins when both are there with different values; otherwise that is an error."""


class KeyTable:
    """The rows of one kind of section. Every name is unique; every alias leads to a row."""

    def __init__(self, keys: Sequence[Key], aliases: Sequence[Alias] = ()) -> None:
        self._keys = {key.name: key for key in keys}
        self._aliases = {alias.name: alias for alias in aliases}
        names = [*(key.name for key in keys), *(alias.name for alias in aliases)]
        assert len(set(names)) == len(names), f"a key has two rows: {sorted(n for n in names if names.count(n) > 1)}"
        assert all(alias.of in self._keys for alias in aliases), "an alias leads nowhere"
        self._groups = {name[:dot] for name in names for dot in _dots(name)}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    @property
    def aliases(self) -> tuple[Alias, ...]:
        return tuple(self._aliases.values())

    def __getitem__(self, name: str) -> Key:
        return self._keys[self.canonical(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._keys or name in self._aliases

    def is_group(self, name: str) -> bool:
        return name in self._groups

    def alias(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def canonical(self, name: str) -> str:
        alias = self._aliases.get(name)
        return alias.of if alias else name

    def suggestion(self, name: str) -> str:
        """What to add to "unknown key": the nearest key of its section, or the section where it really lives."""
        section, _, last = name.rpartition(".")
        elsewhere = [key for key in self if key.name.rpartition(".")[2] == last]
        if elsewhere:
            return f"; did you mean {max(elsewhere, key=lambda key: key.outcome is Outcome.HONOURED).name}?"
        siblings = {n for n in [*self._keys, *self._aliases, *self._groups] if n.rpartition(".")[0] == section}
        return did_you_mean(last, sorted(sibling.rpartition(".")[2] for sibling in siblings))


def _dots(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."]


def honoured(
    name: str,
    kind: Kind,
    says: str,
    *,
    target: str | None = None,
    not_built_values: Mapping[str, str] | None = None,
    substitutes: Mapping[str, tuple[str, str]] | None = None,
) -> Key:
    return Key(
        name=name,
        kind=kind,
        outcome=Outcome.HONOURED,
        says=says,
        target=name if target is None else target,
        not_built_values=not_built_values or {},
        substitutes=substitutes or {},
    )


def no_effect(name: str, kind: Kind, says: str, *, harmless: tuple[object, ...] = ()) -> Key:
    return Key(name=name, kind=kind, outcome=Outcome.NO_EFFECT, says=says, harmless=harmless)


def not_built(name: str, kind: Kind, says: str, *, harmless: tuple[object, ...] = ()) -> Key:
    return Key(name=name, kind=kind, outcome=Outcome.NOT_BUILT, says=says, harmless=harmless)


def refused(name: str, kind: Kind, says: str, *, harmless: tuple[object, ...] = ()) -> Key:
    return Key(name=name, kind=kind, outcome=Outcome.REFUSED, says=says, harmless=harmless)
