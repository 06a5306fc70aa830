"""The Hub: commits, snapshots of models, and what its refusals mean to a person.

It owns every call to the Hub but the loading of datasets; it must not judge what it fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from posttrain_workloads._compat import hub_transport_error
from posttrain_workloads.problems import InvalidInputs, Problem, refuse

Kind = Literal["model", "dataset"]

_NOT_FOUND = {"model": "ModelNotFound", "dataset": "DatasetNotFound"}
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
_WEIGHT_FILES = ("*.safetensors",)
# Other formats of the same weights; in subfolders lie the originals and exports.
_UNUSED_FILES = ("consolidated*.safetensors", "*/*.safetensors", "original/*", "onnx/*", "openvino/*")


def check_token(*, environ: Mapping[str, str]) -> None:
    """Ask the Hub whose token this is, where there is one.

    Raises:
        InvalidInputs: the Hub refuses it, or cannot be reached.
    """
    if not environ.get("HF_TOKEN"):
        return
    from huggingface_hub import HfApi

    with explained(path="spec.access.hubTokenSecretRef", what="the token", kind="model"):
        HfApi().whoami()


def resolve_commit(repo: str, revision: str, *, kind: Kind, path: str) -> str:
    """Return the commit that a branch, tag or commit stands for; `path` is where the spec names the repository.

    Raises:
        InvalidInputs: there is no such repository or revision, or the Hub does not let us see it.
    """
    from huggingface_hub import HfApi

    with explained(path=path, what=f"{kind} {repo} (revision {revision})", kind=kind):
        return str(HfApi().resolve_revision(repo, repo_type=kind, revision=revision).resolved)


def list_files(repo: str, commit: str, *, path: str) -> list[str]:
    """Return the names of a model's files.

    Raises:
        InvalidInputs: the Hub does not let us see them.
    """
    from huggingface_hub import HfApi

    with explained(path=path, what=f"model {repo}", kind="model"):
        return list(HfApi().list_repo_files(repo, revision=commit))


def fetch_model(repo: str, revision: str, *, path: str, weights: bool = True) -> Path:
    """Return the folder of a model's snapshot in the cache, fetched as far as it is not there.

    Where `revision` is a commit whose files are in the cache already, the Hub is not asked.

    Raises:
        InvalidInputs: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with explained(path=path, what=f"model {repo} (revision {revision})", kind="model"):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*_MODEL_FILES, *(_WEIGHT_FILES if weights else ())],
                ignore_patterns=list(_UNUSED_FILES),
            )
        )


def count_remote_parameters(repo: str, commit: str, *, path: str) -> int:
    """Return the parameters of a model from its safetensors' headers, without fetching the weights.

    Raises:
        InvalidInputs: they cannot be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with explained(path=path, what=f"model {repo}", kind="model"):
        try:
            metadata = HfApi().get_safetensors_metadata(repo, revision=commit)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise refuse("UnsafeWeights", f"{path}: {repo} has no safetensors that can be read: {error}") from error
    return sum(metadata.parameter_count.values())


@contextmanager
def explained(*, path: str, what: str, kind: Kind) -> Iterator[None]:
    """Turn what the Hub's client raises in this block into a problem that says what to change."""
    from huggingface_hub import errors

    def unreachable(error: Exception) -> InvalidInputs:
        return refuse(
            "HubUnreachable",
            f"{path}: the Hub did not answer when asked for {what} ({_first_line(error)}): check the network and "
            "spec.access.hubEndpoint, or use a pvc:// source",
        )

    try:
        yield
    except errors.GatedRepoError as error:
        raise InvalidInputs([gated(path=path, what=what)]) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidInputs([not_found(path=path, what=what, kind=kind)]) from error
    except errors.RevisionNotFoundError as error:
        raise refuse(
            _NOT_FOUND[kind], f"{path}: {what}: there is no such revision: name a branch, a tag or a commit"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise refuse(
                "HubAuthenticationFailed",
                f"{path}: the Hub refused the token when asked for {what}: renew it in the Secret that "
                "spec.access.hubTokenSecretRef names",
            ) from error
        if status == 403:
            raise InvalidInputs([gated(path=path, what=what)]) from error
        if status == 429 or status >= 500:
            raise unreachable(error) from error
        raise refuse(_NOT_FOUND[kind], f"{path}: {what}: {_first_line(error)}") from error
    except errors.HFValidationError as error:
        raise refuse(_NOT_FOUND[kind], f"{path}: {what}: {_first_line(error)}") from error
    except (
        hub_transport_error(),
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
        ConnectionError,
    ) as error:
        raise unreachable(error) from error


def not_found(*, path: str, what: str, kind: Kind) -> Problem:
    """Return the problem of a repository that is not there, or not for us: the Hub does not tell which."""
    return Problem(
        _NOT_FOUND[kind],
        f"{path}: {what} is not on the Hub, or it is private and the token may not see it: check the name, and "
        "spec.access.hubTokenSecretRef",
    )


def gated(*, path: str, what: str) -> Problem:
    """Return the problem of a repository that one must be let into."""
    return Problem(
        "GatedModel",
        f"{path}: {what} is gated: ask for access on its page on the Hub, and let spec.access.hubTokenSecretRef name "
        "the token of somebody who has it",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
