"""What a benchmark has measured so far, on disk: one that was killed goes on from there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class Journal:
    """Finished measurements by key, each a line that is on the disk once `put` returns.

    Without a folder nothing is kept. A journal of another benchmark, which `settings` tell apart, is
    begun anew, and so is a line that a kill has cut short.
    """

    def __init__(self, folder: Path | None, settings: Any) -> None:
        self._found: dict[str, Any] = {}
        self._path = None if folder is None else folder / NAME
        if self._path is None:
            return
        head = json.dumps(hashlib.sha256(json.dumps(settings).encode()).hexdigest())
        lines = self._path.read_text("utf-8").split("\n") if self._path.is_file() else []
        whole = lines[:-1]  # what follows the last end of a line is cut short
        if not whole or whole[0] != head:
            whole = [head]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if whole != lines[:-1] or lines[-1:] != [""]:
            beside = self._path.with_suffix(".new")
            beside.write_text("\n".join(whole) + "\n", "utf-8")
            beside.replace(self._path)  # at once: a kill here loses nothing
        for line in whole[1:]:
            key, value = json.loads(line)
            self._found[key] = value

    def get(self, *key: str | int) -> Any:
        """Return what was put under `key`, or None."""
        return self._found.get(json.dumps(key))

    def put(self, *key: str | int, value: Any) -> None:
        """Keep a JSON-able value."""
        name = json.dumps(key)
        self._found[name] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")
                file.flush()
                os.fsync(file.fileno())
