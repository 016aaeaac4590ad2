"""What `generate(..., return_experts=True)` costs while a CPU decodes.

    python benchmarks/routed_experts.py [--quick] [--tokens 96]

Claim: to know which experts each token took costs next to nothing.

Bar: noting alone at most 0.02 of the time of a token.

A generation with and one without take turns, with the same prompts of 32 tokens. Ratios are medians of pairs,
with the quartiles in brackets. emo-tiny comes first, then emo-tiny with a streamer that takes the experts of
each token at once, as the page of `emo demo` does, against one that takes text alone. Then a model of
8 layers of 64 experts with random bfloat16 weights. Other work on the machine moves these ratios by more than
what is measured, so noting is timed alone too, against a token's time.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.in_use.routed_experts import ExpertRecord

EMO_TINY = Path(__file__).parents[1] / "model_cards" / "emo-tiny"
WIDER = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_shared_experts": 1,
         "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip


class Text(BaseStreamer):
    """Takes tokens."""

    def put(self, value):
        """Take them."""
        self.last = value

    def end(self):
        """Nothing is left to do."""


class TextAndExperts(Text):
    """Takes the experts too."""

    def put_experts(self, ids_BLSK, weights_BLSK):
        """Take them."""
        self.experts = ids_BLSK


def compare(model, what: str, *, batch: int, tokens: int, runs: int, streamers=(None, None)) -> float:
    torch.manual_seed(0)
    prompt = torch.randint(5, model.config.vocab_size, (batch, 32))
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}

    def seconds(told: bool) -> float:
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            return_experts=told,
            streamer=streamers[told],
            **settings,
        )
        return time.perf_counter() - start

    seconds(False), seconds(True)
    pairs = []
    for run in range(runs):  # either goes first as often as the other
        order = (False, True) if run % 2 else (True, False)
        times = {told: seconds(told) for told in order}
        pairs.append((times[True], times[False]))
    ratios = sorted(told / plain for told, plain in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    each = 1000 * statistics.median(plain for _, plain in pairs) / tokens
    print(f"{middle:.3f} ({low:.3f} to {high:.3f})  {what}, {batch} at once; without: {each:.1f} ms a token")
    return each


def notes_alone(config: EmoConfig, what: str, token_ms: float, *, live: bool) -> None:
    """The same without a model: what noting takes for each token of one sequence, against decoding it."""
    record = ExpertRecord(config, (lambda ids, weights: None) if live else None)
    layers = config.layer_experts
    picks = [(torch.zeros(1, layer.top_k, dtype=torch.long), torch.ones(1, layer.top_k)) for layer in layers]
    start, steps = time.perf_counter(), 2000
    for _ in range(steps):
        record.begin_forward(1, None)
        for index, (ids, weights) in enumerate(picks):
            record.layer(index).take(ids, weights)
        record.end_forward()
    noting_ms = 1000 * (time.perf_counter() - start) / steps
    how = "at once" if live else "at the end"
    took = f"{1000 * noting_ms:.0f} us a token"
    print(f"{noting_ms / token_ms:.4f}  {what}: noting alone, handed on {how}; {took}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    runs = 6 if args.quick else 24
    tiny = EmoForCausalLM.from_pretrained(EMO_TINY)
    each = [compare(tiny, "emo-tiny", batch=batch, tokens=args.tokens, runs=runs) for batch in (1, 8)]
    streamers = (Text(), TextAndExperts())
    compare(
        tiny,
        "emo-tiny, experts of each token at once",
        batch=1,
        tokens=args.tokens,
        runs=runs,
        streamers=streamers,
    )
    torch.manual_seed(0)
    wider = EmoForCausalLM(EmoConfig(**WIDER)).to(torch.bfloat16).eval()
    what = "8 layers of 64 experts"
    wide = [compare(wider, what, batch=batch, tokens=args.tokens // 3, runs=runs) for batch in (1, 4)]
    for model, name, token_ms in ((tiny, "emo-tiny", each[0]), (wider, what, wide[0])):
        for live in (False, True):
            notes_alone(model.config, name, token_ms, live=live)


if __name__ == "__main__":
    main()
