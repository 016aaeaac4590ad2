"""The models that engines run in these tests, the prompts, and the answers of this package to them."""

import torch
from conftest import TOY
from transformers_emo import EmoConfig, EmoForCausalLM

TINY = TOY.parent / "emo-tiny"
PROMPTS = (
    "def main(",
    "Theorem plus_comm : forall",
    "La maison",
    "SELECT * FROM",
    "import os\n\ndef read(path):\n    return",
)
TOKENS = 48
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "rope_theta": 10000.0,
    "pad_token_id": 1,
    "eos_token_id": 0,
}


def greedy(model: EmoForCausalLM, ids: list[int], tokens: int = TOKENS, **choice) -> list[int]:
    """The most probable tokens after a prompt, by this package, whatever the end-of-text token is."""
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=1, **choice
    )
    return output[0, len(ids) :].tolist()


def small_model(**changes) -> EmoForCausalLM:
    """A random model, whose norms and biases count too."""
    torch.manual_seed(0)
    model = EmoForCausalLM(EmoConfig(**(SMALL | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(std=0.3 if name.endswith("bias") else 0.1)
    return model
