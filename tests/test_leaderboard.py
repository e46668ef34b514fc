"""tools/leaderboard.py: the README's table of records."""
import json
from pathlib import Path

import leaderboard
import pytest
from test_tools import call, refused

ROOT = Path(leaderboard.__file__).resolve().parent.parent
FACTS = {"author": "Ada", "github_id": "ada", "name": "One | two", "date": "2026-05-01T00:00:00Z", "val_bpb": 1.0565,
         "val_bpb_std": 0.0004, "seeds": [1, 2, 3], "bytes_total": 15_947_490, "hardware": "8 x H100"}


def submit(root: Path, track: str, folder: str, **changes) -> None:
    path = root / "records" / f"track_{track}" / folder / "submission.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FACTS | changes))


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{leaderboard.START}\nold\n{leaderboard.END}\n\nThe end.\n")
    return path


def test_best_first_and_tracks_apart(page, capsys):
    submit(page.parent, "10min_16mb", "a", name="Worse", val_bpb=1.0576)
    submit(page.parent, "10min_16mb", "b")
    submit(page.parent, "non_record_16mb", "c", name="Small", val_bpb=1, val_bpb_std=None, seeds=[5])
    for folder, data, score, date in (("d", "ab" * 32, 0.9, "2026-04-01"), ("e", "cd" * 32, 1.2, "2026-06-01"),
                                      ("f", "cd" * 32, 1.1, "2026-01-01")):
        submit(page.parent, "non_record_16mb", folder, data_fingerprint=data, val_bpb=score, date=date)
    assert call(leaderboard, capsys, page)[:2] == (0, f"{page}: written\n")
    text = page.read_text()
    assert text.startswith("# Title\n\n<!--") and text.endswith("-->\n\nThe end.\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    end = "| - | Ada | 2026-05-01 | 15,947,490 | 8 x H100 |"
    assert [(line.split("](")[1][:len("records/track_non_record_16mb/c")][-1], line.split("|")[5].strip())
            for line in rows[2:]] == [("f", "cdcdcdcd"), ("e", "cdcdcdcd"), ("c", "-"), ("d", "abababab")]
    del rows[2:4], rows[3:]
    assert rows == [f"| **1.05650** | 0.00040 | 3 | [One / two](records/track_10min_16mb/b) {end}",
                    f"| **1.05760** | 0.00040 | 3 | [Worse](records/track_10min_16mb/a) {end}",
                    f"| **1.00000** | - | 1 | [Small](records/track_non_record_16mb/c) {end}"]
    assert call(leaderboard, capsys, page)[1] == f"{page}: up to date\n"


def test_no_records(page, capsys):
    call(leaderboard, capsys, page)
    assert page.read_text().count("none yet.") == 2


def test_refuses(page, capsys):
    before = page.read_text()
    submit(page.parent, "10min_16mb", "a", val_bpb="low")
    assert "a/submission.json: val_bpb is missing in it, or no float" in refused(leaderboard, capsys, page)
    assert page.read_text() == before
    page.write_text("# Title\n")
    assert "no place for the table" in refused(leaderboard, capsys, page)
    assert "No such file" in refused(leaderboard, capsys, page.with_name("absent.md"))


def test_the_readme_shows_the_records_of_this_repository():
    text = (ROOT / "README.md").read_text()
    assert f"{leaderboard.START}\n{leaderboard.render(ROOT)}\n{leaderboard.END}" in text, "make leaderboard writes it"
