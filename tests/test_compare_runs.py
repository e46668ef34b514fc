"""tools/compare_runs.py: the statistics against closed forms, what it prints, plots and refuses; and the log reader."""
import math
import re
from pathlib import Path

import compare_runs
import fake_logs
import outcomes
import pytest
import run_log
from hypothesis import given
from hypothesis import strategies as st
from test_tools import call, cells, png_size, refused


# --- statistics
def test_one_sample_test_has_cauchys_p_value_for_two_runs():
    a, published = [1.05, 1.06], 1.07
    t = (1.055 - published) / (math.sqrt(0.00005) / math.sqrt(2))
    test = compare_runs.against(a, published, 0.002)
    assert test.difference == pytest.approx(-0.015)
    assert test.two_sided == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    assert test.better == pytest.approx(0.5 - math.atan(abs(t)) / math.pi)
    shifted = (1.055 + 0.002 - published) / (math.sqrt(0.00005) / math.sqrt(2))
    assert test.by_margin == pytest.approx(0.5 - math.atan(abs(shifted)) / math.pi)


def test_welch_has_the_closed_p_value_of_two_degrees_of_freedom():
    a, b = [1.0, 1.2], [1.5, 1.7]  # equal spreads, two each: 2 degrees of freedom
    t = 0.5 / math.sqrt(0.02 / 2 + 0.02 / 2)
    test = compare_runs.welch(a, b, 0.1)
    assert test.difference == pytest.approx(-0.5) and test.two_sided == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert test.better == pytest.approx(test.two_sided / 2) and test.by_margin > test.better
    assert compare_runs.welch(b, a, 0.1).better == pytest.approx(1 - test.better)


def test_paired_test_looks_at_common_seeds_only():
    a, b = {1: 1.0, 2: 2.0, 3: 9.0}, {1: 1.1, 2: 2.3, 4: 0.0}
    test = compare_runs.paired(a, b, 0.0)
    t = -0.2 / (math.sqrt(0.02) / math.sqrt(2))
    assert test.difference == pytest.approx(-0.2) and "(2)" in test.name
    assert test.two_sided == pytest.approx(1 - 2 / math.pi * math.atan(abs(t))) and test.by_margin == test.better
    assert compare_runs.paired({1: 1.0}, {1: 1.1}, 0.0).two_sided is None
    assert math.isnan(compare_runs.paired({1: 1.0}, {2: 1.1}, 0.0).difference)


def test_too_few_or_equal_runs_have_no_p_value():
    assert compare_runs.welch([1.0], [1.1, 1.2], 0.0)[2:] == (None, None, None)
    assert compare_runs.against([1.0], 1.1, 0.0)[2:] == (None, None, None)
    assert compare_runs.against([1.0, 1.0], 1.0, 0.0).two_sided is None, "no spread, no difference: nothing to divide"


def test_spread_and_interval():
    assert compare_runs.spread([1.0, 2.0, 3.0]) == pytest.approx(1.0) and math.isnan(compare_runs.spread([1.0]))
    assert compare_runs.half_width([0.0, 2.0]) == pytest.approx(12.7062, abs=1e-4), "t of one degree of freedom"


scores = st.lists(st.floats(0.9, 1.1), min_size=2, max_size=5).filter(lambda x: compare_runs.spread(x) > 1e-4)


@given(scores, scores, st.floats(0, 0.01))
def test_the_needed_mean_is_where_p_crosses_the_limit(a, b, margin):
    for others in (b, b[:1]):
        needed = compare_runs.needed_mean(a, others, margin)
        moved = [x - compare_runs.mean(a) + needed for x in a]
        test = compare_runs.welch(moved, others, margin) if len(others) > 1 else \
            compare_runs.against(moved, others[0], margin)
        assert test.by_margin == pytest.approx(compare_runs.WIN_P, rel=1e-4)


# --- the command
NEW, OLD = {42: 1.0500, 314: 1.0512, 999: 1.0495}, {42: 1.0610, 314: 1.0621, 999: 1.0606}


@pytest.fixture
def two_groups(tmp_path):
    return (fake_logs.write_logs(tmp_path, NEW),
            fake_logs.write_logs(tmp_path, OLD, "old", settings={"matrix_lr": 0.026}))


def test_compares_two_groups(two_groups, tmp_path, capsys):
    new, old = two_groups
    code, out, err = call(compare_runs, capsys, *new, "--", *old, "--out", tmp_path / "a.png")
    rows = cells(out)
    assert code == 0, err
    assert rows["A"][4:6] == ["1.05023", "0.00087"] and rows["B"][4] == "1.06123"
    assert rows["A"][1] == f"{1.0502333 / fake_logs.PER_NAT:.5f}"
    assert rows["Welch"][1] == "-0.01100" and rows["paired by seed (3)"][1] == "-0.01100"
    assert rows["Welch"][0] == f"{-0.011 / fake_logs.PER_NAT:.5f}"
    assert "MATRIX_LR 0.03 / 0.026" in out and re.search(r"rule .* met, Welch p = 0.0001", out)
    assert re.search(r"mean of 1\.05\d+ bits per byte or less wins; A has 1.05023", out)
    assert rows["step 100"][2] == f"{-0.011 / fake_logs.PER_NAT:+.4f}" and "seconds 590.1 s" in rows
    assert png_size(tmp_path / "a.png")[0] > 1500


def test_the_same_runs_swapped_do_not_win(two_groups, capsys):
    new, old = two_groups
    _, out, _ = call(compare_runs, capsys, *old, "--", *new)
    assert "not met" in out and "too much" in out and cells(out)["Welch"][1] == "+0.01100"


def test_compares_with_a_published_number(two_groups, tmp_path, capsys):
    _, out, _ = call(compare_runs, capsys, *two_groups[0], "--published", "1.0565", "--out", tmp_path / "a.png")
    assert "met, one sample p = 0.0083" in out and cells(out)["one sample"][1] == "-0.00627"
    _, out, _ = call(compare_runs, capsys, *two_groups[0], "--published", "1.0525")
    assert "not met" in out, "better, but not by 0.005 nats"
    _, out, _ = call(compare_runs, capsys, two_groups[0][0], "--published", "1.0565", "--out", tmp_path / "b.png")
    assert "open; too few runs" in out


def test_one_group_alone_gets_means_and_no_verdict(two_groups, capsys):
    code, out, _ = call(compare_runs, capsys, *two_groups[0])
    assert code == 0 and "rule" not in out and cells(out)["A"][0] == "3"


def test_stages_other_than_the_score(two_groups, capsys):
    new, old = two_groups
    _, out, _ = call(compare_runs, capsys, *new, "--stage", "averaged", "--", *old)
    assert cells(out)["A"][4] == "1.06023"
    assert "no stage 'x'; it has raw, averaged" in refused(compare_runs, capsys, *new, "--stage", "x")


def test_equal_steps_and_equal_time_are_those_all_runs_reached(tmp_path):
    def run(name, seconds):
        points = [run_log.Point(step, step * seconds, 4 - 0.1 * step) for step in (1, 5, 10)]
        return type("Outcome", (), {"run": run_log.Run(Path(name), steps=points)})
    a, b = (type("Group", (), {"outcomes": [run(name, seconds)]}) for name, seconds in (("a", 1.0), ("b", 2.0)))
    rows = cells(compare_runs.describe_curves(a, b))
    assert rows["step 10"] == ["3.0000", "3.0000", "+0.0000", "-"]
    assert rows["seconds 10.0 s"] == ["3.0000", "3.5000", "-0.5000", "-"], "b took five steps in ten seconds"


class Drawn:
    """A group of runs, each of these points of (step, seconds, loss)."""

    def __init__(self, letter, *runs):
        runs = [run_log.Run(Path(letter), steps=[run_log.Point(*point) for point in points]) for points in runs]
        self.letter, self.name, self.bpb = letter, letter, [1.0]
        self.outcomes = [type("Outcome", (), {"run": run}) for run in runs]


LONG = (1, 1.0, 4.0), (10, 10.0, 3.0)


@pytest.mark.parametrize(("runs", "sentences", "told"), [
    ((((1, 1.0, 4.0), (9, 9.0, 3.0)),), ("", ""), ""),
    ((LONG, ((10, 20.0, 4.0), (20, 40.0, 3.0))), ("No curves by step: a group's runs have only step 10 in common.",
                                                 "No curves by seconds: a group's runs have no second in common."),
     "No losses at equal seconds: the runs have no second in common.")])
def test_a_panel_without_curves_says_why(runs, sentences, told, tmp_path, monkeypatch):
    """Also: no loss is made up where a run has none."""
    from matplotlib.figure import Figure
    groups, drawn, save = [Drawn("A", LONG), Drawn("B", *runs)], [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **named: (drawn.extend(figure.axes), save(
        figure, *given, **named)))
    compare_runs.plot(groups, None, None, tmp_path / "a.png")
    assert len(drawn) == 3 and drawn[2].axison
    for axes, sentence in zip(drawn, sentences):
        assert [text.get_text() for text in axes.texts] == [sentence] * bool(sentence)
        assert len(axes.lines) == 2 * (not sentence) and axes.axison == (not sentence)
    text = compare_runs.describe_curves(*groups)
    assert told in text and "| step " in text and ("| seconds " in text) == (not told)


def test_published_logs_can_be_a_group(two_groups, tmp_path, capsys):
    seeds = {42: ("2.31944212", "1.05989454"), 0: ("2.32239991", "1.06124613"), 1234: ("2.32423994", "1.06208695")}
    paths = [tmp_path / f"train_seed{seed}.log" for seed in seeds]
    for path, (seed, (loss, bpb)) in zip(paths, seeds.items()):
        path.write_text(fake_logs.phased_log(seed, loss, bpb))
    code, out, err = call(compare_runs, capsys, *two_groups[0], "--", *paths, "--out", tmp_path / "a.png")
    assert code == 0, err
    assert cells(out)["B"][4:6] == ["1.06108", "0.00111"] and "tokenizers differ" in out
    assert f"{0.005 * 1.05989454 / 2.31944212:.5f} bits per byte" in out, "the margin is in nats of B's tokens"


def test_refuses(two_groups, tmp_path, capsys):
    new, old = two_groups
    again = tmp_path / "again.txt"
    again.write_text(new[0].read_text().replace("run_id:new_seed42", "run_id:again"))
    assert "seed 42 again" in refused(compare_runs, capsys, *new, again)
    assert "MATRIX_LR=0.026, but 0.03" in refused(compare_runs, capsys, new[0], old[1])
    other = fake_logs.write_logs(tmp_path, {7: 1.05}, "other", source=fake_logs.PROGRAM + "# edited\n")
    assert "another program" in refused(compare_runs, capsys, new[0], *other)
    foreign = tmp_path / "foreign.log"
    foreign.write_text(fake_logs.phased_log(7))
    assert "another script" in refused(compare_runs, capsys, new[0], foreign)
    other = {"audit": {"scored_targets": 1, "scored_bytes": 9}}
    text = fake_logs.write_logs(tmp_path, {42: 1.05}, "text", result=other)
    assert "different validation texts" in refused(compare_runs, capsys, *new, "--", *text)
    copy = tmp_path / "copy.txt"
    copy.write_text(new[1].read_text())
    for other in (new[1], copy):
        assert f"{other}: the same log as {new[1]}; give each run once" in refused(
            compare_runs, capsys, *new, "--", other)
    assert "the same log as" in refused(compare_runs, capsys, new[0], new[0])
    assert "exclude each other" in refused(compare_runs, capsys, *new, "--published", "1", "--", *old)
    assert "above 0" in refused(compare_runs, capsys, *new, "--published", "0")
    assert "PNG only" in refused(compare_runs, capsys, *new, "--out", tmp_path / "a.jpg")


# --- the reader of logs
def test_reads_the_baselines_log(tmp_path):
    path = tmp_path / "train.log"
    path.write_text(fake_logs.baseline_log())
    found = outcomes.read_outcome(path)
    assert (found.seed, found.stage, found.val_bpb) == (1337, "final_int8_zlib_roundtrip_exact", 1.2243657)
    assert (found.steps, found.train_seconds, found.eval_seconds) == (13780, 600.038, 1.401)
    assert (found.model_bytes, found.code_bytes, found.submission_bytes) == (15815847, 47642, 15863489)
    assert found.targets == 62021632 and found.calibration_seconds is None and not found.ours
    assert [point.step for point in found.run.steps] == [1, 13780], "nothing of the source is taken for a step"


def test_reads_the_log_of_pr_1855(tmp_path):
    path = tmp_path / "train_seed42.log"
    path.write_text(fake_logs.phased_log())
    found = outcomes.read_outcome(path)
    assert (found.seed, found.stage, found.val_bpb) == (42, "quantized_ttt_phased", 1.05989454)
    assert (found.steps, found.train_seconds, found.calibration_seconds) == (4945, 599.592, 4.7)
    assert (found.model_bytes, found.code_bytes, found.submission_bytes) == (15865260, 31999, 15897259)
    assert found.eval_seconds == 508.8 and found.world_size == 8 and found.targets == 47851520
    assert found.run.stages["diagnostic quantized"].val_bpb == 1.07254371
    assert found.run.steps[-1] == (4500, 540.0, 2.2771) and found.run.settings["ema_decay"] == "0.9965"


def test_reads_our_log(tmp_path):
    found = outcomes.read_outcome(fake_logs.write_logs(tmp_path, {42: 1.05})[0])
    assert found.ours and found.seed == 42 and found.val_bpb == pytest.approx(1.05) and found.stage == "sliding"
    assert found.bpb_per_nat == pytest.approx(fake_logs.PER_NAT) and found.targets == fake_logs.TOKENS
    assert found.run.source == fake_logs.PROGRAM


def test_refuses_logs_without_a_score(tmp_path):
    cut, nan, foreign = (tmp_path / name for name in ("cut.txt", "nan.txt", "foreign.txt"))
    text = fake_logs.our_log(42)
    cut.write_text(text[:text.index("\nresult {")])
    nan.write_text(text.replace("train_loss:4.", "train_loss:nan", 1))
    foreign.write_text("epoch 1 loss 2.5\n")
    with pytest.raises(run_log.ToolError, match="did not finish"):
        outcomes.read_outcome(cut)
    with pytest.raises(run_log.ToolError, match="train_loss:nan"):
        outcomes.read_outcome(nan)
    with pytest.raises(run_log.ToolError, match="no log of train_gpt"):
        outcomes.read_outcome(foreign)
    with pytest.raises(run_log.ToolError, match="No such file"):
        outcomes.read_outcome(tmp_path / "absent.txt")
