"""Experts chosen for every document from its own first tokens: what that costs, by the length of the prompt.

    python examples/emo_tiny/prompts.py model_cards/emo-tiny --out out/prompts    # after the corpus is built

`OUT/README.md` holds the table.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer
from transformers_emo import EmoForCausalLM
from transformers_emo.analysis import encode_documents, num_experts_at, prompt_pools, read_domains
from transformers_emo.analysis.files import write_text
from transformers_emo.analysis.tables import table

LENGTHS = [16, 32, 64, 128, 256]
SHARES = [0.5, 0.25, 0.125]


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/prompts"))
    parser.add_argument("--texts", type=Path, default=Path("corpus"))
    parser.add_argument("--test", type=int, default=8, help="test documents a domain")
    parser.add_argument("--following", type=int, default=192, help="tokens after the prompt to measure")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = EmoForCausalLM.from_pretrained(args.model, dtype="float32")
    texts = [text for domain in read_domains(args.texts, max_test=args.test) for text in domain.test]
    documents = encode_documents(tokenizer, texts, LENGTHS[-1] + args.following)
    sizes = [num_experts_at(model.config, share) for share in SHARES]
    measured = prompt_pools(
        model, documents, num_experts=sizes, prompt_lengths=LENGTHS, num_following=args.following
    )
    loss = {(m.prompt_length, m.num_experts): m.losses.loss for m in measured}
    number = len(measured[0].losses.tokens_N)
    rows = []
    for length in LENGTHS:
        full = loss[length, model.config.num_experts]
        rows.append([str(length), f"{full:.3f}", *(f"{loss[length, k] - full:+.3f}" for k in sizes)])
    text = "\n".join(
        [
            "# Experts chosen from the prompt",
            "",
            f"Made by `examples/emo_tiny/prompts.py`: loss of the {args.following} tokens after a prompt, in "
            f"nats per token, mean over {number} test documents, and its rise when the experts of each layer "
            "are chosen from that prompt alone, document by document.",
            "",
            *table(
                [
                    "tokens of the prompt",
                    "all experts",
                    *(f"{k} of {model.config.num_experts}" for k in sizes),
                ],
                rows,
            ),
            "",
        ]
    )
    write_text(args.out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
