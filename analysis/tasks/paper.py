"""What the paper reports on its tasks by experts kept (https://arxiv.org/abs/2605.06663)."""

from __future__ import annotations

PAPER_MODELS = ("Emo_1b14b_1T", "StdMoE_1b14b_1T")
"""The released models that `PAPER_SCORES` is about."""

PAPER_SCORES: dict[str, dict[str, dict[int, float]]] = {
    "mmlu": {
        "Emo_1b14b_1T": {128: 42.8, 64: 42.5, 32: 41.4, 16: 39.9, 8: 36.1},
        "StdMoE_1b14b_1T": {128: 42.4, 64: 39.4, 32: 30.8, 16: 24.6, 8: 22.7},
    },
    "mmlu_pro": {
        "Emo_1b14b_1T": {128: 18.5, 64: 18.2, 32: 17.6, 16: 16.6, 8: 14.7},
        "StdMoE_1b14b_1T": {128: 19.3, 64: 16.8, 32: 13.2, 16: 9.9, 8: 9.5},
    },
    "gsm8k": {
        "Emo_1b14b_1T": {128: 12.0, 64: 11.0, 32: 11.7, 16: 12.2, 8: 6.9},
        "StdMoE_1b14b_1T": {128: 13.9, 64: 4.9, 32: 2.9, 16: 2.4, 8: 2.3},
    },
}
"""In per cent, without fine-tuning: by the harness's name of the task, by model, by experts kept of 128."""
