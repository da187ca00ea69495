"""Words and numbers that examples are made of."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

PEOPLE = (
    *("Ada", "Albert", "Bella", "Bruno", "Clara", "Conrad", "Daisy", "Dorian", "Edith", "Edgar", "Fanny", "Fred"),
    *("Greta", "Gustav", "Hanna", "Hector", "Irene", "Isaac", "Julia", "Jasper", "Karen", "Konrad", "Lucy", "Leo"),
    *("Martha", "Milton", "Nora", "Nathan", "Olive", "Oscar", "Petra", "Philip", "Rosa", "Rufus", "Sarah", "Simon"),
    *("Tilda", "Tobias", "Ursula", "Victor", "Wanda", "Walter", "Yvonne", "Zelda"),
)
ADJECTIVES = (
    *("amber", "brisk", "calm", "distant", "early", "faint", "gentle", "hollow", "idle", "jolly", "keen", "lively"),
    *("mellow", "narrow", "odd", "pale", "quiet", "rapid", "silent", "tidy", "urban", "vivid", "warm", "young"),
)
NOUNS = (
    *("anchor", "basket", "candle", "dragon", "engine", "feather", "garden", "harbour", "island", "jacket", "kettle"),
    *("lantern", "mirror", "needle", "orchard", "pencil", "quarry", "river", "saddle", "tunnel", "umbrella", "valley"),
    *("window", "yard", "bridge", "castle", "desert", "forest", "glacier", "hammer", "ladder", "meadow", "piano"),
    *("rocket", "shovel", "temple", "violin", "wagon", "ribbon", "saucer"),
)
PAIRS = len(ADJECTIVES) * len(NOUNS)  # keys of two words
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "xu", "ze")


def keys(random: Random, count: int) -> list[str]:
    """Return distinct keys of two words: ``calm-river``; at most `PAIRS`."""
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return random.sample(pairs, count)


def numbers(random: Random, count: int, digits: int) -> list[str]:
    """Return distinct numbers of so many digits, the first not zero."""
    low = 10 ** (digits - 1)
    return [str(number) for number in random.sample(range(low, 10 * low), count)]


def coined(random: Random, count: int) -> list[str]:
    """Return distinct words that mean nothing: ``bakune``; they are longer where there are many."""
    syllables = 3
    while len(_SYLLABLES) ** syllables < 4 * count:
        syllables += 1
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(random.choice(_SYLLABLES) for _ in range(syllables))] = None
    return list(made)


def hexadecimal(random: Random, digits: int) -> str:
    """Return a number in hexadecimal digits, as a part of a UUID."""
    return f"{random.getrandbits(4 * digits):0{digits}x}"


def listed(words: Sequence[str]) -> str:
    """Return ``a``, ``a and b``, or ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
