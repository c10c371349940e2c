"""From what ``--model`` says to a folder: a local one, or a repository of the Hugging Face hub. Torch-free."""

import re
from pathlib import Path

from server.errors import CheckpointError

_FILES = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
"""What is downloaded. Never ``*.bin``: pickled weights are not loaded."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model; downloads it into the hub's cache if need be.

    Args:
        model: an existing folder, or a hub id such as ``fla-hub/gla-340M-15B``.
        revision: branch, tag or commit of the hub's repository; must be None for a folder.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be downloaded; says what to do.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path}: a folder has no revision {revision!r}; leave --revision out")
        return path
    if model and path.exists():
        raise CheckpointError(f"{path}: not a folder; a model is a folder with config.json and *.safetensors")
    looks_local = path.parent != Path(".") and path.parent.is_dir()
    if looks_local or _HUB_ID.fullmatch(model) is None:
        raise CheckpointError(f"{model!r}: no such folder")
    return _download(model, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    """A snapshot of a hub repository in the local cache, which is used as it is where the hub cannot be reached."""
    # Imported here: it takes a while, and most starts are from a folder.
    from huggingface_hub import errors, snapshot_download

    try:
        # Weights in subfolders are other formats of the same ones.
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        problem = "access to it must be granted on the hub first; then log in with `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "no such folder here and no such repository on the hub; a private one needs HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = f"the repository has no revision {revision!r}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        problem = (
            "no such folder here, not in the local cache, and the hub cannot be reached; download it where there is a "
            f"network (`hf download {hub_id}`), copy the folder here and give its path"
        )
    except Exception as error:  # the HTTP library's own errors, the disk's, the hub's: all end the same way
        problem = f"cannot be downloaded: {' '.join(str(error).split())}"
    raise CheckpointError(f"{hub_id}: {problem}")
