"""The plots of one run's results, as PNG: `python plots.py results.json folder`, in an environment of its own."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS = "gpt-worker"
BASE = "openai-python, threads"
OURS_COLOR, PEER_COLOR, IDEAL_COLOR = "#1f6feb", "#9aa4b2", "#d97706"
PEER_COLORS = ("#6b7280", "#a3b18a", "#b56576", "#8e7dbe", "#c9a227", "#4d908e")
DPI = 120

Repetitions = list[dict[str, Any]]


def main() -> None:
    results_path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    scenarios = json.loads(results_path.read_text())["scenarios"]
    for name, draw in (("overhead", overhead), ("limits", limits), ("faults", faults), ("growth", growth)):
        if scenarios.get(name):
            draw(scenarios[name], folder / f"{name}.png")


def overhead(repetitions: Repetitions, path: Path) -> None:
    """Tasks a second, openai-python in threads being 1."""
    ratios: dict[str, list[float]] = {}
    for repetition in repetitions:
        walls = walls_of(repetition)
        if BASE in walls:
            for name, wall_s in walls.items():
                ratios.setdefault(name, []).append(walls[BASE] / wall_s)
    if ratios:
        bars(ratios, "Tasks a second, openai-python in threads = 1\n(no latency, no limits)", path)


def faults(repetitions: Repetitions, path: Path) -> None:
    ratios: dict[str, list[float]] = {}
    lost: dict[str, list[int]] = {}
    for repetition in repetitions:
        for result in repetition["results"]:
            if result["failure"] is None:
                name = result["contestant"]
                ratios.setdefault(name, []).append(result["wall_s"] / repetition["ideal_s"])
                lost.setdefault(name, []).append(result["lost"] + result["wrong"])
    if ratios:
        notes = {name: f"{median(counts):g} lost" for name, counts in lost.items()}
        bars(ratios, "Time ÷ ideal, on an endpoint that fails (less is better)", path, notes)


def bars(values: dict[str, list[float]], title: str, path: Path, notes: dict[str, str] | None = None) -> None:
    names = list(reversed(values))
    middles = [median(values[name]) for name in names]
    reach = [
        [middle - min(values[name]) for name, middle in zip(names, middles, strict=True)],
        [max(values[name]) - middle for name, middle in zip(names, middles, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(7.5, 0.5 * len(names) + 1.3))
    colors = [OURS_COLOR if name == OURS else PEER_COLOR for name in names]
    axes.barh(names, middles, xerr=reach, color=colors, error_kw={"ecolor": "#374151", "capsize": 3})
    for place, (name, middle) in enumerate(zip(names, middles, strict=True)):
        note = f"   {notes[name]}" if notes else ""
        axes.text(middle + reach[1][place] + 0.02 * max(middles), place, f"{middle:.2f}{note}", va="center")
    axes.set_xlim(0, 1.25 * max(middle + more for middle, more in zip(middles, reach[1], strict=True)))
    axes.set_title(title, fontsize=11)
    save(figure, path)


def limits(repetitions: Repetitions, path: Path) -> None:
    """Answers over time of the first run: whoever reaches the top first has won."""
    first = repetitions[0]
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    peer_colors = iter(PEER_COLORS)
    for result in first["results"]:
        if result["failure"] is not None:
            continue
        ours = result["contestant"] == OURS
        moments, counts = zip(*result["answered"], strict=True)
        axes.plot(
            moments,
            [100 * count / result["tasks"] for count in counts],
            label=result["contestant"],
            color=OURS_COLOR if ours else next(peer_colors),
            linewidth=2.4 if ours else 1.2,
            zorder=3 if ours else 2,
        )
    axes.axvline(
        first["ideal_s"], color=IDEAL_COLOR, linestyle="--", linewidth=1.2, label="best possible end"
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("tasks answered, %")
    axes.set_title("Five keys at their limits", fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


def growth(repetitions: Repetitions, path: Path) -> None:
    """Peak memory of the service against the size of a job."""
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    sizes = [size["tasks"] for size in repetitions[0]["sizes"]]
    peaks = [
        [repetition["sizes"][place]["peak_rss_bytes"] / 1e6 for repetition in repetitions]
        for place in range(len(sizes))
    ]
    middles = [median(each) for each in peaks]
    axes.plot(sizes, middles, marker="o", color=OURS_COLOR)
    axes.fill_between(sizes, [min(each) for each in peaks], [max(each) for each in peaks], alpha=0.2)
    for size, middle in zip(sizes, middles, strict=True):
        axes.annotate(
            f"{middle:.0f} MB", (size, middle), textcoords="offset points", xytext=(0, 8), ha="center"
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.3 * max(middles))
    axes.set_xlabel("tasks in one job")
    axes.set_ylabel("peak memory, MB")
    axes.set_title("Memory of the whole service", fontsize=11)
    save(figure, path)


def walls_of(repetition: dict[str, Any]) -> dict[str, float]:
    return {
        result["contestant"]: result["wall_s"]
        for result in repetition["results"]
        if result["failure"] is None
    }


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
