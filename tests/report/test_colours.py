"""Colours of the page, as colour-blind readers see them: a least distance, and contrast with the ground."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from kvscope.report.colours import PALETTE, line_style
from kvscope.report.template import asset
from tests.reference.colour_vision import VISION, XYZ, distance, linear

LINES = 14.0  # least distance of two colours of lines; they also differ in marker and dash
AREAS = 15.0  # of two areas that a legend names
THEMES = ("light", "dark")


def palette(theme: str) -> list[str]:
    found = re.search(theme + r": (\[.*?\])", asset("core.js"))
    assert found
    return list(json.loads(found[1]))


def named(theme: str) -> dict[str, str]:
    """Return the colours of a theme by name; those that a dark page has twice must be equal."""
    blocks = re.findall(r"color-scheme: (light|dark);(.*?)\}", asset("page.css"), re.DOTALL)
    found = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for which, block in blocks if which == theme]
    assert all(each == found[0] for each in found) and len(found[0]) > 15
    return found[0]


def contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2: 1 to 21."""
    high, low = sorted((float(XYZ[1] @ linear(colour)) for colour in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_distance_is_known() -> None:
    assert distance("#000000", "#ffffff", "normal") == pytest.approx(100, abs=0.1)
    assert distance("#ff0000", "#00ff00", "normal") == pytest.approx(170.6, abs=0.5), "by its formula"
    assert distance("#808080", "#8e8e8e", "protanopia") == pytest.approx(
        distance("#808080", "#8e8e8e", "normal"), abs=0.5
    )
    assert distance("#ff0000", "#808000", "deuteranopia") < distance("#ff0000", "#808000", "normal") / 3


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", THEMES)
def test_lines_have_distinct_colours(theme: str, vision: str) -> None:
    pairs = {pair: distance(*pair, vision) for pair in combinations(palette(theme), 2)}
    assert len(pairs) == 28
    assert {pair: round(apart, 1) for pair, apart in pairs.items() if apart < LINES} == {}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    "areas",
    [
        ("kept", "evicted", "future"),
        ("mine", "only", "both", "neither"),
        ("share", "loss", "raised"),
        ("noteline", "page"),
    ],
)
def test_areas_have_distinct_colours(theme: str, vision: str, areas: tuple[str, ...]) -> None:
    colours = named(theme)
    for one, other in combinations(areas, 2):
        assert distance(colours[one], colours[other], vision) >= AREAS, (one, other)


@pytest.mark.parametrize("theme", THEMES)
def test_lines_and_texts_can_be_seen_on_their_ground(theme: str) -> None:
    colours = named(theme)
    assert min(contrast(line, colours["raised"]) for line in palette(theme)) >= 3, "graphics"
    for text in ("text", "muted", "accent"):
        for ground in ("raised", "page", "best", "note"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_lines_of_one_colour_differ_in_marker_and_dash() -> None:
    count = len(PALETTE)
    for place in range(count):
        lines = [line_style(place + turn * count, way) for turn in range(3) for way in range(2)]
        assert {line["color"] for line in lines} == {PALETTE[place]}
        assert len({line["dash"] for line in lines}) == 6 and len({line["symbol"] for line in lines}) == 3
