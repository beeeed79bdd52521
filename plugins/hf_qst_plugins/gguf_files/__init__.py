"""GGUF files of models, for llama.cpp and what is built on it. The guide is `docs/guides/other_tools.md`.

- `export`: `write_gguf`, which pads a smaller model to its architecture's shapes, writes the file and reads it back.
- `architectures`: what a file says of each type of model.
- `rotary`: the positions' settings and factors.
- `vocabulary`: what a file says of a tokenizer.
"""

from .architectures import ARCHITECTURES, GGUFError
from .export import FILE_TYPES, GGUFFile, require_writable, write_gguf

__all__ = ["ARCHITECTURES", "FILE_TYPES", "GGUFError", "GGUFFile", "require_writable", "write_gguf"]
