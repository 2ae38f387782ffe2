"""`offrl`: the same walk for people without an orchestrator.

offrl run PIPELINE.yaml       raw logs to verdict, and to a release when the verdict is PASS
offrl check PIPELINE.yaml     take in new batches and run the coverage checks
offrl verify BUNDLE           hash every file of a released policy
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from offrl_models import registry, stages, storage
from offrl_models.config import Pipeline, read_pipeline
from offrl_models.reports import evidence
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
        word = "holds " if result.passed else "BLOCKS" if result.blocking else "warns "
        console.print(Text(f"{result.check} {word} {result.title if result.passed else result.sentence}"))
    console.print(Text(f"Data Docs: {pipeline.reports / 'coverage' / 'index.html'}"))
    return int(any(result.blocking and not result.passed for result in results))


def verify(arguments: argparse.Namespace, console: Console) -> int:
    manifest = registry.verify(arguments.bundle)
    console.print(
        Text(f"{arguments.bundle}: {len(manifest['files'])} files as released, verdict {manifest['verdict']}")
    )
    return 0


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
    command = commands.add_parser("verify", help="hash every file of a released policy")
    command.add_argument("bundle", type=Path, help="folder of a released version")
    command.set_defaults(function=verify)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 124)
    try:
        return arguments.function(arguments, console)
    except InputError as error:
        print(f"offrl: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
