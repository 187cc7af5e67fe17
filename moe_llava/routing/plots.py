"""Pictures of what the routers did."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour vision deficiency can tell apart too.
EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def plot_expert_load(routing: dict[str, Any]) -> Figure:
    """For image and text tokens side by side, the share of each expert in every MoE layer. `routing` has "layers" and, for "image" and
    "text", counts [layers x experts]."""
    layers = routing["layers"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.55 * len(layers) + 1.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("image", "text"), strict=True):
        counts_LE = np.array(routing[kind], dtype=float)
        shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True).clip(min=1)
        left = np.zeros(len(layers))
        for expert, share in enumerate(shares_LE.T):
            bars = axis.barh(
                range(len(layers)), share, left=left, color=EXPERT_COLOURS[expert % len(EXPERT_COLOURS)], label=f"expert {expert}"
            )
            labels = [f"{value:.0%}" if value > 0.06 else "" for value in share]
            axis.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
            left += share
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{kind} tokens", loc="left")
        axis.set_xlim(0, 1)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure
