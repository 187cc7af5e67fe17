"""Show routes on a terminal: each patch and each token of an answer has the colour and the number of its first expert."""

from __future__ import annotations

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_llava.common.colours import expert_colour, ink
from moe_llava.routing.plots import first_experts
from moe_llava.routing.tokens import RoutingError
from moe_llava.routing.trace import Trace

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def draw_routes(trace: Trace, images: Sequence[str], layer: int | None = None) -> RenderableType:
    """Return the routes of one row. `trace`: has pieces. `images`: their names, which are shown if the model sees each as a whole.
    `layer`: show this one only.

    Raise RoutingError if `layer` is no MoE layer.
    """
    if layer is not None and layer not in trace.layers:
        raise RoutingError(f"layer {layer} has no experts; those that have are {', '.join(map(str, trace.layers))}")
    places = [place for place, index in enumerate(trace.layers) if layer in (None, index)]
    parts: list[RenderableType] = []
    whole = trace.pictures == list(range(len(images)))
    for number in trace.pictures:
        name = images[number] if whole else f"tile {number + 1}"
        grids = [_grid(f"layer {trace.layers[place]}", first_experts(trace, number, place).tolist()) for place in places]
        parts += [Text(name, style="bold"), Columns(grids, padding=(1, 3))]
    answer = Table.grid(padding=(0, 2, 0, 0))
    for place in places:
        answer.add_row(f"layer {trace.layers[place]}", _answer(trace, place))
    experts, chosen = trace.probs_LTE.shape[-1], trace.ids_LTK.shape[-1]
    legend = Text(" ").join(Text(f" expert {expert} ", style=_style(expert)) for expert in range(experts))
    which = "" if chosen == 1 else f"  first choice of {chosen}"
    return Group(*parts, Text("answer", style="bold"), answer, "", legend + Text(which, style="dim"))


def _grid(title: str, experts_RC: list[list[int]]) -> Text:
    rows = [Text("").join(Text(f"{expert:2}", style=_style(expert)) for expert in row) for row in experts_RC]
    return Text("\n", no_wrap=True).join([Text(title), *rows])


def _answer(trace: Trace, place: int) -> Text:
    pieces = trace.pieces or ()
    words = [
        Text(_shown(pieces[token]) + str(expert).translate(SUBSCRIPTS), style=_style(expert))
        for token, expert in enumerate(trace.ids_LTK[place, :, 0].tolist())
        if trace.answer_T[token]
    ]
    return Text(" ").join(words)


def _shown(piece: str) -> str:
    word = piece.strip()
    return word if word and word.isprintable() else repr(piece)


def _style(expert: int) -> str:
    colour = expert_colour(expert)
    return f"{'#000000' if ink(colour) == 'black' else '#ffffff'} on {colour}"
