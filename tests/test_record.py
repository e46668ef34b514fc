"""tools/make_record.py and tools/validate_record.py: what they write, what passes, and what they refuse."""
import argparse
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import fake_logs
import make_record
import outcomes
import pack
import program
import pytest
import record
import record_pages
import run_log
import sweep
import validate_record
from test_tools import call, png_size, refused

import train_gpt

SCORES = {42: 1.0500, 314: 1.0512, 999: 1.0495}
DATE = "2026-05-01"
SOURCE = fake_logs.PROGRAM.encode()
PUBLISHED_KEYS = {  # of the folders of PRs #1855 and #2135, and others' that tools read
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "val_loss_std", "val_bpb_std",
    "seeds", "seed_results", "comparison_baseline_bpb", "delta_vs_leaderboard_bpb", "delta_vs_leaderboard_nats",
    "artifact_bytes_mean", "artifact_bytes_max", "bytes_total", "bytes_code", "train_steps_mean", "step_avg_ms_mean",
    "hardware", "pytorch_version", "cuda_version", "flash_attn_version", "technique_summary", "compliance",
    "attribution", "pre_quant_val_bpb", "quantized_val_bpb", "train_wallclock_ms", "val_tokens", "target_tokens",
    "logs", "step_stop", "wallclock_seconds", "eval_time_seconds"}
PUBLISHED_RULES = {  # their keys of `compliance`
    "train_under_600s", "artifact_under_16mb", "eval_under_600s", "no_slot", "no_pre_quant_ttt", "no_etlb",
    "no_ngram_cache", "score_first_ttt", "three_seeds"}
TECHNIQUES = """| setting | technique | function | source | published | ours |
|---|---|---|---|---|---|
| `XSA_LAST_N` | exclusive self attention | `exclusive` | 2026-03-20 record | -0.002 | unmeasured |
| `TIED` | tied embeddings | `f` | naive baseline | | |
| `VOCAB_SIZE` | no source given | `f` | | | |
"""


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments],
                   check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A repository with a small program, committed."""
    root = tmp_path_factory.mktemp("clone")
    for name, text in (("train_gpt.py", fake_logs.PROGRAM), ("requirements.txt", "torch==2.13.0\nnumpy\n"),
                       ("docs/techniques.md", TECHNIQUES), (".gitignore", "logs/\n"),
                       ("presets/base.env", "# base\nMATRIX_LR=0.02\nMODEL_DIM=512\n")):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "config", "user.name", "Ada")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


@pytest.fixture
def root(clone, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(clone, tmp_path / "clone"))


def make(capsys, root: Path, logs, *options) -> Path:
    """Makes a record -> its folder."""
    code, out, err = call(make_record, capsys, *logs, "--root", root, "--name", "New", "--date", DATE, *options)
    assert code == 0, err
    return Path(out.split(": ")[0])


def write_baseline(folder: Path) -> Path:
    """A published folder's submission.json."""
    path = folder / "baseline.json"
    path.write_text(json.dumps({"author": "B", "github_id": "b", "name": "Before", "date": "2026-04-27",
                                "val_bpb": 1.0611, "seed_results": {"1": {"val_bpb": 1.0605}, "2": {"val_bpb": 1.0610},
                                                                    "3": {"val_bpb": 1.0618}}}))
    return path


@pytest.fixture(scope="module")
def made(clone, tmp_path_factory) -> Path:
    """A sound folder of the record track."""
    place = tmp_path_factory.mktemp("made")
    root = Path(shutil.copytree(clone, place / "clone"))
    notes = place / "notes.md"
    notes.write_text("### What is new\n\nA better learning rate: 1.0502 instead of the baseline's 1.0611.")
    arguments = [*fake_logs.write_logs(root / "logs", SCORES), "--root", root, "--name", "New", "--date", DATE,
                 "--against", write_baseline(place), "--parent", write_baseline(place),
                 "--base", root / "presets/base.env", "--notes", notes]
    assert make_record.main([str(argument) for argument in arguments]) == 0
    return root / "records/track_10min_16mb" / f"{DATE}_New"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / made.name))


# --- make_record
def test_makes_a_whole_folder(made):
    assert {path.name for path in made.iterdir()} == {*record.FIXED_FILES, *map(record.log_name, SCORES)}
    assert [path.name for path in made.parent.iterdir()] == [made.name], "no temporary folder is left"
    facts = json.loads((made / "submission.json").read_text())
    assert set(facts) >= PUBLISHED_KEYS and set(facts["compliance"]) >= PUBLISHED_RULES
    assert facts["val_bpb"] == pytest.approx(1.0502333, abs=1e-7)
    assert facts["val_bpb_std"] == pytest.approx(0.00087, abs=1e-5)
    assert facts["seeds"] == [42, 314, 999] and facts["author"] == "Ada" and facts["track"] == "10min_16mb"
    assert set(facts["seed_results"]["42"]) >= {"val_loss", "val_bpb", "artifact_bytes", "steps", "step_avg_ms",
                                                "eval_time_s", "eval_time_ms", "train_wallclock_ms", "val_tokens",
                                                "target_tokens", "pre_quant_val_bpb", "quantized_val_bpb"}
    assert facts["seed_results"]["42"]["artifact_bytes"] == 15_900_042 + facts["bytes_code"]
    assert facts["bytes_total"] == 15_900_999 + len((made / "train_gpt.py").read_bytes())
    assert facts["comparison_baseline_bpb"] == 1.0611 and facts["comparison_p_value"] < 0.01
    assert facts["delta_vs_leaderboard_bpb"] == pytest.approx(-0.0108667, abs=1e-6)
    assert facts["hardware"] == "8 x NVIDIA H100 80GB HBM3" and facts["cuda_version"] == "13.0"
    assert facts["attention"] == "fa4" and facts["flash_attn_version"] is None
    assert all(facts["compliance"].values()) and facts["settings"] == {"MATRIX_LR": 0.03}
    assert facts["attribution"] == {"exclusive self attention": "2026-03-20 record",
                                    "tied embeddings": "naive baseline"}
    assert facts["base"] == {"preset": "presets/base.env", "differences": {"MATRIX_LR": ["0.02", "0.03"]}}
    assert [one["note"] for one in facts["revisions"]] == ["first version"]
    assert png_size(made / "runs.png")[0] > 1000


def test_the_pages_say_what_the_logs_say(made):
    readme, pull_request = (made / "README.md").read_text(), (made / "PR.md").read_text()
    assert readme.startswith("# New\n\n**1.05023 bits per byte** (mean of 3 seeds, std 0.00087)")
    assert re.search(r"\| 314 +\| +2\.18590\d+ \| +1\.05120000 \|", readme) and "| sliding, the score" in readme
    assert "| `MATRIX_LR` | `0.02` | `0.03` |" in readme and "* Before (B, 1.0611)" in readme
    assert "### What is new" in readme and "Why this is no record" not in readme
    assert pull_request.startswith("Record: New - val_bpb 1.05023 (3-seed mean)\n") and "- [ ]" not in pull_request
    run = (made / "run.sh").read_text()
    assert "export MATRIX_LR=0.03\n" in run and "for seed in ${*:-42 314 999}; do" in run and 'NPROC:-8' in run
    assert (made / "requirements.txt").read_text() == "torch==2.11.0\nnumpy\nflash-attn-4\n"
    assert (made / "train_seed42.log").read_text().startswith('"""A program for tests')


def test_the_command_runs_every_seed(made, tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text('#!/bin/bash\necho $SEED $MATRIX_LR $2\n')
    launcher.chmod(0o755)
    for given, seeds in (((), (42, 314, 999)), (("7", "8"), (7, 8))):
        done = subprocess.run([made / "run.sh", *given], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True,
                              text=True, check=False)
        assert done.stdout == "".join(f"{seed} 0.03 --nproc_per_node=8\n" for seed in seeds), done.stderr


def test_a_made_folder_passes(made, capsys):
    code, out, _ = call(validate_record, capsys, made, "--smoke")
    assert code == 0 and "PASS: 2026-05-01_New, 13 checks passed, 0 failed, 0 unknown" in out, out


def test_a_non_record_says_why(root, capsys):
    logs = fake_logs.write_logs(root / "logs", {1: 1.2}, result={"world_size": 1, "device": "cpu (2 threads)"})
    for path in logs:
        path.write_text(path.read_text().replace(f"device:{fake_logs.H100} world_size:8",
                                                 "device:cpu (2 threads) world_size:1"))
    assert "1 seed; the record track wants 3. Run on 1 x cpu" in refused(
        make_record, capsys, *logs, "--root", root, "--name", "New")
    made = make(capsys, root, logs, "--track", "non_record_16mb")
    assert made.parent.name == "track_non_record_16mb"
    readme = (made / "README.md").read_text()
    assert "## Why this is no record\n\n* 1 seed; the record track wants 3.\n* Run on 1 x cpu (2 threads)" in readme
    assert (made / "PR.md").read_text().startswith("Non-record: New - val_bpb 1.20000 (1 seed)\n")
    assert call(validate_record, capsys, made)[0] == 0
    made = Path(shutil.move(made, made.with_name("moved")))
    assert call(validate_record, capsys, made)[0] == 0, "the name of the folder does not matter"
    text = (made / "submission.json").read_text()
    (made / "submission.json").write_text(text.replace('"track": "non_record_16mb"', '"track": "10min_16mb"'))
    assert "1 seed; the record track wants 3" in fails(capsys, made), "the limits are computed again"


def test_a_revision_keeps_the_history(root, capsys):
    logs = fake_logs.write_logs(root / "logs", SCORES)
    options = "--track", "non_record_16mb"
    made = make(capsys, root, logs, *options)
    assert "--revise" in refused(make_record, capsys, *logs, "--root", root, "--name", "New", "--date", DATE, *options)
    assert make(capsys, root, logs[:2], *options, "--revise", "a seed less") == made
    facts = json.loads((made / "submission.json").read_text())
    assert [one["note"] for one in facts["revisions"]] == ["first version", "a seed less"]
    assert not (made / "train_seed999.log").exists() and [path.name for path in made.parent.iterdir()] == [made.name]
    assert call(validate_record, capsys, made)[0] == 0


def test_the_last_run_of_a_log_is_taken(tmp_path):
    first, second = fake_logs.our_log(42, 1.3), fake_logs.our_log(42, 1.2)
    assert record.last_run(first + second) == second and record.last_run(first) == first
    path = tmp_path / "two.txt"
    path.write_text(first + second)
    assert run_log.parse_log(path).fact("val_bpb") == pytest.approx(1.2)
    resumed = first + second.replace("num_params:", "resumed step:5 train_time:1ms path:x\nnum_params:", 1)
    assert record.last_run(resumed) == resumed, "a resumed run needs what was before it"


EDITS = {  # in a log: what is changed, and what the refusal says
    "cut": (r"\nresult \{.*", "", "did not finish"),
    "cut_lines": (r"\npeak_memory:.*", "", "no line 'trained'"),
    "nan": (r"train_loss:\d", "train_loss:nan", "train_loss:nan"),
    "score": (r"(final_sliding_exact val_loss:\S+ val_bpb:1\.0)5", r"\g<1>4", "final_sliding_exact does not say"),
    "result": (r'("val_bpb": 1\.0)5(\d*, "compile)', r"\g<1>4\2", "val_bpb 1.04"),
    "sums": (r'("sliding": \{"nats": \d)', r"\g<1>1", "is not what its sums give"),
    "bytes": (r"(\nartifact_bytes:159000)4", r"\g<1>3", "bytes: the lines say"),
    "seconds": (r"(train_seconds:59)0", r"\g<1>1", "train_seconds: the lines say 591"),
    "seed": (r"\nseed:42\n", "\nseed:43\n", "seed: the lines say 43"),
    "fingerprint": (r"data_fingerprint:a", "data_fingerprint:b", "data_fingerprint: the lines say"),
    "source": (r'"""Settings\."""', '"""Setting."""', "its source has sha256"),
    "setting": (r"\nxsa_last_n:11", "\nxsa_last_n:12", "XSA_LAST_N differs from the source's default"),
    "override": (r"\nmatrix_lr:0.03", "\nmatrix_lr:0.04", "MATRIX_LR: the lines say 0.04"),
    "order": (r"\nstep:20/", "\nstep:5/", "out of order"),
    "legal": (r'"eval_seconds": 300', '"eval_seconds": 900', "in_time: the lines say False"),
    "leak": (r'"leaked_documents": 0', '"leaked_documents": 3', "leaked_documents: the lines say 0"),
    "stage_seconds": (r"(final_sliding_exact .*eval_time:)12500", r"\g<1>2500", "says eval_time 2.500 seconds"),
    "evaluated": (r'"eval_seconds": 300', '"eval_seconds": 7', "eval_seconds 7.5 is less than its stages took, 25.000"),
    "official": (r'("official_stage": ")sliding', r"\g<1>averaged", "official_stage averaged is not its last stage"),
    "stopped_time": (r"(wallclock_cap train_time:)590125", r"\g<1>490125", "says step 100 after 490125 ms"),
    "stopped_step": (r"(wallclock_cap .* step:)100/", r"\g<1>110/", "stopping_early says step 110"),
    "not_stopped": (r"\nstopping_early.*", "", "steps: 100 of 20000, and no line stopping_early"),
    "compile": (r'"compile_seconds": 100.5', '"compile_seconds": 10.5', "compile_seconds 10.5: the lines say 100.5"),
    "compile_line": (r"\ncompile_warmup.*", "", "compile_seconds 100.5: the lines say 0.0"),
    "memory": (r'"peak_memory_bytes": 42', '"peak_memory_bytes": 22', "is less than the 40000 MiB of training"),
    "tokens": (r'"train_tokens": 78643200', '"train_tokens": 44643200', "are not those of 100 steps"),
    "average": (r"(step:50/.* step_avg:)5900", r"\g<1>4900", "step 50: step_avg:4900.0ms is not train_time / step"),
    "step_line": (r"\nstep:50/\d+ train_loss.*", "", "not those of every 10 steps to step 100"),
    "step_number": (r"\nstep:50/(.*) step_avg:5900.00ms", r"\nstep:51/\1 step_avg:5784.31ms", "not those of every 10"),
    "late_line": (r"(\nstep:100/.* train_time:)590000ms step_avg:5900", r"\g<1>690000ms step_avg:6900",
                  "train_seconds 590.125 is before its last progress line, 690.0"),
    "causal": (r'"causal": true', '"causal": false', "causal is False, with a change of 0.0 nats before"),
    "change": (r'"change_before_nats": 0.0', '"change_before_nats": 0.5', "causal is True, with a change of 0.5 nats"),
    "probability": (r'"probability_error": 1e-06', '"probability_error": 0.11', "legal, against its probability_error"),
    "audited": (r'(, "noise_nats".*?)\}', "}", "AUDIT=True, the result has none"),
    "unsafe": (r"\nttt_unsafe_multi_epoch:0", "\nttt_unsafe_multi_epoch:3", "legal, against its TTT_UNSAFE"),
    "subset": (r"\nval_docs:0", "\nval_docs:100", "val_documents: the lines say 50000, VAL_DOCS is 100"),
    "form": (r'"audit": \{.*?\}', '"audit": 5', "cannot be read"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_logs_are_refused_by_name(name, clone, tmp_path, capsys):
    pattern, text, complaint = EDITS[name]
    path = fake_logs.write_logs(tmp_path, {42: 1.05})[0]
    edited = re.sub(pattern, text, path.read_text(), count=1)
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(run_log.ToolError, match=re.escape(complaint)) as caught:
        make_record.read_logs([path], make_record.Program(SOURCE, pack.pack(SOURCE), fake_logs.SETTINGS))
    assert str(path) in str(caught.value)


def test_a_resumed_log_has_the_lines_behind_its_checkpoint(tmp_path):
    """What was before it is known by the steps alone, so the tokens of a schedule have bounds."""
    schedule, tokens = {"batch_schedule": "0.5@0.65,1@1"}, 60 * 786432
    whole = fake_logs.our_log(42, settings=schedule | {"resume": "a.checkpoint"}, result={"train_tokens": tokens})
    rest = re.sub(r"\nstep:([1-4]?\d|50)/.*", "", whole)
    rest = rest.replace("\nnum_params:", "\nresumed step:50 path:a\nnum_params:")
    path = tmp_path / "a.txt"
    def faults(text: str) -> list[str]:
        path.write_text(fake_logs.our_log(42, settings=schedule) + text)
        return record.log_faults(outcomes.read_outcome(path))
    assert faults(rest) == []
    assert faults(re.sub(r"\n(step|stopping_early):.*", "", rest)) == [], "of a run that had ended training"
    assert "not those of every 10 steps" in faults(re.sub(r"\nstep:80/\d+ train.*", "", rest))[0]
    assert "39321600 to 78643200" in faults(rest.replace(f'tokens": {tokens}', f'tokens": {tokens // 2}'))[0]


def test_tokens_follow_the_schedule_of_batches(tmp_path):
    tokens = (40 * 0.5 + 60) * 786432
    text = fake_logs.our_log(42, settings={"batch_schedule": "0.5@0.65,1@1"}, result={"train_tokens": int(tokens)})
    path = tmp_path / "a.txt"
    for step, fault in ((40, []), (50, [f"train_tokens {tokens:.0f} are not those of 100 steps, {75 * 786432}"])):
        path.write_text(text.replace("\nstep:40/", f"\nstage step:{step} looping:0 batch_share:1\nstep:40/", 1))
        assert record.log_faults(outcomes.read_outcome(path)) == fault


def test_the_challenges_text_is_known_by_its_bytes(tmp_path):
    """Whoever writes 50,000 documents into a log has not scored them."""
    logs = fake_logs.write_logs(tmp_path, SCORES, text=(986_378, 3_081_622))
    facts = record.derive([outcomes.read_outcome(path) for path in logs], 1000)
    assert facts["val_documents"] == 50_000 and not facts["compliance"]["full_validation"]
    facts |= {"comparison": {}, "comparison_p_value": None}
    assert "986,378 targets of 50,000 documents with 3,081,622 bytes, not the" in " ".join(
        record.non_record_reasons(facts))


def test_rules_follow_from_settings_and_audit(tmp_path):
    def rules(name: str, **changes) -> dict[str, bool]:
        logs = fake_logs.write_logs(tmp_path, SCORES, name, **changes)
        return record.derive([outcomes.read_outcome(path) for path in logs], 1000)["compliance"]
    assert all(rules("plain").values())
    assert not rules("ngrams", settings={"ngram_order": 16})["no_ngram_cache"]
    for changes in ({"settings": {"ttt_unsafe_multi_epoch": 3}},
                    {"result": {"audit": fake_logs.AUDIT | {"causal": False}}}):
        kept = rules("unsafe", **changes)
        assert not kept["score_first_ttt"] and not kept["no_pre_quant_ttt"] and kept["no_slot"]


def test_the_package_of_each_back_end_is_asked_for():
    facts = {"pytorch_version": "2.11.0+cu130"}
    for attention, lines in (("fa4", "flash-attn-4\n"), ("sdpa", ""), ("fa3", f"{record.ATTENTION_PACKAGES['fa3']}\n")):
        page = record_pages.render_requirements("torch==2.13.0\nnumpy", facts | {"attention": attention})
        assert page == f"torch==2.11.0\nnumpy\n{lines}"


def test_refuses_and_leaves_nothing(root, tmp_path, capsys):
    logs = fake_logs.write_logs(root / "logs", SCORES)
    options = "--root", root, "--name", "New", "--date", DATE, "--track", "non_record_16mb"
    def complaint(*arguments) -> str:
        return refused(make_record, capsys, *arguments)
    other = fake_logs.write_logs(tmp_path, {7: 1.05}, "other", source=fake_logs.PROGRAM + "# edited\n")
    assert "of another program" in complaint(*logs, *other, *options)
    fewer = fake_logs.write_logs(tmp_path, {7: 1.05}, "fewer")
    fewer[0].write_text(fewer[0].read_text().replace("val_documents:50000", "val_documents:49999"))
    assert "fewer_seed7.txt: its line 'data' says" in complaint(*logs, *fewer, *options)
    settings = fake_logs.write_logs(tmp_path, {8: 1.05}, "settings", settings={"matrix_lr": 0.02})
    assert "MATRIX_LR=0.02, but 0.03" in complaint(*logs, *settings, *options)
    assert "seed 42 again" in complaint(*logs, logs[0], *options)
    foreign = tmp_path / "train_seed42.log"
    foreign.write_text(fake_logs.phased_log())
    assert "of another script" in complaint(foreign, *options)
    assert "No such file" in complaint(tmp_path / "absent.txt", *options)
    large = fake_logs.write_logs(tmp_path, {9: 1.05}, "large", result={
        "artifact_bytes": 16_000_000, "submission_bytes": 16_000_000 + fake_logs.CODE_BYTES, "fits": False,
        "headroom_bytes": -fake_logs.CODE_BYTES, "legal": False})
    size = len(pack.pack(SOURCE))
    assert f"{16_000_000 + size:,} bytes are {size:,} over the limit of 16,000,000" in complaint(*large, *options)
    for count in (size - 1, 0):
        small = fake_logs.write_logs(tmp_path, {9: 1.05}, "small", result={
            "artifact_bytes": 15_000_000, "code_bytes": count, "submission_bytes": 15_000_000 + count,
            "headroom_bytes": 1_000_000 - count})
        assert f"counted {count} bytes of program, train_gpt.py has {size}" in complaint(*small, *options)
    slow = fake_logs.write_logs(tmp_path, SCORES, "slow", steps=110)
    assert "in_time: the lines say False" in complaint(*slow, *options), "649 seconds that call themselves in time"
    record_track = "--root", root, "--name", "New"
    assert "Compared with no earlier record" in complaint(*logs, *record_track)
    assert "Not shown to be better than Before" in complaint(
        *fake_logs.write_logs(tmp_path, {1: 1.06, 2: 1.062, 3: 1.061}, "same"), *record_track, "--against",
        write_baseline(tmp_path))
    broken = tmp_path / "broken.json"
    broken.write_text('{"val_bpb": 1}')
    assert "author is missing" in complaint(*logs, *options, "--against", broken)
    notes = tmp_path / "notes.md"
    notes.write_text("## Settings\n")
    assert "must be ###" in complaint(*logs, *options, "--notes", notes)
    notes.write_text("Better than the 1.0711 of last week.")
    assert "claims: claims 1.0711, which is in no log" in complaint(*logs, *options, "--notes", notes)
    assert "letters, digits" in complaint(*logs, "--name", "a/b")
    assert "no day" in complaint(*logs, "--name", "a", "--date", "yesterday")
    assert "does not exist" in complaint(*logs, *options, "--revise", "x")
    (root / "requirements.txt").write_text("torch==2.13.0\nnumpy\nmore\n")
    assert "uncommitted changes (1 files, requirements.txt first)" in complaint(*logs, *options)
    assert "git" in complaint(*logs, *options[:1], copied(root, tmp_path), *options[2:])
    assert not list(root.glob("records/*/*"))


def copied(root: Path, place: Path) -> Path:
    """The files of a clone without its history."""
    return Path(shutil.copytree(root, place / "copy", ignore=shutil.ignore_patterns(".git")))


def test_logs_over_the_time_limit_are_for_the_other_track(root, tmp_path, capsys):
    slow = {"legal": False, "audit": fake_logs.AUDIT | {"in_time": False}}
    logs = fake_logs.write_logs(root / "logs", SCORES, steps=110, result=slow)
    complaint = refused(make_record, capsys, *logs, "--root", root, "--name", "New")
    assert "took 653.4 seconds; the limit is 600" in complaint
    made = make(capsys, root, logs, "--track", "non_record_16mb")
    assert "* Training and calibration took 653.4 seconds; the limit is 600." in (made / "README.md").read_text()


def test_a_program_that_does_not_run_leaves_nothing(root, capsys):
    source = fake_logs.PROGRAM.replace("    print(", "    raise SystemExit('no memory')\n    print(")
    (root / "train_gpt.py").write_text(source)
    git(root, "commit", "-qam", "broken")
    logs = fake_logs.write_logs(root / "logs", {42: 1.05}, source=source)
    options = "--root", root, "--name", "New", "--track", "non_record_16mb"
    assert "exit code 1 on toy data: no memory" in refused(make_record, capsys, *logs, *options)
    assert not list((root / "records/track_non_record_16mb").iterdir())


def test_an_interruption_leaves_the_old_folder(root, capsys, monkeypatch):
    logs = fake_logs.write_logs(root / "logs", SCORES)
    made = make(capsys, root, logs, "--track", "non_record_16mb")
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    monkeypatch.setattr(make_record, "smoke", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    options = "--root", root, "--name", "New", "--date", DATE, "--track", "non_record_16mb", "--revise", "again"
    assert call(make_record, capsys, *logs, *options)[0] == 130
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert [path.name for path in made.parent.iterdir()] == [made.name]


# --- validate_record
def fails(capsys, folder: Path, *options) -> str:
    """Validates a folder that must fail -> the report."""
    code, out, err = call(validate_record, capsys, folder, *options)
    assert code == 1 and not err and "\nFAIL: " in out, out
    return out


def resign(folder: Path) -> None:
    """Puts the present files' hashes into submission.json, as one would who wants to hide a change."""
    facts = json.loads((folder / "submission.json").read_text())
    facts["files"] = {path.name: record.sha256(path) for path in folder.iterdir() if path.name != "submission.json"}
    (folder / "submission.json").write_text(json.dumps(facts, indent=2) + "\n")


def change_digit(path: Path, place: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:place] + b"%d" % ((data[place] - 48 + 1) % 10) + data[place + 1:])


@pytest.mark.parametrize("name", sorted([*record.FIXED_FILES, "train_seed42.log"]))
def test_any_changed_digit_fails(name, folder, capsys):
    data = (folder / name).read_bytes()
    for place in random.Random(name).sample([i for i, byte in enumerate(data) if 48 <= byte < 58], 3):
        change_digit(folder / name, place)
        fails(capsys, folder)
        (folder / name).write_bytes(data)


HIDDEN = {  # a change with new hashes: file, what, and what the report says all the same
    "score": ("submission.json", r'("val_bpb": 1\.0)5', r"\g<1>4", "val_bpb is 1.04"),
    "seed_score": ("submission.json", r'("42": \{\s*"val_loss": 2\.1)', r"\g<1>1", "seed_results.42.val_loss is"),
    "size": ("submission.json", r'("bytes_total": 1590)', r"\g<1>1", "bytes_total is"),
    "rule": ("submission.json", r'"three_seeds": true', '"three_seeds": false', "compliance.three_seeds is False"),
    "revision": ("submission.json", r'("revisions": \[\s*\{[^}]*"val_bpb": 1\.)0', r"\g<1>1", "the last revision says"),
    "table": ("README.md", r"\| 1\.0512", "| 1.0412", "README.md line"),
    "prose": ("README.md", r"baseline's 1\.0611", "baseline's 1.0711", "claims 1.0711, which is in no log"),
    "title": ("PR.md", r"1\.05023", "1.04023", "PR.md line 1"),
    "command": ("run.sh", r"MATRIX_LR=0.03", "MATRIX_LR=0.04", "run.sh line"),
    "packages": ("requirements.txt", r"torch==2.11", "torch==2.12", "does not ask for torch==2.11.0"),
    "attention": ("requirements.txt", r"flash-attn-4\n", "", "does not ask for flash-attn-4, which ran"),
    "earlier": ("submission.json", r'\n  "attention": "fa4",', "", "attention is None, the logs give fa4"),
    "packed": ("train_gpt.py", r"(?s)(d=iter.{1500}).", r"\1!", "is not what train_gpt_readable.py packs to"),
    "unpacker": ("train_gpt.py", r"exec\(compile", "print(compile", "packs to: not packed by this tools/pack.py"),
    "readable": ("train_gpt_readable.py", r'"""Settings', '"""Setting', "its source is neither"),
    "plot": ("runs.png", r"PNG", "PNX", "runs.png is no PNG"),
    "log": ("train_seed314.log", r'("nats": \d)', r"\g<1>1", "is not what its sums give"),
    "causal": ("train_seed314.log", r'"causal": true', '"causal": false', "causal is False, with a change of 0.0 nats"),
    "evaluated": ("train_seed314.log", r'"eval_seconds": 300', '"eval_seconds": 7', "is less than its stages took"),
    "documents": ("train_seed314.log", r"val_documents:50000", "val_documents:50001", "its line 'data' says"),
    "back_end": ("train_seed314.log", r"attention:fa4", "attention:fa3", "its line 'model' says"),
    "other_seed": ("train_seed314.log", r"seed:314\n", "seed:315\n", "seed: the lines say 315"),
    "one_setting": ("train_seed314.log", r"\nxsa_last_n:11", "\nxsa_last_n:10", "XSA_LAST_N=10, but 11"),
}


@pytest.mark.parametrize("change", HIDDEN)
def test_a_change_with_new_hashes_fails_too(change, folder, capsys):
    name, pattern, text, complaint = HIDDEN[change]
    data = (folder / name).read_bytes().decode("latin1")
    changed = re.sub(pattern, text, data, count=1)
    assert changed != data
    (folder / name).write_bytes(changed.encode("latin1"))
    resign(folder)
    assert complaint in fails(capsys, folder)


def repacked(folder: Path, text: str) -> None:
    """Has a folder's packed program hold this text. The sizes in the folder's pages may be others then."""
    model = pack.make_model(pack.dedented(text))
    (folder / "train_gpt.py").write_bytes(pack.packed_file(model, pack.coded(model)))
    resign(folder)


def program_check(capsys, folder: Path) -> str:
    """Validates a folder -> what it says about the program."""
    return " ".join(line for line in call(validate_record, capsys, folder)[1].splitlines() if " program " in line)


def test_the_packed_program_may_be_in_other_words_but_the_same(folder, capsys):
    """As another Python writes it."""
    text = pack.minify(SOURCE)
    repacked(folder, text.replace("8192", "(8192)"))
    assert program_check(capsys, folder).startswith("pass ")
    repacked(folder, text.replace("8192", "8193"))
    assert "train_gpt.py is not what train_gpt_readable.py packs to" in program_check(capsys, folder)


def test_what_this_python_cannot_read_is_unknown(folder, capsys):
    repacked(folder, pack.minify(SOURCE).replace("import json", "import json json"))
    assert "is not what train_gpt_readable.py packs to" in program_check(capsys, folder)
    for path in folder.glob("*.log"):
        path.write_text(re.sub(r" python:\S+", " python:3.1.4", path.read_text()))
    resign(folder)
    assert "packed? Python 3.1 packed it; it can tell" in program_check(capsys, folder)


def test_another_unpacker_is_unknown(folder, capsys, monkeypatch):
    own = pack.unpacker()
    with monkeypatch.context() as patch:
        patch.setattr(pack, "unpacker", lambda: own + "\n0")
        repacked(folder, pack.minify(SOURCE))
    commit = json.loads((folder / "submission.json").read_text())["commit"]
    assert f"has another unpacker than this tools/pack.py writes; that of commit {commit[:12]} can tell" in \
        program_check(capsys, folder)


def test_programs_that_pack_themselves_are_asked(root, capsys):
    """As they were before tools/pack.py; a run of one counted exactly what it packs to."""
    source = fake_logs.PROGRAM.replace("\n\nif __name__", (
        '\n\ndef pack_source(source):\n    """-> the packed program."""\n    return b"#packed\\n" + source'
        '\n\n\nif __name__'))
    (root / "train_gpt.py").write_text(source)
    git(root, "commit", "-qam", "old")
    options = "--track", "non_record_16mb"
    logs = fake_logs.write_logs(root / "logs", SCORES, source=source)
    assert "counted 5000 bytes" in refused(make_record, capsys, *logs, "--root", root, "--name", "New", *options)
    size = len(source) + 8
    for seed, path in zip(SCORES, logs):
        counted = {"code_bytes": size, "submission_bytes": 15_900_000 + seed + size,
                   "headroom_bytes": 100_000 - seed - size}
        path.write_text(fake_logs.our_log(seed, SCORES[seed], source=source, result=counted))
    made = make(capsys, root, logs, *options)
    assert (made / "train_gpt.py").read_text() == f"#packed\n{source}"
    assert call(validate_record, capsys, made)[0] == 0
    (made / "train_gpt.py").write_text(f"#packed\n{source}".replace("8192", "8193"))
    resign(made)
    assert "train_gpt.py is not what train_gpt_readable.py packs to" in program_check(capsys, made)
    for path in made.glob("*.log"):
        path.write_text(re.sub(r" python:\S+", " python:3.1.4", path.read_text()))
    resign(made)
    assert "packed? Python 3.1 packed it; it can tell" in program_check(capsys, made)


def test_runs_of_the_packed_program_count_its_bytes(root, capsys):
    packed = pack.pack(SOURCE)
    logs = fake_logs.write_logs(root / "logs", SCORES, source=packed.decode("latin1"))
    made = make(capsys, root, logs, "--track", "non_record_16mb")
    facts = json.loads((made / "submission.json").read_text())
    assert facts["bytes_code"] == len(packed) and facts["bytes_total"] == 15_900_999 + len(packed)
    assert (made / "train_gpt.py").read_bytes() == packed and (made / "train_gpt_readable.py").read_bytes() == SOURCE
    assert call(validate_record, capsys, made)[0] == 0
    logs = fake_logs.write_logs(root / "logs", SCORES, source=packed.decode("latin1"), result={
        "code_bytes": 5000, "artifact_bytes": 15_000_000, "submission_bytes": 15_005_000, "headroom_bytes": 995_000})
    assert "counted 5000 bytes of program" in refused(make_record, capsys, *logs, "--root", root, "--name", "Other")


def test_missing_and_extra_files_fail(folder, capsys):
    (folder / "run.sh").unlink()
    (folder / "helper.py").write_text("pass\n")
    (folder / "__pycache__").mkdir()
    out = fails(capsys, folder)
    assert "run.sh is missing; helper.py does not belong here" in out and "pycache" not in out


def audit_row(capsys, folder: Path) -> str:
    return next(line for line in call(validate_record, capsys, folder)[1].splitlines() if " audit " in line)


def test_the_audit_is_reported(root, capsys):
    """Passed, not there, or not passed: the last two are no failure of a folder that does not hide them."""
    options = "--track", "non_record_16mb"
    made = make(capsys, root, fake_logs.write_logs(root / "logs", SCORES), *options)
    assert audit_row(capsys, made).startswith("pass    audit          another token changes earlier scores by 0 nats")
    without = {key: fake_logs.AUDIT[key] for key in [*fake_logs.AUDIT][:5]}
    failed = {"audit": fake_logs.AUDIT | {"probability_error": 0.11}, "legal": False}
    for changes, text in (({"settings": {"audit": False}, "result": {"audit": without}}, "AUDIT=1 was off in"),
                          ({"result": failed}, "train_seed999.log: not passed, and not called legal")):
        made = make(capsys, root, fake_logs.write_logs(root / "logs", SCORES, **changes), *options, "--revise", "x")
        assert audit_row(capsys, made).startswith("unknown audit") and text in audit_row(capsys, made)
        assert call(validate_record, capsys, made)[0] == 0
    assert "* The program's own audit calls a run not legal." in (made / "README.md").read_text()


@pytest.mark.parametrize("folder", sorted(path.parent for path in program.ROOT.glob("records/*/*/submission.json")),
                         ids=lambda path: path.name)
def test_the_records_of_this_repository_pass(folder):
    """What another Python packed may be unknown here; nothing may fail."""
    _, report = validate_record.check(folder)
    assert not report.failed and len(report.rows) > 10, str(report)


def test_unreadable_folders(folder, tmp_path, capsys):
    assert "no such folder" in refused(validate_record, capsys, tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "submission.json: No such file" in refused(validate_record, capsys, empty)
    (empty / "submission.json").write_text("[1]")
    assert "must be a JSON object" in refused(validate_record, capsys, empty)
    (empty / "submission.json").write_text("{")
    assert "no JSON" in refused(validate_record, capsys, empty)
    facts = json.loads((folder / "submission.json").read_text())
    for broken, complaint in (({"lineage": [{}]}, "not built as such files are"), ({"author": ""}, "author is empty"),
                              ({"date": "May"}, "is no day"), ({"track": "x"}, "is neither"),
                              ({"blurb": 1}, "blurb is"), ({"seeds": ["a"]}, "seeds is"),
                              ({"comparison": {"name": "x"}}, "not built as")):
        (folder / "submission.json").write_text(json.dumps(facts | broken))
        assert complaint in fails(capsys, folder), broken


def test_smoke_failure_fails(folder, capsys):
    (folder / "train_gpt.py").write_text("raise SystemExit('broken')")
    assert "smoke          " in (out := fails(capsys, folder, "--smoke")) and "broken" in out


# --- published folders
def published(place: Path, **changes) -> Path:
    """A folder as PR #1855's, by hand."""
    folder = place / "track_10min_16mb" / "2026-04-27_Published"
    folder.mkdir(parents=True)
    seeds = {42: ("2.31944212", "1.05989454", 15897259), 0: ("2.32239991", "1.06124613", 15897259),
             1234: ("2.32423994", "1.06208695", 15897259)}
    for seed, (loss, bpb, total) in seeds.items():
        (folder / f"train_seed{seed}.log").write_text(fake_logs.phased_log(seed, loss, bpb, total))
    (folder / "train_gpt.py").write_text("pass\n")
    (folder / "README.md").write_text("# A record\n\n**1.06107587** on 3 seeds, **15,897,259** bytes\n")
    given = {"author": "A", "github_id": "a", "name": "A record", "date": "2026-04-27", "val_bpb": 1.06107587,
             "bytes_total": 15897259, "seeds": list(seeds)} | changes
    (folder / "submission.json").write_text(json.dumps(given))
    return folder


def test_a_published_folder_passes_with_what_is_unknown(tmp_path, capsys):
    code, out, _ = call(validate_record, capsys, published(tmp_path))
    assert code == 0 and re.search(r"pass +score +1\.06107587, mean of quantized_ttt_phased", out), out
    assert re.search(r"unknown limits +train_seed0.log: 599.6 s of training and 4.7 s of calibration are over 600", out)
    assert "count 31,999 bytes of program, train_gpt.py has 5" in out and "logs no sums" in out


def test_the_baselines_folder_passes(tmp_path, capsys):
    folder = tmp_path / "2026-03-17_NaiveBaseline"
    folder.mkdir()
    for name, text in (("train.log", fake_logs.baseline_log()), ("train_gpt.py", "pass\n"), ("README.md", "Baseline"),
                       ("submission.json", json.dumps({"author": "Baseline", "github_id": "openai", "name": "Baseline",
                                                       "date": "2026-03-18T00:05:35Z", "val_bpb": 1.2244,
                                                       "bytes_total": 15863489}))):
        (folder / name).write_text(text)
    code, out, _ = call(validate_record, capsys, folder)
    assert code == 0 and "1 logs; the record track wants 3" in out, out


def test_published_folders_fail_where_the_logs_say_otherwise(tmp_path, capsys):
    assert "1.0599 is not the logs' mean, 1.06107587" in fails(capsys, published(tmp_path / "a", val_bpb=1.0599))
    assert "bytes_total 15,000,000 is in no log" in fails(capsys, published(tmp_path / "b", bytes_total=15_000_000))
    assert "github_id is missing" in fails(capsys, published(tmp_path / "c", github_id=None))
    folder = published(tmp_path / "d")
    (folder / "train_gpt.py").unlink()
    (folder / "train_seed0.log").write_text(fake_logs.phased_log(0, total=16071321, milliseconds=602000))
    (folder / "train_seed7.log").write_text("nothing\n")
    out = fails(capsys, folder)
    assert "train_gpt.py is missing" in out and "train_seed7.log: no log of" in out
    (folder / "train_seed7.log").unlink()
    out = fails(capsys, folder)
    assert "16,071,321 bytes, 71,321 over the limit" in out and "trained 602.0 seconds" in out
    (folder / "train_seed0.log").write_text(fake_logs.phased_log(42))
    assert "one twice" in fails(capsys, folder)
    for path in folder.glob("*.log"):
        path.unlink()
    assert "no log in the folder" in fails(capsys, folder)


def test_claims():
    known = [1.06107587, 15897259, 0.0009]
    good, bad = "1.0611, 1.06108, 15,897,259 and 15897259 bytes, 3 seeds, 600 s", "1.0612 v1.2345.6 PR #1234567"
    assert validate_record.unfounded_claims(good, known) == []
    assert validate_record.unfounded_claims(bad, known) == ["claims 1.0612, which is in no log"]


# --- the real program
def test_a_record_of_the_real_program(tmp_path, capsys):
    root, data = tmp_path / "clone", program.write_data(tmp_path / "data")
    for name in ("train_gpt.py", "requirements.txt", "docs/techniques.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(program.ROOT / name, root / name)
    git_ignore = root / ".gitignore"
    git_ignore.write_text("logs/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    assert train_gpt.main(program.settings(data, root / "logs", SEED=5)) == 0
    result = program.result_of(capsys.readouterr().out)
    made = make(capsys, root, [root / "logs/run.txt"], "--track", "non_record_16mb")
    facts = json.loads((made / "submission.json").read_text())
    assert facts["val_bpb"] == round(result["val_bpb"], 8) and len(facts["attribution"]) > 10
    size = (made / "train_gpt.py").stat().st_size
    assert facts["bytes_code"] == size < result["code_bytes"]
    assert facts["bytes_total"] == result["artifact_bytes"] + size


def test_toy_settings_keep_heads_and_layers():
    known = {"model_dim": 512, "num_heads": 8, "rope_dims": 16, "gate_window": 12, "vocab_size": 8192}
    small = record.toy_settings({"NUM_HEADS": 4, "ROPE_DIMS": 4, "UNKNOWN": 1}, known)
    assert small == {"NUM_HEADS": "4", "ROPE_DIMS": "4", "MODEL_DIM": "32", "GATE_WINDOW": "8", "VOCAB_SIZE": "64"}


@pytest.mark.parametrize("preset", sorted(path.name for path in (program.ROOT / "presets").glob("*.env")))
def test_every_preset_has_toy_settings(preset):
    config, _ = train_gpt.Config.from_env(sweep.read_preset(program.ROOT / "presets" / preset))
    small = record.toy_settings(config.overrides(), vars(train_gpt.Config()))
    toy, _ = train_gpt.Config.from_env(small | {"DATA_PATH": "x", "LOG_DIR": "x"})
    assert toy.num_layers == config.num_layers and toy.num_heads == config.num_heads and toy.model_dim < 100
    assert train_gpt.param_shapes(toy).keys() == train_gpt.param_shapes(config).keys(), "the same parameters, smaller"


def test_paths_of_a_machine_stay_out_of_the_pages():
    assert record_pages.shown_setting("data_path", "/home/ada/data/datasets/mine") == "DATA_PATH=mine"
    assert record_pages.shown_setting("matrix_lr", "0.03") == "MATRIX_LR=0.03"
    with pytest.raises(argparse.ArgumentTypeError):
        make_record.folder_name("")
