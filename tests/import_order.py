"""Imports in one order after another, each in a process of its own: EMO must work alike after all of them.

`test_registration.py` starts the processes.
"""

import sys
import threading
from pathlib import Path

import torch

TOY = Path(__file__).parents[1] / "model_cards" / "toy-emo"
CAUSAL = "from transformers import AutoModelForCausalLM"
# Orders that import no network, neither Transformers' nor ours, until somebody wants a model.
LIGHT = [
    "import transformers_emo",
    "import transformers_emo, transformers",
    f"{CAUSAL}, AutoConfig, AutoTokenizer\nimport transformers_emo",
    f"import transformers_emo\n{CAUSAL}",
    "from transformers_emo import EmoConfig, EmoTokenizer, ExpertSubset, mix\nimport transformers",
    "from transformers_emo import PackedConfig",
    "from transformers_emo.tokenization.tokenization_emo import EmoTokenizer",
    "from transformers_emo.modeling_emo.kernels.expert_kernels import emo_experts_forward",
]
ORDERS = [
    "import transformers.integrations.moe, transformers_emo",
    "from transformers import Trainer, pipeline\nimport transformers_emo",
    "from transformers_emo import EmoForCausalLM",
    "import transformers_emo.subsets.loading.model_hooks\nfrom transformers_emo import select_experts",
    "import transformers_emo.quantization.quantizer",
    "import transformers.quantizers.auto, transformers_emo",
    "from transformers_emo import quantize_model",
]
# No module of the package by its full name: Python 3.11 locks up where one thread imports a package, which
# imports its module, and another that module, which first imports its package.
AT_ONCE = [
    "import transformers_emo",
    CAUSAL,
    "import transformers.integrations.moe",
    "from transformers_emo import EmoForCausalLM",
    "from transformers_emo import select_experts",
    "from transformers_emo import EmoTokenizer",
    "from transformers_emo import PackedConfig",
]


def check() -> None:
    """See that EMO is to Transformers what it should be."""
    import transformers
    import transformers_emo as emo
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["emo-packed"] is emo.PackedConfig
    assert AUTO_QUANTIZER_MAPPING["emo-packed"].__name__ == "PackedQuantizer"
    assert {"emo", "emo_sorted"} <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())
    assert type(transformers.AutoTokenizer.from_pretrained(TOY)) is emo.EmoTokenizer
    config = transformers.AutoConfig.from_pretrained(TOY)
    assert type(config) is emo.EmoConfig
    assert issubclass(type(transformers.AutoConfig.for_model("flex_olmo_noqknorm_prenorm")), emo.EmoConfig)
    for auto, network in (
        (transformers.AutoModel, emo.EmoModel),
        (transformers.AutoModelForCausalLM, emo.EmoForCausalLM),
        (transformers.AutoModelForSequenceClassification, emo.EmoForSequenceClassification),
        (transformers.AutoModelForTokenClassification, emo.EmoForTokenClassification),
    ):
        assert emo.EmoConfig in auto._model_mapping and auto._model_mapping[emo.EmoConfig] is network
        assert network in auto._model_mapping._extra_content.values()
    experts = [[0, 1, 2, 31]] * config.num_hidden_layers
    model = transformers.AutoModelForCausalLM.from_pretrained(TOY, expert_subset=experts)
    assert model.config.num_experts == 4 and model.config._experts_implementation == "emo"
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.isfinite().all()


def one_after_another(order: str) -> None:
    """Import so, then check."""
    exec(order, {})
    assert not (order in LIGHT and "transformers.modeling_utils" in sys.modules)
    check()


def all_at_once() -> None:
    """Import in as many threads, then check."""
    import transformers  # noqa: F401  its own first import is circular: two threads cannot make it

    errors = []
    start = threading.Barrier(len(AT_ONCE))

    def run(line: str) -> None:
        start.wait()
        try:
            exec(line, {})
        except BaseException as error:
            errors.append((line, error))

    threads = [threading.Thread(target=run, args=(line,)) for line in AT_ONCE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    check()
