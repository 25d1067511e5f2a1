"""Uploading a written folder to the Hugging Face Hub, with a model card, once it has been proven."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from depthprune import hub
from depthprune.errors import DepthpruneError, ExportError
from depthprune.export.card import card, on_hub, public, scrubbed, title
from depthprune.export.check import check
from depthprune.export.diagnose import diagnose
from depthprune.files import read_json, to_json
from depthprune.plan import Plan

README = "README.md"
OURS = ("plan.json", "recovery.json", "quantization.json")  # files that may name paths of this machine anywhere
_CLIENT: type[Exception] = HfHubHTTPError.__bases__[0]  # what the Hub's HTTP client raises, whichever it is
NAMES = ("_name_or_path", "name_or_path")  # fields in which transformers may write one


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a written folder to the Hub as one commit, and say where it is.

    ``folder`` is a model's, or that of a run with a ``model`` in it, whose measurements then stand in the card. The
    repository is made unless it is there; ``revision`` is a branch, made too. A ``README.md`` in the folder is taken as
    it is; without one a card is written (``card``), for the upload alone. Paths of this machine that stand in
    ``plan.json`` and the like are uploaded as their last part. The folder itself stays as it is.
    Raises ``ExportError`` where the folder fails its proofs, and ``DepthpruneError`` in one line where there is no
    token, where the Hub cannot be reached, and where it refuses.
    """
    model, run = places(Path(folder))
    _prove(model, run)
    card(model, run=run)  # should it not be possible, say so before anything is made
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    token = token or huggingface_hub.get_token()
    if token is None:
        raise DepthpruneError("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    if huggingface_hub.is_offline_mode() or not hub.answers(endpoint):
        why = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else f"{endpoint} cannot be reached"
        raise DepthpruneError(f"cannot upload to {repo}: {why}")
    api = HfApi(endpoint=endpoint, token=token)
    with _translated(repo, revision), tempfile.TemporaryDirectory(prefix="depthprune-") as scratch:
        place = Path(scratch) / "upload"
        license = _license(api, model)
        there = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(there.repo_id).private:
            raise ExportError(f"{there.repo_id} is there already and is public: name another, or leave out private")
        if revision is not None:
            api.create_branch(there.repo_id, branch=revision, exist_ok=True)
        stage(model, run, place, there.repo_id, license)
        api.upload_folder(
            repo_id=there.repo_id,
            folder_path=place,
            revision=revision,
            commit_message=message or f"Upload {title(model, run)}, pruned with depthprune",
        )
    return f"{endpoint}/{there.repo_id}" + (f"/tree/{revision}" if revision else "")


def places(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the model, and that of the run that made it, where there is one."""
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        return folder / "model", folder
    above = folder.absolute().parent
    return folder, above if folder.name == "model" and (above / "run.json").is_file() else None


def stage(model: Path, run: Path | None, place: Path, repo: str, license: str | None = None) -> None:
    """Lay out what is uploaded: links to the files of a model, its card, and its JSON files without paths."""
    for file in sorted(model.rglob("*")):
        name = file.relative_to(model)
        if not file.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        text = _cleaned(file) if len(name.parts) == 1 else None
        if text is None:
            (place / name).symlink_to(file.resolve())
        else:
            (place / name).write_text(text, encoding="utf-8")
    if not (model / README).exists():
        (place / README).write_text(card(model, run=run, license=license, repo=repo), encoding="utf-8")


def _cleaned(file: Path) -> str | None:
    """The text of a JSON file without paths of this machine; None where it has none."""
    if file.name in OURS:
        fields = read_json(file)
        clean = scrubbed(fields)
        if file.name == "plan.json":
            clean["model"]["id"] = public(str(fields["model"]["id"]))
        return to_json(clean) + "\n" if clean != fields else None
    if file.name.endswith("config.json"):
        fields = read_json(file)
        clean = {key: public(str(value)) if key in NAMES and value else value for key, value in fields.items()}
        return json.dumps(clean, indent=2, ensure_ascii=False) + "\n" if clean != fields else None
    return None


def _prove(model: Path, run: Path | None) -> None:
    """Refuse a folder that fails its proofs; those of its run count, and what its files say now."""
    if run is not None and (run / "check.json").is_file():
        failed = [p for p in read_json(run / "check.json").get("proofs", ()) if not p.get("passed")]
        failed += [proof.to_json() for proof in diagnose(model)]
    else:
        failed = [proof.to_json() for proof in check(model) if not proof.passed]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ExportError(f"{model} is not uploaded: {failed[0]['name']}: {failed[0]['detail']}{more}")


def _license(api: HfApi, model: Path) -> str | None:
    """The licence that the Hub has for the base model; None where it has no such model, or keeps it to itself."""
    base = Plan.load(model / "plan.json").model.id if (model / "plan.json").is_file() else ""
    if not base or not on_hub(base):
        return None
    try:
        found = api.model_info(base).card_data
    except (HfHubHTTPError, ValueError):
        return None
    license = None if found is None else found.get("license")
    return license if isinstance(license, str) else None


@contextmanager
def _translated(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = error.server_message or str(error).strip().splitlines()[-1]
        what = {
            401: "the Hub does not know this token; run `hf auth login`",
            403: f"this token may not write there; make one that may ({_line(said)})",
            404: f"the Hub has no {repo}{f' with a branch {revision}' if revision else ''}, or not for this token",
        }.get(status, f"the Hub answers {status}: {_line(said)}")
        raise DepthpruneError(f"cannot upload to {repo}: {what}") from None
    except (_CLIENT, OSError, ValueError, RuntimeError) as error:
        raise DepthpruneError(f"cannot upload to {repo}: {_line(str(error) or type(error).__name__)}") from None


def _line(text: Any, longest: int = 200) -> str:
    return " ".join(str(text).split())[:longest]
