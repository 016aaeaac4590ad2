"""The error for model files that cannot be used."""

from __future__ import annotations


class CheckpointError(OSError):
    """A checkpoint is incomplete, damaged or of a kind that cannot be read in part.

    Example:

    ```python
    >>> from transformers_emo.checkpoints import Checkpoint, CheckpointError
    >>> try:
    ...     Checkpoint.from_folder(tmp_path)
    ... except CheckpointError as error:
    ...     print(str(error)[:34])
    There are no safetensors weights i

    ```
    """
