"""Send an exported directory to the Hugging Face Hub.

The token is what ``hf auth login`` or ``HF_TOKEN`` give to huggingface_hub; evomerge never sees one
in a file, an option or a message. ``HF_ENDPOINT`` names another server.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import InputError, SetupError


def require_hub(repo: str) -> None:
    """Refuse what cannot be sent, before anything is written.

    Raises:
        InputError: no valid name of a repository.
        SetupError: nobody is logged in, or the network is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: expected owner/name, got {repo!r}") from error
    if repo.count("/") != 1:
        raise InputError(f"--push-to-hub: expected owner/name, got {repo!r}")
    if constants.is_offline_mode():
        raise SetupError("--push-to-hub: HF_HUB_OFFLINE is set (unset it to use the Hub)")
    if get_token() is None:
        raise SetupError(
            "--push-to-hub: not logged in to the Hub (run `hf auth login`, or set HF_TOKEN)"
        )


def push(directory: Path, repo: str, private: bool = True) -> str:
    """Upload all files of a directory in one commit; return the repository's address.

    The repository is made where it does not exist. One that holds files is left alone: nobody's
    model is replaced, and shards of two are not mixed. Nothing local changes.

    Args:
        directory: of an export.
        repo: ``owner/name``.
        private: of a new repository; an existing one stays as it is.

    Raises:
        InputError: the repository holds files.
        SetupError: the Hub refused or could not be reached; says how to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library behind huggingface_hub, whichever its version uses; its errors of
    # connections are of the same family.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi(library_name="evomerge")
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    try:
        address = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        present = sorted(set(api.list_repo_files(repo)) - {".gitattributes"})
        if present:
            raise InputError(
                f"--push-to-hub: {repo} holds files ({', '.join(present[:3])}): choose a new "
                f"name, or delete them there and run: hf upload {repo} {directory}"
            )
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            allow_patterns=names,
            commit_message="Upload a merge made with evomerge",
        )
    # An upload of weights that fails comes as a RuntimeError around its cause.
    except (HfHubHTTPError, transport, OSError, ValueError, RuntimeError) as error:
        cause = f"{error} {error.__cause__ or ''}"
        reason = " ".join(cause.split())[:300]
        raise SetupError(
            f"--push-to-hub: {repo} is not complete on the Hub: {reason} (the export in "
            f"{directory} is whole; to try again: hf upload {repo} {directory})"
        ) from error
    return str(address)
