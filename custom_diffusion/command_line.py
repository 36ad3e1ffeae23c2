"""What the command lines share: ``--config run.yaml``, the file that repeats a run, and how help is shown."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from custom_diffusion.errors import Interrupted, UserError, is_out_of_memory
from custom_diffusion.files import read_text_again, write_bytes
from custom_diffusion.text import first_line

CONFIG_NAME = "config.yaml"
# The names alone: what they stand for takes seconds to import.
SCHEDULERS = ("ddim", "dpmsolver++", "euler", "euler_a", "unipc")
DTYPES = ("fp32", "fp16", "bf16")
DEFAULT_MODEL = "custom-diffusion-model"  # where training writes, and where the other commands look


# Secrets, who runs it, what a launcher sets, and the file itself have no place in a file that is passed on.
_NOT_SAVED = ("config", "contact", "hub_token", "local_rank")


class OneOrSeveral(argparse.Action):
    """A flag that may be given several times: its value is then a list of texts, and else a text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add one more."""
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else [*one_or_several(before), values])


def one_or_several(value: str | Sequence[str] | None) -> list[str]:
    """What :class:`OneOrSeveral` has made of its flag, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something: not None, False or nothing at all, but 0 is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is False or action.default in (None, "", []):
            return action.help
        if isinstance(action.default, list):  # as it would be typed, not as Python writes it
            return f"{action.help} (default: {' '.join(map(str, action.default)).replace('%', '%%')})"
        return super()._get_help_string(action)


def switch(text: str) -> bool:
    """An argparse type for switches that are also written ``--real_prior=True``."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Add ``--config`` to a parser and parse with it: the file's flags first, so that the command line wins.

    The file is a YAML mapping of flag names without dashes to values; lists for flags that take several, true and
    false for switches. Its values go through the parser's own types and choices.

    Raises:
        SystemExit: as argparse does, also for a file that cannot be read and for names that are no flags.
    """
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file with any of these flags; what is on the command line wins.")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        file = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        file = None  # --config without a file: the real parser says so
    given = list(sys.argv[1:] if argv is None else argv)
    from_file = [] if file is None else _flags_of_file(parser, Path(file), given)
    return parser.parse_args([*from_file, *given])


def _flags_of_file(parser: argparse.ArgumentParser, path: Path, given: Sequence[str]) -> list[str]:
    try:
        content = yaml.safe_load(read_text_again(path))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--config {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that no calendar has is a ValueError
        mark = getattr(error, "problem_mark", None)
        parser.error(f"--config {str(path)!r} is no valid YAML" + (f", see its line {mark.line + 1}" if mark else ""))
    if content is None:
        return []
    if not isinstance(content, dict):
        parser.error(f"--config {str(path)!r} must hold flags and their values, such as 'seed: 1'")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    argv: list[str] = []
    for name, value in content.items():
        if name not in actions or name in ("config", "help"):
            close = difflib.get_close_matches(str(name), actions, 1)
            parser.error(f"--config {str(path)!r}: {name!r} is no flag" + (f"; {close[0]}?" if close else ""))
        if not any(word.split("=")[0] in actions[name].option_strings for word in given):
            argv += _as_flags(parser, actions[name], value, path)
    return argv


def _as_flags(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, path: Path) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"--config {str(path)!r}: {action.dest!r} is true or false, not {value!r}")
        return [flag] if value else []
    if action.nargs in ("+", "*"):
        if value == []:
            return []
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    # action="append" too: the flag several times
    if isinstance(value, list) and (isinstance(action.default, list) or isinstance(action, OneOrSeveral)):
        return [f"{flag}={one}" for one in value]
    if isinstance(value, (list, dict)):
        parser.error(f"--config {str(path)!r}: {action.dest!r} takes one value, not {value!r}")
    return [f"{flag}={value}"]


def without_userinfo(address: str) -> str:
    """A web address without the user name and password that may stand before its host; other text as it is."""
    return re.sub(r"(?i)^(\s*https?://)[^/?#]*@", r"\1", address)


def config_text(args: argparse.Namespace) -> bytes:
    """Every flag's value as YAML, without secrets: ``--config`` with this in a file repeats the run."""
    values = {name: value for name, value in vars(args).items() if name not in _NOT_SAVED and value is not None}
    values = {name: without_userinfo(value) if isinstance(value, str) else value for name, value in values.items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000).encode()


def save_config(args: argparse.Namespace, path: Path) -> None:
    """Write :func:`config_text` into a file, whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    write_bytes(path, config_text(args))


def whole_number(least: int) -> Any:
    """An argparse type: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse.__name__ = "whole number"
    return parse


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def number_from_zero(text: str) -> float:
    """An argparse type: a finite number, 0 or above."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def finite_number(text: str) -> float:
    """An argparse type: a number that is neither nan nor infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def seed_number(text: str) -> int:
    """An argparse type: what every library takes for a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2^32 - 1")
    return value


def denoising_steps(text: str) -> int:
    """An argparse type: fewer denoising steps than the 1000 timesteps that models have."""
    value = int(text)
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 999")
    return value


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


# What argparse calls them where a text is none.
for _of_whole_numbers in (seed_number, denoising_steps, positive_int):
    _of_whole_numbers.__name__ = "whole number"
for _of_numbers in (finite_number, positive_number, number_from_zero, share):
    _of_numbers.__name__ = "number"


def add_base_model_flags(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Add the flags that say which base model a command loads.

    Args:
        otherwise: which one that is where none is given, for the help.
    """
    add = parser.add_argument
    add("--pretrained_model_name_or_path", help=f"Base model; if not given, {otherwise}.")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the base model's files, such as fp16.")
    add(
        "--tokenizer_name",
        help="Folder or Hub id of another tokenizer than the base model's. If not given, revision, variant and "
        "tokenizer are what training used, as the card of a concept of this base model says.",
    )
    add(
        "--pretrained_vae_model_name_or_path",
        help="Folder or Hub id of another VAE than the base model's, such as madebyollin/sdxl-vae-fp16-fix; if not "
        "given, the one of training.",
    )


def add_sampling_flags(add: Callable[..., Any]) -> None:
    """Add the flags that say how images are drawn; ``add`` is ``add_argument`` of a parser or a group of it."""
    add("--seed", type=seed_number, default=42, help="Image i of each prompt starts from the noise of seed + i.")
    add("--num_inference_steps", type=denoising_steps, default=100, help="Denoising steps.")
    add("--guidance_scale", type=finite_number, default=6.0, help="How strictly the prompt is followed.")
    add("--eta", type=share, default=1.0, help="DDIM's noise: 0 is deterministic DDIM, 1 is as noisy as DDPM.")
    add("--scheduler", default="ddim", choices=SCHEDULERS, help="Sampler; dpmsolver++ needs only 25 steps.")
    add("--device", help="Such as cuda, cuda:1, mps or cpu; if not given, the best there is.")


def given_base_model(args: argparse.Namespace) -> dict[str, str | None]:
    """What the flags of :func:`add_base_model_flags` say, as :func:`concept.files.find_base_model` takes it."""
    return {
        "given": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "variant": args.variant,
        "tokenizer": args.tokenizer_name,
        "other_vae": args.pretrained_vae_model_name_or_path,
    }


def end_quietly_on_interrupt() -> None:
    """From here on, Ctrl-C outside of :func:`run` ends in one line: importing the libraries takes seconds."""

    def say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = say


def run(
    main: Callable[[], None],
    interrupted: str = "interrupted: run the same command again",
    name_to_speak_as: Callable[[str], str | None] = lambda error: "",
    needs_memory: str = "close other programs",
) -> None:
    """Run a command's ``main``; whatever can go wrong for a user ends in one line and an exit code.

    Args:
        main: the command.
        interrupted: what Ctrl-C leaves behind, and how to continue.
        name_to_speak_as: where there are several processes, what one of them puts before an error; None to be silent.
        needs_memory: what to do where there is not enough memory.

    Raises:
        SystemExit: with 1 for an error, 128 + its number after a signal.
    """
    try:
        try:
            main()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"there is not enough memory ({first_line(error)}): {needs_memory}") from error
    except UserError as error:
        name = name_to_speak_as(str(error))
        sys.exit(1 if name is None else f"error: {name}{error}")
    except OSError as error:
        # A full disk, a folder that may not be written to: what was written before is whole.
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}")
    except (Interrupted, KeyboardInterrupt) as interruption:
        # All processes get the signal, and one line of it is enough.
        if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
            print(interruption if isinstance(interruption, Interrupted) else interrupted, file=sys.stderr)
        sys.exit(getattr(interruption, "exit_code", 128 + signal.SIGINT))


def import_diffusers(needed: str | None = None) -> None:
    """Import diffusers as if the packages that load models in 4 and 8 bits were not installed.

    diffusers and peft import them wherever they find them: that takes seconds, and prints warnings at every start.
    ``--use_8bit_adam`` imports bitsandbytes itself.

    Args:
        needed: the one that the command does need.
    """
    hidden = {name: sys.modules.get(name) for name in ("bitsandbytes", "torchao") if name != needed}
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's own way to say: not there
    # torchao's import warns of what no command does: of its checkpoints, and of an outdated way to register types.
    for logger in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    importlib.import_module("diffusers.loaders.peft")
    for name, former in hidden.items():
        if former is None:
            del sys.modules[name]
        else:
            sys.modules[name] = former
