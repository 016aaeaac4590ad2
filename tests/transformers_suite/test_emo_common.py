"""Transformers' own tests of a model, in one process, on EMO."""

import unittest

from transformers_emo import (
    EmoConfig,
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
)

from transformers_suite.suite import CommonTests, DecoderCase, olmoe_passes

# A dense layer below a layer of experts, two of them shared.
MIXED_LAYERS = {
    "num_experts_per_layer": [0, 6],
    "num_experts_per_tok": 4,
    "num_shared_experts": 2,
    "dense_intermediate_size": 48,
    "dense_mlp_bias": True,
}


class EmoCommonTest(DecoderCase, CommonTests, unittest.TestCase):
    config_class = EmoConfig
    config_kwargs = {"num_shared_experts": 1}
    all_model_classes = (EmoModel, EmoForCausalLM, EmoForSequenceClassification, EmoForTokenClassification)
    must_pass = olmoe_passes()
    # It asks for a warning at the name a cache had before 5.24. EMO takes both for good: test_caches.py.
    test_bc_cache_name_forward = None


class EmoMixedLayersCommonTest(EmoCommonTest):
    config_kwargs = MIXED_LAYERS
