"""The journal of a conversion, from which a killed one resumes.

Beside TARGET is `.TARGET.unfinished/` with `journal.jsonl`, `lock`, and `new/`, which becomes the target. The journal's
first line names the job. Each further line is a part that was written and verified, or the start of publishing `new/`,
with or without permission to overwrite. A truncated line is ignored.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

from joyjax.errors import CheckpointError
from joyjax.reading import unfinished

JOURNAL = "journal.jsonl"
PUBLISHING = "placing"  # the key in journals, which older versions wrote too
LOCK = "lock"


@dataclasses.dataclass
class Journal:
    """The journal of one job: the digests of each finished part, by component and part.

    `begun`: the folder has this job's own journal; until then it may have that of another job.
    """

    folder: Path
    job: str
    done: dict[tuple[str, str], dict[str, str]] = dataclasses.field(default_factory=dict)
    begun: bool = False
    publishing: bool = False
    overwrite: bool = False  # publishing may replace files of the target

    @property
    def new(self) -> Path:
        """The folder that becomes the target."""
        return self.folder / "new"

    def begin(self) -> None:
        """Start the job unless it is begun; remove the files of another job."""
        if self.begun:
            return
        # The journal is removed first: its entries must never refer to files that are gone.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != JOURNAL):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._append({"job": self.job})
        self.begun = True

    def clear(self) -> None:
        """Remove the folder, unless this job or another can resume from it."""
        other = not self.begun and (self.folder / JOURNAL).exists()
        if not self.done and not other:
            shutil.rmtree(self.folder, ignore_errors=True)

    def part_done(self, component: str, part: str, digests: Mapping[str, str]) -> None:
        """Record that a part is on disk and verified."""
        self._append({"component": component, "part": part, "sha256": digests})
        self.done[component, part] = dict(digests)

    def all_done(self, overwrite: bool) -> None:
        """Record that `new` is complete; from now on parts of it may be in the target."""
        self._append({PUBLISHING: overwrite})
        self.publishing, self.overwrite = True, overwrite

    def _append(self, entry: object) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as opened:
            opened.write("\n" + json.dumps(entry) + "\n")  # the line before may be truncated
            opened.flush()
            os.fsync(opened.fileno())


@contextlib.contextmanager
def open_journal(target: Path, job: str) -> Iterator[Journal]:
    """Open the journal of a job, an earlier run's or a new one, and hold its lock until the block ends.

    Raises:
        CheckpointError: if another program is writing to the same target.
        OSError: if the folder cannot be created.
    """
    folder = unfinished(target)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(f"{target} is being written by another program; wait until it ends") from None
    try:
        yield _read(folder, job)
    finally:
        lock.release()


def _read(folder: Path, job: str) -> Journal:
    journal, lines = Journal(folder, job), []
    with contextlib.suppress(OSError):
        lines = (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    entries = []
    for line in lines:
        if line.endswith("\n"):
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    if not entries or entries[0] != {"job": job}:
        return journal
    journal.begun = True
    for entry in entries[1:]:
        if PUBLISHING in entry:
            journal.publishing, journal.overwrite = True, entry[PUBLISHING]
        else:
            journal.done[entry["component"], entry["part"]] = entry["sha256"]
    return journal
