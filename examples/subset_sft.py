"""Fine-tune a quarter of the experts on questions and answers, with Trainer; the loss is on the answers only.

python examples/subset_sft.py [OUT]
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers_emo import EmoForCausalLM, EmoTokenizer, select_experts
from transformers_emo.tokenization import encode_answers
from transformers_emo.training import DocumentCollator, EmoTrainer, train_only, training_arguments

ROOT = Path(__file__).parents[1]
REPO = ROOT / "model_cards" / "toy-emo"  # or a released model: "allenai/Emo_1b14b_1T"
out = sys.argv[1] if len(sys.argv) > 1 else "out/subset_sft"

tokenizer = EmoTokenizer.from_pretrained(REPO)
rows = load_dataset("json", data_files=str(ROOT / "examples/data/questions.jsonl"), split="train")
examples = encode_answers(rows, tokenizer=tokenizer, prompt="question", answer="answer")

# The experts are chosen on the task itself: questions with their answers.
texts = [row["question"] + row["answer"] for row in rows]
subset = select_experts(REPO, texts=texts, num_experts=8)
# Trained with pools, but not fine-tuned with them: eight experts are a small pool themselves.
model = EmoForCausalLM.from_pretrained(
    REPO, expert_subset=subset, document_pool_min=None, document_pool_max=None
)
train_only(model, "routed")  # or "all", "routed+shared", "routed+shared+router"

arguments = training_arguments(
    "fine-tune",
    out,
    num_train_epochs=30,
    learning_rate=2e-3,  # the recipe's 5e-5 is for models of billions of parameters
    windows_per_step=8,
    logging_steps=20,
    save_strategy="no",
)
EmoTrainer(model, arguments, DocumentCollator(model.config), examples).train()

model.save_pretrained(out)  # a stand-alone small EMO
tokenizer.save_pretrained(out)
prompt = tokenizer(rows[0]["question"], return_tensors="pt")
print(tokenizer.decode(model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
