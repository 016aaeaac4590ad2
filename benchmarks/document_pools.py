"""What document pools cost: in a training step, pools on against off, and in a block, the router against all.

    python benchmarks/document_pools.py [--quick] [--hidden 1024] [--tokens 4096] [--documents 16]

Claim: choosing the pools of documents costs next to nothing.

Bar: router and pools at most 0.03 of a block's time at 512 tokens, bfloat16, 128 experts.

A step is forward, loss and backward of a model with 128 experts (8 taken for a token) over one packed row.
Steps with pools and without alternate, after one of each that does not count: with the cross entropy alone in
both, and with the pools' own losses. Then one block at the released model's width (2048, 128 experts of 1024)
over 512 tokens of 4 documents: its router, with pools and without, against the whole block.
"""

import argparse
import statistics
import time

import torch
from processes import peak_megabytes
from transformers_emo import EmoConfig, EmoForCausalLM
from transformers_emo.modeling_emo.modeling_emo import EmoSparseMoeBlock
from transformers_emo.modeling_emo.pools.document_pool import PoolRequest, document_pools

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


def compare(name: str, a, b, runs: int) -> None:
    """Print the ratio of two calls."""
    value, first, second = ratio(a, b, runs)
    memory = [peak_megabytes(call) for call in (a, b)]
    print(
        f"{value:.3f}  {name}  ({1e3 * first:.1f} ms, {memory[0]:.0f} MB / {1e3 * second:.1f} ms, "
        f"{memory[1]:.0f} MB)",
        flush=True,
    )


def compare_in_block(runs: int, tokens: int = 512, documents: int = 4) -> None:
    """Print the share of the router in a block at the released model's width."""
    config = EmoConfig(document_pool_eval=32, eos_token_id=1, num_hidden_layers=1)
    config._experts_implementation = "emo"
    with torch.device("meta"):
        block = EmoSparseMoeBlock(config, config.layer_experts[0])
    block = block.to(torch.bfloat16).to_empty(device="cpu").eval()
    for parameter in block.parameters():
        torch.nn.init.uniform_(parameter, -0.04, 0.04)
    ids = torch.full((1, tokens), 5)
    ids[0, :: tokens // documents] = 1
    request = PoolRequest(document_pool=True)
    pools = document_pools(
        config, request, training=False, input_ids=ids, position_ids=None, attention_mask=None
    )
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, pool in (("router with pools", pools[0] if pools else None), ("router alone", None)):
            compare(
                f"times a block's time: {name}, {tokens} tokens, bfloat16, {config.num_experts} experts",
                lambda pool=pool: block.gate(hidden[0], None, pool),
                lambda pool=pool: block(hidden, None, pool),
                runs,
            )


def compare_steps(args: argparse.Namespace) -> None:
    """Print what pools cost in a training step."""
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
        hidden = model.model(ids, use_cache=False, training_step=True, **kwargs).last_hidden_state
        model.loss_function(model.lm_head(hidden), ids, config.vocab_size).backward()

    print(f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.documents} documents")
    compare(
        "times a step without pools: pools on, cross entropy only",
        without_own_losses,
        lambda: without_own_losses(**OFF),
        args.runs,
    )
    compare("times a step without pools: pools with their losses", step, lambda: step(**OFF), args.runs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, and one run")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.tokens, args.runs = 128, 512, 1
    compare_steps(args)
    compare_in_block(4 * args.runs + 1)


if __name__ == "__main__":
    main()
