"""The same tests on OLMoE, which is part of Transformers. Not run by default: `baseline.py` runs it."""

import unittest

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from transformers_suite.suite import CommonTests, DecoderCase, DistributedTests


class OlmoeCommonTest(DecoderCase, CommonTests, unittest.TestCase):
    config_class = OlmoeConfig
    all_model_classes = (OlmoeModel, OlmoeForCausalLM)


class OlmoeDistributedTest(DecoderCase, DistributedTests, unittest.TestCase):
    config_class = OlmoeConfig
    all_model_classes = (OlmoeModel, OlmoeForCausalLM)
