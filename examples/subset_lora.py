"""Train a LoRA adapter on a quarter of the experts, then use it on the full model.

python examples/subset_lora.py [OUT]
"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
from transformers import set_seed
from transformers_emo import EmoForCausalLM, EmoTokenizer
from transformers_emo.tokenization import encode_answers
from transformers_emo.training import (
    DocumentCollator,
    EmoTrainer,
    load_adapter,
    lora_config,
    training_arguments,
)

ROOT = Path(__file__).parents[1]
REPO = ROOT / "model_cards" / "toy-emo"  # or a released model: "allenai/Emo_1b14b_1T"
out = sys.argv[1] if len(sys.argv) > 1 else "out/subset_lora"

tokenizer = EmoTokenizer.from_pretrained(REPO)
rows = load_dataset("json", data_files=str(ROOT / "examples/data/questions.jsonl"), split="train")
examples = encode_answers(rows, tokenizer=tokenizer, prompt="question", answer="answer")

subset = ROOT / "examples/data/man_pages.json"
model = EmoForCausalLM.from_pretrained(REPO, expert_subset=subset)
# Attention, and the experts by the names that they have on disk.
config = lora_config(
    model, r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
)
set_seed(0)  # an adapter begins at random
adapted = get_peft_model(model, config)

arguments = training_arguments(
    "fine-tune",
    out,
    num_train_epochs=50,
    learning_rate=4e-3,
    windows_per_step=8,
    logging_steps=20,
    save_strategy="no",
)
EmoTrainer(adapted, arguments, DocumentCollator(model.config), examples).train()
adapted.save_pretrained(out)  # the adapter, and the experts that it belongs to

# Other experts are refused. On the full model the adapter finds its own by their ids; a mask picks them.
full = load_adapter(EmoForCausalLM.from_pretrained(REPO), out).eval()
prompt = tokenizer(rows[0]["question"], return_tensors="pt")
with full.get_base_model().use_experts(subset):
    print(tokenizer.decode(full.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
