"""Imports in one order after another, each in a process of its own, and EMO must work the same after all of them.

Run by `test_registration.py`. PyTorch is imported once and the processes are forked from there: what is asked
here is of Transformers and this package, and a process without either takes a second less.
"""

import os
import sys
import threading
import traceback

import torch

TOY = sys.argv[1]
CAUSAL = "from transformers import AutoModelForCausalLM"
ORDERS = [
    "import transformers_emo",
    "import transformers, transformers_emo",
    f"{CAUSAL}, AutoConfig, AutoTokenizer\nimport transformers_emo",
    f"import transformers_emo\n{CAUSAL}",
    "import transformers.integrations.moe\nimport transformers_emo",
    "from transformers import pipeline, Trainer\nimport transformers_emo",
    "from transformers_emo import EmoForCausalLM",
    "from transformers_emo import select_experts, EmoConfig",
    # What registering imports, imported first.
    "from transformers_emo.modeling_emo.expert_kernels import emo_experts_forward",
    "from transformers_emo.tokenization.tokenization_emo import EmoTokenizer",
    "import transformers_emo.subsets.model_hooks",
]
AT_ONCE = [
    "import transformers_emo",
    CAUSAL,
    "import transformers.integrations.moe",
    "from transformers_emo import EmoForCausalLM",
    "from transformers_emo import select_experts",
    "from transformers import AutoTokenizer",
]
HEAVY = "transformers.modeling_utils"


def check() -> None:
    """EMO is everything it should be to Transformers."""
    import transformers
    import transformers_emo as emo
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    text = transformers.AutoTokenizer.from_pretrained(TOY)
    assert type(text) is emo.EmoTokenizer
    assert type(transformers.AutoConfig.from_pretrained(TOY)) is emo.EmoConfig
    assert issubclass(type(transformers.AutoConfig.for_model("flex_olmo_noqknorm_prenorm")), emo.EmoConfig)
    for auto, network in (
        (transformers.AutoModel, emo.EmoModel),
        (transformers.AutoModelForCausalLM, emo.EmoForCausalLM),
        (transformers.AutoModelForSequenceClassification, emo.EmoForSequenceClassification),
        (transformers.AutoModelForTokenClassification, emo.EmoForTokenClassification),
    ):
        assert auto._model_mapping[emo.EmoConfig] is network, auto
        assert network in auto._model_mapping.values() and network in dict(auto._model_mapping.items()).values()
    assert {"emo", "emo_sorted"} <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())
    experts = [[0, 1, 2, 63]] * transformers.AutoConfig.from_pretrained(TOY).num_hidden_layers
    model = transformers.AutoModelForCausalLM.from_pretrained(TOY, expert_subset=experts)
    assert model.config.num_experts == 4 and model.config._experts_implementation == "emo"
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.isfinite().all()


def in_a_process(name: str, run) -> bool:
    """Whether it runs to its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            print(f"--- {name}", traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def in_order(order: str) -> None:
    """Import so, then check."""
    exec(order, {})
    if "Emo" not in order and "pipeline" not in order and "moe" not in order and "select" not in order:
        assert HEAVY not in sys.modules
    check()


def all_at_once() -> None:
    """Import in as many threads, then check."""
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


if __name__ == "__main__":
    done = [in_a_process(order, lambda order=order: in_order(order)) for order in ORDERS]
    done.append(in_a_process("all at once", all_at_once))
    sys.exit(not all(done))
