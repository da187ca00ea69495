"""A head's quantised cache with integer codes, scales and zero points, token by token, in loops over numbers."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvscope.core.cache_scheme import CacheScheme

Vector = list[float]
E4M3 = sorted(
    {sign * (1 + part / 8) * 2.0 ** (power - 7) for sign in (1, -1) for power in range(1, 16) for part in range(8)}
    - {480.0, -480.0}  # the pattern of NaN
    | {sign * part / 8 * 2.0**-6 for sign in (1, -1) for part in range(8)}
)


def half(number: float) -> float:
    """Return a number rounded to float32 and then to float16, as torch rounds float64."""
    (single,) = struct.unpack("f", struct.pack("f", number))
    return float(struct.unpack("e", struct.pack("e", single))[0])


def e4m3(number: float) -> float:
    """Return the nearest number of the format; of two the one with the even last bit."""
    near = min(abs(number - one) for one in E4M3)
    both = [one for one in E4M3 if abs(number - one) == near]
    return both[0] if len(both) == 1 else next(one for one in both if last_bit(abs(one)) == 0)


def last_bit(number: float) -> int:
    power = max(-6, math.floor(math.log2(number))) if number else -6
    return int(number / 2.0**power * 8) % 2


@dataclass
class Codes:
    """Codes of numbers that share a scale: ``code * scale + zero``."""

    scale: float
    zero: float
    codes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, numbers: dict[int, float], levels: int, stored: Callable[[float], float] = half) -> Codes:
        low, high = (min(numbers.values()), max(numbers.values())) if numbers else (0.0, 0.0)
        made = cls(stored((high - low) / levels), stored(low))
        for place, number in numbers.items():
            code = round((number - made.zero) / made.scale) if made.scale else round(number - made.zero)
            made.codes[place] = min(max(code, 0), levels)
        return made

    def read(self, place: int) -> float:
        return self.codes[place] * self.scale + self.zero


def farthest(numbers: dict[tuple[int, int], float], most: int) -> set[tuple[int, int]]:
    """Return the places of the largest numbers, of equal ones the first."""
    return set(sorted(numbers, key=lambda place: (-numbers[place], place))[:most])


def deviations(numbers: Sequence[float]) -> list[float]:
    mean = sum(numbers) / len(numbers)
    spread = math.sqrt(sum((one - mean) ** 2 for one in numbers) / len(numbers))
    return [float(round(abs(one - mean) / (spread or 1) * 4096)) for one in numbers]


def coded_group(keys: Sequence[Vector], scheme: CacheScheme) -> tuple[list[Vector], list[int]]:
    """Return a group of keys as they are read back from codes with a scale for each channel, and their outliers."""
    channels = range(len(keys[0]))
    kept: set[tuple[int, int]] = set()
    if scheme.kind == "kvquant" and scheme.outliers:
        distance = {
            (place, channel): far
            for channel in channels
            for place, far in enumerate(deviations([key[channel] for key in keys]))
        }
        kept = farthest(distance, int(len(distance) * scheme.outliers + 0.5))
    read = [[0.0] * len(channels) for _ in keys]
    for channel in channels:
        codes = Codes.of(
            {place: key[channel] for place, key in enumerate(keys) if (place, channel) not in kept}, scheme.levels
        )
        for place, key in enumerate(keys):
            whole = (place, channel) in kept
            read[place][channel] = half(key[channel]) if whole else codes.read(place)
    return read, [sum(place == one for one, _ in kept) for place in range(len(keys))]


def coded_value(value: Vector, scheme: CacheScheme) -> tuple[Vector, int]:
    """Return a value as it is read back from codes, and how many of its numbers are outliers."""
    if scheme.kind == "fp8":
        return coded_fp8(value), 0
    kept: set[tuple[int, int]] = set()
    width = scheme.group if scheme.kind in ("kivi", "quanto") else len(value)
    stored = float if scheme.kind == "quanto" else half  # the tests cache float64
    if scheme.kind == "kvquant":
        distance = {(0, channel): far for channel, far in enumerate(deviations(value))}
        kept = farthest(distance, int(len(value) * scheme.outliers + 0.5))
    read: Vector = []
    for start in range(0, len(value), width):
        part = {channel: value[channel] for channel in range(start, min(start + width, len(value)))}
        codes = Codes.of({place: one for place, one in part.items() if (0, place) not in kept}, scheme.levels, stored)
        read += [half(one) if (0, place) in kept else codes.read(place) for place, one in part.items()]
    return read, len(kept)


def coded_fp8(vector: Vector) -> Vector:
    scale = half(max(abs(one) for one in vector) / 448)
    return [e4m3(max(-448.0, min(448.0, one / (scale or 1)))) * scale for one in vector]


@dataclass
class Head:
    """What one key/value head holds: by position of the token, its key and value as attention reads them.

    ``off`` and ``on`` remove and apply the position of a key; ``bits`` counts codes, scales and full numbers.
    """

    scheme: CacheScheme
    off: Callable[[Vector, int], Vector]
    on: Callable[[Vector, int], Vector]
    key: dict[int, Vector] = field(default_factory=dict)
    value: dict[int, Vector] = field(default_factory=dict)
    group_of: dict[int, int] = field(default_factory=dict)  # position of a quantised key -> number of its group
    outliers: dict[tuple[str, int], int] = field(default_factory=dict)
    coded_values: set[int] = field(default_factory=set)
    groups: int = 0
    last: int | None = None  # of quanto: how many tokens had come when all of them became codes

    def add(self, position: int, key: Vector, value: Vector) -> None:
        self.key[position], self.value[position] = key, value

    def keep(self, positions: set[int]) -> None:
        for position in set(self.key) - positions:
            del self.key[position], self.value[position]
            self.group_of.pop(position, None)
            self.coded_values.discard(position)

    def quantise(self, tokens: int) -> None:
        """Quantise what is due once so many tokens have come; those that are evicted are gone already."""
        scheme = self.scheme
        if scheme.kind == "quanto":
            self._quantise_all(tokens)
            return
        first = scheme.first if scheme.kind == "kvquant" else 0
        if scheme.kind == "kivi":
            keys, values = tokens - tokens % scheme.residual, tokens - scheme.residual
        else:
            keys, values = (tokens - tokens % scheme.group if scheme.kind == "kvquant" else tokens), tokens
        due = [each for each in sorted(self.key) if first <= each < keys and each not in self.group_of]
        size = 1 if scheme.kind == "fp8" else scheme.group
        for start in range(0, len(due), size):
            self._group(due[start : start + size])
        for position in sorted(self.value):
            if first <= position < values and position not in self.coded_values:
                self.value[position], self.outliers["value", position] = coded_value(self.value[position], scheme)
                self.coded_values.add(position)

    def _quantise_all(self, tokens: int) -> None:
        """Read all that is held and quantise it again, also what is codes already, when the residual is full."""
        if self.last is not None and tokens - self.last < self.scheme.residual:
            return
        self.last = tokens
        for position in self.key:
            self.key[position], _ = coded_value(self.key[position], self.scheme)
            self.value[position], _ = coded_value(self.value[position], self.scheme)
            self.group_of[position] = position
            self.coded_values.add(position)
            self.outliers["key", position] = self.outliers["value", position] = 0

    def _group(self, members: list[int]) -> None:
        keys = [self.key[each] for each in members]
        if self.scheme.kind == "fp8":
            read, outliers = [coded_fp8(key) for key in keys], [0]
        elif self.scheme.kind == "kvquant":
            plain, outliers = coded_group(
                [self.off(key, at) for key, at in zip(keys, members, strict=True)], self.scheme
            )
            read = [self.on(key, at) for key, at in zip(plain, members, strict=True)]
        else:
            read, outliers = coded_group(keys, self.scheme)
        for each, key, count in zip(members, read, outliers, strict=True):
            self.key[each], self.group_of[each], self.outliers["key", each] = key, self.groups, count
        self.groups += 1

    @property
    def bits(self) -> int:
        """Size of what is held."""
        scheme, total = self.scheme, 0
        for position, key in self.key.items():
            if position in self.group_of:
                total += scheme.bits * len(key) + 32 * self.outliers["key", position]
                total += 16 if scheme.kind == "fp8" else 0
                total += 32 * math.ceil(len(key) / scheme.group) if scheme.kind == "quanto" else 0
            else:
                total += 16 * len(key)
        for position, value in self.value.items():
            if position in self.coded_values:
                parts = 1 if scheme.kind == "kvquant" else math.ceil(len(value) / scheme.group)
                total += scheme.bits * len(value) + 32 * self.outliers["value", position]
                total += 16 if scheme.kind == "fp8" else 32 * parts
            else:
                total += 16 * len(value)
        if scheme.kind in ("kivi", "kvquant"):
            channels = len(next(iter(self.key.values()))) if self.key else 0
            total += 32 * channels * len(set(self.group_of.values()))
        return total
