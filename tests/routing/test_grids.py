"""The terminal shows the experts that the routers chose."""

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from moe_llava.common.colours import expert_colour
from moe_llava.routing.grids import draw_routes
from moe_llava.routing.tokens import IMAGE, TEXT, RoutingError
from moe_llava.routing.trace import Trace


@pytest.fixture
def trace():
    """Two images of 2 x 2 patches, a word of the prompt, and an answer of four pieces, in layers 1 and 3."""
    ids_LT = torch.tensor([[0, 1, 2, 10, 3, 3, 1, 1, 0, 1, 2, 10, 1], [1, 1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3]])
    ids_LTK = torch.stack([ids_LT, torch.full_like(ids_LT, 9)], dim=-1)
    patches = [(image, row, column) for image in range(2) for row in range(2) for column in range(2)]
    return Trace(
        probs_LTE=torch.zeros(2, 13, 11),
        ids_LTK=ids_LTK,
        weights_LTK=torch.ones_like(ids_LTK).float(),
        dropped_LTK=torch.zeros_like(ids_LTK).bool(),
        token_ids_T=torch.arange(13),
        rows_T=torch.zeros(13),
        kinds_T=torch.tensor([IMAGE] * 8 + [TEXT] * 5),
        answer_T=torch.tensor([False] * 9 + [True] * 4),
        places_T3=torch.tensor([*patches, *[(-1, -1, -1)] * 5]),
        layers=(1, 3),
        pieces=(*[""] * 8, "where", " a", "[red]", " ", "\x1b"),
    )


def drawn(renderable, width=80, **settings):
    console = Console(file=io.StringIO(), width=width, **settings)
    console.print(renderable)
    return console.file.getvalue()


def test_patches_of_every_image_and_tokens_of_the_answer(trace):
    lines = [line.split() for line in drawn(draw_routes(trace, ["a.png", "[b].png"])).splitlines()]
    assert lines[:8] == [
        ["a.png"],
        ["layer", "1", "layer", "3"],
        ["0", "1", "1", "1"],
        ["210", "1", "1"],  # two digits fill the field
        ["[b].png"],
        ["layer", "1", "layer", "3"],
        ["3", "3", "2", "2"],
        ["1", "1", "2", "2"],
    ]
    assert lines[9] == ["layer", "1", "a₁", "[red]₂", "'", "'₁₀", r"'\x1b'₁"]
    assert lines[10][:3] == ["layer", "3", "a₃"]
    assert " ".join(lines[-2] + lines[-1]).endswith("expert 10 first choice of 2")


def test_tiles_are_not_named_like_the_image_that_they_are_of(trace):
    text = drawn(draw_routes(trace, ["a.png"]))
    assert text.splitlines()[0].strip() == "tile 1"
    assert text.count("tile") == 2
    text = drawn(draw_routes(replace(trace, places_T3=torch.full((13, 3), -1)), ["a.png"]))
    assert text.splitlines()[0].strip() == "answer"


def test_colours_are_those_of_the_pictures(trace):
    text = drawn(draw_routes(trace, ["a.png", "b.png"], 1), color_system="truecolor", force_terminal=True)
    for expert, shown in ((0, " 0"), (1, " 1"), (2, "[red]₂"), (10, "10")):
        red, green, blue = (int(expert_colour(expert)[place : place + 2], 16) for place in (1, 3, 5))
        assert re.search(rf"48;2;{red};{green};{blue}m{re.escape(shown)}\x1b", text)


def test_one_layer(trace):
    text = drawn(draw_routes(trace, ["a.png", "b.png"], 3))
    assert "layer 3" in text
    assert "layer 1" not in text
    with pytest.raises(RoutingError, match="layer 2 has no experts; those that have are 1, 3"):
        draw_routes(trace, [], 2)
