"""Layers shared by the architectures."""

from torch import Tensor


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut a map into square windows of tokens, row by row.

    Args:
        x: (batch, channels, height, width), height and width multiples of `window`.

    Returns:
        (batch x windows, window x window, channels)
    """
    batch, channels, height, width = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, channels, rows, window, columns, window)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (batch, rows, columns, window, window, channels)
    return x.reshape(batch * rows * columns, window * window, channels)


def window_reverse(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `window_partition`: (batch x windows, window x window, channels) -> (batch, channels, height, width)."""
    rows, columns = height // window, width // window
    batch, channels = tokens.shape[0] // (rows * columns), tokens.shape[-1]
    x = tokens.reshape(batch, rows, columns, window, window, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (batch, channels, rows, window, columns, window)
    return x.reshape(batch, channels, height, width)
