"""What a run takes: bytes a training step keeps."""

from hf_qst.planning.saved_bytes import SavedForBackward

__all__ = ["SavedForBackward"]
