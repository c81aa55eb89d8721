"""--push OWNER/NAME: a finished folder to the Hugging Face Hub, as a private model repository.

What could stop it is asked before the work begins: hours of training must not end at a missing token.
"""

from formats.errors import UserError
from formats.hub import HUB_ID, on_hub
from safety import ranks
from safety.terminal import say, warn

LEFT_OUT = ["checkpoints/*", "*.partial/*"]


def wanted(settings):
    """Whether this process is to upload anything. Commands without --push never are."""
    return getattr(settings, "push", "") and not settings.dry_run and ranks.first()


def check_push(settings):
    """Raise UserError unless --push names a repository, and a token is there that the Hub knows."""
    if not wanted(settings):
        return
    import requests
    from huggingface_hub import constants, get_token

    name = HUB_ID.fullmatch(settings.push)
    if not name or name[2]:
        raise UserError(f"--push {settings.push}: is no repository of the Hub; name one as OWNER/NAME")
    token = get_token()
    if not token:
        raise UserError("--push: no token of the Hub; run .venv/bin/huggingface-cli login, or set HF_TOKEN")
    try:
        answer = requests.get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"}, timeout=10
        )
    except requests.RequestException as error:
        raise UserError(f"--push: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); connect, or leave "
                        f"out --push and upload later") from None  # fmt: skip
    if answer.status_code != 200:
        raise UserError(f"--push: the Hub refuses the token ({answer.status_code}); make another and set HF_TOKEN")
    is_adapter = getattr(settings, "tune", "full") == "lora"  # `merge` has no such setting: it pushes a whole model
    if is_adapter and not on_hub(settings.model):
        warn(f"--push: the base {settings.model} is a folder of this machine; who downloads an adapter needs it, too")


def push(settings, folder):
    """Upload a folder to --push, if there is one. Raises UserError with the command that does it later."""
    if not wanted(settings):
        return
    import requests
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(settings.push, private=True, exist_ok=True)
        api.upload_folder(repo_id=settings.push, folder_path=folder, ignore_patterns=LEFT_OUT)
    except (HfHubHTTPError, requests.RequestException, OSError) as error:
        raise UserError(
            f"{folder}: finished, but not uploaded ({type(error).__name__}); run .venv/bin/huggingface-cli upload "
            f"{settings.push} {folder}"
        ) from None
    say(f"uploaded: {api.endpoint}/{settings.push}")
