"""Pushing a finished adapter to the Hub: one commit, an explicit list of files."""

from pathlib import Path
from typing import Any

from toolkit.chat import first_line
from toolkit.errors import RunError
from toolkit.recipe import Recipe

# Never optimizer state, checkpoints, pickles, or resolved.json, which names paths of this machine.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)


def push(recipe: Recipe, run: Path) -> str:
    """Push `run/adapter` and `run/recipe.yaml` to the recipe's repository; identical content makes no commit.

    Returns:
        The address of the commit.

    Raises:
        RunError: the Hub refused or could not be reached; the run is as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    assert recipe.hub is not None
    api, repo_id = HfApi(), recipe.hub.repo_id
    files: dict[str, Path] = {name: run / "adapter" / name for name in ADAPTER_FILES} | {
        "recipe.yaml": run / "recipe.yaml"
    }
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items() if file.is_file()
    ]
    try:
        api.create_repo(repo_id, private=recipe.hub.private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=f"Adapter of {recipe.file.name}")
    except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not pushed
        reason = first_line(error).rstrip(".")
        raise RunError(
            f"{recipe.where('hub', 'repo_id')}: not pushed to {repo_id}: {reason}. The run is finished and as it was; "
            f"run the same command again to push"
        ) from error
    return str(commit.commit_url)
