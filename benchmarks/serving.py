"""What serving with part of the experts costs: decoding with pools chosen from the prompt, and swapping.

    python benchmarks/serving.py [--quick] [--model model_cards/toy-emo] [--tokens 48] [--runs 9]

Claim: decoding within pools chosen from the prompt costs as much as plain decoding, and a swap reads only the
experts that are new.

Greedy decoding of a prompt with `document_pool` (a quarter of the routed experts) and plain alternate, in the
trained model given and in a wider random one (512 wide, 64 experts). What is compared is the time from the
first new token to the last: the prompt is read in both. Then experts of the model given are swapped for a
subset that shares half of them, against loading that subset. Times are processor time of one thread, which
other work on the machine stretches less than it does the clock.
"""

import argparse
import statistics
import time

import torch
from processes import peak_megabytes
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.checkpoints.local_files import LocalFiles


class FirstToken(BaseStreamer):
    """Notes when the prompt has been read and the first token is there."""

    def __init__(self):
        self.calls = 0
        self.at = 0.0

    def put(self, value) -> None:
        """Called with the prompt, and then with every token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.process_time()

    def end(self) -> None:
        """Called when there are no more."""


def decode_seconds(model: EmoForCausalLM, prompt: torch.Tensor, tokens: int, **kwargs) -> float:
    """From the first new token to the last."""
    first = FirstToken()
    model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=first, **kwargs
    )
    return time.process_time() - first.at


def compare(name: str, model: EmoForCausalLM, tokens: int, runs: int) -> None:
    """Print the ratio of decoding with pools to plain decoding, pair by pair."""
    prompt = torch.randint(2, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    size = min(layer.num_routed for layer in model.config.layer_experts) // 4
    decode_seconds(model, prompt, 8, document_pool=size), decode_seconds(model, prompt, 8)
    pairs = []
    for run in range(runs):  # which of the two is first alternates too
        order = [{"document_pool": size}, {}] if run % 2 == 0 else [{}, {"document_pool": size}]
        times = {bool(kwargs): decode_seconds(model, prompt, tokens, **kwargs) for kwargs in order}
        pairs.append((times[True], times[False]))
    ratio = statistics.median(pooled / plain for pooled, plain in pairs)
    fastest = min(pooled for pooled, _ in pairs) / min(plain for _, plain in pairs)
    each = 1e3 * statistics.median(plain for _, plain in pairs) / (tokens - 1)
    memory = [
        peak_megabytes(lambda kwargs=kwargs: decode_seconds(model, prompt, tokens, **kwargs))
        for kwargs in ({"document_pool": size}, {})
    ]
    print(
        f"{ratio:.3f}  times plain decoding: {size} routed experts from the prompt, {name}  "
        f"(fastest runs {fastest:.3f}; {each:.2f} ms a token; {memory[0]:.0f} MB / {memory[1]:.0f} MB)"
    )


def compare_swap(path: str, runs: int) -> None:
    """Print the bytes and the time of a swap to those of loading, for subsets that share half."""
    config = EmoConfig.from_pretrained(path)
    first, second = [], []
    for layer in config.layer_experts:
        quarter, shared = layer.num_routed // 4, list(range(layer.num_routed, layer.num_experts))
        first.append([*range(2 * quarter), *shared])
        second.append([*range(quarter, 3 * quarter), *shared])
    read, read_into = [0], LocalFiles.read_into

    def counting(self, file, start, buffer):
        read[0] += len(buffer)
        read_into(self, file, start, buffer)

    LocalFiles.read_into = counting
    pairs, swapped, loaded = [], 0, 0
    for _ in range(runs):
        model = EmoForCausalLM.from_pretrained(path, expert_subset=first)
        read[0], start = 0, time.process_time()
        model.swap_experts(second, progress=False)
        swap, swapped = time.process_time() - start, read[0]
        read[0], start = 0, time.process_time()
        EmoForCausalLM.from_pretrained(path, expert_subset=second)
        pairs.append((swap, time.process_time() - start))
        loaded = read[0]
    LocalFiles.read_into = read_into
    print(f"{swapped / loaded:.3f}  times the bytes of loading the subset: swapping half of the experts")
    memory = [
        peak_megabytes(lambda: model.swap_experts(first, progress=False)),
        peak_megabytes(lambda: EmoForCausalLM.from_pretrained(path, expert_subset=second)),
    ]
    times = [1e3 * statistics.median(each) for each in zip(*pairs, strict=True)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"{ratio:.3f}  times the time of loading the subset: the same swap  "
        f"({times[0]:.0f} ms / {times[1]:.0f} ms; {memory[0]:.0f} MB / {memory[1]:.0f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="8 tokens, one run")
    parser.add_argument("--model", default="model_cards/toy-emo")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.runs = 8, 1
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = EmoConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    compare(args.model, EmoForCausalLM.from_pretrained(args.model), args.tokens, args.runs)
    compare("512 wide, 64 experts", EmoForCausalLM(config).eval(), args.tokens, args.runs)
    compare_swap(args.model, args.runs)


if __name__ == "__main__":
    main()
