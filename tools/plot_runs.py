"""Draws the loss curves of one or more runs and a bar chart of their stages' bits per byte to a PNG.

    python tools/plot_runs.py logs/demo.txt
    python tools/plot_runs.py logs/a.txt logs/b.txt logs/c.txt --out compare.png
"""
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_log import Run, ToolError, exit_code, parse_log

DPI, INCHES = 150, (12.0, 4.8)
COLORS = ("#3b6fb6", "#e07b39", "#4c9f70", "#b0457b", "#8a6fc1", "#a08030", "#45a5b5", "#7f7f7f")
SKIPPED_SHARE = 0.1  # of the training time, at whose steep beginning the loss axis does not look
MAX_NAME, MAX_TITLE = 50, 90  # characters of a run's name, of a line of the title


def display_names(runs: Sequence[Run]) -> list[str]:
    """Names that differ, with nothing in them that matplotlib would take for a formula or a hidden entry."""
    names = [run.name for run in runs]
    names = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs)]
    half = MAX_NAME // 2
    names = [name if len(name) <= MAX_NAME else f"{name[:half]}...{name[-half + 3:]}" for name in names]
    return [(" " if name.startswith("_") else "") + name.replace("$", r"\$") for name in names]


def lighter(color: str) -> str:
    """'#rrggbb' -> the same color mixed with white."""
    return "#" + "".join(f"{(int(color[i:i + 2], 16) * 2 + 255) // 3:02x}" for i in (1, 3, 5))


def loss_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Range of the loss axis: everything but the fall at the very beginning."""
    points = [point for run in runs for point in run.steps + run.validations]
    late = [point.loss for run in runs for point in run.steps + run.validations
            if point.seconds >= SKIPPED_SHARE * run.steps[-1].seconds]
    low, high = min(point.loss for point in points), max(late)
    margin = 0.05 * (high - low) or 0.05 * high or 1.0
    return low - margin, high + margin


def bar_limits(values: Sequence[float]) -> tuple[float, float]:
    """Range of the bits per byte axis: from a round number below the lowest where all are alike, else from 0."""
    low, high = min(values), max(values)
    start = 0.0
    if 0 < high - low < 0.3 * high:
        unit = 10.0 ** math.floor(math.log10(high - low))
        start = max(math.floor((low - (high - low)) / unit) * unit, 0.0)
    return start, high + 0.18 * (high - start) or 1.0


def draw_losses(axes: Any, runs: Sequence[Run], names: Sequence[str]) -> None:
    """Loss against seconds, one line per run; validation losses as diamonds."""
    for i, (run, name) in enumerate(zip(runs, names)):
        color, style = COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]
        axes.plot([p.seconds for p in run.steps], [p.loss for p in run.steps], color=color, linestyle=style, label=name,
                  linewidth=1.8, marker="o" if len(run.steps) <= 60 else "", markersize=3)
        axes.plot([p.seconds for p in run.validations], [p.loss for p in run.validations], color=color, linestyle="",
                  marker="D", markersize=7, markeredgecolor="white", zorder=3)
    axes.set(title="Loss in training", xlabel="training time (seconds)", ylabel="loss (nats per token)")
    axes.set_ylim(*loss_limits(runs))
    axes.set_xlim(0, 1.02 * max(point.seconds for run in runs for point in run.steps + run.validations) or 1.0)
    axes.grid(alpha=0.3)


def draw_stages(axes: Any, runs: Sequence[Run]) -> None:
    """Bits per byte of every stage, one horizontal bar per run; the official score's number is bold."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    limits = bar_limits([stage.val_bpb for run in runs for stage in run.stages.values()])
    scored = [i for i, run in enumerate(runs) if run.stages]
    height, bold = 0.8 / len(scored), False
    for row, i in enumerate(scored):
        run, color = runs[i], COLORS[i % len(COLORS)]
        for stage, score in run.stages.items():
            official = bool(run.result) and run.result.get("official_stage") == stage
            place, bold = stages.index(stage) + (row - (len(scored) - 1) / 2) * height, bold or official
            axes.barh(place, score.val_bpb, 0.9 * height, color=color if official else lighter(color))
            axes.annotate(f"{score.val_bpb:.4f}", (score.val_bpb, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=9, fontweight="bold" if official else "normal")
    axes.set_yticks(range(len(stages)), stages)
    axes.invert_yaxis()
    start = f"; axis starts at {limits[0]:.4g}" if limits[0] else ""
    axes.set(title="Validation by stage" + " (bold: the score)" * bold, xlim=limits,
             xlabel=f"bits per byte (lower is better{start})")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)


def title_of(runs: Sequence[Run], names: Sequence[str]) -> str:
    """'demo: 40 steps, 47,931 parameters, 0.6995 bits per byte', or the number of runs."""
    if len(runs) > 1:
        return f"{len(runs)} runs"
    run, facts = runs[0], f"{runs[0].steps[-1].step:,} steps, not finished"
    if run.result:
        facts = (f"{run.fact('steps'):,} steps, {run.fact('num_params'):,} parameters, "
                 f"{run.fact('val_bpb'):.4f} bits per byte")
    return names[0] + (": " if run.stages and len(names[0] + facts) < MAX_TITLE else "\n") + facts


def plot(runs: Sequence[Run], out: Path) -> None:
    """Runs with at least one step each -> PNG. ToolError where it cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    names, scored = display_names(runs), [run for run in runs if run.stages]
    bars = len(scored) * len({stage for run in scored for stage in run.stages})
    size = INCHES[0] if scored else 0.6 * INCHES[0], max(INCHES[1], 1.8 + 0.22 * bars + 0.25 * len(runs))
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "font.size": 10}):
        figure, axes = plt.subplots(1, 2 if scored else 1, figsize=size, squeeze=False,
                                    width_ratios=[1.25, 1] if scored else None)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        draw_losses(axes[0, 0], runs, names)
        if scored:
            draw_stages(axes[0, 1], runs)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if len(runs) == 1:
            labels = ["training loss"]
        if any(run.validations for run in runs):
            handles.append(Line2D([], [], color="#555555", linestyle="", marker="D", markersize=6))
            labels.append("validation loss")
        columns = max(1, min(len(labels), 130 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(title_of(runs, names), fontsize=14, fontweight="bold")
        try:
            figure.savefig(out, dpi=DPI, format="png")
        except OSError as error:
            raise ToolError(f"--out {out}: {error.strerror}") from None
        finally:
            plt.close(figure)


def draw(logs: Sequence[Path], out: Path | None) -> None:
    """Log files -> PNG, by default next to the first log. ToolError for a log without steps."""
    runs = [parse_log(path) for path in logs]
    for run in runs:
        if not run.steps:
            raise ToolError(f"{run.path}: no line 'step:.. train_loss:..' in it, so training did not start")
    out = out or logs[0].with_suffix(".png")
    if out.suffix.lower() != ".png":
        raise ToolError(f"--out {out}: writes PNG only; choose a name that ends with .png")
    plot(runs, out)
    print(f"wrote {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="log file of train_gpt.py, LOG_DIR/RUN_ID.txt")
    add("--out", type=Path, metavar="PNG", help="default: next to the first log, with the suffix .png")
    config = parser.parse_args(arguments)
    return exit_code(lambda: draw(config.logs, config.out))


if __name__ == "__main__":
    sys.exit(main())
