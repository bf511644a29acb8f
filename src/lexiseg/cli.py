"""The `lexiseg` command: small commands, each with an example that runs today."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

from lexiseg import environment  # first: it turns telemetry of the libraries off

import typer  # isort: skip
from typer.core import TyperGroup  # isort: skip

from lexiseg.errors import LexisegError, StageError
from lexiseg.serving.limits import LIMITS
from lexiseg.workspace import main_checkout, private_folder, require_root

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Data sets in data/ and data.dvc.")
weights_app = typer.Typer(no_args_is_help=True, help="Local weight files in weights/.")
profile_app = typer.Typer(no_args_is_help=True, help="Settings of params.yaml by name.")


class _SweepGroup(TyperGroup):
    """`lexiseg sweep METHOD` beside `lexiseg sweep show`: what is no command of the group is a method."""

    def resolve_command(self, ctx, args):
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


sweep_app = typer.Typer(
    no_args_is_help=True,
    cls=_SweepGroup,
    help="Search settings: `lexiseg sweep METHOD`, options by `lexiseg sweep run --help`.",
)
stego_app = typer.Typer(no_args_is_help=True, help="What STEGO's results say without any label.")
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(profile_app, name="profile")
app.add_typer(sweep_app, name="sweep")
app.add_typer(stego_app, name="stego")


@app.callback()
def root_help() -> None:
    """Language-driven and unsupervised segmentation as one versioned, tracked stage graph.

    `dvc repro` runs the graph; these commands feed it, use what it makes, and show it.
    """


@app.command()
def stage(name: str) -> None:
    """Run one stage of dvc.yaml. `dvc repro` calls this; it does not look upstream.

    Example: lexiseg stage validate
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.stages.settings import parse_settings, read_values

    values = read_values(root)
    settings = parse_settings(values)
    _prepare_process(root, threads=settings.threads)
    import psutil

    from lexiseg.pipeline import node_of, read_graph, remove_orphans
    from lexiseg.stage import job_of, run_in_working_tree
    from lexiseg.stages.registry import stage_function

    graph = read_graph(root)
    node = node_of(graph, name)
    for orphan in remove_orphans(root, graph, node):
        print(f"{name}: removed {orphan}, which no stage makes any more", file=sys.stderr)
    started = psutil.Process().create_time()
    job = job_of(root, node, stage_function(name), settings=settings, values=values, started=started)
    run_in_working_tree(root, job)


@app.command()
def plan(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, with all they need; none: the graph.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what `dvc repro` would run and why, and the time, memory and disk to expect from earlier runs.

    Example: lexiseg plan lseg-evaluate
    """
    from dataclasses import asdict

    import psutil

    from lexiseg.plan import plan as make_plan
    from lexiseg.plan import plan_lines
    from lexiseg.stages.settings import parse_settings, read_values

    root = require_root()
    parse_settings(read_values(root))
    steps = make_plan(root, targets or ())
    if as_json:
        print(json.dumps([asdict(step) for step in steps], indent=2))
        return
    free = {"free_memory": psutil.virtual_memory().available, "free_disk": shutil.disk_usage(root).free}
    print("\n".join(plan_lines(steps, **free)))


@app.command()
def mend() -> None:
    """Put right what a killed dvc may leave behind: a half-written dvc.lock, a table of locks half-written or stale.

    Example: lexiseg mend
    """
    from lexiseg.mend import mend as mend_files

    done = mend_files(require_root())
    print("\n".join(done) if done else "nothing to mend")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    labels: Annotated[
        str | None, typer.Option(help="Words to look for, separated by commas; STEGO has names of its own.")
    ] = None,
    labels_file: Annotated[Path | None, typer.Option(help="Or a text file with a label per line.")] = None,
    model: Annotated[
        str, typer.Option(help="Model folder, or models:/NAME@ALIAS of MLflow's registry.")
    ] = "outputs/lseg/register",
) -> None:
    """Colour pictures by words: label map (PNG of indices), overlay and JSON per picture, with TCL soft masks too.

    Example: lexiseg predict photo.jpg --labels "grass, sky, ring" --out predictions
    """
    from lexiseg.errors import LabelError
    from lexiseg.inference import parse_labels, predict_files
    from lexiseg.loading import load
    from lexiseg.segmentation import check_labels

    if labels is not None and labels_file is not None:
        raise LabelError(
            found="both --labels and --labels-file",
            allowed="one of them",
            fix='name what to look for, such as --labels "grass, sky, ring"',
        )
    names = None if labels is None else parse_labels(labels)
    if labels_file is not None:
        names = check_labels(_lines_of(labels_file))
    loaded = load(model)
    names = loaded.check_labels(names)
    for label, words in loaded.unknown_words(names).items():
        print(f"note: the text encoder has never seen {', '.join(words)} (label `{label}`)", file=sys.stderr)
    for label, row in loaded.stand_ins(names).items():
        print(f"note: `{label}` has no vector of its own, that of `{row}` stands in", file=sys.stderr)
    for result in predict_files(loaded, images, names, out=out):
        found = [item for item in result["labels"] if item["area"]]
        shares = ", ".join(f"{item['label']} {100 * item['area']:.1f} %" for item in found)
        rest = len(result["labels"]) - len(found)
        print(f"{result['image']}: {shares}" + (f"; nothing of {rest} others" if rest else ""))
    print(f"written to {out}")


@app.command("import")
def import_(
    method: str,
    file: Annotated[Path, typer.Argument(help="Checkpoint: .ckpt, .pt, .pth or .safetensors.")],
    out: Annotated[Path | None, typer.Option(help="Model folder to write; by default models/<file name>.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Encode or model folder with the text encoder, where the file has none; stego: to name by."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with a class name per line: the model's vocabulary; stego: its linear probe's."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value that the file does not tell; may be given again.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights, for the model's card.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Save and use a profile of this name, under which the graph evaluates the model.")
    ] = None,
) -> None:
    """Turn a checkpoint of the official implementation into a model folder. No code in the file is executed.

    Keys of --set for lseg: block, block_depth, activation, readout, heads, temperature, and predict.KEY for the keys
    of lseg.predict in params.yaml; for tcl: statistics, temperature; for stego: heads, facet, head.

    Example: lexiseg import lseg demo_e200.ckpt --out models/demo_e200
    """
    import yaml

    from lexiseg.errors import SettingsError
    from lexiseg.importing import import_model
    from lexiseg.methods import METHODS
    from lexiseg.profiles import check_new_profile, save_profile
    from lexiseg.settings import override
    from lexiseg.stages.settings import parse_settings, read_values

    if profile is not None:  # before the minutes that a large checkpoint takes
        check_new_profile(require_root(), profile)
        parse_settings(read_values(require_root()))
    options = {}
    for pair in set_ or ():
        key, _, value = pair.partition("=")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            value = ""
        if not key or not value:
            raise SettingsError(found=f"--set {pair}", allowed="--set key=value", fix="write it like --set heads=12")
    report = import_model(
        method,
        file,
        out=out or Path("models") / file.stem,
        text=text,
        classes=_lines_of(classes),
        options=options,
        licence=licence,
    )
    print("\n".join(report.lines()))
    labels = "" if METHODS[method].clusters else '--labels "dog, grass, other" '
    print(f"try it: lexiseg predict photo.jpg {labels}--model {report.folder} --out predictions")
    if profile is not None:
        if report.settings is None:
            raise SettingsError(
                found=f"a text side in {report.folder} that is no CLIP with a ViT: no profile was saved",
                allowed="a model whose CLIP can be the graph's, with its dense embeddings as the baseline",
                fix=f"set `{method}.model.init`, its sha256, `encode.text` and `baselines` in params.yaml by hand",
            )
        parse_settings(override(read_values(require_root()), report.settings))
        save_profile(require_root(), profile, changes=report.settings)
        print(f"using the profile {profile}: `dvc repro` evaluates the model on the data set in params.yaml")


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="METHOD@ALIAS or METHOD/VERSION, or models:/NAME@ALIAS of MLflow's registry.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8080,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for a new version; 0: only on SIGHUP.")
    ] = 30.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, max=50_000_000, help="Of all pictures of a request together.")
    ] = LIMITS.pixels,
    max_labels: Annotated[int, typer.Option(min=1, help="Of a request.")] = LIMITS.labels,
    max_body: Annotated[float, typer.Option(min=0.001, help="MB of a request.")] = LIMITS.body_bytes / 1e6,
    max_pictures: Annotated[int, typer.Option(min=1, help="Of a request.")] = LIMITS.pictures,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; those beyond are sent away.")
    ] = LIMITS.queue,
    calls: Annotated[int, typer.Option(min=1, help="Requests computed at once, each on all cores.")] = LIMITS.calls,
) -> None:
    """Serve a registered model over HTTP, and every version that takes its place, until Ctrl+C or SIGTERM.

    Example: lexiseg serve lseg@challenger --port 8080
    """
    from dataclasses import replace

    root = require_root()
    _use_working_tree(root)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _prepare_process(root, threads=int(os.environ.get("OMP_NUM_THREADS") or cores))
    from lexiseg.serving.server import serve as run_server

    limits = replace(
        LIMITS,
        pixels=max_pixels,
        labels=max_labels,
        body_bytes=int(1e6 * max_body),
        pictures=max_pictures,
        queue=queue,
        calls=calls,
    )
    run_server(root, model, host=host, port=port, limits=limits, watch=watch)


@app.command()
def report(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every method beside its baselines, under one protocol.

    Example: lexiseg report --json
    """
    from lexiseg.reporting import read_report, report_lines

    result = read_report(require_root())
    print(json.dumps(result, indent=2) if as_json else "\n".join(report_lines(result)))


@app.command()
def sync() -> None:
    """Publish to MLflow whatever outputs/ holds and MLflow lacks, and write the Data Docs page. Safe to repeat.

    Example: lexiseg sync
    """
    from lexiseg.projections import write_outdated_data_docs
    from lexiseg.tracking.sync import sync as sync_outputs

    root = require_root()
    page = write_outdated_data_docs(root)
    if page is not None:
        print(f"Data Docs written to {page}")
    published = sync_outputs(root)
    from lexiseg.sweeps.publish import publish_studies

    published += publish_studies(root, private_folder(root) / "sweeps", url=os.environ.get("LEXISEG_STORAGE") or None)
    print("\n".join(map(str, published)) if published else "nothing new to publish")


@app.command()
def ablate(
    method: str,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from 0.")] = 3,
    table: Annotated[str | None, typer.Option(help="Which comparison; without it the method's controls.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; may be given again.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Evaluate on this split (val while choosing); may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Run a method's variants and controls over several seeds and print the table.

    Tables of lseg: controls, blocks (spatial regularisation), text-encoder; of tcl: parts, texts; of stego: controls,
    probes (several starts, two numbers of clusters), loss.

    Example: lexiseg ablate lseg --table blocks --seeds 3
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.stages.settings import parse_settings, read_values

    values = read_values(root)
    name = "-".join(filter(None, [method, table, str(values.get("profile"))]))
    target = (out or private_folder(root) / "ablations" / f"{name}.json").absolute()
    _prepare_process(root, threads=parse_settings(values).threads)
    from lexiseg.ablation import ablate as run_ablation
    from lexiseg.ablation import retrieval_lines, table_lines
    from lexiseg.provenance import made_with
    from lexiseg.storage import write_json

    made = made_with(root)  # as it is now: a commit may be made while the trials run
    result = run_ablation(root, method, seeds=range(seeds), table=table, variants=variant or (), splits=split or ())
    write_json(target, result | {"made_with": made})
    print("\n".join([*table_lines(result), "", *retrieval_lines(result)]))
    print(f"written to {target}")


@app.command()
def promote(
    method: str,
    version: Annotated[str | None, typer.Option(help="Number of the version; without it the alias challenger.")] = None,
    to: Annotated[str, typer.Option(help="The alias that it is to get; there are gates for production alone.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Measure and show, and decide nothing.")] = False,
) -> None:
    """Make a registered version production, if it passes the gates of `promotion` in params.yaml.

    The exit code is 1 where it is refused.

    Example: lexiseg promote lseg --to production --check
    """
    from lexiseg.errors import PromotionError

    if to != "production":
        raise PromotionError(
            found=f"--to {to}" if to else "no --to",
            allowed="--to production",
            fix="say what the version is to become; other aliases are set on MLflow's pages, without gates",
        )
    root = require_root()
    _use_working_tree(root)
    from lexiseg.stages.settings import parse_settings, read_values

    _prepare_process(root, threads=parse_settings(read_values(root)).threads)
    from lexiseg.promotion.promote import decide, examine, who_asks

    examination = examine(root, method, version=version)
    if check:
        passed = examination.passed
        print(f"version {examination.candidate.version} {'would be promoted' if passed else 'would be refused'}")
    else:
        entry = decide(root, examination, asked=who_asks("lexiseg promote"))
        passed = entry.decision.outcome == "promoted" and entry.carried_out == "yes"
        print(f"{entry.decision.outcome} version {entry.decision.version}: {entry.decision.reason}")
        if entry.carried_out != "yes":
            print(f"it was not carried out: {entry.carried_out}", file=sys.stderr)
    if not passed:
        for gate in examination.gates:
            if not gate.passed:
                print(f"{gate.name}\n  allowed: {gate.allowed}\n  to do: {gate.fix}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def rollback(
    method: str,
    to: Annotated[str | None, typer.Option(help="Version; without it the one that was production before.")] = None,
    reason: Annotated[str, typer.Option(help="In words, for the history.")] = "",
) -> None:
    """Make a version production again that was production before.

    Example: lexiseg rollback lseg --reason "loses the small signs"
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.promotion.promote import rollback as roll_back
    from lexiseg.promotion.promote import who_asks

    entry = roll_back(root, method, to=to, asked=who_asks("lexiseg rollback"), reason=reason)
    print(f"{entry.decision.outcome} to version {entry.decision.version} (before: version {entry.decision.before})")
    if entry.decision.outcome == "refused" or entry.carried_out != "yes":
        print(entry.decision.reason, f"(carried out: {entry.carried_out})", file=sys.stderr)
        raise typer.Exit(1)


@app.command("retire")
def retire_(
    method: str,
    reason: Annotated[str, typer.Option(help="In words, for the history.")],
) -> None:
    """Leave a method without a production model: the next version is judged as the first was.

    For models that cannot be compared with what comes, such as STEGO's with another number of clusters.

    Example: lexiseg retire stego --reason "other clusters from now on"
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.promotion.promote import retire, who_asks

    entry = retire(root, method, asked=who_asks("lexiseg retire"), reason=reason)
    if entry.carried_out != "yes":
        print(f"version {entry.decision.version} was not retired: {entry.carried_out}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"retired version {entry.decision.version}; no version of {method} is production")


@app.command()
def history(
    method: str, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False
) -> None:
    """Tell every decision on a method's production model, with reason and evidence.

    Example: lexiseg history lseg
    """
    root = require_root()
    from lexiseg.promotion.promote import read_history
    from lexiseg.promotion.story import story_json, story_lines

    found = read_history(root, method)
    print(json.dumps(story_json(found), indent=2, ensure_ascii=False) if as_json else "\n".join(story_lines(found)))


@app.command()
def card(
    method: str,
    version: Annotated[str | None, typer.Option(help="Number of the version; without it the alias challenger.")] = None,
) -> None:
    """Print the model card of a registered version: data, vocabulary, scores with seeds, limits, licences, use.

    Example: lexiseg card lseg
    """
    root = require_root()
    from lexiseg.promotion.promote import read_card

    print(read_card(root, method, version=version))


@app.command()
def doctor() -> None:
    """Check the installation and the working tree; the exit code is 1 where something needs attention.

    Example: lexiseg doctor
    """
    from lexiseg.doctor import examine

    findings = examine(require_root())
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'LOOK'}  {finding.what}")
        if not finding.good:
            print(f"      to do: {finding.fix}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def clean() -> None:
    """Remove the work folders of stages and the copies of flow runs that are not in use, and what dvc left behind.

    outputs/ and DVC's cache stay.

    Example: lexiseg clean
    """
    from lexiseg.copies import remove_copies
    from lexiseg.mend import mend as mend_files
    from lexiseg.stage import clean as clean_work

    root = main_checkout(require_root())
    removed, freed = clean_work(private_folder(root), outputs=root / "outputs")
    print(f"removed {removed} work folders, {freed / 1e6:.0f} MB")
    copies = remove_copies(root)
    if copies:
        print(f"removed {copies} copies of the working tree")
    for line in mend_files(root):
        print(line)


@data_app.command("add")
def data_add(
    name: str,
    path: Annotated[Path, typer.Argument(help="Folder of the raw files.")],
    adapter: Annotated[
        str, typer.Option(help="Layout of the files: camvid, coco, coco20i, folder, fss, pascal5i, world.")
    ],
) -> None:
    """Check a data set, copy it to data/NAME and version it in data.dvc (on no remote).

    Example: lexiseg data add camvid ../CamVid --adapter camvid
    """
    from lexiseg.announce import announce_data
    from lexiseg.data.add import add_data
    from lexiseg.errors import DataError
    from lexiseg.pipeline import changed_data, run_dvc
    from lexiseg.stages.settings import parse_settings, read_values

    root = require_root()
    # DVC records all data sets of data.dvc at once.
    wrong = {path: how for path, how in changed_data(root).items() if how in ("deleted", "modified")}
    wrong.pop(f"data/{name}", None)
    if wrong:
        raise DataError(
            found="; ".join(f"{path} is {how}" for path, how in wrong.items()) + ", unlike what data.dvc records",
            allowed="the other data sets as they are recorded, since all are recorded together",
            fix=f"`dvc pull {' '.join(wrong)}` where a remote has them, `lexiseg data add` with your own copy, or "
            "remove their entries from data.dvc; `dvc commit data.dvc` records a change that is meant",
        )
    limit = parse_settings(read_values(root)).data.max_pixels
    added = add_data(name, path, adapter=adapter, root=root, max_pixels=limit)
    for command in added.commands:
        run_dvc(root, command)
    if added.changed and announce_data(name):
        print("Prefect was told: a deployment that waits for other data starts")
    counts = ", ".join(f"{split} {count}" for split, count in added.splits.items())
    classes = f"{added.classes} classes" if added.classes else "no classes, photographs without labels"
    print(f"data/{name}: {classes}; {counts}" + ("" if added.changed else " (was there before)"))
    print(f"to use it: set data.name: {name} and data.adapter: {adapter}, or `lexiseg profile use` a profile that does")


@weights_app.command("add")
def weights_add(file: Path) -> None:
    """Copy a weight file to weights/ and print its sha256. A .names.txt beside a table comes along.

    Example: lexiseg weights add ~/Downloads/mobilenetv2.safetensors
    """
    from lexiseg.errors import ModelError
    from lexiseg.storage import atomic_path, sha256_of_file

    if not file.is_file():
        raise ModelError(found=f"no file {file}", allowed="a weight file", fix="check the path")
    folder = main_checkout(require_root()) / "weights"
    sources = [path for path in (file, file.with_suffix(".names.txt")) if path.is_file()]
    for source in sources:  # all are looked at before the first is copied
        target = folder / source.name
        if target.is_file() and sha256_of_file(target) != sha256_of_file(source):
            raise ModelError(
                found=f"weights/{source.name} is there already with other content",
                allowed="a name for one content",
                fix="rename the new file, or remove the old one if nothing uses it",
            )
    for source in sources:
        with atomic_path(folder / source.name) as temporary:
            shutil.copyfile(source, temporary)
    print(f"weights/{file.name}  sha256 {sha256_of_file(*sources)}")


@profile_app.command("list")
def profile_list() -> None:
    """List the profiles; a star marks the one in use.

    Example: lexiseg profile list
    """
    from lexiseg.profiles import profile_names
    from lexiseg.stages.settings import read_values

    root = require_root()
    current = read_values(root).get("profile")
    for name in profile_names(root):
        print(f"{'*' if name == current else ' '} {name}")


@profile_app.command("show")
def profile_show() -> None:
    """Check params.yaml and show what it changes against the default.

    Example: lexiseg profile show
    """
    from lexiseg.profiles import BASE, differences
    from lexiseg.settings import read_yaml
    from lexiseg.stages.settings import parse_settings, read_values

    root = require_root()
    values = read_values(root)
    parse_settings(values)
    changes = differences(read_yaml(root / "profiles" / f"{BASE}.yaml"), values)
    for key, value in sorted(changes.items()):
        print(f"{key}: {value}")
    if not changes:
        print("params.yaml is the default")


@profile_app.command("use")
def profile_use(
    name: str, force: Annotated[bool, typer.Option(help="Drop unsaved edits of params.yaml.")] = False
) -> None:
    """Write params.yaml for a profile. Unsaved edits are never overwritten, unless forced.

    Example: lexiseg profile use camvid
    """
    from lexiseg.profiles import use_profile

    before = use_profile(require_root(), name, force=force)
    print(f"params.yaml: {before} -> {name}; `dvc repro` runs it")


@profile_app.command("save")
def profile_save(name: str) -> None:
    """Keep the edits of params.yaml as a profile of their own.

    Example: lexiseg profile save mine
    """
    from lexiseg.profiles import save_profile

    keys = save_profile(require_root(), name)
    print(f"profiles/{name}.yaml: {len(keys)} values")


Storage = Annotated[
    str | None,
    typer.Option(
        envvar="LEXISEG_STORAGE",
        show_envvar=True,
        help="SQLAlchemy address of the database, such as postgresql://…; without it .lexiseg/sweeps.db.",
    ),
]


@sweep_app.command("run")
def sweep_run(
    method: str,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="A space of the method, KEY, KEY=low..high[,log], KEY=a|b, or a YAML file; may be given again."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=value that all trials share; may be given again.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials of the whole study, those that are there included.")] = 20,
    study: Annotated[str | None, typer.Option(help="Its name; without it METHOD-SPACE.")] = None,
    storage: Storage = None,
    workers: Annotated[int, typer.Option(help="Processes that work on trials at once.")] = 1,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="Metric, latency or memory, NAME or NAME:min; miou without it. Given again: compromises."),
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help='"NAME<=NUMBER" or "NAME>=NUMBER"; latency in ms, memory in MB.')
    ] = None,
    split: Annotated[str, typer.Option(help="Whose metrics are compared; never the one that is reported.")] = "val",
    seed: Annotated[int, typer.Option(min=0, help="Of the search alone.")] = 0,
    prune: Annotated[bool, typer.Option(help="End trainings that are behind the others.")] = True,
    gpus: Annotated[float, typer.Option(min=0, help="On a Ray cluster: GPUs of each worker, such as 0.5.")] = 0.0,
    dry: Annotated[bool, typer.Option("--plan", help="Show the plan and its cost, and run nothing.")] = False,
) -> None:
    """Search settings of a method by Optuna, on stages of the graph. The same command goes on with a study.

    Example: lexiseg sweep run tcl --space inference --trials 20 --plan
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.stages.settings import parse_settings, read_values

    # Before the process goes to the root of the working tree.
    space = [str(Path(one).resolve()) if one.endswith((".yaml", ".yml")) else one for one in space or ()]
    _prepare_process(root, threads=parse_settings(read_values(root)).threads)
    from lexiseg.sweeps.results import best_trials, study_lines
    from lexiseg.sweeps.sweep import Request, prepare, sweep, sweep_folder

    request = Request(
        method=method,
        space=space,
        fixed=set_ or (),
        trials=trials,
        study=study,
        storage=storage,
        workers=workers,
        objectives=objective or (),
        constraints=constraint or (),
        split=split,
        seed=seed,
        prune=prune,
        gpus=gpus,
    )
    prepared = prepare(root, request)
    print("\n".join(prepared.lines(trials=trials, workers=workers)), flush=True)
    if dry:
        return
    print(flush=True)
    found = sweep(root, request, prepared)
    print("\n".join(["", *study_lines(found)]))
    print(f"pictures and logs in {sweep_folder(root, found.study_name)}")
    if len(best_trials(found)) == 1:
        print(f"`lexiseg sweep apply {found.study_name}` writes the best trial into params.yaml")


@sweep_app.command("show")
def sweep_show(
    study: Annotated[str | None, typer.Argument(help="Name of a study; none: list them.")] = None,
    storage: Storage = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the trials of a study, or the studies that there are.

    Example: lexiseg sweep show
    """
    root = require_root()
    from lexiseg.sweeps.results import study_json, study_lines
    from lexiseg.sweeps.study import counts, load_study, open_storage, storage_url, study_names

    opened = open_storage(storage_url(root, storage))
    if study is not None:
        found = load_study(opened, study)
        print(json.dumps(study_json(found), indent=2) if as_json else "\n".join(study_lines(found)))
        return
    names = study_names(opened)
    listed = {name: counts(load_study(opened, name)) for name in names}
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    for name, number in listed.items():
        print(f"{name}: {', '.join(f'{count} {state}' for state, count in number.items() if count) or 'no trial yet'}")
    if not names:
        print("no study yet; `lexiseg sweep METHOD` makes one")


@sweep_app.command("apply")
def sweep_apply(
    study: str,
    trial: Annotated[int | None, typer.Option(help="Number of the trial; without it the best.")] = None,
    storage: Storage = None,
) -> None:
    """Write the best trial of a study into params.yaml; `dvc repro` then gives its score, and that on other splits.

    Example: lexiseg sweep apply tcl-inference
    """
    root = require_root()
    from lexiseg.sweeps.apply import apply_trial
    from lexiseg.sweeps.study import load_study, open_storage, storage_url

    found = load_study(open_storage(storage_url(root, storage)), study)
    changed, differing = apply_trial(root, found, slot=trial)
    for key, value in changed.items():
        print(f"params.yaml: {key} = {value}")
    if not changed:
        print("params.yaml has these values already")
    if differing:
        print("note: the score will be another one than the trial's, since")
        print("\n".join(f"  {line}" for line in differing))
    print("`dvc repro` runs it; `lexiseg profile save NAME` keeps it")


@sweep_app.command("work", hidden=True)
def sweep_work(study: str, name: Annotated[str, typer.Option()] = "", storage: Storage = None) -> None:
    """Work on a study until it is done; `lexiseg sweep METHOD` starts this.

    Example: lexiseg sweep work tcl-inference
    """
    root = require_root()
    _use_working_tree(root)
    from lexiseg.stages.settings import parse_settings, read_values

    _prepare_process(root, threads=parse_settings(read_values(root)).threads)
    from lexiseg.sweeps.study import load_study, open_storage, storage_url, worker_name
    from lexiseg.sweeps.worker import work

    opened = open_storage(storage_url(root, storage))
    work(root, lambda: load_study(opened, study), name=name or worker_name(0))


@stego_app.command("diagnose")
def stego_diagnose(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("diagnosis"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Show similarities by kind of pair, shifts that fit them, signs of a collapse, and the use of the clusters.

    Reads outputs/stego as far as its stages have run; stego-neighbours is enough for the shifts.

    Example: lexiseg stego diagnose --out diagnosis
    """
    root = require_root()
    from lexiseg.methods.stego.diagnostics import diagnose
    from lexiseg.stages.settings import parse_settings, read_values

    settings, out = parse_settings(read_values(root)), out.absolute()
    _prepare_process(root, threads=settings.threads)
    table, lines = diagnose(root / "outputs" / "stego", settings.stego, seed=settings.seed, out=out)
    print(json.dumps(table, indent=2) if as_json else "\n".join([*lines, f"pictures written to {out}"]))


def _lines_of(path: Path | None) -> list[str]:
    """Names from a text file, without empty lines."""
    if path is None:
        return []
    from lexiseg.errors import DataError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            found=f"{path} cannot be read ({type(error).__name__})",
            allowed="a UTF-8 text file with a name per line",
            fix="check the path",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def main() -> None:
    """Entry point: errors that a user can act on come as three lines, without a traceback."""
    try:
        app()
    except LexisegError as error:
        _fail(error)
    except OSError as error:
        from lexiseg.storage import refused_write

        refused = refused_write(error)
        if refused is None:
            raise
        _fail(refused)


def _fail(error: LexisegError) -> None:
    print(f"error ({type(error).__name__})\n{error}", file=sys.stderr)
    sys.exit(1)


def _prepare_process(root: Path, *, threads: int) -> None:
    # Before torch is imported: it reads the count once.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    environment.keep_memory()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    os.chdir(root)


def _use_working_tree(root: Path) -> None:
    """Restart with the working tree's own package where another one was imported (copies made by dvc exp run)."""
    import lexiseg

    own = root / "src" / "lexiseg"
    if Path(lexiseg.__file__).resolve().parent == own.resolve() or not own.is_dir():
        return
    if os.environ.get("LEXISEG_RESTARTED") == str(root):
        raise StageError(
            found=f"the imported lexiseg package is {Path(lexiseg.__file__).parent}, also after a restart",
            allowed=f"the one of this working tree, {own}",
            fix=f"set PYTHONPATH={root / 'src'}, or install this tree with `pip install -e .`",
        )
    variables: dict[str, str] = dict(os.environ, LEXISEG_RESTARTED=str(root))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, "-m", "lexiseg", *sys.argv[1:]], variables)


if __name__ == "__main__":
    main()
