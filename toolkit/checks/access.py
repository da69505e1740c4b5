"""Whether the Hub has what a recipe names, at that revision, and whether this token may push: one sentence each."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.findings import Finding
from toolkit.recipe.sections import Recipe

SECONDS = 15.0  # for all questions together; the client's own calls would wait for ever
FILES = (".json", ".jsonl", ".csv", ".parquet")
BUILDERS = {"json", "csv", "parquet", "text", "arrow"}


def check_access(recipe: Recipe, endpoint: str | None = None, seconds: float = SECONDS) -> list[Finding]:
    """Ask the Hub about base, data and repository, all at once; a note where it is not to be asked.

    Args:
        endpoint: The Hub's address; by default the client's own (`HF_ENDPOINT`).
        seconds: Time for all answers together.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Finding("note", "access", "Hub", "not asked: offline")]
    api = huggingface_hub.HfApi(endpoint=endpoint)
    questions = [_exists(api, *named) for named in _named(recipe)]
    if recipe.hub is not None:
        questions.append(_may_push(api, recipe, huggingface_hub.get_token()))
    return _answers(questions, seconds)


def _named(recipe: Recipe) -> list[tuple[str, str, str | None, str]]:
    """What a recipe names on the Hub: `(model or dataset, id, revision, where)`."""
    model = recipe.model
    named = [("model", model.name_or_path, model.revision, recipe.where("model", "name_or_path"))]
    names = {stage.name for stage in recipe.stages} | {"base", None}
    held_out = recipe.evaluate.data if recipe.evaluate else []
    sources: list[tuple[Any, tuple[str | int, ...]]] = [(s, ("evaluate", "data", i)) for i, s in enumerate(held_out)]
    for s, stage in enumerate(recipe.stages):
        if stage.from_ not in names:
            name, _, revision = str(stage.from_).partition("@")
            named.append(("model", name, revision or None, recipe.where("stages", s, "from")))
        for key, found in (("data", stage.data), ("eval_data", stage.eval_data)):
            sources += [(source, ("stages", s, key, i)) for i, source in enumerate(found)]
    for source, at in sources:
        if not source.path.endswith(FILES) and source.path not in BUILDERS:
            named.append(("dataset", source.path, source.revision, recipe.where(*at, "path")))
    seen = dict.fromkeys(
        entry[:3] for entry in named if not Path(entry[1]).is_absolute() and not Path(entry[1]).exists()
    )
    return [next(entry for entry in named if entry[:3] == key) for key in seen]


def _exists(api: Any, kind: str, name: str, revision: str | None, where: str) -> Callable[[], list[Finding]]:
    def ask() -> list[Finding]:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        at = f" at revision {revision!r}" if revision else ""
        ways = "see the name, or run `hf auth login` if it is private"
        try:
            info = (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision)
            if info.gated:
                api.auth_check(name, repo_type=kind)
        except GatedRepoError:
            text = f"the {kind} {name} is gated; ask for access on its page, then run `hf auth login`"
        except RevisionNotFoundError:
            text = f"the {kind} {name} has no revision {revision!r}; expected a branch, tag or commit of it"
        except RepositoryNotFoundError:
            text = f"the Hub has no {kind} {name}{at}, or hides it from this token; {ways}"
        except HFValidationError:
            text = f"{name!r} is neither a file or folder here nor a Hub id"
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in (401, 403):
                raise
            text = f"the Hub refuses the {kind} {name}{at} ({status}); {ways}"
        else:
            return [Finding("note", "access", where, f"the {kind} {name} is on the Hub{at}")]
        return [Finding("error", "access", where, text)]

    ask.where = where  # type: ignore[attr-defined]
    return ask


def _may_push(api: Any, recipe: Recipe, token: str | None) -> Callable[[], list[Finding]]:
    assert recipe.hub is not None
    repo_id, where = recipe.hub.repo_id, recipe.where("hub", "repo_id")

    def ask() -> list[Finding]:
        from huggingface_hub.errors import HfHubHTTPError

        if token is None:
            text = f"there is no token, so {repo_id} cannot be pushed to; run `hf auth login`, or set HF_TOKEN"
            return [Finding("warning", "push", where, text)]
        try:
            user = api.whoami(token=token)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 401:
                raise
            text = "the Hub does not know this token; run `hf auth login`, or set HF_TOKEN"
            return [Finding("error", "push", where, text)]
        reason = _reason_against(user, repo_id)
        if reason is not None:
            return [Finding("error", "push", where, reason)]
        return [Finding("note", "push", where, f"{user['name']} may push to {repo_id.split('/')[0]}")]

    ask.where = where  # type: ignore[attr-defined]
    return ask


def _reason_against(user: dict[str, Any], repo_id: str) -> str | None:
    """Why this user's token may not push there, as far as `whoami` tells."""
    owner = repo_id.split("/", maxsplit=1)[0]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])} | {user["name"]: "admin"}
    token = (user.get("auth") or {}).get("accessToken") or {}
    if owner not in roles:
        return f"{user['name']} is no member of {owner}; push to one of {', '.join(sorted(roles))}"
    if roles[owner] == "read":
        return f"{user['name']} may only read in {owner}; ask for the role contributor or write"
    if token.get("role") == "read":
        return "this token may only read; make one that may write, then run `hf auth login`"
    if token.get("role") == "fineGrained":
        scoped = (token.get("fineGrained") or {}).get("scoped", [])
        writes = {s.get("entity", {}).get("name") for s in scoped if "repo.write" in s.get("permissions", [])}
        if not writes & {owner, repo_id}:
            return f"this token has no permission to write to {repo_id}; give it repo.write there"
    return None


def _answers(questions: list[Callable[[], list[Finding]]], seconds: float) -> list[Finding]:
    """Ask all at once, in threads that are left behind when the time is up."""
    answers: list[list[Finding] | None] = [None] * len(questions)

    def run(i: int) -> None:
        try:
            answers[i] = questions[i]()
        except (
            Exception
        ) as error:  # the client raises a dozen unrelated types; all of them mean that there is no answer
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            answers[i] = [_no_answer(questions[i], reason)]

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.daemon = True
    timer.start()
    for thread in threads:
        while thread.is_alive() and not stop.is_set():
            thread.join(0.05)
    timer.cancel()
    late = f"no answer in {seconds:g} s"
    found = [answer or [_no_answer(question, late)] for question, answer in zip(questions, answers, strict=True)]
    return [finding for answer in found for finding in answer]


def _no_answer(question: Any, reason: str) -> Finding:
    return Finding("warning", "access", question.where, f"not checked, as the Hub gave no answer: {reason}")
