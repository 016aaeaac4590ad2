"""`EmoConfig`: released files in, released files out, contradictions refused."""

import copy
import json
import pickle

import pytest
from conftest import GOLDENS
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_emo import EmoConfig, EmoModel
from transformers_emo.configuration import LayerExperts, LegacyEmoConfig

RELEASED = GOLDENS / "A_hf_forward" / "base" / "checkpoint" / "config.json"


def test_released_file_is_written_back_with_the_same_keys_and_values(tmp_path):
    EmoConfig.from_pretrained(RELEASED.parent).save_pretrained(tmp_path)
    saved, released = (json.loads(path.read_text()) for path in (tmp_path / "config.json", RELEASED))
    for key in released.keys() - {"auto_map", "transformers_version"}:
        assert saved[key] == released[key], key
    assert "auto_map" not in saved and "rope_parameters" not in saved


@pytest.mark.parametrize(
    "rope_scaling",
    [None, {"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 4.0}],
)
def test_rope_keys_survive_a_round_trip(tmp_path, rope_scaling):
    released = {"model_type": "emo", "rope_theta": 12345.0, "rope_scaling": rope_scaling}
    config = EmoConfig.from_dict(released)
    assert config.rope_parameters["rope_theta"] == 12345.0
    config.save_pretrained(tmp_path)
    again = EmoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 12345.0


SCALINGS = [None, {}, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}]


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("before", [None, {"rope_type": "linear", "factor": 3.0}])
@pytest.mark.parametrize("how", ["set", "update", "load"])
def test_a_scaling_that_is_set_leaves_theta(tmp_path, name, scaling, before, how):
    released = {"model_type": "emo", "rope_theta": 12345.0, "rope_scaling": before}
    given = None if scaling is None else dict(scaling)
    if how == "load":
        config = EmoConfig.from_dict(released, **{name: scaling})
    else:
        config = EmoConfig.from_dict(released)
        if how == "set":
            setattr(config, name, scaling)
        else:
            config.update({name: scaling})
    assert scaling == given  # nothing is written into what was given
    expected = {"rope_type": "default", **(scaling or {}), "rope_theta": 12345.0}
    if scaling and "type" in scaling:
        expected["rope_type"] = scaling["type"]
    assert config.rope_parameters == expected and config.rope_theta == 12345.0
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == 12345.0 and "rope_parameters" not in saved
    for again in (
        EmoConfig.from_pretrained(tmp_path),
        EmoConfig.from_dict(config.to_dict()),
        EmoConfig(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert again.rope_parameters == expected


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_theta_can_be_set_in_every_way():
    released = {"model_type": "emo", "rope_theta": 12345.0}
    config = EmoConfig.from_dict(released)
    config.rope_theta = 5.0
    assert config.to_dict()["rope_theta"] == config.rope_parameters["rope_theta"] == 5.0
    config.update({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    config.update({"rope_scaling": None, "rope_theta": 8.0})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 8.0}
    config.rope_parameters = {"rope_type": "default", "rope_theta": 9.0}
    assert config.rope_theta == 9.0
    assert EmoConfig.from_dict(released, rope_theta=11.0).rope_theta == 11.0
    assert EmoConfig().rope_theta == 500000.0


@pytest.mark.parametrize("theta", [0, [], False, True, ""])
def test_a_file_with_a_theta_that_is_none_is_refused(theta):
    for said in ({"rope_theta": theta}, {"rope_parameters": {"rope_theta": theta}}):
        with pytest.raises(ValueError, match="`rope_theta` of the config is .*: write a number above 0"):
            EmoConfig.from_dict({"model_type": "emo"} | said)


@pytest.mark.parametrize("theta", [None, 0, -1.0, float("nan"), "10000"])
def test_a_theta_that_is_none_is_refused(theta):
    with pytest.raises(ValueError, match="`rope_theta` of the config is .*: write a number above 0"):
        EmoConfig().rope_theta = theta


def test_file_without_shared_experts_has_none():
    assert EmoConfig.from_dict({"model_type": "emo"}).num_shared_experts == 0
    assert EmoConfig().num_shared_experts == 1


def test_legacy_config_becomes_a_plain_one():
    legacy = {
        "model_type": "flex_olmo_noqknorm_prenorm",
        "architectures": ["FlexOlmoNoQKNormPrenormForCausalLM"],
        "num_experts": 32,
    }
    for config_class in (EmoConfig, LegacyEmoConfig):
        config = config_class.from_dict(legacy)
        assert (type(config), config.model_type, config.architectures) == (
            EmoConfig,
            "emo",
            ["EmoForCausalLM"],
        )
    assert legacy["model_type"] == "flex_olmo_noqknorm_prenorm"  # the caller's dict is left alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_layer": [8]}, "has 1 entries, expected one for each of the 2 layers"),
        ({"num_experts_per_layer": [0, 8]}, "dense_intermediate_size"),
        ({"num_experts_per_layer": [-1, 8]}, "has -1 experts"),
        ({"num_shared_experts_per_layer": [1, 9]}, "Layer 1 has 9 shared experts"),
        ({"num_shared_experts": 3, "num_experts_per_tok": 2}, "fewer than the 3 that every token takes"),
        ({"always_active_experts": [8], "num_shared_experts": 0}, r"always-active experts \[8\]"),
        ({"always_active_experts": [1, 1], "num_shared_experts": 0}, r"always-active experts \[1, 1\]"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"retained_experts": [[1]]}, "retained_experts"),
        ({"retained_experts": [[1], [2]]}, "names 1 experts in layer 0, which has 8"),
        ({"num_shared_experts": 9}, "more than the 8 experts"),
    ],
)
def test_contradictions_are_refused_by_name(changes, message):
    with pytest.raises(Exception, match=message):
        EmoConfig(**{"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 4} | changes)


@pytest.mark.parametrize(
    "name",
    ["dense_mlp_bias", "num_shared_experts", "norm_topk_prob", "output_router_logits", "attention_bias"]
    + [
        "tie_word_embeddings",
        "use_cache",
        "router_aux_loss_coef",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
    ],
)
def test_null_in_a_file_means_the_default(name):
    config = EmoConfig.from_dict({"model_type": "emo", name: None})
    expected = EmoConfig.from_dict({"model_type": "emo"})
    assert config.to_dict() == expected.to_dict()
    assert config.rope_parameters["rope_theta"] == 500000.0


def test_integers_and_nulls_within_lists_in_a_file_are_understood():
    config = EmoConfig.from_dict(
        {
            "router_aux_loss_coef": 0,
            "num_hidden_layers": 2,
            "always_active_experts_per_layer": [None, [1]],
        }
    )
    assert config.router_aux_loss_coef == 0.0
    assert config.always_active_experts_per_layer == [[], [1]]


def test_wrong_type_is_refused():
    with pytest.raises(Exception, match="num_experts"):
        EmoConfig(num_experts="many")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_layer_experts_resolve_every_per_layer_setting(sizes, shared):
    config = EmoConfig(
        num_hidden_layers=len(sizes),
        num_experts_per_layer=sizes,
        num_shared_experts=shared,
        num_experts_per_tok=4,
        dense_intermediate_size=8,
    )
    for layer, size in zip(config.layer_experts, sizes, strict=True):
        assert layer == LayerExperts(size, min(shared, size), (), min(4, size))
        assert layer.num_routed + layer.num_shared == size
        assert layer.is_dense == (size == 0)


@pytest.mark.parametrize(
    ("num_experts", "shared", "always", "used"),
    [
        (8, 2, (), (6, 7)),
        (8, 0, (3, 1), (1, 3)),
        (8, 1, (7, 0), (0, 7)),
        (8, 0, (), ()),
        (0, 0, (), ()),
        (0, 1, (), ()),
    ],
)
def test_always_used_are_the_shared_and_the_always_active_experts(num_experts, shared, always, used):
    assert LayerExperts(num_experts, shared, always, top_k=min(4, num_experts)).always_used == used


NAN, INFINITE = float("nan"), float("inf")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
IMPOSSIBLE = [
    *(
        {name: value}
        for name in SMALL
        if name not in ("pad_token_id", "eos_token_id")
        for value in (-4, "8", 2.5)
    ),
    *({name: 0} for name in SMALL if name not in ("pad_token_id", "eos_token_id", "num_experts")),
    {"num_key_value_heads": 0},
    {"num_key_value_heads": -2},
    {"num_key_value_heads": 3},
    {"hidden_size": 28},
    {"head_dim": 0},
    {"head_dim": 7},
    {"head_dim": "8"},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": NAN},
    {"rms_norm_eps": INFINITE},
    {"rms_norm_eps": -1.0},
    {"initializer_range": -0.1},
    {"initializer_range": NAN},
    {"attention_dropout": 1.5},
    {"attention_dropout": NAN},
    {"router_aux_loss_coef": NAN},
    {"balance_loss_coef": INFINITE},
    {"hidden_act": "no-such"},
    {"rope_scaling": {"rope_type": "no-such", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": NAN}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    {"rope_scaling": {"rope_type": ["linear"]}},
    {"rope_theta": NAN},
    {"rope_theta": 0.0},
    {"num_experts_per_layer": [0, 8], "dense_intermediate_size": 0},
    {"num_experts_per_layer": ["8", 8]},
    {"num_experts_per_layer": [8, 2.5]},
    {"retained_experts": [[-1, *range(7)], list(range(8))]},
    {"retained_experts": [[0, *range(7)], list(range(8))]},
    {"retained_experts": [list(range(8)), list(range(1, 9))], "root_experts_per_layer": [8, 8]},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_what_no_network_can_have_is_named_in_one_line(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "emo", **SMALL, **changes}))
    makers = (
        lambda: EmoModel(EmoConfig(**SMALL | changes)),  # a network, since experts alone have no heads
        lambda: EmoConfig.from_pretrained(tmp_path),
        lambda: EmoConfig.from_dict(SMALL | changes),
    )
    name = next(iter(changes))
    words = {
        "rope_scaling": "rope_scaling|rope_type|factor|rotary",
        "num_experts_per_layer": "dense_intermediate_size|num_experts_per_layer",
        "head_dim": "head",
        "hidden_size": "hidden_size|head",
        "num_experts": "num_experts|experts",
    }
    for make in makers:
        with pytest.raises((ValueError, StrictDataclassError), match=words.get(name, name)) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_small_but_possible_configs_stay_possible():
    assert EmoConfig(**SMALL | {"num_attention_heads": 16, "num_key_value_heads": 1}).num_key_value_heads == 1
    assert EmoConfig(**SMALL | {"rms_norm_eps": 0.0, "attention_dropout": 1, "head_dim": 6}).head_dim == 6
    assert EmoConfig(**SMALL | {"num_experts": 1, "num_experts_per_tok": 1}).layer_experts[0].num_routed == 0
