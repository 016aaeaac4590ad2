"""Transformers' common model tests, put together for any small decoder of ours or of upstream's."""

import inspect
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Unpack
from unittest.mock import patch

import torch
import transformers
from packaging.version import parse
from transformers import PreTrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device
from transformers.utils import TransformersKwargs

from transformers_suite.upstream import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_suite.upstream.generation.test_utils import GenerationTesterMixin

# Modules that are downloaded (`fetch.py`): before the first run no editor can find them.
UPSTREAM = "transformers_suite.upstream"
ConfigTester = import_module(f"{UPSTREAM}.test_configuration_common").ConfigTester
ModelTesterMixin: Any = import_module(f"{UPSTREAM}.test_modeling_common").ModelTesterMixin
TrainingTesterMixin: Any = import_module(f"{UPSTREAM}.test_training_mixin").TrainingTesterMixin

_DISTRIBUTED = [test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin]
# Upstream runs its distributed tests for a few of its models only; None is its own way to say "every model".
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
try:
    from transformers_suite.upstream import test_expert_parallel_mixin
except ImportError:  # the oldest Transformers supported has no such tests
    pass
else:
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    _DISTRIBUTED.append(test_expert_parallel_mixin.ExpertParallelTesterMixin)

# Small, so that all tests take a minute. The vocabulary is odd on purpose: ranks cannot divide it evenly.
_TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_OLMOE_PASSES = Path(__file__).with_name("olmoe_passes")


def olmoe_passes(version: str = transformers.__version__) -> frozenset[str]:
    """Names of the tests that OLMoE, upstream's nearest relative of EMO, passes; written by `baseline.py`.

    They are those of this Transformers, or of the newest before it that there is a list of.
    """
    lists = {parse(file.stem): file for file in _OLMOE_PASSES.glob("*.txt")}
    known = max((listed for listed in lists if listed <= parse(version)), default=min(lists))
    lines = lists[known].read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def write_olmoe_passes(names: Iterable[str]) -> None:
    """Store the names of the tests that OLMoE passes."""
    header = (
        f"# What OLMoE passes of the tests of Transformers {transformers.__version__}; from baseline.py.\n"
    )
    file = _OLMOE_PASSES / f"{transformers.__version__}.txt"
    file.write_text(header + "".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")


class DecoderTester:
    """Makes tiny configs of one decoder and inputs for them; has the attributes that upstream's tests read.

    Args:
        config_class (`type`): the decoder's config.
        causal_lm_class (`type`): the decoder with its language-model head.
        config_kwargs (`dict`): settings besides the tiny ones.
    """

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, config_class: type, causal_lm_class: type, config_kwargs: dict[str, Any]):
        self.config_class = config_class
        self.causal_lm_class = causal_lm_class
        self.config_kwargs = {**_TINY, **config_kwargs}
        vars(self).update(self.config_kwargs)

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.config_kwargs)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        # Ids from 3 on, so that none is special, in rows of different lengths, padded on the right.
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        lengths = torch.arange(self.batch_size, device=torch_device) % self.seq_length + 1
        attention_mask = (torch.arange(self.seq_length, device=torch_device) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class DecoderCase:
    """Base of a test case: the decoder under test. Stands before the mixins, which read `model_tester`."""

    config_class: ClassVar[type]
    config_kwargs: ClassVar[dict[str, Any]] = {}
    # Base model, causal LM, sequence classifier, token classifier.
    all_model_classes: ClassVar[tuple[type, ...]]
    model_tester: DecoderTester | None = None
    # Names of tests that must not be skipped on a CPU; `conftest.py` turns a skip into a failure.
    must_pass: ClassVar[frozenset[str]] = frozenset()
    # Without it `test_can_init_all_missing_weights` skips files that have no copyright line from 2023 on.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self.model_tester = DecoderTester(self.config_class, self.all_model_classes[1], self.config_kwargs)
        # Which class has which head, and so wants which labels, upstream's tests look up in the tables of the
        # in-tree models. `AutoModel.register` fills other tables.
        tables = [
            modeling_auto.MODEL_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ]
        for table, model_class in zip(tables, self.all_model_classes, strict=False):
            self.enterContext(patch.dict(table, {self.config_class.model_type: model_class.__name__}))
        # Upstream's heads have strings for annotations, in which one test does not find `output_attentions`:
        # it would skip itself at the first such head.
        for head in (GenericForSequenceClassification, GenericForTokenClassification):
            annotations = inspect.unwrap(head.forward).__annotations__
            self.enterContext(patch.dict(annotations, kwargs=Unpack[TransformersKwargs]))


class ConfigTests:
    """The tests of the config class."""

    def test_config(self):
        tester = ConfigTester(self, config_class=self.config_class, **self.model_tester.config_kwargs)
        tester.run_common_tests()


class CommonTests(ConfigTests, ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """The tests that run in one process."""


class DistributedTests(*_DISTRIBUTED):  # type: ignore[misc]
    """The tests that start several ranks."""

    def setUp(self):
        super().setUp()
        # They skip themselves where there are fewer cores than ranks. Ranks are small here, and share cores.
        self.enterContext(patch("os.cpu_count", return_value=8))
