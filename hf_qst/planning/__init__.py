"""What a run takes: bytes a training step keeps."""
