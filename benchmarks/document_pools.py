"""What document pools cost in a training step: the same model, pools on against off, in one run.

    python benchmarks/document_pools.py [--hidden 1024] [--tokens 4096] [--documents 16]

A step is forward, loss and backward of a model with 128 experts (8 taken for a token) over one packed row.
Steps with pools and without alternate, after one of each that does not count. Three rows, ratio first: with
the cross entropy alone in both, with the pools' own losses, and the router with its pools against the expert
block.
"""

import argparse
import statistics
import time

import torch
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.document_pool import PoolRequest, document_pools

OFF = {"document_pool": False}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(a, b, runs: int) -> tuple[float, float, float]:
    """Median of a/b pair by pair, and the medians."""
    a(), b()
    pairs = [(seconds(a), seconds(b)) for _ in range(runs)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return statistics.median(x / y for x, y in pairs), *medians


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = EmoConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        vocab_size=8192,
        pad_token_id=0,
        eos_token_id=1,
        document_pool_min=8,
        document_pool_max=127,
    )
    model = EmoForCausalLM(config).train()
    ids = torch.randint(2, config.vocab_size, (1, args.tokens))
    ids[0, :: args.tokens // args.documents] = 1

    def step(**kwargs) -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()

    def without_own_losses(**kwargs) -> None:
        model.zero_grad()
        hidden = model.model(ids, use_cache=False, **kwargs).last_hidden_state
        model.loss_function(model.lm_head(hidden), ids, config.vocab_size).backward()

    block = model.model.layers[0].mlp
    hidden = torch.randn(1, args.tokens, args.hidden)
    pools = document_pools(
        config, PoolRequest(), training=True, input_ids=ids, position_ids=None, attention_mask=None
    )

    def route_and_pool() -> None:
        with torch.no_grad():
            block.gate(hidden[0], None, pools[0])

    def whole_block() -> None:
        with torch.no_grad():
            block(hidden)

    print(f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.documents} documents")
    rows = {
        "step, pools on / off, cross entropy only": (without_own_losses, lambda: without_own_losses(**OFF)),
        "step, pools with their losses / off": (step, lambda: step(**OFF)),
        "router with pools / expert block": (route_and_pool, whole_block),
    }
    for name, (a, b) in rows.items():
        value, first, second = ratio(a, b, args.runs)
        print(f"{value:.3f}  {name}  ({1e3 * first:.0f} ms / {1e3 * second:.0f} ms)")


if __name__ == "__main__":
    main()
