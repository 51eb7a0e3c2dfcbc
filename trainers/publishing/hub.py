"""The upload to the Hub: its right is checked before the run, weights go in the background, all
else at the end."""

from __future__ import annotations

import shlex
import shutil
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from trainers.config import Config
from trainers.errors import RunFailedError, UserError
from trainers.publishing.model_card import name_repository
from trainers.publishing.public import public_text
from trainers.run_folder import (
    BEST,
    CARD_NAME,
    CONFIG_NAME,
    EVALUATION_NAME,
    FIGURES_NAME,
    FINAL,
    MODEL,
    PIPELINE,
    PUBLIC_REPORT_NAME,
    PUSH,
    SAMPLES,
    read_best,
)

if TYPE_CHECKING:
    from trainers.training.loop import StepMetrics, Task


# within a run folder, * stopping at a slash; never checkpoints, caches or class pictures
UPLOAD_PATTERNS = (
    *(CARD_NAME, CONFIG_NAME, FIGURES_NAME, EVALUATION_NAME, PUBLIC_REPORT_NAME),
    *("[!.]*.safetensors", f"{PIPELINE}/**/*", f"{MODEL}/**/*", f"{SAMPLES}/{FINAL}/*"),
)


RETRY_DELAYS = (2, 8)  # seconds before another try, on top of the client's own


TOKEN_HINT = (
    "Make one that may write at https://huggingface.co/settings/tokens, then run `hf auth login`"
)


class PushError(RunFailedError):
    """A finished run did not reach the Hub; it is whole on the disk, and the message has the
    command to try again."""


def check_access(config: Config) -> str | None:
    """USER/NAME of a repository that exists and takes this run, or None when nothing is to be
    pushed.

    Asked before anything is loaded. Raises: UserError.
    """
    hub = config.hub
    if not hub.push_to_hub:
        return None
    if get_token() is None:
        raise UserError(
            "hub.push_to_hub: not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN"
        )
    api, repo = HfApi(), hub.hub_model_id or config.output_dir.name
    try:
        token = api.whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise UserError(
                f"hub.push_to_hub: the token {token.get('displayName')!r} may only read. "
                f"{TOKEN_HINT}"
            )
        repo = api.create_repo(repo, private=hub.private, exist_ok=True).repo_id
        if (
            not hub.create_pr
        ):  # anybody may propose; create_repo is content with any repository that is there
            address = f"{api.endpoint}/api/models/{repo}/auth-check/write"
            hf_raise_for_status(get_session().get(address, headers=build_hf_headers()))
        if hub.private and not api.model_info(repo).private:
            raise UserError(
                f"hub.private: {repo} is there already and is public. Make it private, or push "
                f"elsewhere"
            )
        if hub.hub_revision and not api.revision_exists(repo, hub.hub_revision):
            api.create_branch(repo, branch=hub.hub_revision)
    except UserError:
        raise
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        raise UserError(f"hub.push_to_hub: cannot push to {repo}: {error_reason(error)}") from error
    return repo


def files_to_upload(folder: Path) -> list[str]:
    """The files of a run folder that are uploaded."""
    paths = (path for pattern in UPLOAD_PATTERNS for path in folder.glob(pattern) if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def upload(config: Config, repo: str, folder: Path, message: str) -> str | None:
    """Commit what is shared of `folder`; the address of the repository or pull request, None if
    nothing is new."""
    api, hub = HfApi(), config.hub
    before = api.model_info(repo, revision=hub.hub_revision).sha
    additions = []
    for name in files_to_upload(folder):
        content: bytes | Path = folder / name
        if name == CONFIG_NAME:
            content = public_text(config).encode()
        additions.append(CommitOperationAdd(name, content))
    commit = api.create_commit(
        repo_id=repo,
        operations=additions,
        commit_message=message,
        revision=hub.hub_revision,
        create_pr=hub.create_pr,
    )
    return None if commit.oid == before else commit.pr_url or str(commit.repo_url)


def push_run(config: Config, repo: str, source: str | None = None) -> str:
    """Upload a finished run; says what came of it.

    repo: from `check_access`. source: RUN@STEP, if the folder is `step_release`'s. Raises:
    PushError.
    """
    folder, hub = config.output_dir, config.hub
    source = source or str(folder)
    if not (folder / CARD_NAME).exists():
        raise UserError(f"{folder} is not finished: it has no {CARD_NAME}, which a run writes last")
    name_repository(folder, repo)
    delays = (
        [] if hub.create_pr else list(RETRY_DELAYS)
    )  # another try could open another pull request
    while True:
        try:
            address = upload(config, repo, folder, "Add trained weights")
        except Exception as error:
            if delays and not is_permanent(error):
                time.sleep(delays.pop(0))
                continue
            raise PushError(
                f"the upload to {repo} failed: {error_reason(error)}. The run is complete in "
                f"{source}. To try again:\n"
                f"  {shlex.join(retry_command(config, repo, source))}"
            ) from error
        return f"pushed to {address}" if address else f"nothing new to push: {repo} has all of it"


def push_result(config: Config, repo: str) -> str:
    """Upload a finished run with its last or its best weights, as `hub.weights` says; see
    `push_run`."""
    run = config.output_dir
    if config.hub.weights == "best" and not read_best(run / BEST):
        warnings.warn(f"{run} has no best weights: the last ones are pushed", stacklevel=2)
    elif config.hub.weights == "best":
        return push_best(config, repo)
    return push_run(config, repo)


def push_best(config: Config, repo: str) -> str:
    """As `push_run`, of the weights in RUN/best."""
    from trainers.publishing.step_release import step_release
    from trainers.training.run_weights import find_best

    best = find_best(config.output_dir, config)
    with step_release(best) as release:
        return push_run(release, repo, best.name)


def retry_command(config: Config, repo: str, source: str) -> list[str]:
    """The command that pushes a finished run."""
    hub, command = config.hub, ["python", "scripts/push.py", source, "--repo", repo]
    command += ["--private"] if hub.private else []
    command += ["--revision", hub.hub_revision] if hub.hub_revision else []
    return command + (["--create-pr"] if hub.create_pr else [])


def is_permanent(error: Exception) -> bool:
    """Whether another try would end the same way."""
    error = unwrap_error(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code < 500
    return isinstance(error, (ValueError, OfflineModeIsEnabled))


def unwrap_error(error: Exception) -> Exception:
    """What is inside the client's wrapper around the upload of one file."""
    return (
        error.__cause__
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        else error
    )


def error_reason(error: Exception) -> str:
    """What the Hub or the network said, in a line."""
    error = unwrap_error(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        status, message = (
            error.response.status_code,
            f" ({error.server_message})" if error.server_message else "",
        )
        advice = {
            401: ". Run `hf auth login`",
            403: f". The token may not write there. {TOKEN_HINT}",
        }
        return f"the Hub answers {status}{message}{advice.get(status, '')}"
    message = " ".join(str(error).split())
    return (
        message
        if isinstance(error, (OSError, ValueError))
        else f"no answer from {HfApi().endpoint} ({message})"
    )


class PushToHub:
    """Every `hub.push_every` steps the weights go to the Hub in the background; `finish` uploads
    the whole run.

    repo: from `check_access` in the main process, None in the others. A failure warns, and training
    goes on.
    """

    def __init__(self, task: Task, config: Config, repo: str | None) -> None:
        self.task, self.config, self.repo = task, config, repo
        self.folder = config.output_dir / PUSH
        self.api = HfApi()
        self.job: Future[None] | None = None
        self.has_warned = False

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        every, last = self.config.hub.push_every, self.config.train.max_train_steps
        if self.repo is None or every is None or step % every or step == last:
            return
        if self.job and not self.job.done():
            return
        from trainers.training.loop import averaged_weights  # torch

        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir()
        with averaged_weights(self.task):
            self.task.save(self.folder)
        shutil.copy(self.config.output_dir / CONFIG_NAME, self.folder)
        self.job = self.api.run_as_future(self.upload_weights, step)

    def upload_weights(self, step: int) -> None:
        try:
            upload(self.config, self.repo, self.folder, f"Weights at step {step}")
        except Exception as error:
            if not self.has_warned:
                self.has_warned = True
                message = (
                    f"the upload at step {step} failed: {error_reason(error)}. Training "
                    f"goes on, later uploads too"
                )
                warnings.warn(message, stacklevel=2)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Upload the finished run and say so. Raises: PushError when that fails and
        `hub.required`."""
        if self.repo is None:
            return
        if self.job:
            self.job.result()
        try:
            print(push_result(self.config, self.repo))
        except PushError as error:
            if self.config.hub.required:
                raise
            print(error)
