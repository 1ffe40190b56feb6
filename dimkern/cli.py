"""The `dimkern` command.

A subcommand is a function which adds its flags to a parser and returns what runs it, and one line in COMMANDS.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import dimkern

TRAIN_EXAMPLES = """\
examples:
  dimkern train
  dimkern train --estimator jsd --out runs/jsd
  dimkern train --data fashion-mnist --preset dim-l --batch-size 4096 --chunk 256 --out runs/large
  dimkern train --data folder:photos --image-size 64 --width 64 --out runs/photos
  dimkern train --resume runs/photos --epochs 40
  torchrun --nproc-per-node 2 -m dimkern train     # two processes, --batch-size images each
"""

REPRODUCE_NOTES = """\
A finished row is never done again and an interrupted one goes on: run the same command until all is there. Tables are
rewritten after every row, plots after every seed. Run it several times at once to share the rows: each process takes
those that no other is at; on a busy machine two with --threads 1 are quicker than one with two threads.

examples:
  dimkern reproduce --budget smoke
  dimkern reproduce --budget full --data cifar10 --data-root data
"""

Runner = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Says one line when a flag is wrong: the usage is a screenful, and `--help` prints it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status (argparse's 2 for a flag that cannot be used)."""
    parser = Parser(prog="dimkern", description="Deep InfoMax losses as fused streaming ops.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dimkern {dimkern.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (help, add) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        command.set_defaults(run=add(command))
    arguments = parser.parse_args(argv)
    run: Runner = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def add_train(parser: argparse.ArgumentParser) -> Runner:
    from dimkern.train import PRESETS, TrainConfig

    parser.usage = "%(prog)s [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = TRAIN_EXAMPLES
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(TrainConfig):
        accepts = field.metadata
        if accepts["group"] not in groups:
            groups[accepts["group"]] = parser.add_argument_group(accepts["group"])
        kind = type(field.default)
        default = f" (default: {field.default})" if field.default != "" else ""
        groups[accepts["group"]].add_argument(
            flag(field.name),
            type=kind,
            default=argparse.SUPPRESS,  # only flags that were given: a resumed run takes the others from its checkpoint
            metavar=accepts["metavar"] or "|".join(accepts["choices"]) or {int: "N", float: "X"}[kind],
            help=accepts["help"] + default,
        )
    weights = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in row.items()) for name, row in PRESETS.items())
    groups["objective"].add_argument(
        "--preset", choices=PRESETS, help=f"the weights of the paper ({weights}); flags given beside it win"
    )
    groups["output"].add_argument(
        "--resume",
        metavar="PATH",
        type=Path,
        help="go on from this checkpoint or run directory, with its settings (and there, unless --out is given)",
    )
    groups["output"].add_argument("--overwrite", action="store_true", help="replace the run that --out holds")

    def run(arguments: argparse.Namespace) -> int:
        from dimkern import train
        from dimkern.train import checkpoint, processes

        own = ("run", "resume", "overwrite", "preset")
        given = {key: value for key, value in vars(arguments).items() if key not in own}
        given = PRESETS.get(arguments.preset, {}) | given

        def start() -> None:
            config = TrainConfig(**given) if arguments.resume is None else checkpoint.settings(arguments.resume, given)
            if arguments.resume is None or "batch_size" in given:  # a checkpoint has that of all processes together
                config = dataclasses.replace(config, batch_size=config.batch_size * processes.count())
            train.run(config, arguments.resume, overwrite=arguments.overwrite)

        return reported(parser, start)

    return run


def add_reproduce(parser: argparse.ArgumentParser) -> Runner:
    from dimkern.reproduce import BUDGETS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    budgets = "".join(f"  {name:7}{budget.about}\n" for name, budget in BUDGETS.items())
    parser.epilog = f"budgets:\n{budgets}\n{REPRODUCE_NOTES}"
    parser.add_argument(
        "--budget", choices=BUDGETS, default="hour", help="how much to spend, see below (default: hour)"
    )
    parser.add_argument("--data", metavar="NAME", help="as for train (default: fashion-mnist; digits for smoke)")
    parser.add_argument(
        "--data-root", metavar="DIR", help="as for train: where the files of fashion-mnist or cifar10 are"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, nargs="+", default=[], help="seeds (default: 0 1 2; 0 for smoke)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads, as for train")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory of results, tables, plots (default: runs/reproduce-BUDGET-DATA)",
    )

    def run(arguments: argparse.Namespace) -> int:
        from dimkern import reproduce

        settings = {key: getattr(arguments, key) for key in ("data", "data_root", "threads")}
        given = {key: value for key, value in settings.items() if value is not None}

        def start() -> None:
            for path in reproduce.run(arguments.budget, arguments.out, given, tuple(arguments.seeds)):
                print(f"wrote {path}")

        return reported(parser, start)

    return run


def reported(parser: argparse.ArgumentParser, start: Callable[[], object]) -> int:
    """Run `start`; what is the user's to put right becomes one line and an exit status."""
    from dimkern.train import SettingError, TrainingStopped

    try:
        start()
    except SettingError as error:
        parser.error(f"{flag(error.setting)}: {error.why}")
    except ModuleNotFoundError as error:
        if "dimkern[train]" not in str(error):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except TrainingStopped as error:
        print(f"{parser.prog}: stopped: {error}", file=sys.stderr)
        return 1
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> Runner:
    def run(arguments: argparse.Namespace) -> int:
        print(dimkern.doctor())
        return 0

    return run


def flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Runner]]] = {
    "train": ("train Deep InfoMax on images, probe what it learnt, write a report with plots", add_train),
    "reproduce": ("train and probe every row of the paper's comparison, write its table and plots", add_reproduce),
    "doctor": ("say what is installed, what was built and which backends serve, for a bug report", add_doctor),
}
