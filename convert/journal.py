"""What a conversion has done so far, so that one that was killed goes on.

Beside the target TARGET lies `.TARGET.unfinished/`: `journal.jsonl`, `lock`, and `new/`, which becomes the target. The
journal's first line names the job; each further one a part that was written and read back, or that all were and `new/`
is being given its place, with or without leave to overwrite. A line that was cut off by a kill is as good as none.
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
PLACING = "placing"
LOCK = "lock"


@dataclasses.dataclass
class Journal:
    """The journal of one job: the digests in each part that is done, by component and part.

    `begun`: is this job's own journal in the folder? Until it is, there may be that of another job.
    """

    folder: Path
    job: str
    done: dict[tuple[str, str], dict[str, str]] = dataclasses.field(default_factory=dict)
    begun: bool = False
    placing: bool = False
    overwrite: bool = False  # may `placing` replace what is in the target?

    @property
    def new(self) -> Path:
        """The folder that becomes the target."""
        return self.folder / "new"

    def begin(self) -> None:
        """Start the job where it is not begun: what another job left goes."""
        if self.begun:
            return
        # The journal goes first: what it tells of must be there, if this is stopped and its job comes back.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != JOURNAL):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._append({"job": self.job})
        self.begun = True

    def clear(self) -> None:
        """Remove the folder, unless there is something in it to go on from: of this job, or of another."""
        other = not self.begun and (self.folder / JOURNAL).exists()
        if not self.done and not other:
            shutil.rmtree(self.folder, ignore_errors=True)

    def part_done(self, component: str, part: str, digests: Mapping[str, str]) -> None:
        """Note that a part is on disk and was read back."""
        self._append({"component": component, "part": part, "sha256": digests})
        self.done[component, part] = dict(digests)

    def all_done(self, overwrite: bool) -> None:
        """Note that `new` is whole, and from now on may be found in its place, whole or in part."""
        self._append({PLACING: overwrite})
        self.placing, self.overwrite = True, overwrite

    def _append(self, entry: object) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as opened:
            opened.write("\n" + json.dumps(entry) + "\n")  # the line before may have been cut off
            opened.flush()
            os.fsync(opened.fileno())


@contextlib.contextmanager
def open_journal(target: Path, job: str) -> Iterator[Journal]:
    """Open the journal of a job: that of an earlier run of it, or one to begin; held until the block is left.

    Raises:
        CheckpointError: if another program writes to the same target at this time.
        OSError: if the folder cannot be made.
    """
    folder = unfinished(target)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CheckpointError(f"{target} is being written by another program at this time; let it end") from None
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
        if PLACING in entry:
            journal.placing, journal.overwrite = True, entry[PLACING]
        else:
            journal.done[entry["component"], entry["part"]] = entry["sha256"]
    return journal
