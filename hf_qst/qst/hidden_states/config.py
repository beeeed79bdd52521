"""The configuration of a hidden-state cache."""

from __future__ import annotations

import os
from dataclasses import dataclass

STORAGES = ("full", "bfloat16", "int8")


class HiddenStateCacheError(ValueError):
    """Stored states cannot stand in for the base's own in this model or call."""


@dataclass(frozen=True)
class HiddenStateCacheConfig:
    """Where a base's hidden states are kept, and how.

    Args:
        folder (`str`): shared by all bases, adapters and processes; made if it is not there.
        storage (`str`): `"full"` keeps states as they are, `"bfloat16"` in two bytes a number, `"int8"` in one, with a
            scale for each 64 channels.
        size_limit (`int`, *optional*): bytes that `folder` may take. Examples that do not fit run the base every time.
            None: as much as the disk holds.
    """

    folder: str | os.PathLike
    storage: str = "full"
    size_limit: int | None = None

    def __post_init__(self):
        if not isinstance(self.folder, (str, os.PathLike)) or not os.fspath(self.folder):
            raise ValueError(f"HiddenStateCacheConfig.folder must be the path of a folder, got {self.folder!r}")
        if self.storage not in STORAGES:
            raise ValueError(
                f"HiddenStateCacheConfig.storage must be one of {', '.join(STORAGES)}, got {self.storage!r}"
            )
        limit = self.size_limit
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"HiddenStateCacheConfig.size_limit must be a number of bytes >= 1 or None, got {limit!r}")

    @classmethod
    def of(cls, value: HiddenStateCacheConfig | str | os.PathLike) -> HiddenStateCacheConfig:
        """The configuration that `value` is, or one for the folder that it names."""
        return value if isinstance(value, cls) else cls(value)
