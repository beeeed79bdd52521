"""What the ops check of their arguments, and how they see tensors as rows."""

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(**tensors: torch.Tensor | None) -> None:
    """Raise `TypeError` for the first tensor that is not floating point; `None` passes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must have a dtype of {FLOAT_DTYPES}, got {tensor.dtype}")


def check_same_dtype(**tensors: torch.Tensor | None) -> None:
    """Raise `TypeError` unless all tensors have the dtype of the first; `None` passes."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"{', '.join(dtypes)} must have one dtype, got {', '.join(map(str, dtypes.values()))}")


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Raise `ValueError` unless `tensor` has this shape, which `meaning` puts in words; `None` passes."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, got {list(tensor.shape)}")


def check_index(index: torch.Tensor) -> None:
    """Raise unless `index` is a vector of 32- or 64-bit integers. What it holds is not read: that would synchronise."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be [width], got {list(index.shape)}")


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[..., dim]` as `[rows, dim]` whose entries lie side by side, copied where its strides have no room for that."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
