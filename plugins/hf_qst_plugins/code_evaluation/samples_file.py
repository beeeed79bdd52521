"""The JSONL file of an evaluation: a header with the settings, then one line per sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_qst.saved.json_files import with_checksum, without_checksum
from hf_qst.saved.whole_files import write_text

from .sandbox import Outcome

KEYS = ("task_id", "sample", "completion", "program_parses", "outcome", "detail", "tokens", "seconds")

UNJUDGED = Outcome("not judged", "", 0.0)
"""Of a completion whose program has not been executed."""


class SamplesFileError(ValueError):
    """A samples file belongs to a run with other settings, or is damaged."""


def _parse(path: Path, data: bytes) -> tuple[dict, list[dict], int]:
    """Settings, samples, and the number of bytes in complete lines."""
    whole = data.rfind(b"\n") + 1
    settings: dict = {}
    samples: list[dict] = []
    seen: set[tuple] = set()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = without_checksum(json.loads(line), "the line")
            if number == 1:
                settings = record["settings"]
                continue
            if absent := [key for key in KEYS if key not in record]:
                raise ValueError(f"{absent[0]!r} is missing")
            key = (record["task_id"], record["sample"])
            if key in seen:
                raise ValueError(f"sample {key} was there before")
        except (ValueError, KeyError, TypeError) as error:
            raise SamplesFileError(f"{path}, line {number}: not a line of an evaluation: {error}") from None
        seen.add(key)
        samples.append(record)
    return settings, samples, whole


def read_samples(path: str | Path) -> tuple[dict, list[dict]]:
    """(settings, samples) of a file. An incomplete last line is ignored.

    Raises:
        SamplesFileError: the file is damaged; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    settings, samples, whole = _parse(path, path.read_bytes())
    if not whole:
        raise SamplesFileError(f"{path}: holds no header; it is not the file of an evaluation")
    return settings, samples


def _differing(one: object, other: object) -> tuple[object, object]:
    """Both values; of dictionaries only the entries that differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one, other
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    pairs = {name: _differing(one.get(name), other.get(name)) for name in names}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def rewrite_samples(path: str | Path, settings: Mapping, samples: Sequence[Mapping]) -> None:
    """Replace a file by one with these settings and samples, completely or not at all."""
    records = [{"settings": settings}, *({key: sample[key] for key in KEYS} for sample in samples)]
    write_text(path, "".join(json.dumps(with_checksum(record)) + "\n" for record in records))


class SamplesFile:
    """Appends samples to `path`. An existing file with the same settings continues after its last complete line.

    Raises:
        SamplesFileError: the file has other settings (named, with both values), is damaged, or another process is
            writing to it.
    """

    def __init__(self, path: str | Path, settings: Mapping, overwrite: bool = False):
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))  # as read back from the file, where tuples are lists
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  (closed by __exit__)
        try:
            self.samples = self._open(settings, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _open(self, settings: dict, overwrite: bool) -> list[dict]:
        import fcntl  # POSIX only, like the sandbox

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SamplesFileError(f"{self.path}: another run is writing to this file; give another one") from None
        self._file.seek(0)
        saved, samples, whole = ({}, [], 0) if overwrite else _parse(self.path, self._file.read())
        self._file.truncate(whole)
        if not whole:
            self._write({"settings": settings})
            return []
        for name in sorted(saved.keys() | settings.keys()):
            if saved.get(name) != settings.get(name):
                there, here = _differing(saved.get(name), settings.get(name))
                raise SamplesFileError(
                    f"{self.path}: holds samples made with {name}={there!r}, this run has {here!r}; use another file, "
                    "the same setting, or overwrite=True (--overwrite)"
                )
        return samples

    def _write(self, record: Mapping) -> None:
        self._file.write(
            json.dumps(with_checksum(record)).encode() + b"\n"
        )  # a single write, so that the line is complete

    def append(self, sample: Mapping) -> None:
        """Write one sample, a mapping with the keys `KEYS`."""
        record = {key: sample[key] for key in KEYS}
        self._write(record)
        self.samples.append(record)

    def __enter__(self) -> SamplesFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
