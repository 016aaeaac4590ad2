"""The one place where EMO joins Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration import EmoConfig, LegacyEmoConfig
from .modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from .subsets import loading


def register() -> None:
    """Register EMO with the auto-classes. Done on import; calling it again changes nothing.

    Example:

    ```python
    >>> from transformers_emo.registration import register
    >>> register()

    ```
    """
    EmoPreTrainedModel._package = loading
    AutoConfig.register(EmoConfig.model_type, EmoConfig, exist_ok=True)
    AutoConfig.register(LegacyEmoConfig.model_type, LegacyEmoConfig, exist_ok=True)
    AutoModel.register(EmoConfig, EmoModel, exist_ok=True)
    AutoModelForCausalLM.register(EmoConfig, EmoForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(EmoConfig, EmoForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(EmoConfig, EmoForTokenClassification, exist_ok=True)
