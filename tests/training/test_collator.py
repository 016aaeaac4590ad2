"""`DocumentCollator`: which document a token belongs to, and what padding is."""

import datasets
import pytest
import torch
from tolerances import assert_same_numbers
from transformers import Trainer, TrainingArguments
from transformers_emo import EmoConfig
from transformers_emo.modeling_emo.pools.segments import segments_from_eos
from transformers_emo.tokenization import pack_dataset
from transformers_emo.training import DocumentCollator

CONFIG = EmoConfig(eos_token_id=1, pad_token_id=0)


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [("eos", [0, 0, 1, 1, 1, 2, 2, 2]), ("after_eos", [0, 0, 0, 1, 1, 1, 2, 2])],
)
def test_eos_opens_or_closes_as_the_config_says(boundaries, expected):
    collate = DocumentCollator(EmoConfig(eos_token_id=1, document_boundaries=boundaries))
    ids = [5, 6, 1, 7, 8, 1, 9, 9]
    batch = collate([{"input_ids": ids}])
    assert batch["document_ids"].tolist() == [expected]
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [ids]
    assert batch.keys() == {"input_ids", "labels", "document_ids"}  # nothing to mask, no mask
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_documents_that_a_window_gives_are_used_first():
    ids = [5, 1, 6, 7]
    batch = DocumentCollator(CONFIG)(
        [{"input_ids": ids, "document_ids": [3, 3, 3, 8]}, {"input_ids": ids, "seq_lengths": [1, 0, 3]}]
    )
    assert batch["document_ids"].tolist() == [[3, 3, 3, 8], [0, 2, 2, 2]]


def test_positions_that_start_again_are_documents():
    collate = DocumentCollator(EmoConfig(document_boundaries="position_ids"))
    batch = collate([{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}])
    assert batch["document_ids"].tolist() == [[0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0]]


def test_padding_is_masked_no_target_and_of_no_document():
    collate = DocumentCollator(CONFIG, window=5)
    batch = collate(
        [
            {"input_ids": [5, 1, 6], "labels": [-100, 1, 6]},
            {"input_ids": torch.tensor([0, 5, 1, 6]), "attention_mask": torch.tensor([0, 1, 1, 1])},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 1, 6, 0, 0], [0, 5, 1, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 6, -100, -100], [-100, 5, 1, 6, -100]]
    assert batch["document_ids"].tolist() == [[0, 1, 1, -1, -1], [-1, 0, 1, 1, -1]]


def test_a_set_window_gives_every_batch_the_same_keys_and_shape():
    collate = DocumentCollator(CONFIG, window=3)
    full, short = collate([{"input_ids": [5, 6, 7]}]), collate([{"input_ids": [5]}])
    assert full["attention_mask"].tolist() == [[1, 1, 1]]
    assert {name: value.shape for name, value in full.items()} == {
        name: value.shape for name, value in short.items()
    }


def test_padding_changes_no_loss(make_model):
    model = make_model(document_pool_min=4, document_pool_max=4).train()
    rows = [{"input_ids": [5, 6, 1, 7, 8, 1, 9, 10]}]
    exact = model(**DocumentCollator(model.config)(rows))
    padded = model(**DocumentCollator(model.config, window=12)(rows))
    for name in ("ce_loss", "aux_loss", "router_z_loss"):
        assert_same_numbers(padded[name], exact[name])


@pytest.mark.parametrize(
    ("config", "window", "error"),
    [
        ({}, {"input_ids": [5, 6], "seq_lengths": [1, 2]}, r"add up to 3, expected its 2"),
        ({}, {"input_ids": [5, 6], "document_ids": [0]}, r"`document_ids` of shape \(1,\): expected \(2,\)"),
        ({}, {"input_ids": [5, 6, 7, 8]}, r"4 tokens, more than the collator's `window` of 3"),
        ({"document_boundaries": "position_ids"}, {"input_ids": [5]}, "add the column"),
        ({"eos_token_id": None}, {"input_ids": [5]}, "`config.eos_token_id` is not set"),
    ],
)
def test_misuse_is_named(config, window, error):
    collate = DocumentCollator(EmoConfig(**{"eos_token_id": 1} | config), window=3)
    with pytest.raises(ValueError, match=error):
        collate([window])


@pytest.mark.parametrize(
    "window", [{"input_ids": [5, -3]}, {"input_ids": [5, 96]}, {"input_ids": [5, 6], "labels": [-100, 96]}]
)
def test_ids_outside_the_vocabulary_are_refused(window):
    with pytest.raises(
        ValueError, match="the model has those from 0 to 95: encode the data with the model's"
    ):
        DocumentCollator(EmoConfig(vocab_size=96, pad_token_id=0, eos_token_id=1))([window])


def test_columns_are_in_all_windows_or_in_none():
    with pytest.raises(ValueError, match="1 of 2 windows have no `position_ids`.*give it to all or to none"):
        DocumentCollator(CONFIG)([{"input_ids": [5]}, {"input_ids": [5], "position_ids": [0]}])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_trainer_hands_documents_to_the_model_and_trains(streaming, workers, make_model, tmp_path):
    model = make_model(document_pool_min=4, document_pool_max=8)
    torch.manual_seed(0)
    lengths = torch.randint(0, 9, (40,)).tolist()
    documents = [torch.randint(2, 96, (length,)).tolist() for length in lengths]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    rows = datasets.Dataset.from_dict({"input_ids": documents}, features=features)
    rows = rows.to_iterable_dataset(num_shards=2) if streaming else rows
    packed = pack_dataset(rows, eos_token_id=model.config.eos_token_id, window=16)

    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        dataloader_num_workers=workers, use_cpu=True, save_strategy="no", disable_tqdm=True,
        optim="adamw_torch", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=packed, data_collator=DocumentCollator(model.config, window=16)
    )
    result = trainer.train()

    assert result.global_step == len(calls) == 2 and 0 < result.training_loss < 20
    for kwargs in calls:
        ids, segments = kwargs["input_ids"], kwargs["document_ids"]
        assert ids.shape == (2, 16) and segments.max() > 0
        assert segments.tolist() == segments_from_eos(ids, 1, eos_opens=True).tolist()
        assert kwargs["labels"].tolist() == ids.tolist()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("experts" in name for name in changed) and any("gate.weight" in name for name in changed)
