"""The `posttrain` command: reads arguments, calls the part that does the work, prints what it answers.

It owns options, output and exit codes; it must not decide anything, nor import more than typer before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.api.training_run import TrainingRun
    from posttrain.local.state import RunFolder

app = typer.Typer(
    name="posttrain",
    help="Fine-tune language models: one YAML file, on this machine or in a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ResourceFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with TrainingRuns.")]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field, as in spec.sft.args.learning_rate=1e-4. With several runs in the file NAME:spec.…=….",
    ),
]
Claims = Annotated[
    list[str],
    typer.Option("--claim", metavar="NAME=FOLDER", help="Let a folder of this machine stand for a claim (pvc://NAME)."),
]
Secrets = Annotated[
    list[str],
    typer.Option("--secret", metavar="NAME=FOLDER", help="Let a folder with a file per key stand for a Secret."),
]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="FOLDER", help="Where runs are kept. Default: $POSTTRAIN_STATE, else .posttrain."),
]


def main() -> None:
    """Run the command line; a user's mistake ends in a message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


@app.command()
def run(
    file: ResourceFile,
    sets: Sets = [],  # noqa: B006 - typer makes a new one
    claims: Claims = [],  # noqa: B006
    secrets: Secrets = [],  # noqa: B006
    state: State = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live display.")] = False,
) -> None:
    """Execute the TrainingRuns of a file on this machine, or go on with them; Ctrl-C stops after a checkpoint."""
    from posttrain.local.display import open_view
    from posttrain.local.environments import cache_root
    from posttrain.local.runner import run_file
    from posttrain.local.state import state_root

    exit_code = run_file(
        file,
        sets=sets,
        claims=_folders(claims, option="--claim"),
        secrets=_folders(secrets, option="--secret"),
        state_root=state or state_root(),
        cache=cache_root(),
        open_view=lambda: open_view(plain=plain),
    )
    raise typer.Exit(exit_code)


def _folders(values: list[str], *, option: str) -> dict[str, Path]:
    folders = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not name or not folder:
            raise UserError(f"{option} {value}: write it as {option} NAME=FOLDER")
        folders[name] = Path(folder)
    return folders


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML files with TrainingRuns.")],
) -> None:
    """Check files: every problem with its line. Exit code 2 if there is one."""
    from posttrain.files import check_run, find_runs, find_warnings, read_documents
    from posttrain.local.preflight import resolve_paths

    valid = True
    for file in files:
        try:
            documents = find_runs(read_documents(file), file=file)
        except UserError as error:
            print(error, file=sys.stderr)
            valid = False
            continue
        for document in documents:
            try:
                data = resolve_paths(document.data, folder=file.absolute().parent)
                run = check_run(document, data=data)
            except UserError as error:
                print(error, file=sys.stderr)
                valid = False
            else:
                for warning in find_warnings(run, document=document):
                    print(f"{file}:{warning.line}: warning: {warning}", file=sys.stderr)
                print(f"{file}: {run.kind} {run.metadata.name} is valid")
    if not valid:
        raise typer.Exit(UserError.exit_code)


@app.command()
def plan(file: ResourceFile, sets: Sets = []) -> None:  # noqa: B006 - typer copies it
    """Print the objects that each run begins with, as YAML: its own, those of prepare, those of the first attempt."""
    from datetime import UTC, datetime

    from posttrain.api.loader import dump_document
    from posttrain.files import assign_to_runs, assume_settings, check_run, find_runs, read_documents
    from posttrain.local.preflight import resolve_paths
    from posttrain.plan.training_run import preview_training_run

    documents = find_runs(read_documents(file), file=file)
    changed = assign_to_runs(documents, sets=sets, file=file)
    runs = [
        check_run(document, data=resolve_paths(data, folder=file.absolute().parent))
        for document, data in zip(documents, changed, strict=True)
    ]
    objects = [
        manifest
        for run in runs
        for manifest in preview_training_run(run, now=datetime.now(UTC), settings=assume_settings(run), beside=runs)
    ]
    print("---\n".join(dump_document(manifest) for manifest in objects), end="")


@app.command()
def explain(
    field: Annotated[str, typer.Argument(metavar="FIELD", help="As in spec.datasets.fraction or spec.sft.args.")] = "",
) -> None:
    """Say what a field means, which values it takes and what its default is."""
    from posttrain.api import explain as explanations

    print(explanations.explain(field).render(), end="")


class Output(StrEnum):
    """How the resource is written."""

    YAML = "yaml"
    JSON = "json"


@app.command()
def status(
    name: Annotated[str, typer.Argument(metavar="[NAME]", show_default=False)] = "",
    output: Annotated[Output | None, typer.Option("--output", "-o", help="The resource with its status.")] = None,
    state: State = None,
) -> None:
    """Show the runs on this machine, or one of them in full."""
    import json
    from datetime import UTC, datetime

    from posttrain.api.loader import dump_document
    from posttrain.local.state import list_runs, lock_holder, state_root
    from posttrain.local.status_text import TABLE_HEADER, align, detail_lines, table_row
    from posttrain.local.summary import shown

    now = datetime.now(UTC)
    folders = [_find_run(name, state=state)[0]] if name else list_runs(state or state_root())
    runs = [(folder, run) for folder in folders if (run := folder.read_run()) is not None]
    if output is not None:
        data = [run.to_data() for _, run in runs]
        if output is Output.JSON:
            listing = {"apiVersion": "v1", "kind": "List", "items": data}
            print(json.dumps(data[0] if name else listing, indent=2, ensure_ascii=False))
        else:
            print("---\n".join(dump_document(item) for item in data), end="")
    elif name:
        ((folder, run),) = runs
        executed = lock_holder(folder) is not None

        def locate(uri: str) -> str:
            place = folder.locate(uri)
            return uri if place is None else shown(place)

        print("\n".join(detail_lines(run, executed=executed, now=now, locate=locate)))
    elif runs:
        rows = [table_row(run, executed=lock_holder(folder) is not None, now=now) for folder, run in runs]
        print("\n".join(align([TABLE_HEADER, *rows])))
    else:
        print(f"no runs in {state or state_root()}", file=sys.stderr)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    rank: Annotated[int | None, typer.Option(help="Only the lines of this rank.")] = None,
    attempt: Annotated[int | None, typer.Option(help="Default: the newest; 0 is prepare.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends or stops.")] = False,
    state: State = None,
) -> None:
    """Print what a run's processes wrote: those of an attempt and, without --attempt, of the run's services."""
    from posttrain.local.logs import read_lines

    folder, _ = _find_run(name, state=state)
    for line in read_lines(folder, attempt=attempt, rank=rank, follow=follow):
        print(line, flush=follow)


@app.command()
def samples(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    step: Annotated[int | None, typer.Option(help="Default: the newest that was logged.")] = None,
    claim: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of a run in a cluster: where its claim is mounted, or lies as a copy."),
    ] = None,
    state: State = None,
) -> None:
    """Print completions of a step of a grpo run, with their rewards, as they lie in the run's storage."""
    from posttrain.local.completions import read_completions, read_completions_on_claim, render_completions
    from posttrain.local.environments import cache_root

    if claim is not None:
        found, rows = read_completions_on_claim(name, claim=claim, step=step, cache=cache_root())
    else:
        folder, run = _find_run(name, state=state)
        found, rows = read_completions(run, folder=folder, step=step, cache=cache_root())
    print(render_completions(rows, step=found))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN")],
    second: Annotated[str, typer.Argument(metavar="RUN")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.html")] = None,
    state: State = None,
) -> None:
    """Show how two runs ended and what differs in their configuration; -o lays their curves over each other."""
    from posttrain.local.compare import differences, outcomes, read_side, write_comparison
    from posttrain.local.status_text import align

    folders = [_find_run(name, state=state) for name in (first, second)]
    sides = [read_side(run, storage=folder.storage) for folder, run in folders]
    rows = [("", sides[0].name, sides[1].name)]
    rows += [(d.name, d.first, d.second) for d in outcomes(sides[0], second=sides[1])]
    found = differences(sides[0], second=sides[1])
    rows += [(d.name, d.first, d.second) for d in found]
    print("\n".join(align(rows)))
    if not found:
        print("Spec, effective arguments and provenance are equal.")
    if output is not None:
        with _writing(output):
            write_comparison(sides[0], second=sides[1], out=output)
        print(f"Curves: {output}", file=sys.stderr)


@app.command()
def convert(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of an SFT or GRPO script.")],
    name: Annotated[str, typer.Option(help="Name of the run. Default: from the file's name.")] = "",
    accelerate: Annotated[str | None, typer.Option(metavar="CONFIG", help="As in zero3: strategy and 8 GPUs.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Another number of GPUs, as for groups of 7.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE")] = None,
) -> None:
    """Turn a recipe of open-r1 or TRL into a TrainingRun; every key that is dropped is named on standard error."""
    from posttrain.api.loader import dump_document
    from posttrain.convert import convert_recipe
    from posttrain.files import read_documents

    documents = read_documents(recipe)
    if len(documents) != 1:
        raise UserError(f"{recipe}: holds {len(documents)} documents, and a recipe is one")
    conversion = convert_recipe(documents[0].data, name=name or _name_of(recipe), accelerate=accelerate, gpus=gpus)
    for key, why in conversion.dropped:
        print(f"{recipe}: dropped {key}: {why}", file=sys.stderr)
    for note in conversion.notes:
        print(f"{recipe}: {note}", file=sys.stderr)
    text = dump_document(conversion.resource)
    if output is None:
        print(text, end="")
    else:
        with _writing(output):
            output.write_text(text, encoding="utf-8")


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn the system's refusal to write a file that was asked for into a message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): name a file in a folder that is there"
        ) from None


def _name_of(recipe: Path) -> str:
    """Return a run's name made from a file's; open-r1's are all called config_<something>."""
    import re

    stem = recipe.stem.removeprefix("config_")
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).lstrip("-0123456789")[:40].rstrip("-") or "run"


@app.command()
def env(name: Annotated[str, typer.Argument(metavar="NAME", help="An image: trainer, vllm.")]) -> None:
    """Make an image's Python environment if need be, and print its interpreter."""
    from rich.console import Console

    from posttrain.local.environments import cache_root, ensure_environment

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("") as spinner:
            interpreter = ensure_environment(
                name, cache=cache_root(), report=spinner.update, announce=lambda line: console.print(line, markup=False)
            )
    else:
        interpreter = ensure_environment(name, cache=cache_root(), report=lambda line: print(line, file=sys.stderr))
    print(interpreter)


@app.command()
def version() -> None:
    """Print the version."""
    from posttrain import __version__

    print(__version__)


def _find_run(name: str, *, state: Path | None) -> tuple[RunFolder, TrainingRun]:
    from posttrain.local.state import RunFolder, list_runs, state_root

    root = state or state_root()
    folder = RunFolder(root / name)
    run = folder.read_run()
    if run is None:
        known = ", ".join(found.name for found in list_runs(root)) or "none"
        raise UserError(f"there is no run {name!r} in {root}; there are: {known}")
    return folder, run
