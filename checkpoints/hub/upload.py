"""The place to upload files to: a repository, and a branch of it."""

from __future__ import annotations

from huggingface_hub import HfApi


def make_place(api: HfApi, repo_id: str, repo_type: str, revision: str | None, private: bool | None) -> None:
    """Make the repository and the branch if they do not exist.

    The branch of a pull request (`refs/pr/...`) is not made: the Hub does that when it is opened.

    Args:
        api (`HfApi`): the Hub.
        repo_id (`str`): the repository, `user/name`.
        repo_type (`str`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): the branch.
        private (`bool`, *optional*): whether a new repository is private.

    Example: see `transformers_emo.subsets.push_folder`.
    """
    api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
