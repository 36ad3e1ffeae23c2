"""Which experiment trackers ``--report_to`` can use on this machine. Imports nothing that takes time."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

EXTRAS = ("wandb", "comet")  # those that this project's extras install, by the extra's name


@dataclass(frozen=True)
class Account:
    """What shows that somebody has logged in, or wants to stay offline.

    Attributes:
        keys: environment variables; any of them, not empty.
        offline: environment variables with the values that keep the tracker on this machine.
        files: of which one holds one of the words; "" for any text.
        advice: what to do where nothing is found.
    """

    keys: tuple[str, ...]
    offline: dict[str, tuple[str, ...]]
    files: dict[str, tuple[str, ...]]
    advice: str

    def is_there(self) -> bool:
        """Whether anything was found; at a terminal the trackers ask for themselves."""
        if any(os.environ.get(name) for name in self.keys):
            return True
        if any(os.environ.get(name, "").lower() in values for name, values in self.offline.items()):
            return True
        if any(_holds(Path(name).expanduser(), words) for name, words in self.files.items()):
            return True
        return sys.stdin is not None and sys.stdin.isatty()


def _holds(path: Path, words: tuple[str, ...]) -> bool:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return False
    return any(word in text for word in words)


def _accounts() -> dict[str, Account]:
    netrc = os.environ.get("NETRC", "~/.netrc")
    wandb_settings = f"{os.environ.get('WANDB_CONFIG_DIR', '~/.config/wandb')}/settings"
    settings = ("mode", "base_url", "api_key")
    return {
        "wandb": Account(
            ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"),
            {"WANDB_MODE": ("offline", "dryrun", "disabled"), "WANDB_DISABLED": ("true", "1")},
            {netrc: ("wandb",), "~/_netrc": ("wandb",), wandb_settings: settings, "wandb/settings": settings},
            "log in with `wandb login`, or stay on this machine with WANDB_MODE=offline",
        ),
        "comet_ml": Account(
            ("COMET_API_KEY",),
            {"COMET_START_ONLINE": ("0", "false")},
            {os.environ.get("COMET_CONFIG", "~/.comet.config"): ("api_key",), ".comet.config": ("api_key",)},
            "log in with `comet login`, or stay on this machine with COMET_START_ONLINE=0",
        ),
        "clearml": Account(
            ("CLEARML_API_ACCESS_KEY",),
            {"CLEARML_OFFLINE_MODE": ("1", "true")},
            {os.environ.get("CLEARML_CONFIG_FILE", "~/clearml.conf"): ("",)},
            "log in with `clearml-init`, or stay on this machine with CLEARML_OFFLINE_MODE=1",
        ),
        "swanlab": Account(
            ("SWANLAB_API_KEY",),
            {"SWANLAB_MODE": ("local", "offline", "disabled")},
            {"~/.swanlab/.netrc": ("",)},
            "log in with `swanlab login`, or stay on this machine with SWANLAB_MODE=local",
        ),
    }


def tracker_problem(report_to: str, trackers: tuple[str, ...]) -> str | None:
    """Why ``--report_to`` cannot be followed; None where it can.

    Args:
        report_to: a tracker, ``all`` or ``none``.
        trackers: the names of all of them.
    """
    if report_to == "none":
        return None
    if report_to != "all" and not _is_installed(report_to):
        extra = report_to.removesuffix("_ml")
        command = f"pip install '.[{extra}]'" if extra in EXTRAS else f"pip install {report_to}"
        return f"--report_to={report_to} needs the package {report_to}: {command}"
    wanted = [name for name in trackers if _is_installed(name)] if report_to == "all" else [report_to]
    accounts = _accounts()
    for name in wanted:
        if name in accounts and not accounts[name].is_there():
            among = f" ({', '.join(wanted)})" if report_to == "all" else ""
            return f"--report_to={report_to}{among} needs an account with {name}: {accounts[name].advice}"
    return None


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
