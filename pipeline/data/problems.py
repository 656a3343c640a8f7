"""What was wrong with records and with files, and how much of it is too much."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from pipeline.data.document import Document, Problem

PROBLEMS_PRINTED = 5


PROBLEMS_KEPT = 100


@dataclass
class Problems:
    """What was wrong with the records of a split so far. `key`: of the config, whose files they come from."""

    limit: float
    key: str = "data files"
    documents: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)

    def leave_out(self, records: Iterable[Document | Problem]) -> Iterator[Document]:
        """The documents among the records. Raises ValueError, naming the file and whatever `limit` is, at a file that
        is damaged or gives no document; and as soon as, of 1,000 records or more, ten times more than `limit` are
        problems: a wrong field name should not cost a night. The verdict on all is the caller's `check`."""
        file, found = "", 0
        problems: list[Problem] = []  # the first of this file
        for record in records:
            if record.file != file:
                self._judge(file, found, problems)
                file, found, problems = record.file, 0, []
            if isinstance(record, Document):
                self.documents += 1
                found += 1
                yield record
                continue
            if record.whole_file:
                raise ValueError(
                    f"{self.key}: {record.file} is damaged (line {record.line}: {record.what}), so nobody knows how "
                    "much of it is missing. Fetch or write it again, or leave the file out"
                )
            problems += [record] * (len(problems) < PROBLEMS_PRINTED)
            self.add(record)
            if self.documents + self.kinds.total() >= 1_000:
                self.check(10 * self.limit)
        self._judge(file, found, problems)

    def add(self, problem: Problem) -> None:
        """Count one, and show it where it is among the first."""
        self.kinds[problem.what] += 1
        if len(self.first) < PROBLEMS_KEPT:
            self.first.append(problem)
        if self.kinds.total() <= PROBLEMS_PRINTED:
            tqdm.write(f"left out: {problem.file}:{problem.line}: {problem.what}", file=sys.stderr)

    def _judge(self, file: str, found: int, problems: list[Problem]) -> None:
        """Raises ValueError where a file gave problems only. A .txt is a single record, so a bad one is one of many."""
        if problems and not found and not file.endswith(".txt"):
            seen = "; ".join(f"line {problem.line}: {problem.what}" for problem in problems)
            raise ValueError(
                f"{self.key}: no document in {file} ({seen}). Repair it, name the right field "
                "(data.text_field), or leave the file out"
            )

    def check(self, limit: float) -> None:
        """Raises ValueError where more than `limit` of the records so far are problems."""
        problems, records = self.kinds.total(), self.documents + self.kinds.total()
        if problems > limit * records:
            offenders = "\n".join(f"  {p.file}:{p.line}: {p.what}" for p in self.first[:PROBLEMS_PRINTED])
            raise ValueError(
                f"{problems} of {records} records cannot be used, more than data.max_bad_fraction = {self.limit} of "
                f"them:\n{offenders}\nRepair the files, or raise data.max_bad_fraction to leave such records out."
            )
