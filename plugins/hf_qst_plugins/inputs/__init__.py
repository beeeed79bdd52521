"""Models and texts by the names that a user types: for the command line, the examples and the benchmarks.

- `models`: `model_path` and `load_model`, for hub names, folders, GGUF files and models that come in a package.
- `sources`: `read_rows`, for text files, folders, JSONL and data sets.
- `rows`: rows of tokens, with chat templates, and the mean loss over them.
- `cache`: the folder where files are kept between runs.
"""

from .cache import cache_folder, kept_model
from .models import PACKAGED, NoModelError, device_and_dtype, load_model, model_path, nf4, quantization_config
from .rows import BlockDataset, Collator, blocks, held_out_loss, token_rows
from .sources import DataError, read_rows

__all__ = [
    "PACKAGED",
    "BlockDataset",
    "Collator",
    "DataError",
    "NoModelError",
    "blocks",
    "cache_folder",
    "device_and_dtype",
    "held_out_loss",
    "kept_model",
    "load_model",
    "model_path",
    "nf4",
    "quantization_config",
    "read_rows",
    "token_rows",
]
