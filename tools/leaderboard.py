"""Writes the README's table of records from records/*/*/submission.json.

    python tools/leaderboard.py README.md

Only what stands between the two marker comments changes. Best score first, the record track before the other; there,
runs of the same data (the first digits of their fingerprint) stand together, those of the latest run before others.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import NON_RECORD, PUBLISHED_KEYS, RECORD, SUBMISSION, read_json
from record_pages import number
from run_log import ToolError, exit_code, read_text

START, END = "<!-- leaderboard: make leaderboard writes what follows -->", "<!-- end of leaderboard -->"
HEADER = ["| bits per byte | std | seeds | record | data | by | date | bytes | hardware |",
          "|---:|---:|---:|---|---|---|---|---:|---|"]


def cell(text: Any) -> str:
    """Whatever an author wrote, as one cell of a table."""
    return " ".join(str(text).replace("|", "/").replace("<", "&lt;").split())


class Row(NamedTuple):
    data: str
    date: str
    val_bpb: float
    text: str


def row(root: Path, path: Path) -> Row:
    """submission.json -> its row. ToolError for one that lacks a key."""
    facts = read_json(path)
    for key, kind in PUBLISHED_KEYS.items():
        if not isinstance(facts.get(key), (kind, int) if kind is float else kind):
            raise ToolError(f"{path}: {key} is missing in it, or no {kind.__name__}; see tools/validate_record.py")
    size = facts.get("bytes_total")
    cells = [f"**{facts['val_bpb']:.5f}**", number(facts.get("val_bpb_std"), 5), str(len(facts.get("seeds") or [])),
             f"[{cell(facts['name'])}]({path.parent.relative_to(root).as_posix()})",
             data := cell(facts.get("data_fingerprint") or "-")[:8], cell(facts["author"]),
             date := cell(facts["date"])[:10], number(size, 0), cell(facts.get("hardware") or "-")]
    return Row(data, date, facts["val_bpb"], f"| {' | '.join(cells)} |")


def render(root: Path) -> str:
    """Clone -> Markdown between the markers."""
    parts = []
    for track, title in ((RECORD, "Records: 10 minutes of training on 8 x H100, 16,000,000 bytes"),
                         (NON_RECORD, "Non-records: 16,000,000 bytes, any time and machine; scores compare only where "
                          "the data are the same")):
        rows = [row(root, path) for path in (root / "records" / f"track_{track}").glob(f"*/{SUBMISSION}")]
        rows.sort(key=lambda x: (x.val_bpb, x.text))
        if track == NON_RECORD:
            latest = {x.data: (max(y.date for y in rows if y.data == x.data), x.data) for x in rows}
            rows.sort(key=lambda x: latest[x.data], reverse=True)
        table = [f"{title}.", "", *HEADER, *(x.text for x in rows)]
        parts.append("\n".join(table) if rows else f"{title}: none yet.")
    return "\n\n".join(parts)


def update(page: Path) -> None:
    """Writes the table into a page of a clone, whole or not at all. ToolError where it has no markers."""
    text = read_text(page)
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ToolError(f"{page}: no place for the table; put these two lines where it belongs: {START} {END}")
    new = f"{before}{START}\n{render(page.resolve().parent)}\n{END}{after}"
    if new != text:
        part = page.with_name(f".{page.name}.part")
        try:
            part.write_text(new, encoding="utf8")
            os.replace(part, page)
        except OSError as error:
            raise ToolError(f"{page}: {error.strerror}") from None
    print(f"{page}: {'written' if new != text else 'up to date'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="PAGE", help="the README.md beside records/")
    config = parser.parse_args(arguments)
    return exit_code(lambda: update(config.page))


if __name__ == "__main__":
    sys.exit(main())
