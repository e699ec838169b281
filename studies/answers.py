"""Compare the answer checker with other judges of the same answers: agreement, and where they differ.

    python -m studies.answers GRID.jsonl.gz ... --cases CASES.jsonl --second-label FIELD --list disagreements.jsonl

A grid has the format of `studies.real_grids`, with prompts that have a `reference_answer`; a case is
{"gold", "pred", "expected"} or {"answer", "response", "expected"}.
If a grid's `meta` has the `extracted_answer` on which its label is based, the checker also judges that answer. This
shows whether the two extract different answers from a response, or judge the same answer differently. The tables go to
studies/answers.md, and the disagreements to the file given by --list, for manual review. No row of a grid is stored in
this repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persyn.llm.protocols import Judge, Judged, ModelSpec
from persyn.llm.scorers import math_scorer
from studies.common import put, table

REPORT = Path(__file__).with_suffix(".md")


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, the reference, another judge's verdict, and the answer that judge extracted, if known."""

    response: str
    reference: str
    is_right: bool
    read: str | None = None


def main() -> None:
    """Run the checker on everything, and write the tables and the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", type=Path)
    parser.add_argument("--cases", type=Path, action="append", default=[])
    parser.add_argument("--second-label", metavar="FIELD", help="field of `meta`; skip rows whose label differs")
    parser.add_argument("--list", type=Path, required=True, help="file to write the disagreements to")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    known = {path.name.split(".")[0]: list(_cases(path)) for path in options.cases}
    known |= {path.name.split(".")[0]: list(_grid(path, options.second_label)) for path in options.grids}
    rows = []
    with options.list.open("w", encoding="utf-8") as file:
        for name, answers in known.items():
            counts, apart = compare(answers)
            rows.append(_row(name, len(answers), counts))
            file.writelines(json.dumps({"of": name, **each}) + "\n" for each in apart)
    head = (
        "answers",
        "judged",
        "agree",
        "right, called wrong",
        "wrong, called right",
        "no verdict",
        "different answer extracted",
    )
    put(options.report, table(head, rows))


def _cases(path: Path) -> Iterator[Answer]:
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        given, gold = ("pred", "gold") if "gold" in case else ("response", "answer")
        yield Answer(case[given], case[gold], bool(case["expected"]))


def _grid(path: Path, second: str | None) -> Iterator[Answer]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            meta = row.get("meta", {})
            if row["label"] == meta.get(second, row["label"]):
                yield Answer(row["response"], str(row["reference_answer"]), row["label"], meta.get("extracted_answer"))


def compare(answers: Sequence[Answer]) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Count and list the ways in which the checker and the other judge differ.

    returns: counts of "alike", "called_wrong", "called_right" and "undecided", and for the last three how many are due
             to "another_answer": for the answer that the other judge extracted, the checker agrees with that judge.
    """
    counts: Counter[str] = Counter()
    apart: list[dict[str, Any]] = []
    found = judge([(answer.response, answer.reference) for answer in answers])
    for answer, verdict in zip(answers, found, strict=True):
        if verdict == answer.is_right:
            counts["alike"] += 1
        else:
            how = {None: "undecided", False: "called_wrong", True: "called_right"}[verdict]
            counts[how] += 1
            apart.append(
                {
                    "how": how,
                    "is_right": answer.is_right,
                    "reference": answer.reference,
                    "read": answer.read,
                    "response": answer.response,
                }
            )
    known = [each for each in apart if each["read"] is not None]
    for each, verdict in zip(known, judge([(str(each["read"]), each["reference"]) for each in known]), strict=True):
        each["another_answer"] = verdict == each["is_right"]
        counts["another_answer"] += each["another_answer"]
    return counts, apart


def judge(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """The checker's verdict on each (response, reference); None where it reaches none."""
    engine = math_scorer.load(ModelSpec("math", ""), lambda: None)
    engine.submit([Judge(number, [], response, reference) for number, (response, reference) in enumerate(pairs)])
    found: dict[int, bool | None] = {}
    while engine.pending:
        for result in engine.step():
            found[result.id] = bool(result.value) if isinstance(result, Judged) else None
    return [found[number] for number in range(len(pairs))]


def _row(name: str, n: int, counts: Counter[str]) -> tuple[str, ...]:
    parts = ("alike", "called_wrong", "called_right", "undecided", "another_answer")
    return (name, f"{n:,}", *(f"{counts[part]:,}" for part in parts))


if __name__ == "__main__":
    main()
