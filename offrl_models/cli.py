"""`offrl`: the same walk for people without an orchestrator.

offrl run PIPELINE.yaml       raw logs to verdict, and to a release when the verdict is PASS
offrl validate PIPELINE.yaml  is the YAML right?
offrl check PIPELINE.yaml     take in new batches and run the coverage checks
offrl verify BUNDLE           hash every file of a released policy
offrl evaluate LOG ...        anyone's logs, anyone's policy: is it any good?
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from offrl_models import assess, registry, stages, storage
from offrl_models.config import Pipeline, read_pipeline
from offrl_models.reports import assessment, evidence, quality
from offrl_models.schema import InputError


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    return Pipeline(read_pipeline(arguments.pipeline), arguments.root.resolve())


def run(arguments: argparse.Namespace, console: Console) -> int:
    pipeline = _pipeline(arguments)
    judged, released = stages.run(pipeline)
    for table in evidence.tables(storage.read_json(pipeline.reports / "evidence.json")):
        console.print(table)
    said = f"{judged.summary['status']}: {judged.summary['policy_name']}: {judged.summary['reason']}."
    console.print(Text(f"Released as version {released.version} in {released.folder}." if released else said))
    return 0


def check(arguments: argparse.Namespace, console: Console) -> int:
    pipeline = _pipeline(arguments)
    stages.ingest(pipeline).require_clean()
    _, results = stages.coverage(pipeline)
    for result in results:
        told = result.title if result.passed and result.applies else result.sentence.removeprefix(quality.ABSENT)
        console.print(Text(f"{result.check} {result.standing:<14} {told}"), soft_wrap=True)
    console.print(Text(f"Data Docs: {pipeline.reports / 'coverage' / 'index.html'}"))
    return int(any(result.blocking and not result.passed for result in results))


def validate(arguments: argparse.Namespace, console: Console) -> int:
    wrong = 0
    for path in arguments.pipelines:
        try:
            console.print(Text(f"{path}: the YAML of {read_pipeline(path).dataset} is right"))
        except InputError as error:
            print(f"offrl: {error}", file=sys.stderr)
            wrong = 1
    return wrong


def verify(arguments: argparse.Namespace, console: Console) -> int:
    manifest = registry.verify(arguments.bundle)
    console.print(
        Text(f"{arguments.bundle}: {len(manifest['files'])} files as released, verdict {manifest['verdict']}")
    )
    return 0


def evaluate(arguments: argparse.Namespace, console: Console) -> int:
    options = vars(arguments)
    named = {"--html": arguments.html, "--json": arguments.json}
    outputs = {option: path for option, path in named.items() if path is not None}
    for option, path in outputs.items():
        _require_output(option, path, arguments.log)
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise InputError(f"--html and --json are both {arguments.json}; give two files.")
    found = assess.assess(
        arguments.log,
        assess.contract_of(options),
        assess.target_of(options),
        assess.effort_of(options),
        assess.salt_of(options),
    )
    assessment.write(found, arguments.html, arguments.json)
    console.print(assessment.table(found))
    for line in assessment.lines(found):
        console.print(Text(line))
    console.print(Text(f"The page: {arguments.html}"))
    return 0


def _require_output(option: str, path: Path, log: Sequence[Path]) -> None:
    """Raises InputError where no file can be written, or one would take the place of something else than an earlier page."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK) or (path.exists() and not path.is_file()):
        raise InputError(f"{option} {path}: no file can be written there; name one in a folder that exists.")
    of_log = next((each for each in log if path.resolve().is_relative_to(each.resolve())), None)
    if of_log is not None:
        raise InputError(f"{option} {path}: {of_log} is the log; name another file.")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    """The options of `offrl evaluate`; what they mean together is checked where they are used."""
    command._negative_number_matcher = re.compile(
        r"-\d*\.?\d+(e[+-]?\d+)?$", re.IGNORECASE
    )  # argparse's has no exponent
    command.add_argument("log", type=Path, nargs="+", help="files of the log, or their folder")
    policy = command.add_argument_group("the policy, by one of these")
    policy.add_argument("--policy", type=Path, metavar="BUNDLE_OR_ONNX", help="a released version, or a policy.onnx")
    policy.add_argument(
        "--policy-column", metavar="NAME", help="the probabilities of all actions, or that of the logged one"
    )
    policy.add_argument(
        "--policy-callable", metavar="MODULE:FUNCTION", help="function(observation, mask) -> probabilities"
    )
    columns = command.add_argument_group("what the columns mean (a bundle brings its own contract)")
    columns.add_argument("--contract", type=Path, metavar="YAML", help="a contract, or a pipeline's defs.yaml")
    columns.add_argument("--format", help="where the file names do not say it")
    columns.add_argument("--horizon", type=int, help="1 where every row stands alone")
    for name in ("episode", "entity", "step", "action", "mask", "action-prob", "reward", "terminated", "truncated"):
        columns.add_argument(f"--{name}", metavar="COLUMN")
    columns.add_argument("--observation", metavar="COLUMNS", help="such as age,ward:12,sex:f|m,vitals[17]")
    columns.add_argument(
        "--next-observation", metavar="COLUMNS", help="the same columns as observed next, in that order"
    )
    columns.add_argument("--actions", metavar="N_OR_LABELS", help="how many, coded from 0, or a,b,c")
    columns.add_argument(
        "--reward-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the true range of one reward"
    )
    columns.add_argument("--gamma", type=float, help="discount per step")
    command.add_argument("--all-entities", action="store_true", help="also those that a released policy may have seen")
    command.add_argument("--quick", action="store_true", help="train networks for fewer steps")
    command.add_argument("--seed", type=int, default=0, help="of everything random")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    command.add_argument(
        "--html", type=Path, default=Path("evaluation.html"), metavar="FILE", help="write the page there"
    )
    command.set_defaults(function=evaluate)


def main() -> int:
    parser = argparse.ArgumentParser(prog="offrl", description="Logged decisions to a gated policy.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, what in (
        ("run", run, "raw logs to verdict, and to a release when the verdict is PASS"),
        ("check", check, "take in new batches and run the coverage checks"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("pipeline", type=Path, help="the pipeline's defs.yaml")
        command.add_argument("--root", type=Path, default=Path.cwd(), help="project folder (default: this one)")
        command.set_defaults(function=function)
    command = commands.add_parser("validate", help="is the YAML of some pipelines right?")
    command.add_argument("pipelines", type=Path, nargs="+", help="their defs.yaml")
    command.set_defaults(function=validate)
    command = commands.add_parser("verify", help="hash every file of a released policy")
    command.add_argument("bundle", type=Path, help="folder of a released version")
    command.set_defaults(function=verify)
    _add_evaluate(commands.add_parser("evaluate", help="anyone's logs, anyone's policy: is it any good?"))
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 124)
    try:
        return arguments.function(arguments, console)
    except InputError as error:
        print(f"offrl: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
