"""What is written about the program: the techniques page, README's commands, and the limits of the file."""
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt
from train_gpt import Config

ROOT = Path(train_gpt.__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from count_lines import code_lines, longest_functions  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_bytes()
FIELDS = {f.name.upper() for f in fields(Config)}
PLUMBING = {  # where things are, how the program runs, what it prints: no technique
    "RUN_ID", "SEED", "LOG_DIR", "ARTIFACT_PATH", "RESUME", "PREFLIGHT", "CHECKPOINT_EVERY_SECONDS", "DEVICE",
    "COMPILE", "ATTENTION", "DETERMINISTIC", "ALLOW_OVERSIZE", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE",
    "MAX_LEAKED_DOCUMENTS", "FORCE_STOP_STEP", "EVAL_ONLY", "AUDIT", "VAL_BATCH_TOKENS", "VAL_DOCS", "VAL_LOSS_EVERY",
    "TRAIN_LOG_EVERY"}


# --- docs/techniques.md
def table_rows() -> list[list[str]]:
    """Cells of the rows of all tables whose first column is `setting`."""
    rows, inside = [], False
    for line in (ROOT / "docs/techniques.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "setting":
            inside = True
            assert cells[2] == "function"
        elif inside and not set(line) <= set("|- :"):
            rows.append(cells)
    return rows


def test_every_setting_but_plumbing_is_a_technique():
    described = [name for row in table_rows() for name in re.findall(r"`([A-Z0-9_]+)`", row[0])]
    assert sorted(described) == sorted(set(described)), "described twice"
    assert PLUMBING <= FIELDS
    assert set(described) == FIELDS - PLUMBING


def test_every_name_on_the_techniques_page_exists():
    text = (ROOT / "docs/techniques.md").read_text()
    names = set(re.findall(r"`([A-Z][A-Z0-9]*_?[A-Z0-9_]*)`", text))
    assert names and all(name in FIELDS or hasattr(train_gpt, name) for name in names), names - FIELDS


def test_the_page_says_how_many_techniques_are_unmeasured():
    stated = re.search(r'"unmeasured": (\d+) rows', (ROOT / "docs/techniques.md").read_text())
    assert stated and int(stated[1]) == sum(row[-1] == "unmeasured" for row in table_rows())


def test_every_function_on_the_techniques_page_exists():
    rows = table_rows()
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 6, row
        functions = re.findall(r"`([\w.]+)`", row[2])
        assert functions, row
        for path in functions:
            value = train_gpt
            for part in path.split("."):
                assert hasattr(value, part), f"{path} of {row[0]}"
                value = getattr(value, part)


# --- commands in README.md and the other pages
PACKED = "build/train_gpt.py"  # make pack writes it


def commands(text: str) -> list[str]:
    """Shell commands in ``` blocks and indented lines; a trailing backslash joins lines."""
    found, fenced = [], False
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            words = line.strip().removeprefix("$ ")
            without = re.sub(r"^([A-Z_0-9]+=\S*\s+)+", "", words)
            if re.match(r"(make|python3?|torchrun|set -a)\b", without):
                found.append(words)
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def complaint(command: str) -> str:
    """What is wrong with a shell command of a page, or ''."""
    parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    if parsed.returncode:
        return parsed.stderr
    command = re.sub(r"\s#.*", "", command)
    for part in re.split(r"&&|\|\||[;|]", command):
        words = [word for word in part.split() if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]
        if words[:1] == ["make"]:
            unknown = {word for word in words[1:] if not word.startswith("-")} - make_targets()
            if unknown:
                return f"no make target {unknown}"
    named = [word.strip("'\"") for word in re.split(r"[\s;]+", command)]
    for word in named:
        if re.fullmatch(r"[\w./-]+\.(py|env)", word) and word != PACKED and not (ROOT / word).is_file():
            return f"no file {word}"
    return ""


PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md")
               if path.is_file())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page(page):
    wrong = {command: complaint(command) for command in commands(page.read_text())}
    assert not any(wrong.values()), {command: text for command, text in wrong.items() if text}


def test_readme_shows_how_to_run():
    shown = " ".join(commands((ROOT / "README.md").read_text()))
    assert "train_gpt.py" in shown and "make" in shown


def test_commands_of_the_program_and_the_makefile():
    assert train_gpt.__doc__
    shown = [re.split(r" {3,}", line)[0] for line in commands(train_gpt.__doc__.replace(" a laptop's CPU", ""))]
    assert len(shown) >= 4 and not any(complaint(line) for line in shown), shown
    text = re.sub(r"\$\((BIN|PYTHON|VENV|RUN_ID)\)/?", "", (ROOT / "Makefile").read_text())
    missing = {name for name in re.findall(r"[\w./-]+\.(?:py|env)\b", text) if not (ROOT / name).is_file()}
    assert missing <= {PACKED}


def test_the_check_of_commands_can_fail():
    page = "```\nmake nothing\npython absent.py\nset -a; . presets/absent.env; set +a; python train_gpt.py\n" \
           "A=1 python train_gpt.py 'x\n```\n    make check test\n\nmake prose\n" \
           "    B=2 torchrun --x=1 train_gpt.py # y\n"
    found = commands(page)
    assert len(found) == 6
    assert [bool(complaint(command)) for command in found] == [True, True, True, True, False, False]


# --- the file itself
def test_train_gpt_stays_readable():
    text = SOURCE.decode("ascii")
    assert code_lines(text) <= 2500
    assert longest_functions(text)[0][0] <= 60, longest_functions(text)[:3]
    assert max(map(len, text.splitlines())) <= 120
    assert "\t" not in text and "\r" not in text and text.endswith("\n")


def test_counting_is_of_code_only():
    text = '"""Doc.\n\nMore.\n"""\n# comment\n\ndef f(\n    a,\n):\n    """Doc."""\n    return (a +\n            1)\n'
    assert code_lines(text) == 5 and longest_functions(text) == [(6, "f")]
