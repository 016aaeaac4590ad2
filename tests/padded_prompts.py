"""Prompts of two lengths for the tests of generation, and how they are gone on with."""

import torch

PROMPTS = [[5, 17, 60, 2, 1, 33, 8, 90], [44, 71, 12, 9, 28]]  # 1 is the EOS token
NEW = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def batch(prompts=PROMPTS):
    """Token ids and mask, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
