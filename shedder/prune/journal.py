"""The log of a search: a header that says which search it is, then one line per event, appended as it happens.

A step is {"step": n, ...}; a trial of the step after it is {"trial": [layer, axis, unit], "loss": x}, null where the
loss is infinite. A search that was killed leaves whole lines and perhaps a piece of one, which is cut off when the
search goes on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from shedder.prune.parallel import Workers
from shedder.prune.trials import Key

VERSION = 2

Losses = dict[Key, float]


class Journal:
    """What a search has done so far. With several processes the first one reads and writes, all know the same.

    steps[0] is the untouched model; trials[n] are the losses known in the step after steps[n].
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any], workers: Workers) -> None:
        self.path = None if path is None else Path(path)
        self.workers = workers
        self.steps: list[dict[str, Any]] = []
        self.trials: list[Losses] = []
        self._file: IO[str] | None = None
        header = {"version": VERSION, **json.loads(json.dumps(header))}
        events: list[dict[str, Any]] = []
        failure = None
        if workers.is_first and self.path is not None:
            try:
                events = self._open(self.path, header)
            except (ValueError, OSError) as error:
                failure = f"{error}"
        found = workers.from_first({"header": header, "events": events, "failure": failure})
        if found["failure"] is not None:
            raise ValueError(found["failure"])
        if found["header"] != header:
            raise ValueError("the processes of this search were given different arguments, models or texts")
        for event in found["events"]:
            self._note(event)

    def _open(self, path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
        """The events in the file; it is left as it was unless it is the log of this search."""
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path} is being written by another search") from error
        self._file.seek(0)
        not_a_log = f"{path} is not the log of a search; move it away to start anew"
        try:
            text = self._file.read()
            whole = text[:text.rfind("\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{not_a_log} ({error})") from error
        if lines:
            self._check(path, lines[0], header)
        elif not json.dumps(header).startswith(text):
            raise ValueError(not_a_log)
        try:
            for event in lines[1:]:
                self._note(event)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{not_a_log} (an event is {event!r})") from error
        self.steps, self.trials = [], []
        self._file.truncate(len(whole.encode()))
        if not lines:
            self._append(header, sync=True)
        return lines[1:]

    @staticmethod
    def _check(path: Path, found: Any, header: dict[str, Any]) -> None:
        for name, value in header.items():
            theirs = found.get(name) if isinstance(found, dict) else None
            if theirs != value:
                raise ValueError(f"{path} belongs to another search: its {name} is {theirs!r}, now {value!r}; "
                                 "move it away to start anew")

    def _note(self, event: dict[str, Any]) -> None:
        if "step" in event:
            self.steps.append(event)
            self.trials.append({})
        else:
            layer, axis, unit = event["trial"]
            self.trials[-1][layer, axis, unit] = math.inf if event["loss"] is None else event["loss"]

    def _append(self, event: dict[str, Any], sync: bool) -> None:
        if self._file is not None:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def add_trial(self, key: Key, loss: float) -> None:
        """Survives a kill from now on, though not a power failure before the next step."""
        if key not in self.trials[-1]:
            self.trials[-1][key] = loss
            self._append({"trial": key, "loss": loss if math.isfinite(loss) else None}, sync=False)

    def add_step(self, record: dict[str, Any]) -> None:
        record = json.loads(json.dumps(record))
        self._note(record)
        self._append(record, sync=True)

    def keep(self, steps: int) -> None:
        """Forgets what came after the first `steps` records; the file keeps it."""
        del self.steps[steps:], self.trials[steps:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
