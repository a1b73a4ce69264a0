"""The picture of the ratios: for each cell, a bar for each backend of TARS and each peer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_COLOURS = {"tars-llamacpp": "Blues", "tars-xllamacpp": "Oranges"}


def draw(path: Path, ratios: Mapping[str, Mapping[tuple[str, str], float]]) -> None:
    """Write a PNG of ``ratios``: by cell, by contender and peer. Raises ``ImportError`` without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 - only the bench session has it

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only behind use()

    pairs = list(dict.fromkeys(pair for cell in ratios.values() for pair in cell))
    peers = list(dict.fromkeys(peer for _, peer in pairs))
    width = 0.8 / len(pairs)
    size = max(5, 1.5 + 0.36 * len(ratios) * len(pairs)), 4.8
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for at, pair in enumerate(pairs):
        name, peer = pair
        shown = [(cell, values[pair]) for cell, values in enumerate(ratios.values()) if pair in values]
        bars = axes.bar(
            [cell + (at - (len(pairs) - 1) / 2) * width for cell, _ in shown],
            [ratio - 1 for _, ratio in shown],
            width * 0.94,
            bottom=1,
            color=mpl.colormaps[_COLOURS[name]](0.8 - 0.4 * peers.index(peer) / max(1, len(peers) - 1)),
            label=f"{name} / {peer}",
        )
        axes.bar_label(bars, [f"{ratio:.2f}" for _, ratio in shown], fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.45), max(high, 2.2))  # small differences look small
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.set_xlabel("callers x prompt tokens x answer tokens")
    axes.set_ylabel("tokens/s: TARS / peer")
    axes.set_title("Bars above 1: TARS is faster")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
