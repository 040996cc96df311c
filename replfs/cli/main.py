"""The commands: arguments into a volume's configuration, or into a control attribute, and errors into one line."""

import os
import sys
from typing import NoReturn

import click

import replfs
from replfs.cli import controls, volumes
from replfs.errors import ReplfsError, printable


def main() -> NoReturn:
    """The entry point: exit status 0 done, 1 failed, 2 wrong usage."""
    _have_standard_streams()
    try:
        _commands.main(prog_name="replfs", standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "replfs"
        message = error.format_message().replace("\n", " ").rstrip(".")
        _fail(f"{message} (see {where} --help)", 2)
    except ReplfsError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    sys.exit(0)


def _have_standard_streams() -> None:
    """Those that were closed when the process started go nowhere: else the next file that is opened would take their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))  # noqa: SIM115 - for good


def _fail(message: str, status: int) -> NoReturn:
    print(f"replfs: error: {printable(message, 2000)}", file=sys.stderr)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(replfs.__version__, message="%(prog)s %(version)s")
def _commands() -> None:
    """A disk image that is replicated while it is in use, as QEMU's COLO does it, mounted as a file.

    On the machine that takes over, `replfs secondary` serves its copy of the disk; on the machine that runs, `replfs primary`
    mounts the disk and forwards every write. Point a virtual machine (or any program) at the file in each mount.

    Each control command does no more than set an extended attribute, so that
    `setfattr -n user.replfs.checkpoint -v 1 MOUNTPOINT` is the same as `replfs checkpoint MOUNTPOINT`.
    """


for command in (volumes.secondary, volumes.primary, *controls.COMMANDS):
    _commands.add_command(command)
