"""What stood here is now `transformers_emo.PackedConfig`, which wants no torchao and can be saved."""

from __future__ import annotations

from typing import Any, NoReturn


def quantised_experts(bits: int = 8, **kwargs: Any) -> NoReturn:
    """Tell what to use in its place.

    Args:
        bits (`int`, defaults to 8): not looked at; `PackedConfig` takes it.
        kwargs: not looked at.

    Raises:
        RuntimeError: always.

    Example:

    ```python
    >>> from transformers_emo.modeling_emo.quantised_experts import quantised_experts
    >>> try:
    ...     quantised_experts(8)
    ... except RuntimeError as error:
    ...     print(str(error)[:60])
    `quantised_experts` is gone: give `quantization_config=Packe

    ```
    """
    raise RuntimeError(
        f"`quantised_experts` is gone: give `quantization_config=PackedConfig(bits={bits!r})`, from "
        "`transformers_emo`, which also quantises attention and head, and can be saved in 8 and in 4 bits. A "
        "model that was saved in torchao's 8 bits has to be made again from the unquantised one."
    )
