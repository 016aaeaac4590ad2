"""Transformers' own tests of tensor, expert and data parallelism, on EMO."""

import unittest

import pytest
from transformers_emo import (
    EmoConfig,
    EmoForCausalLM,
    EmoForSequenceClassification,
    EmoForTokenClassification,
    EmoModel,
)

from transformers_suite.suite import DecoderCase, DistributedTests, olmoe_passes
from transformers_suite.test_emo_common import MIXED_LAYERS


class EmoDistributedTest(DecoderCase, DistributedTests, unittest.TestCase):
    config_class = EmoConfig
    config_kwargs = {"num_shared_experts": 1}
    all_model_classes = (EmoModel, EmoForCausalLM, EmoForSequenceClassification, EmoForTokenClassification)
    must_pass = olmoe_passes()


@pytest.mark.slow  # the same paths as above with other layers
class EmoMixedLayersDistributedTest(EmoDistributedTest):
    config_kwargs = MIXED_LAYERS
