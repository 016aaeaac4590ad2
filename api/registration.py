"""The one place where EMO joins Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto import tokenization_auto

from .configuration import EmoConfig, LegacyEmoConfig
from .modeling_emo import (
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
    EmoPreTrainedModel,
)
from .modeling_emo.expert_kernels import emo_experts_forward, few_rows_linear, sorted_experts_forward
from .modeling_emo.modeling_emo import EmoLinear
from .subsets import model_hooks
from .tokenization import EmoTokenizer


def register() -> None:
    """Register EMO with the auto-classes. Done on import; calling it again changes nothing.

    Example:

    ```python
    >>> from transformers_emo.registration import register
    >>> register()

    ```
    """
    EmoPreTrainedModel._package = model_hooks
    EmoLinear._few_rows = staticmethod(few_rows_linear)
    AutoConfig.register(EmoConfig.model_type, EmoConfig, exist_ok=True)
    AutoConfig.register(LegacyEmoConfig.model_type, LegacyEmoConfig, exist_ok=True)
    AutoModel.register(EmoConfig, EmoModel, exist_ok=True)
    AutoModelForCausalLM.register(EmoConfig, EmoForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(EmoConfig, EmoForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(EmoConfig, EmoForTokenClassification, exist_ok=True)
    AutoTokenizer.register(EmoConfig, EmoTokenizer, exist_ok=True)
    ALL_EXPERTS_FUNCTIONS.register(EmoPreTrainedModel._cpu_experts, emo_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register("emo_sorted", sorted_experts_forward)
    # Registered alone, the class would serve only repositories that name none. Released ones may name
    # `GPT2Tokenizer`, which in Transformers 5 splits text as GPT-2 does, not as their `tokenizer.json` says.
    # This is how Transformers itself lists the models whose repositories name a wrong class.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[EmoConfig.model_type] = EmoTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(EmoConfig.model_type)
