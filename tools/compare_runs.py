"""Compares two groups of runs, or one group with a published number: is the difference real, and is it enough to win?

    python tools/compare_runs.py logs/new_seed42.txt logs/new_seed314.txt -- logs/old_seed42.txt logs/old_seed314.txt
    python tools/compare_runs.py logs/new_seed*.txt --published 1.06108
    python tools/compare_runs.py logs/new_seed*.txt

A group is one experiment under several seeds. Logs of published scripts work too. The challenge's rule for a new
record: better by 0.005 nats per token or more, shown at p < 0.01. Differences are A - B: negative = A is better.
"""
import argparse
import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from outcomes import Outcome, check_group, differing_settings, read_outcome
from plot_runs import COLORS, DPI
from run_log import Point, ToolError, exit_code, read_text, table

WIN_NATS, WIN_P = 0.005, 0.01  # the challenge's rule for a new record
CONFIDENCE = 0.95  # of intervals and bands
GRID = 200  # points of a curve
MAX_ROWS = 12  # settings that are listed one by one


class Test(NamedTuple):
    """One statistical test of the difference A - B. p values are None where there are too few runs."""

    name: str
    difference: float
    two_sided: float | None  # p of "no difference"
    better: float | None  # p of "A is not better"
    by_margin: float | None  # p of "A is not better by the margin"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample, n - 1 degrees of freedom; nan for one value."""
    center = mean(values)
    return math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def half_width(values: Sequence[float]) -> float:
    """Half of the confidence interval of the mean (Student's t)."""
    from scipy import stats
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread(values) / math.sqrt(len(values))


def run_test(name: str, difference: float, margin: float, enough: bool,
             p_value: Callable[[float, str], Any]) -> Test:
    """p_value(shift, alternative) tests A against B + shift -> Test."""
    if not enough:
        return Test(name, difference, None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal values: scipy warns of lost precision, and the p value says it all
        found = [float(p_value(*case)) for case in ((0.0, "two-sided"), (0.0, "less"), (-margin, "less"))]
    return Test(name, difference, *(None if math.isnan(p) else p for p in found))


def welch(a: Sequence[float], b: Sequence[float], margin: float) -> Test:
    """Two groups with spreads of their own; seeds need not match."""
    from scipy import stats
    return run_test("Welch", mean(a) - mean(b), margin, min(len(a), len(b)) > 1, lambda shift, alternative:
                    stats.ttest_ind(a, [x + shift for x in b], equal_var=False, alternative=alternative)[1])


def paired(a: dict[int, float], b: dict[int, float], margin: float) -> Test:
    """{seed: score} each; only seeds that both have."""
    from scipy import stats
    seeds = sorted(set(a) & set(b))
    differences = [a[seed] - b[seed] for seed in seeds]
    name = f"paired by seed ({len(seeds)})"
    return run_test(name, mean(differences) if seeds else math.nan, margin, len(seeds) > 1, lambda shift, alternative:
                    stats.ttest_1samp(differences, shift, alternative=alternative)[1])


def against(a: Sequence[float], published: float, margin: float) -> Test:
    """A group against one number without a spread."""
    from scipy import stats
    return run_test("one sample", mean(a) - published, margin, len(a) > 1, lambda shift, alternative:
                    stats.ttest_1samp(a, published + shift, alternative=alternative)[1])


def needed_mean(a: Sequence[float], b: Sequence[float], margin: float) -> float:
    """The highest mean of A that wins against B (one value = a published number) with A's and B's spreads."""
    from scipy import stats
    parts = [spread(x) ** 2 / len(x) for x in (a, b) if len(x) > 1]
    error = math.sqrt(sum(parts))
    if not error:
        return mean(b) - margin
    degrees = sum(parts) ** 2 / sum(part ** 2 / (len(x) - 1) for part, x in
                                    zip(parts, [x for x in (a, b) if len(x) > 1]))
    return mean(b) - margin - float(stats.t.ppf(1 - WIN_P, degrees)) * error


class Group:
    """The runs of one experiment."""

    def __init__(self, letter: str, outcomes: Sequence[Outcome], stage: str | None):
        check_group(outcomes)
        self.letter, self.outcomes = letter, outcomes
        self.nats = [outcome.score(stage)[0] for outcome in outcomes]
        self.bpb = [outcome.score(stage)[1] for outcome in outcomes]
        self.by_seed = {outcome.seed: bpb for outcome, bpb in zip(outcomes, self.bpb) if outcome.seed is not None}
        self.stages = " or ".join(dict.fromkeys(stage or outcome.stage for outcome in outcomes))

    @property
    def name(self) -> str:
        """What the runs' names begin with."""
        names = [outcome.run.name for outcome in self.outcomes]
        common = names[0]
        while not all(name.startswith(common) for name in names):
            common = common[:-1]
        return common.removesuffix("_seed").rstrip("_- ") or names[0]

    @property
    def bpb_per_nat(self) -> float:
        return mean([outcome.bpb_per_nat for outcome in self.outcomes])


def show(value: float | None, digits: int = 5, sign: str = "") -> str:
    """A number, '-' where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def show_p(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"


def describe_groups(groups: Sequence[Group]) -> list[str]:
    """Tables of the runs, and of means and spreads."""
    runs = [[f"{group.letter} {outcome.run.name}", str(outcome.seed), show(nats), show(bpb), f"{outcome.steps or 0:,}",
             show(outcome.train_seconds, 1), f"{outcome.submission_bytes or 0:,}"] for group in groups
            for outcome, nats, bpb in zip(group.outcomes, group.nats, group.bpb)]
    rows = [[group.letter, str(len(group.bpb)), *(text for values in (group.nats, group.bpb) for text in
                                                  (show(mean(values)), show(spread(values)), show(half_width(values))))]
            for group in groups]
    interval = f"+- {CONFIDENCE:.0%}"
    return [table(["run", "seed", "nats", "bits per byte", "steps", "train s", "bytes"], runs),
            table(["group", "runs", "nats", "std", interval, "bits per byte", "std", interval], rows)]


def describe_settings(a: Group, b: Group) -> str:
    """What differs between the groups besides seeds."""
    rows = differing_settings(a.outcomes[0], b.outcomes[0])
    if a.outcomes[0].ours != b.outcomes[0].ours:  # two scripts: what only one of them has says nothing
        rows = {name: values for name, values in rows.items() if "-" not in values}
    if not rows:
        return "A and B have the same settings."
    shown = [f"{name.upper()} {left} / {right}" for name, (left, right) in list(rows.items())[:MAX_ROWS]]
    rest = f", and {len(rows) - MAX_ROWS} more" if len(rows) > MAX_ROWS else ""
    return f"Settings, A / B: {'; '.join(shown)}{rest}."


def describe_tests(tests: Sequence[Test], per_nat: float) -> str:
    rows = [[test.name, show(test.difference / per_nat, 5, "+"), show(test.difference, 5, "+"),
             show_p(test.two_sided), show_p(test.better), show_p(test.by_margin)] for test in tests]
    return table(["test of A - B", "nats", "bits per byte", "p, two-sided", "p, A better",
                  f"p, better by {WIN_NATS} nats"], rows)


def verdict(test: Test, a: Sequence[float], b: Sequence[float], margin: float) -> str:
    """Is the rule of the challenge met, and what would meet it."""
    won = test.by_margin is not None and test.by_margin < WIN_P
    needed, shown = needed_mean(a, b, margin), show_p(test.by_margin)
    rule = f"Record rule (better by {WIN_NATS} nats = {margin:.5f} bits per byte at p < {WIN_P}):"
    if test.by_margin is None:
        return f"{rule} open; too few runs to tell, two or more of each group do."
    return (f"{rule} {'met' if won else 'not met'}, {test.name} p = {shown}. With these spreads and numbers of runs a "
            f"mean of {needed:.5f} bits per byte or less wins; A has {mean(a):.5f}, "
            f"{abs(needed - mean(a)):.5f} {'to spare' if won else 'too much'}.")


# --- curves: how far a group was after the same steps, after the same time
def curves(groups: Sequence[Group]) -> tuple[str, list[list[list[Point]]]]:
    """-> (which loss, the curves of each group's runs): validation where all runs have two points, else training."""
    runs = [[outcome.run for outcome in group.outcomes] for group in groups]
    if all(len(run.validations) > 1 for group in runs for run in group):
        return "validation", [[run.validations for run in group] for group in runs]
    return "training", [[run.steps for run in group] for group in runs]


def at(points: Sequence[Point], axis: str, places: Any) -> Any:
    """Loss at steps or seconds, by linear interpolation."""
    import numpy as np
    return np.interp(places, [getattr(point, axis) for point in points], [point.loss for point in points])


def common_range(runs: Sequence[Sequence[Point]], axis: str) -> tuple[float, float]:
    """First and last step or second between which every run has losses; last < first: there are none."""
    return max(getattr(points[0], axis) for points in runs), min(getattr(points[-1], axis) for points in runs)


def no_curve(lines: Sequence[Sequence[Sequence[Point]]], axis: str) -> str:
    """Why some group has no curve along an axis; "" = all have one."""
    for first, last in (common_range(runs, axis) for runs in lines):
        if first >= last:
            found = f"only {axis} {last:,g}" if first == last else f"no {axis.removesuffix('s')}"
            return f"No curves by {axis}: a group's runs have {found} in common."
    return ""


def describe_curves(a: Group, b: Group) -> str:
    """Table of the loss at the last step, and at the last second, that all runs reached."""
    which, lines = curves([a, b])
    if not all(points for group in lines for points in group):
        return "No losses in training in some log: no comparison at equal steps and equal time."
    rows, missing = [], []
    for axis, unit in (("step", ""), ("seconds", " s")):
        first, place = common_range([points for group in lines for points in group], axis)
        if place < first:
            missing.append(f"No losses at equal {axis}: the runs have no {axis.removesuffix('s')} in common.")
            continue
        losses = [[float(at(points, axis, place)) for points in group] for group in lines]
        test = welch(losses[0], losses[1], 0.0)
        rows.append([f"{axis} {place:,.{0 if axis == 'step' else 1}f}{unit}", *(show(mean(x), 4) for x in losses),
                     show(test.difference, 4, "+"), show_p(test.two_sided)])
    header = [f"{which} loss, nats, at", "A", "B", "A - B", "p, two-sided"]
    return "\n\n".join([*([table(header, rows)] if rows else []), *missing])


def draw_curves(axes: Any, groups: Sequence[Group], axis: str) -> None:
    """Mean loss of each group and its confidence band, or why there is nothing to draw."""
    import numpy as np
    which, lines = curves(groups)
    late: list[float] = []
    if missing := no_curve(lines, axis):
        axes.set_axis_off()
        axes.text(0.5, 0.5, missing, ha="center", va="center", transform=axes.transAxes)
        return
    for group, runs, color in zip(groups, lines, COLORS):
        grid = np.linspace(*common_range(runs, axis), GRID)
        losses = np.stack([at(points, axis, grid) for points in runs])
        axes.plot(grid, losses.mean(0), color=color, linewidth=1.8, label=f"{group.letter} {group.name}")
        if len(runs) > 1:
            width = np.array([half_width(column) for column in losses.T.tolist()])
            axes.fill_between(grid, losses.mean(0) - width, losses.mean(0) + width, color=color, alpha=0.2, linewidth=0)
        late += losses.mean(0)[GRID // 5:].tolist()
    margin = 0.08 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(title=f"{which.capitalize()} loss by {axis}", ylabel=f"nats per token (mean, {CONFIDENCE:.0%} band)",
             xlabel="step" if axis == "step" else "training time (seconds)")
    axes.grid(alpha=0.3)


def draw_scores(axes: Any, groups: Sequence[Group], published: float | None, needed: float | None) -> None:
    """Every run's score, each group's mean with its confidence interval, and what has to be beaten."""
    for place, (group, color) in enumerate(zip(groups, COLORS)):
        axes.plot([place] * len(group.bpb), group.bpb, color=color, marker="o", linestyle="", markersize=6, alpha=0.7)
        if len(group.bpb) > 1:
            axes.errorbar(place + 0.18, mean(group.bpb), half_width(group.bpb), color=color, marker="D", capsize=5)
        axes.annotate(f"{mean(group.bpb):.5f}", (place + 0.26, mean(group.bpb)), va="center", fontsize=9)
    for value, style, text in ((published, "-", "published"), (needed, "--", "needed to win")):
        if value is not None:
            axes.axhline(value, color="#555555", linestyle=style, linewidth=1.2)
            axes.annotate(f"{text} {value:.5f}", (len(groups) - 0.5, value), (0, 3), textcoords="offset points",
                          ha="right", fontsize=9)
    axes.set_xticks(range(len(groups)), [f"{group.letter} ({len(group.bpb)})" for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.2)
    axes.margins(y=0.12)
    axes.set(title=f"Scores, mean and {CONFIDENCE:.0%} interval", ylabel="bits per byte (lower is better)")
    axes.grid(axis="y", alpha=0.3)


def plot(groups: Sequence[Group], published: float | None, needed: float | None, out: Path) -> None:
    """-> PNG. ToolError where it cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "font.size": 10}):
        drawn = all(points for group in curves(groups)[1] for points in group)
        figure, axes = plt.subplots(1, 3 if drawn else 1, figsize=(15.0 if drawn else 5.0, 4.6), squeeze=False)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
        if drawn:
            draw_curves(axes[0, 0], groups, "step")
            draw_curves(axes[0, 1], groups, "seconds")
            for panel in [panel for panel in axes[0, :2] if panel.lines][:1]:
                panel.legend(frameon=False)
        draw_scores(axes[0, -1], groups, published, needed)
        try:
            figure.savefig(out, dpi=DPI, format="png")
        except OSError as error:
            raise ToolError(f"--out {out}: {error.strerror}") from None
        finally:
            plt.close(figure)


def compare(a_logs: Sequence[Path], b_logs: Sequence[Path], published: float | None, stage: str | None,
            out: Path | None) -> None:
    """Prints the comparison, writes the plot."""
    if out and out.suffix.lower() != ".png":
        raise ToolError(f"--out {out}: writes PNG only; choose a name that ends with .png")
    refuse_copies([*a_logs, *b_logs])
    a = Group("A", [read_outcome(path) for path in a_logs], stage)
    groups = [a, Group("B", [read_outcome(path) for path in b_logs], stage)] if b_logs else [a]
    parts, needed, per_nat = describe_groups(groups), None, groups[-1].bpb_per_nat
    margin = WIN_NATS * per_nat
    if b_logs:
        b = groups[1]
        check_text(a, b)
        tests = [welch(a.bpb, b.bpb, margin), paired(a.by_seed, b.by_seed, margin)]
        needed = needed_mean(a.bpb, b.bpb, margin) if min(len(a.bpb), len(b.bpb)) > 1 else None
        parts += [describe_settings(a, b), describe_tests(tests, per_nat), verdict(tests[0], a.bpb, b.bpb, margin),
                  describe_curves(a, b)]
        if abs(a.bpb_per_nat / per_nat - 1) > 1e-6:
            parts.append("The tokenizers differ: bits per byte decide; nats are those of B's tokens.")
    if published is not None:
        test = against(a.bpb, published, margin)
        needed = needed_mean(a.bpb, [published], margin) if len(a.bpb) > 1 else None
        parts += [describe_tests([test], per_nat), f"Against {published}, published. "
                  + verdict(test, a.bpb, [published], margin)]
    print("\n\n".join(parts))
    if out:
        plot(groups, published, needed, out)
        print(f"\nwrote {out}")


def refuse_copies(paths: Sequence[Path]) -> None:
    """ToolError for a log that is given twice, also under another name: a run is no second sample of itself."""
    seen: dict[str, Path] = {}
    for path in paths:
        digest = hashlib.sha256(read_text(path).encode()).hexdigest()
        if digest in seen:
            raise ToolError(f"{path}: the same log as {seen[digest]}; give each run once, in A or in B")
        seen[digest] = path


def check_text(a: Group, b: Group) -> None:
    """ToolError where the groups were scored on different validation texts, as far as the logs tell."""
    if a.outcomes[0].ours and b.outcomes[0].ours:
        mine, other = (group.outcomes[0].run.fact("audit")["scored_bytes"] for group in (a, b))
        if mine != other:
            raise ToolError(f"{a.outcomes[0].path}: scored {mine:,} bytes of text, {b.outcomes[0].path} {other:,}: "
                            "scores of different validation texts cannot be compared")


def positive(text: str) -> float:
    """Argument -> a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="compare_runs.py [options] A.txt ... [-- B.txt ...]")
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="logs of group A; behind -- those of group B")
    add("--published", type=positive, metavar="BPB", help="a published score in bits per byte, instead of group B")
    add("--stage", help="compare this stage instead of the score, as averaged or quantized")
    add("--out", type=Path, metavar="PNG", help="write a plot: curves with confidence bands, scores")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    config, b_logs = parser.parse_intermixed_args(given[:cut]), []
    a_logs = config.logs
    if cut < len(given):
        config = parser.parse_intermixed_args(given[cut + 1:], config)
        b_logs = config.logs
    if b_logs and config.published is not None:
        parser.error("--published and a group behind -- exclude each other: give one of them")
    return exit_code(lambda: compare(a_logs, b_logs, config.published, config.stage, config.out))


if __name__ == "__main__":
    sys.exit(main())
