"""Files: what they must hold, and the one way to write them."""

from hf_qst.saved.whole_files import whole_file, write_text

__all__ = ["whole_file", "write_text"]
