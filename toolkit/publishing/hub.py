"""The Hub: push a finished adapter in one commit, check what arrived, and pull one back."""

import hashlib
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ProofError, RunError
from toolkit.publishing import card
from toolkit.recipe.sections import Hub
from toolkit.records.portable import adapter_folder, read_resolved, records
from toolkit.records.rundir import ADAPTER, CARD, EVALUATION, RECIPE, RESOLVED, read_json, write_json, write_text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER_FILES = (
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
RECORDS = (CARD, RECIPE, RESOLVED, EVALUATION, "report.html", "report/*.png", "*/stage.json", "*/metrics.jsonl")
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long a push waits; seconds."""

    timeout: float = 60.0
    """For one answer of the Hub; the client's own default is for ever."""
    attempts: int = 4
    first_wait: float = 2.0
    """Before the second attempt; doubled for each one after."""
    longest_wait: float = 60.0
    """Also the most that a `Retry-After` is granted."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    """Of the commit, or of the pull request."""
    commit: str
    changed: bool
    verified: bool

    def __str__(self) -> str:
        done = "pushed" if self.changed else "unchanged, nothing to push"
        return f"{done}: {self.url}" + (", fetched again and equal" if self.verified else "")


def push(run: Path, hub: Hub, patience: Patience | None = None) -> Pushed:
    """Push the adapter of a run; pushing the same run again makes no commit.

    Args:
        run: A run directory. Only its card is written, and that after the push.

    Raises:
        RunError: there is no finished adapter, or the Hub refused or could not be reached; the run is as it was.
        ProofError: what the Hub gives back is not what was sent.
    """
    patience = patience or Patience()
    files = files_of(run, hub)
    pushed = _again(lambda: _commit(files, hub), run, hub, patience)
    if hub.tag:
        _again(lambda: _tag(hub, pushed.commit), run, hub, patience, done=f"pushed to {pushed.url}, but not tagged")
    if hub.verify:
        differs = _again(
            lambda: _differences(hub, pushed.commit, files),
            run,
            hub,
            patience,
            done=f"pushed to {pushed.url}, not verified",
        )
        if differs:
            raise ProofError(f"{pushed.url}: what the Hub gives back is not what was sent: {', '.join(differs)}")
    write_text(run / CARD, files[CARD].decode())  # type: ignore[union-attr]
    return pushed


def files_of(run: Path, hub: Hub) -> dict[str, Path | bytes]:
    """Path in the repository -> file or content: an explicit list, no checkpoints, optimizer state or pickles."""
    adapter = adapter_folder(run, hub.stage)
    files: dict[str, Path | bytes] = {name: adapter / name for name in (CONFIG, WEIGHTS)}
    if read_resolved(run).get("own_tokenizer"):
        files |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    return files | {CARD: card.card(run, hub.repo_id, hub.stage).encode()} | records(run, hub.stage)


def pull(repo: str, output: Path | None = None, patience: Patience | None = None) -> Path:
    """Fetch an adapter into a directory shaped like a run: `adapter/`, and its records where there are such.

    Args:
        repo: `owner/name`, or `owner/name@revision`.
        output: A directory that is not there yet, or empty; by default `runs/NAME`.

    Raises:
        RunError: the directory holds something, there is no such adapter, or the Hub cannot be reached.
        ProofError: the adapter is not the one that its record names.
    """
    repo_id, _, revision = repo.partition("@")
    target = output or Path("runs") / repo_id.split("/")[-1]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target}: holds something already; choose another directory with --output")
    try:
        with _patient(patience or Patience()), tempfile.TemporaryDirectory() as fetched:
            commit = _fetch(repo_id, revision or None, Path(fetched))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _arrange(Path(fetched), partial)
            _note_pull(partial, repo_id, commit)
            partial.replace(target)
    except RunError:
        raise
    except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not to be had
        raise RunError(f"not pulled from {repo}: {_reason(error)}. To try again: toolkit pull {repo}") from error
    return target


def _commit(files: dict[str, Path | bytes], hub: Hub) -> Pushed:
    """Every step may be taken twice, so that an attempt may be made again after any of them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    api.create_repo(hub.repo_id, private=hub.private or None, exist_ok=True)
    if hub.private and api.model_info(hub.repo_id).private is False:
        raise RunError(f"{hub.repo_id} exists and is public, and private is asked for; choose another repository")
    if hub.revision and hub.revision != "main":
        api.create_branch(hub.repo_id, branch=hub.revision, exist_ok=True)
    message = f"Adapter of {_stage_name(files)}"
    request = _own_request(api, hub, message) if hub.create_pr else None
    revision = request.git_reference if request else hub.revision
    before = api.model_info(hub.repo_id, revision=revision).sha
    there = api.list_repo_files(hub.repo_id, revision=revision)
    operations: list[Any] = [CommitOperationDelete(name) for name in there if _is_stale(name, files)]
    operations += [CommitOperationAdd(name, content) for name, content in files.items()]
    made = api.create_commit(
        hub.repo_id,
        operations,
        commit_message=message,
        revision=revision,
        create_pr=hub.create_pr and request is None,
    )
    url = (made.pr_url or (request.url if request else None)) if hub.create_pr else None
    return Pushed(str(url or made.commit_url), made.oid, made.oid != before, hub.verify)


def _stage_name(files: dict[str, Path | bytes]) -> str:
    return str(json.loads(files[RESOLVED])["delivered"])  # type: ignore[arg-type]


def _is_stale(name: str, files: dict[str, Path | bytes]) -> bool:
    """A file of an earlier push that would mislead beside this one; files of others are never touched."""
    owned = name in TOKENIZER_FILES or any(Path(name).match(pattern) for pattern in RECORDS)
    return owned and name not in files


def _own_request(api: Any, hub: Hub, message: str) -> Any:
    """The open pull request of an earlier push, whose answer may have been lost."""
    me = api.whoami()["name"]
    found = api.get_repo_discussions(hub.repo_id, author=me, discussion_type="pull_request", discussion_status="open")
    return next((request for request in found if request.title == message), None)


def _tag(hub: Hub, commit: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(hub.repo_id).tags}
    if tags.get(hub.tag or "", commit) != commit:
        raise RunError(f"the tag {hub.tag} is on another commit already; choose another name")
    if hub.tag and hub.tag not in tags:
        api.create_tag(hub.repo_id, tag=hub.tag, revision=commit)


def _differences(hub: Hub, commit: str, files: dict[str, Path | bytes]) -> list[str]:
    """Files of the adapter that come back otherwise, fetched into an empty cache: a warm one would hide a failure."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as empty:
        fetched = {
            name: Path(hf_hub_download(hub.repo_id, name, revision=commit, cache_dir=empty, force_download=True))
            for name in (CONFIG, WEIGHTS)
        }
        return [name for name, file in fetched.items() if _sha256(file) != _sha256(Path(str(files[name])))]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- pulling ---------------------------------------------------------------------------------------------------------


def _fetch(repo_id: str, revision: str | None, folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    info = api.model_info(repo_id, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings or []}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in names]
    if missing:
        pickled = "; pickled weights are not loaded" if "adapter_model.bin" in names else ""
        raise RunError(f"{repo_id} is not an adapter: no {' and no '.join(missing)}{pickled}")
    wanted = [CONFIG, WEIGHTS, *TOKENIZER_FILES, *RECORDS]
    snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=wanted)
    return str(info.sha)


def _arrange(fetched: Path, target: Path) -> None:
    shutil.copytree(fetched, target, ignore=shutil.ignore_patterns(".cache"))
    (target / ADAPTER).mkdir()
    for name in (CONFIG, WEIGHTS, *TOKENIZER_FILES):
        if (target / name).is_file():
            (target / name).rename(target / ADAPTER / name)
    delivered = (read_json(target / RESOLVED) or {}).get("delivered")
    if delivered and (target / delivered / "stage.json").is_file():
        shutil.copytree(target / ADAPTER, target / delivered / ADAPTER)


def _note_pull(folder: Path, repo_id: str, commit: str) -> None:
    from toolkit.models.adapter import adapter_digest

    resolved = read_json(folder / RESOLVED)
    if resolved is None:
        return
    record = read_json(folder / str(resolved.get("delivered")) / "stage.json") or {}
    if record.get("adapter_digest") not in (None, adapter_digest(folder / ADAPTER)):
        raise ProofError(f"{repo_id}: the adapter is not the one that its record names")
    write_json(folder / RESOLVED, resolved | {"pulled": {"repo_id": repo_id, "commit": commit}})


# --- the network -----------------------------------------------------------------------------------------------------


def _again(work: Callable[[], Any], run: Path, hub: Hub, patience: Patience, done: str = "") -> Any:
    """Do it, again where that helps; the last failure is said in one sentence, with the command to try again."""
    wait = patience.first_wait
    for attempt in range(1, patience.attempts + 1):
        try:
            with _patient(patience):
                return work()
        except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not done
            if attempt < patience.attempts and _may_pass(error):
                asked = _retry_after(error)
                time.sleep(min(wait if asked is None else asked, patience.longest_wait))
                wait *= 2
                continue
            what = done or f"not pushed to {hub.repo_id}"
            raise RunError(
                f"{what}: {_reason(error)}. The run is as it was; to try again: {command(run, hub)}"
            ) from error


def command(run: Path, hub: Hub) -> str:
    """The command that pushes this run as it was asked for."""
    parts = ["toolkit", "push", str(run), "--repo-id", hub.repo_id]
    for flag, value in (("--stage", hub.stage), ("--revision", hub.revision), ("--tag", hub.tag)):
        parts += [flag, value] if value else []
    asked = (("--private", hub.private), ("--create-pr", hub.create_pr), ("--no-verify", not hub.verify))
    return shlex.join(parts + [flag for flag, on in asked if on])


@contextmanager
def _patient(patience: Patience) -> Iterator[None]:
    """Give the client's session a time-out, and keep it from obeying a `Retry-After` of hours."""
    from huggingface_hub import get_session

    def cap(response: Any) -> None:
        if response.headers.get("Retry-After", "").isdigit():
            asked = min(int(response.headers["Retry-After"]), int(patience.longest_wait))
            response.headers["Retry-After"] = str(asked)
        if "ratelimit" in response.headers and response.status_code == 429:
            response.headers.pop("ratelimit")

    session = get_session()
    timeout, hooks = session.timeout, session.event_hooks
    session.timeout = patience.timeout
    session.event_hooks = {**hooks, "response": [*hooks.get("response", []), cap]}
    try:
        yield
    finally:
        session.timeout, session.event_hooks = timeout, hooks


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def _retry_after(error: BaseException) -> float | None:
    responses = (getattr(link, "response", None) for link in _chain(error))
    value = next((response.headers.get("Retry-After", "") for response in responses if response is not None), "")
    return float(value) if value.isdigit() else None


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the Hub is busy, or the connection was cut. Silence is not waited out."""
    import httpx2

    if isinstance(error, RunError):
        return False
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    cut = (httpx2.NetworkError, httpx2.RemoteProtocolError, json.JSONDecodeError)
    return any(isinstance(link, cut) for link in _chain(error))


def _reason(error: BaseException) -> str:
    import httpx2

    said = {
        401: "the Hub does not accept the token; run `hf auth login`, or set HF_TOKEN",
        403: "the token may not write there; it needs write access",
        404: "there is no such repository or revision, or the token may not see it",
        409: "the repository is being changed by another commit",
        429: "the Hub has had too many requests and asks to wait",
    }
    if isinstance(error, RunError):
        return str(error)
    status = _status(error)
    if status is not None and (status in said or status >= 500):
        return said.get(status, f"the Hub is not well (HTTP {status})")
    links = list(_chain(error))
    if any(isinstance(link, httpx2.TimeoutException) for link in links):
        return "the Hub did not answer in time"
    if any(isinstance(link, httpx2.TransportError) for link in links):
        return "the Hub cannot be reached, or the connection was cut"
    last = links[-1]
    return (str(last).strip() or type(last).__name__).splitlines()[0].rstrip(".")
