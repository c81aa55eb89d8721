"""Models and data sets of the Hugging Face Hub by name: download, cache, resume, offline."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from formats.errors import UserError

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # owner/name, owner/name@revision


def on_hub(name):
    """(OWNER/NAME, revision) where a name is one of the Hub and no folder here, else None."""
    found = None if Path(name).exists() else HUB_ID.fullmatch(name)
    return found and (found[1], found[2] or "main")


def fetch(repo, revision, patterns, kind):
    """The local folder of a model or data set of the Hugging Face Hub: cached, or downloaded under a progress bar.

    kind: "model" or "dataset"; patterns: which files, none but these and none from subfolders they do not name; there
    must be one of the first pattern.
    HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they mean everywhere. While the Hub cannot be reached, a
    cache that another program filled is taken as it is: the caller checks that its files are there.
    Raises UserError with what could not be had, and the remedy.
    """
    import requests
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    what, own = f"{kind} {repo}@{revision}", "--data FOLDER" if kind == "dataset" else "--model FOLDER"
    ignored = ["*consolidated*"] if any("/" in pattern for pattern in patterns) else ["*consolidated*", "*/*"]
    # A broken download leaves some of its files, and offline nobody can know which are missing: hence this mark.
    place = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo}".replace("/", "--")
    mark = hashlib.sha256(repr((revision, patterns)).encode()).hexdigest()[:16]
    unfinished = place / f"unfinished-{mark}"
    try:
        try:  # snapshot_download alone would wait forever for a server that does not answer
            HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10)
            reached = True
        except (ConnectionError, requests.ConnectionError, requests.Timeout):
            reached = False
        if reached:
            with suppress(OSError):  # where one cannot write, no download can break
                place.mkdir(parents=True, exist_ok=True)
                unfinished.touch()
        elif unfinished.exists():
            raise errors.LocalEntryNotFoundError("partly cached")
        folder = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored,
            local_files_only=not reached,
        )  # fmt: skip
        with suppress(OSError):
            unfinished.unlink()
        if any(Path(folder).glob(patterns[0])):
            return Path(folder)
        problem = f"no {patterns[0]} was found; name files of your own: {own}"
    except errors.GatedRepoError:
        problem = "its owner must grant you access; ask for it on the model's page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = f"not on the Hub, or private; check the name, set HF_TOKEN, or name files of your own: {own}"
    except errors.RevisionNotFoundError:
        problem = "the Hub has no such revision; see the branches on its page"
    except errors.LocalEntryNotFoundError:
        problem = f"only partly cached, and the Hub cannot be reached; connect, or name files of your own: {own}"
    except errors.HFValidationError as error:
        problem = str(error)
    except requests.RequestException as error:
        problem = f"the download broke off ({type(error).__name__}); run the same command again to continue it"
    raise UserError(f"{what}: {problem}")
