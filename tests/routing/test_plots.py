"""Pictures show what the statistics counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from moe_llava.common.colours import EXPERT_COLOURS, expert_colour, ink
from moe_llava.routing.plots import first_experts, plot_answer, plot_expert_load, plot_modality, plot_patches, plot_pathways, plot_router
from moe_llava.routing.tokens import IMAGE, TEXT
from tests.routing.test_statistics import make_trace, random_trace, summed


@pytest.fixture(scope="module")
def summary():
    return summed(random_trace())


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_load_of_every_layer_and_expert(summary):
    figure = plot_expert_load(summary)
    everything, image, _ = figure.axes
    assert [label.get_text() for label in everything.get_yticklabels()] == ["layer 0", "layer 2", "layer 4"]
    widths = np.array([bar.get_width() for bar in everything.patches]).reshape(4, 3).T
    assert np.allclose(widths, summary["load"])
    counts = np.array(summary["image"])
    assert np.allclose(np.array([bar.get_width() for bar in image.patches]).reshape(4, 3).T, counts / counts.sum(1, keepdims=True))


def test_modality_marks_the_dead_and_is_white_in_the_middle():
    found = summed(make_trace([[[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 1.0, 0]]], [IMAGE, TEXT, TEXT, TEXT]))
    axis, bar = plot_modality(found).axes
    assert texts(axis) == ["50%", "0%", "dead"]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["only\ntext", "as in\nall", "only\nimages"]
    assert axis.images[0].norm(0.25) == 0.5


def test_pathways_are_lines_through_their_experts(summary):
    for axis, name in zip(plot_pathways(summary).axes, ("image", "text"), strict=True):
        lines = [line for line in axis.lines if len(line.get_xdata()) == 3]
        drawn = {tuple(np.round(line.get_ydata() - np.mean(line.get_ydata() % 1), 0).astype(int)) for line in lines}
        assert len(lines) == 10
        assert len(drawn) > 3
        top = lines[-1]  # the most taken one lies on top, and is the widest
        assert top.get_linewidth() == max(line.get_linewidth() for line in lines)
        heights = top.get_ydata() + 4.5 * 0.07
        assert np.allclose(heights, summary["pathways"][name]["paths"][0]["experts"])


def test_routers(summary):
    sure, margin, information, agreement = plot_router(summary).axes[:4]
    assert np.allclose(sure.lines[0].get_ydata(), summary["entropy"]["image"])
    assert np.allclose(margin.lines[1].get_ydata(), summary["margin"]["text"])
    assert np.allclose(information.lines[0].get_ydata(), summary["modality_information"])
    assert np.allclose(agreement.images[0].get_array(), summary["agreement"])


def patches_trace():
    """A text token, an image of 2 x 3 patches, two answer tokens."""
    trace = random_trace(tokens=9, layers=2, seed=3)
    places = torch.full((9, 3), -1)
    places[1:7] = torch.tensor([[0, row, column] for row in range(2) for column in range(3)])
    kinds = torch.tensor([TEXT] + [IMAGE] * 6 + [TEXT] * 2, dtype=torch.uint8)
    answer = torch.tensor([False] * 7 + [True] * 2)
    return replace(trace, places_T3=places, kinds_T=kinds, answer_T=answer, pieces=("q", *[""] * 6, " $5", "\n"))


def test_every_patch_has_the_colour_of_its_first_expert():
    trace = patches_trace()
    expected = trace.ids_LTK[1, 1:7, 0].view(2, 3)
    assert first_experts(trace, 0, 1).tolist() == expected.tolist()
    axes = plot_patches(trace, [np.zeros((4, 6, 3))], experts=4).axes
    assert [axis.get_title() for axis in axes] == ["input of the model", "layer 0", "layer 2"]
    colours = axes[2].images[1].get_array()
    assert [to_hex(colour).upper() for colour in colours[1]] == [expert_colour(expert) for expert in expected[1].tolist()]
    assert texts(axes[2]) == [str(expert) for expert in expected.flatten().tolist()]


def test_answer_tokens_are_named_and_coloured(tmp_path):
    trace = patches_trace()
    figure = plot_answer(trace, experts=4)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == [r"\$5", r"\n"]
    assert texts(axis) == [str(expert) for expert in trace.ids_LTK[:, 7:, 0].flatten().tolist()]
    figure.savefig(tmp_path / "answer.png")
    long = random_trace(tokens=200)
    long.answer_T[:] = True
    figure = plot_answer(long, experts=4)
    assert len(figure.axes) == 4
    assert figure.get_suptitle() == "96 of 200 tokens of the answer"


def test_numbers_can_be_read_on_every_colour():
    """At least the contrast that W3C asks of large text, 3 to 1; black and white are at their best about where they change."""

    def luminance(colour):
        return np.dot([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)], (0.2126, 0.7152, 0.0722))

    for colour in EXPERT_COLOURS:
        low, high = sorted((luminance(colour), luminance(ink(colour))))
        assert (high + 0.05) / (low + 0.05) > 4.5
