"""The command line: parse, call one function, print."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # `python cli.py` means `python -m heatmill.cli`
    import runpy

    runpy.run_module("heatmill.cli", run_name="__main__", alter_sys=True)
    raise SystemExit

import difflib
import errno
import json
import sys
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import HeatmillError, InputError, __version__

if TYPE_CHECKING:
    from .engine.jobs.plan import Job

Command = Callable[..., Any]


class Interrupted(HeatmillError):
    """Stopped by Ctrl-C."""

    exit_code = 130


class Program(click.Group):
    """Turns every refusal into one line on stderr and the exit code of the contract."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as err:  # click would print a line of its own
            raise Interrupted(str(err) or "interrupted") from err

    def main(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        try:
            kwargs["standalone_mode"] = False
            result = super().main(args, *others, **kwargs)
            raise SystemExit(result if isinstance(result, int) else 0)
        except (Interrupted, click.exceptions.Abort) as err:
            _fail(str(err) or "interrupted", Interrupted.exit_code)
        except click.exceptions.NoArgsIsHelpError as err:
            click.echo(err.format_message())
            raise SystemExit(0) from None
        except click.ClickException as err:
            where = getattr(err, "ctx", None)
            _fail(err.format_message() + (f" ({where.command_path} --help)" if where else ""), 2)
        except Exception as err:
            debug = "--debug" in (sys.argv[1:] if args is None else args)
            if debug:
                traceback.print_exc()
            if isinstance(err, HeatmillError):
                _fail(str(err), err.exit_code)
            if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                _fail(f"{err.filename or 'the disk'}: no space is left; the same command resumes", 4)
            if isinstance(err, OSError) and err.filename:
                _fail(f"{err.filename}: {err.strerror}", 2)
            hint = "" if debug else "; --debug shows where"
            _fail(f"a bug in heatmill: {type(err).__name__}: {err}{hint}", 1)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    click.echo("heatmill: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line), err=True)
    raise SystemExit(code)


def model_options(command: Command) -> Command:
    """Flags that say what the model file does not."""
    for option in reversed(
        [
            click.option(
                "--layer", metavar="NAME", help="Value or node to read feature maps from [default: automatic]."
            ),
            click.option("--preprocess", metavar="NAME|FILE", help="Preset (imagenet, raw) or JSON spec of the model."),
            click.option("--labels", type=click.Path(path_type=Path), help="Class names: text or JSON file."),
            click.option("--output", metavar="KIND", help="What the scores are: logits, probabilities or sigmoid."),
            click.option("--scores", metavar="NAME", help="The score output, where the model has several."),
        ]
    ):
        command = option(command)
    return command


def session_options(command: Command) -> Command:
    """Flags that say how the network is run."""
    for option in reversed(
        [
            click.option(
                "--backend", default="auto", show_default=True, help="auto, reference, onnxruntime or tensorrt."
            ),
            click.option(
                "--provider",
                help="The backend's provider: cpu, openvino, cuda, tensorrt, nv-tensorrt-rtx; of tensorrt: tensorrt, "
                "rtx [default: the fastest].",
            ),
            click.option("--precision", default="auto", show_default=True, help="auto, fp32, tf32, bf16, fp16, int8."),
            click.option("--batch-size", default="auto", show_default=True, help="Rows per network call."),
        ]
    ):
        command = option(command)
    return command


def job_options(command: Command) -> Command:
    """Flags that say what is explained."""
    for option in reversed(
        [
            click.option(
                "-m",
                "--method",
                "methods",
                multiple=True,
                default=["score-cam"],
                show_default=True,
                metavar="NAME[:key=value,...]",
                help="Repeatable; heatmill methods lists them. A whole number may be a range: segments=10..100 "
                "(steps of 10).",
            ),
            click.option(
                "-t",
                "--target",
                "targets",
                multiple=True,
                default=["predicted"],
                show_default=True,
                metavar="TARGET",
                help="predicted, topN, label, all, a class number or name; repeatable.",
            ),
            click.option(
                "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of random masks."
            ),
            click.option("--limit", type=click.IntRange(1), help="Explain only the first N images."),
            click.option(
                "--device", metavar="N[,N...]", help="Numbers of the GPUs; each has a worker of its own [default: 0]."
            ),
        ]
    ):
        command = option(command)
    return command


workers_option = click.option(
    "--workers", type=click.IntRange(1, 256), help="Threads that decode images [default: the cores]."
)
max_bad_option = click.option(
    "--max-bad",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of bad images above which the exit code is 3.",
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress.")
log_format_option = click.option(
    "--log-format", type=click.Choice(["auto", "json"]), default="auto", help="Of progress on stderr."
)


def common_options(command: Command) -> Command:
    """Flags of every command."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 4096:
        raise InputError(f"--batch-size {text!r}: give auto or a number from 1 to 4096")
    return int(text)


def _devices(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    numbers = text.replace(" ", "").split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise InputError(f"--device {text!r}: give numbers of GPUs, each once, as 0 or 0,1,2,3")
    return tuple(map(int, numbers))


def _key(parameter: click.Parameter) -> str:
    """What a flag or argument is called in a TOML file: its long name."""
    return max(parameter.opts, key=len).lstrip("-") if isinstance(parameter, click.Option) else str(parameter.name)


def _read_config(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A TOML file's keys become the flags' defaults; an unknown key is refused."""
    if value is None:
        return None
    try:
        config = tomllib.loads(value.read_text())
    except (OSError, ValueError) as err:
        raise click.UsageError(f"{value}: can't be read as TOML ({err})") from None
    known = {_key(each): each for each in context.command.params if each.name not in ("config", "debug")}
    defaults: dict[str, Any] = {}
    for key, given in config.items():
        word = key.replace("_", "-")
        if word not in known:
            near = difflib.get_close_matches(word, known, n=3) or sorted(known)
            raise click.UsageError(f"{value}: unknown key {key!r}; nearest: {', '.join(near)}")
        many = known[word].multiple if isinstance(known[word], click.Option) else known[word].nargs == -1
        # as text, so that a value is judged as it is on the command line
        texts = [str(each) for each in (given if isinstance(given, list) else [given])]
        defaults[str(known[word].name)] = texts if many else ",".join(texts)
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _list_metrics(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the metrics and presets, and end."""
    if not value:
        return
    from .engine.metrics import METRICS, PRESETS

    for metric in METRICS.values():
        click.echo(f"{metric.name} ({metric.better} is better): {metric.summary}\n    {metric.citation}")
        _echo_parameters(metric.parameters)
    for name, calls in PRESETS.items():
        click.echo(f"preset {name}: {' '.join(calls)}")
    context.exit()


def _echo_parameters(parameters: Any) -> None:
    for key, parameter in parameters.items():
        choices = f" ({', '.join(parameter.choices)})" if parameter.choices else ""
        click.echo(f"    {key}={parameter.default}  {parameter.doc}{choices}")


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="heatmill")
def main() -> None:
    """Saliency maps for ONNX image classifiers, at data-set scale.

    Example: heatmill explain model.onnx photos/ -o run
    """


@main.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the run; an existing run is resumed.")
@job_options
@model_options
@session_options
@workers_option
@max_bad_option
@click.option("--overwrite", is_flag=True, help="Remove an existing run in the folder first.")
@click.option("--save-overlays", is_flag=True, help="Write a PNG per map to OUT/report/overlays.")
@click.option("--dry-run", is_flag=True, help="Say what the run will cost, as heatmill plan does, and do nothing.")
@quiet_option
@log_format_option
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    callback=_read_config,
    expose_value=False,
    help="TOML file in which every flag can stand.",
)
@click.option("--generate-config", is_flag=True, help="Print the given flags as TOML, and do nothing.")
@common_options
def explain(**options: Any) -> int:
    """Write one saliency map per image and target to a run's folder.

    MODEL is an ONNX classifier; INPUTS are folders, image files or manifests (.csv, .parquet).

    \b
    Example: heatmill explain model.onnx photos/ -o run
             heatmill explain model.onnx val.csv -o run -m rise -t label -t predicted
    """
    if options["generate_config"]:
        click.echo(_as_toml(click.get_current_context()), nl=False)
        return 0
    dry = options["dry_run"]
    if options["model"] is None or not options["inputs"] or (options["out"] is None and not dry):
        raise click.UsageError("give MODEL, INPUTS and -o OUT")
    if dry:
        return _forecast(options, None)
    job = _job(options)
    from .engine.jobs.job import explain as run_job

    style = _style(options["quiet"], options["log_format"])
    summary = run_job(job, style)
    overlays = None
    if options["save_overlays"]:
        from .engine.jobs.report import write_overlays
        from .engine.jobs.store import open_run

        overlays = write_overlays(open_run(summary.run))
    if options["as_json"]:
        told = {
            name: getattr(summary, name) for name in ("run", "images", "rows", "statuses", "bad", "seconds", "stages")
        }
        click.echo(json.dumps({**told, "overlays": overlays}))
    else:
        ok = summary.statuses.get("ok", 0)
        click.echo(f"{summary.run}: {ok} of {summary.rows} maps of {summary.images} images, {summary.seconds:.1f} s")
        for status, count in summary.statuses.items():
            if status != "ok":
                click.echo(f"  {status}: {count}")
        if overlays is not None:
            click.echo(f"  overlays: {Path(summary.run) / 'report' / 'overlays'} ({overlays})")
    if summary.exit_code == 3:
        share = f"{summary.bad} of {summary.images} images are bad, more than --max-bad {options['max_bad']:g} allows"
        click.echo(f"heatmill: {share}; heatmill report {summary.run} lists them", err=True)
    return summary.exit_code


def _style(quiet: bool, log_format: str) -> str:
    """How progress is shown; see `Progress`."""
    return "quiet" if quiet else "json" if log_format == "json" else "auto"


def _job(options: dict[str, Any]) -> Job:
    """What a command's flags ask for."""
    from .engine.jobs.plan import Job

    plural = {name: tuple(options[name]) for name in ("inputs", "methods", "targets")}
    given = {field.name: options[field.name] for field in fields(Job) if field.name in options}
    sizes = {"batch_size": _batch_size(options["batch_size"]), "devices": _devices(options["device"])}
    return Job(**{**given, **plural, **sizes})


def _forecast(options: dict[str, Any], budget: str | None) -> int:
    from .engine.jobs.forecast import forecast, forecast_text, parse_budget

    job = _job({**options, "out": options.get("out") or Path()})
    seconds = None if budget is None else parse_budget(budget)
    tell = partial(click.echo, err=True)
    found = forecast(job, seconds, resume=options.get("out") is not None, tell=tell)
    click.echo(json.dumps(found) if options["as_json"] else forecast_text(found), nl=options["as_json"])
    return 0


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@job_options
@model_options
@session_options
@click.option("--budget", metavar="TIME", help="What the run may take (90s, 15m, 2h, 1d); else what fits is named.")
@common_options
def plan(budget: str | None, debug: bool, **options: Any) -> int:
    """Say what explaining will cost: passes, time on this machine, memory and disk, by method.

    A few of the images are rehearsed: every pass is counted, few are run.

    \b
    Example: heatmill plan model.onnx photos/ -m score-cam -m rise
             heatmill plan model.onnx photos/ -m score-cam --budget 2h
    """
    return _forecast(options, budget)


def _as_toml(context: click.Context) -> str:
    lines = []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in ("generate_config", "debug") or value is None:
            continue
        many = isinstance(value, tuple | list)
        plain = [str(each) if isinstance(each, Path) else each for each in (value if many else [value])]
        lines.append(f"{_key(parameter)} = {json.dumps(plain if many else plain[0], ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@model_options
@common_options
def inspect(model: Path, as_json: bool, debug: bool, **options: Any) -> int:
    """Show what a model file is: input, spec, classes, target layers, which methods can run, and a trial run.

    Exit code 2 says that the trial was refused.

    Example: heatmill inspect model.onnx
    """
    from .engine.jobs.describe import describe, describe_text

    found = describe(model, **options)
    click.echo(json.dumps(found) if as_json else describe_text(found), nl=as_json)
    return 2 if found["trial"] and not found["trial"]["runs"] else 0


@main.command()
@common_options
def methods(as_json: bool, debug: bool) -> None:
    """List the methods with their parameters.

    Example: heatmill methods
    """
    from .engine.methods import METHODS

    if as_json:
        click.echo(
            json.dumps(
                {
                    method.name: {
                        "summary": method.summary,
                        "citation": method.citation,
                        "parameters": {
                            key: {
                                "default": parameter.default,
                                "doc": parameter.doc,
                                "choices": list(parameter.choices),
                            }
                            for key, parameter in method.parameters.items()
                        },
                    }
                    for method in METHODS.values()
                }
            )
        )
        return
    for method in METHODS.values():
        click.echo(f"{method.name}: {method.summary}\n    {method.citation}")
        _echo_parameters(method.parameters)


@main.command()
@common_options
def doctor(as_json: bool, debug: bool) -> None:
    """Say what this machine offers: processor, backends, and what `auto` picks and why.

    Example: heatmill doctor
    """
    from .engine.jobs.describe import doctor as examine
    from .engine.jobs.describe import doctor_text

    found = examine()
    click.echo(json.dumps(found) if as_json else doctor_text(found), nl=as_json)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@common_options
def verify(run: Path, as_json: bool, debug: bool) -> int:
    """Read every byte of a run: checksums, rows, order, maps, metric rows.

    Exit code 4 says that shards are missing, 5 that something is damaged.

    Example: heatmill verify run
    """
    from .engine.jobs.measures import verify as check_metrics
    from .engine.jobs.store import open_run
    from .engine.jobs.store import verify as check

    counts = check(run)
    if metric_rows := check_metrics(open_run(run)):
        counts["metric_rows"] = metric_rows
    complete = counts["committed"] == counts["shards"]
    text = f"{run}: {counts['committed']} of {counts['shards']} shards, {counts['rows']} rows, {counts['ok']} maps"
    text += f", {metric_rows} metric rows" if metric_rows else ""
    click.echo(
        json.dumps({"run": str(run), **counts}) if as_json else f"{text}: {'sound' if complete else 'incomplete'}"
    )
    return 0 if complete else 4


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=["standard"],
    show_default=True,
    metavar="NAME[:key=value,...]",
    help="Metric or preset, repeatable; --list names them.",
)
@click.option(
    "-m", "--method", "methods", multiple=True, metavar="NAME", help="Only maps of this method; repeatable [all]."
)
@click.option("--by", multiple=True, metavar="COLUMN", help="Slice by class, correct, label or a manifest's column.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the table [RUN/report/evaluation].")
@click.option("--model", type=click.Path(path_type=Path), help="Where the model file is now [where it was].")
@workers_option
@quiet_option
@click.option(
    "--list",
    "listed",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_list_metrics,
    help="List the metrics and presets, and do nothing.",
)
@common_options
def evaluate(runs: tuple[Path, ...], out: Path | None, quiet: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Measure how far a run's maps can be trusted, and compare methods and runs.

    Metric rows go to RUN/metrics, beside the maps; what is there already is kept. The table is printed, and written as
    Markdown, CSV and an HTML page.

    \b
    Example: heatmill evaluate run
             heatmill evaluate run --metric rise --metric pointing-game:tolerance=0 --by correct
    """
    from .engine.jobs.evaluate import Evaluation
    from .engine.jobs.evaluate import evaluate as measure
    from .engine.jobs.store import open_run
    from .engine.jobs.table import compare_metrics
    from .engine.jobs.table_pages import table_json, table_text, write_pages

    found = measure(Evaluation(runs=runs, **options), "quiet" if quiet else "auto")
    opened = [open_run(run) for run in runs]
    table = compare_metrics(opened, options["metrics"], [each.methods for each in found], options["by"])
    page = write_pages(table, opened, out or runs[0] / "report" / "evaluation")
    if as_json:
        told = [{name: getattr(each, name) for name in each.__slots__} for each in found]
        click.echo(json.dumps({"runs": told, "page": str(page), **table_json(table)}))
    else:
        click.echo(table_text(table), nl=False)
        click.echo(str(page))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--limit", default=500, show_default=True, type=click.IntRange(1), help="Cards on the page.")
@click.option("--overlays", is_flag=True, help="Also write a PNG per map.")
@common_options
def report(run: Path, limit: int, overlays: bool, as_json: bool, debug: bool) -> None:
    """Write RUN/report/index.html: every map over its photograph, in one page that needs no network.

    Example: heatmill report run
    """
    from .engine.jobs.report import write_overlays, write_report
    from .engine.jobs.store import open_run

    opened = open_run(run)
    page = write_report(opened, limit=limit)
    count = write_overlays(opened) if overlays else None
    click.echo(json.dumps({"page": str(page), "overlays": count}) if as_json else str(page))


@main.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder of the page [default: RUN_A/report/compare/NAME OF B]."
)
@click.option("--method-a", metavar="NAME", help="Only this method of RUN_A [default: all that both runs have].")
@click.option("--method-b", metavar="NAME", help="Only this method of RUN_B; with one of each, names need not agree.")
@click.option(
    "--top",
    default=15.0,
    show_default=True,
    type=click.FloatRange(0, 100, min_open=True),
    help="Percentage of the highest places whose overlap is told.",
)
@click.option(
    "--by",
    type=click.Choice(["spearman", "cosine", "overlap"]),
    default="spearman",
    show_default=True,
    help="What the worst pairs are chosen by.",
)
@click.option("--worst", default=24, show_default=True, type=click.IntRange(0, 1000), help="Pairs shown on the page.")
@common_options
def compare(run_a: Path, run_b: Path, out: Path | None, top: float, as_json: bool, debug: bool, **options: Any) -> None:
    """Say how alike the maps of two runs are, and how often their predictions differ: the precision audit.

    Images are matched by id, rows by method and target. OUT gets a page with the worst pairs, every pair as Parquet,
    and a summary.

    \b
    Example: heatmill compare run run-fp16
             heatmill compare run run --method-a cam --method-b rise
    """
    from .engine.jobs.compare import compare as measure
    from .engine.jobs.compare import compare_text
    from .engine.jobs.compare_page import write_page
    from .engine.jobs.store import open_run

    first, second = open_run(run_a), open_run(run_b)
    found = measure(first, second, out, top=top / 100, **options)
    page = write_page(first, second, found)
    told = {**found.told, "page": str(page)}
    click.echo(json.dumps(told) if as_json else f"{compare_text(told)}\n{page}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "kind",
    required=True,
    type=click.Choice(["crops", "erased", "npy", "png", "hdf5-virelay", "fiftyone"]),
    help="New images for training (crops, erased), or maps for other tools.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("-m", "--method", metavar="NAME", help="Only the maps of this method [default: all].")
@click.option("--limit", type=click.IntRange(1), help="Only the first N rows of the run.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of crops, erased: the region is where the map is at least this share of its greatest value [default: 0.5].",
)
@click.option(
    "--padding",
    type=click.FloatRange(0),
    help="Of crops: added on each side, as a share of the region's side [default: 0.1].",
)
@click.option(
    "--fill",
    type=click.Choice(["mean", "black", "blur"]),
    help="Of erased: the model's mean colour, black, or the photograph blurred [default: mean].",
)
@click.option("--format", type=click.Choice(["jpeg", "png"]), help="Of crops, erased [default: jpeg, quality 95].")
@click.option(
    "--size",
    type=click.Choice(["native", "input", "image"]),
    help="Of npy: native, as stored, or input, the network's; of png: image, the photograph's, or input "
    "[default: the first].",
)
@common_options
def export(run: Path, kind: str, out: Path, as_json: bool, debug: bool, **options: Any) -> None:
    """Write a run's maps for other tools, or photographs cut to or without their salient region for training.

    OUT appears when it is complete, with a manifest.

    \b
    Example: heatmill export run --as crops -o crops
             heatmill export run --as erased -o erased --fill blur
             heatmill export run --as npy -o arrays
    """
    from .engine.jobs.exports import export as write
    from .engine.jobs.exports import export_text
    from .engine.jobs.exports.base import Options
    from .engine.jobs.store import open_run

    found = write(open_run(run), kind, out, Options(**options))
    click.echo(json.dumps(found) if as_json else export_text(found), nl=as_json)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@click.option("-m", "--method", default="score-cam", show_default=True, metavar="NAME[:key=value,...]")
@click.option("--limit", default=4, show_default=True, type=click.IntRange(1), help="Number of images.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="The median round is told.")
@click.option("--device", type=click.IntRange(0), help="Number of the GPU [default: 0].")
@model_options
@session_options
@common_options
def bench(model: Path, inputs: tuple[Path, ...], as_json: bool, debug: bool, **options: Any) -> None:
    """Measure a method beside the bare network in the same run.

    Without INPUTS the images are random noise (whose feature maps repeat less than a photograph's).

    Example: heatmill bench model.onnx photos/ --method score-cam
    """
    from .engine.jobs.bench import bench as measure
    from .engine.jobs.bench import bench_text

    options["batch_size"] = _batch_size(options["batch_size"])
    found = measure(model, inputs, **options)
    click.echo(json.dumps(found) if as_json else bench_text(found), nl=as_json)


@main.command("train-lcam")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The .onnx file that comes out.")
@click.option("--run", type=click.Path(path_type=Path), help="Folder of the training [default: OUT.training].")
@click.option(
    "--variant",
    default="fm",
    show_default=True,
    type=click.Choice(["fm", "img"]),
    help="What the attention multiplies: feature maps (the head alone runs) or the image (the whole network).",
)
@click.option(
    "--loss",
    default="own-map",
    show_default=True,
    type=click.Choice(["own-map", "faithful"]),
    help="Which maps area and variation are of: each image's own, or, as in the authors' code, all pairs of a batch.",
)
@click.option(
    "--preset",
    default="head",
    show_default=True,
    type=click.Choice(["head", "vgg", "resnet"]),
    help="Schedule: for few images, begun with the head's own weights; or as published for VGG and ResNet.",
)
@click.option("--epochs", type=click.IntRange(1), help="Over the training images [default: the preset's].")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="Images per step [default: the preset's].")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Of the steps at first [default: the preset's].")
@click.option(
    "-t",
    "--target",
    default="predicted",
    show_default=True,
    type=click.Choice(["predicted", "label"]),
    help="Class of an image: the model's own prediction, or the manifest's label.",
)
@click.option(
    "--held-out",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 0.9, min_open=True),
    help="Share of images that are not trained on.",
)
@click.option(
    "--patience",
    default=5,
    show_default=True,
    type=click.IntRange(0),
    help="Epochs without a better held-out loss after which training ends; 0 is never.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of order and split.")
@click.option("--limit", type=click.IntRange(1), help="Take only the first N images.")
@model_options
@click.option("--backend", default="auto", show_default=True, help="auto, reference or onnxruntime.")
@click.option("--provider", help="The backend's provider [default: the fastest].")
@workers_option
@max_bad_option
@click.option("--overwrite", is_flag=True, help="Train anew; features that are still right are kept.")
@quiet_option
@log_format_option
@common_options
def train_lcam(as_json: bool, debug: bool, quiet: bool, log_format: str, **options: Any) -> int:
    """Train L-CAM's attention on a frozen classifier: afterwards one pass explains an image for any class.

    The classifier with the attention comes out as one ONNX file, for heatmill explain lcam.onnx photos/ --method l-cam.
    The same command resumes.

    Example: heatmill train-lcam model.onnx photos/ -o lcam.onnx
    """
    from .engine.jobs.train import train
    from .engine.jobs.train_settings import TrainJob

    trained = train(TrainJob(**options), _style(quiet, log_format))
    if as_json:
        click.echo(json.dumps({field.name: getattr(trained, field.name) for field in fields(trained)}))
    else:
        last = next(entry for entry in reversed(trained.history) if "average_drop" in entry)
        click.echo(
            f"{trained.out}: epoch {trained.best_epoch} of {trained.epochs} kept; held out at the end: average drop "
            f"{last['average_drop']:.1f}%, increase {last['increase']:.1f}%"
        )
        click.echo(f"  {trained.trained} images trained on, {trained.held_out} held out, {trained.bad} bad")
        told = f", {trained.untrained} have none and are marked untrained" if trained.untrained else ""
        click.echo(f"  {trained.classes} classes have a training image{told}")
        click.echo(f"  report: {trained.page}")
    if trained.exit_code == 3:
        share = f"{trained.bad} of {trained.images} images are bad, more than --max-bad {options['max_bad']:g} allows"
        click.echo(f"heatmill: {share}", err=True)
    return trained.exit_code


@main.command("compile")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-m",
    "--method",
    "methods",
    multiple=True,
    default=["score-cam"],
    show_default=True,
    metavar="NAME[:key=value,...]",
    help="Their backward graphs are built too; repeatable.",
)
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    default=["predicted"],
    show_default=True,
    metavar="TARGET",
    help="As for explain; a backward graph is made for their number.",
)
@click.option(
    "--target-gpu",
    "gpus",
    multiple=True,
    metavar="sm_NN",
    help="Build for this GPU, whatever is here (TensorRT-RTX); repeatable [default: all that the library builds for].",
)
@model_options
@click.option("--backend", default="tensorrt", show_default=True, help="Only tensorrt builds ahead of time.")
@click.option("--provider", help="tensorrt or rtx [default: what is installed].")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, tf32, bf16, fp16, int8.")
@click.option("--batch-size", default="auto", show_default=True, help="Rows per network call.")
@common_options
def compile_command(model: Path, as_json: bool, debug: bool, **options: Any) -> None:
    """Build ahead what a GPU will run, for the network and the methods' backward graphs.

    TensorRT-RTX does so on machines without a GPU. The plans go to the user's cache, where explain finds them.

    Example: heatmill compile model.onnx --precision fp16
    """
    from .engine.jobs.compile import compile_model, compile_text

    options["batch_size"] = _batch_size(options["batch_size"])
    found = compile_model(model, **options)
    click.echo(json.dumps(found) if as_json else compile_text(found), nl=as_json)


@main.command()
@click.option("-o", "--out", default="demo", show_default=True, type=click.Path(path_type=Path))
@common_options
def demo(out: Path, as_json: bool, debug: bool) -> int:
    """Explain real photographs with EfficientNet-Lite0, both shipped by packages of the extra [demo].

    Example: heatmill demo
    """
    from .engine.jobs.demo import demo as run_demo
    from .engine.jobs.demo import demo_text

    found = run_demo(out)
    click.echo(json.dumps(found) if as_json else demo_text(found), nl=as_json)
    return int(found["exit_code"])


if __name__ == "__main__":
    main()
