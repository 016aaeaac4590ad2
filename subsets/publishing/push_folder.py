"""A folder put on the Hub: a model, an adapter or documents."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.hub.names import existing_folder
from ...checkpoints.hub.upload import make_place
from ...checkpoints.source_files import LOADED_FILES, SourceFiles, unchanged
from ...configuration import LEGACY_MODEL_TYPE, EmoConfig
from ..push_subset import CARD
from .cards import adapter_card, documents_card, model_card

# Partial files, caches, `.env`; and the state of a `Trainer`: larger than the model, and its arguments, a
# pickle, may hold the user's token.
_NOT_PUSHED = [".*", "*/.*"] + [
    f"{folder}{name}"
    for folder in ("", "*/")
    for name in (
        "checkpoint-*/*",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*.pth",
        "training_args.bin",
    )
]

# What must not be of two models. (A run that goes on may add checkpoints, which are not pushed.)
_TOLD_APART = (*LOADED_FILES, "adapter_*", "*.jsonl")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Put a folder on the Hub: a model, an adapter, or documents as `<domain>.jsonl`, which become a dataset.

    After an interrupted call, files that were sent are not sent again. A repository without a card gets one.
    Files whose names begin with a dot are not sent. Neither is the state of a `Trainer`: its `checkpoint-*`
    folders, optimiser, schedule, random state and arguments.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        repo_id (`str`): the repository, `user/name`; made if need be.
        token (`str` or `bool`, *optional*): as everywhere in huggingface_hub.
        revision (`str`, *optional*): the branch; made if need be.
        private (`bool`, *optional*): make the repository private, if it is made.
        commit_message (`str`, *optional*): the commit's title.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        FileNotFoundError: if there is no such folder.
        CheckpointError: if weights of a model are missing, cut short or damaged; before anything is sent.
        SourceChangedError: if the folder changed while it was sent: the commit may be a mix then. Push again.
        ValueError: if the folder is none of these, its model is no EMO, or one of the documents' files is
            called `default.jsonl` or has `*`, `?`, `[` or `]` in its name.

    Example:

    ```python
    >>> from transformers_emo.subsets import push_folder
    >>> push_folder("model_cards/toy-emo", "me/toy-emo", token="hf_...")  # doctest: +SKIP
    >>> try:
    ...     push_folder(tmp_path, "me/nothing")
    ... except ValueError as error:
    ...     print(str(error).endswith("expected a model, an adapter or documents in .jsonl files."))
    True

    ```
    """
    folder = existing_folder(folder)
    files = SourceFiles.of(folder, patterns=_TOLD_APART)
    documents = sorted(path.name for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    repo_type = "model"
    if (folder / "adapter_config.json").is_file():
        card = adapter_card(folder, repo_id)
    elif (folder / "config.json").is_file():
        Checkpoint.from_folder(folder).source.close()
        kind = EmoConfig.get_config_dict(folder)[0].get("model_type")
        if kind not in (EmoConfig.model_type, LEGACY_MODEL_TYPE):
            raise ValueError(f"The model in {folder} is of type {kind!r}, expected 'emo': use `hf upload`.")
        card = model_card(EmoConfig.from_pretrained(folder), repo_id)
    elif "default.jsonl" in documents:
        raise ValueError(
            f"A domain of {folder} is called 'default', the name by which `load_dataset` gives all of them: "
            "rename default.jsonl."
        )
    elif patterns := [name for name in documents if set(name) & set("*?[]")]:
        raise ValueError(
            f"{patterns[0]!r} in {folder} would be a pattern on the Hub and not the name of a file, and its "
            "documents would be missing from the dataset: rename it."
        )
    elif documents:
        repo_type, card = "dataset", documents_card(documents, repo_id)
    else:
        raise ValueError(
            f"There is nothing to push in {folder}: expected a model, an adapter or documents in .jsonl "
            "files."
        )
    api = HfApi(token=token)
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    make_place(api, repo_id, repo_type, revision, private)
    with unchanged(files):
        commit = api.upload_folder(
            folder_path=folder, ignore_patterns=_NOT_PUSHED, commit_message=commit_message, **where
        )
    if (folder / CARD).is_file() or api.file_exists(repo_id, CARD, repo_type=repo_type, revision=revision):
        return commit
    return api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo=CARD, commit_message="Add a card", **where
    )
