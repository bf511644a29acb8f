"""Every command of the README, the docs and the help texts is run, in a working tree that is small but whole.

Blocks marked sh, console or python are collected, and yaml ones, which are settings that the reader puts into
params.yaml; a page's blocks run in their order in one copy of the tree.
What cannot run here as it stands is listed in INSTEAD with the reason and with what runs in its place. The installation
of `make` is taken as done, everything else of it is run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import timm
import torch
import typer.main
from helpers.coco import write_captioned, write_coco
from helpers.micro import save
from helpers.official_lseg import write_checkpoint
from helpers.official_tcl import officially_named
from helpers.stego_checkpoint import write_checkpoint as write_stego_checkpoint
from helpers.working_tree import SOURCE, change, environment, run, write_street
from ruamel.yaml import YAML
from safetensors.torch import save_file

from lexiseg.cli import app
from lexiseg.data.adapters.coco_words import STUFF, THINGS
from lexiseg.pipeline import read_graph
from lexiseg.settings import read_yaml
from lexiseg.storage import load_tensors, sha256_of_file

PAGES = [
    "README.md",
    *sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("docs/*.md")),
    *sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("src/**/*.md")),
]
# Pages whose commands train a model of real size or run whole graphs: in `make test-all` only.
SLOW_PAGES = {
    *("docs/own-data.md", "docs/lseg.md", "docs/tcl.md", "docs/stego.md"),
    *("docs/prefect.md", "docs/sweeps.md", "docs/cluster.md", "docs/promotion.md"),
}
# Pages whose blocks need a server: tests/serving/test_page.py runs them against one.
SERVED_PAGES = {"docs/serving.md"}
LANGUAGES = ("sh", "console", "python", "yaml")
# A page may hold a whole repro; on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(1200)

_FOR_EACH_DATABASE = "for name in mlflow mlflow_auth prefect sweeps; do docker compose exec -T postgres"
# Command -> (what runs instead, why). An empty string runs nothing.
INSTEAD = {
    "source .venv/bin/activate": ("", "the tools of this Python are on PATH already"),
    "make test": ("make --dry-run test", "this is a test of `make test`"),
    "make ui": ("make --dry-run ui", "serves until it is stopped; tests/test_make.py starts it and asks for a page"),
    "python flows/workpools.py": ("", "needs a Prefect server; tests/journeys/test_prefect.py has one"),
    **dict.fromkeys(
        ("make server", "make worker"),
        ("", "serve until they are stopped; tests/journeys/test_prefect.py starts them and looks at what they do"),
    ),
    **dict.fromkeys(
        (
            "prefect --no-prompt deploy --all",
            "prefect deployment run reproduce/lseg",
            "prefect deployment run reproduce/all --param 'settings={\"lseg.train.lr\": 0.002}'",
        ),
        ("", "needs a Prefect server; tests/journeys/test_prefect.py has one"),
    ),
    "prefect deployment run sweep/tcl --param trials=50": ("", "needs a Prefect server"),
    **{
        f"pip install -c constraints.txt -e '.[{extra}]'": ("", "the extras are there")
        for extra in ("sweeps", "ray,sweeps", "team")
    },
    **dict.fromkeys(
        (
            "export LEXISEG_STORAGE=postgresql://lexiseg:PASSWORD@db.example.org/sweeps",
            "lexiseg sweep tcl --space weights --trials 200 --study wide --workers 2",
        ),
        ("", "needs a PostgreSQL server; tests/journeys/test_sweep.py has one, and two checkouts"),
    ),
    **dict.fromkeys(
        (
            "git clone https://github.com/you/lexiseg /shared/lexiseg",
            "cd /shared/lexiseg && make install",
            ".venv/bin/pip install -c constraints.txt -e '.[ray,sweeps]'",
            ".venv/bin/ray get-auth-token --generate",
            "export RAY_AUTH_MODE=token",
            "RAY_USAGE_STATS_ENABLED=0 .venv/bin/ray start --head --port 6379",
            "RAY_USAGE_STATS_ENABLED=0 .venv/bin/ray start --address 10.0.0.1:6379",
            "export LEXISEG_RAY=10.0.0.1:6379",
            "createdb sweeps",
            "export LEXISEG_STORAGE=postgresql://lexiseg:PASSWORD@10.0.0.2/sweeps",
            "lexiseg sweep tcl --space weights --trials 200 --workers 8 --gpus 0.5",
            "pip install dvc-s3",
            "dvc remote add --local store s3://bucket/lexiseg",
            "dvc push --remote store data/camvid outputs/lseg/train",
            "dvc pull --remote store data/camvid",
        ),
        ("", "needs machines, a database or a bucket of one's own; tests/journeys have Ray's local cluster"),
    ),
    # docs/promotion.md
    "lexiseg promote lseg --to production": (
        "lexiseg sync && sed -i 's/lseg: {miou: 0.45}/lseg: {miou: 0.0}/; s/latency: 500.0/latency: 60000.0/' "
        "params.yaml && lexiseg promote lseg --to production",
        "the models of the small tree can nothing, and the machine of a test may be slow",
    ),
    **{
        f"lexiseg promote {method} --to production --check": (
            f"lexiseg sync && (lexiseg promote {method} --to production --check || true) | grep 'would be '",
            "the models of the small tree can nothing, so it may be refused",
        )
        for method in ("lseg", "tcl")
    },
    'lexiseg rollback lseg --reason "loses the small signs"': (
        '(lexiseg rollback lseg --reason "loses the small signs" 2>&1 || true) | grep "no way back from"',
        "there is one version, and nothing to go back to; tests/journeys/test_promotion.py rolls back",
    ),
    'lexiseg retire stego --reason "other clusters from now on"': (
        '(lexiseg retire stego --reason "other clusters from now on" 2>&1 || true) | grep "no production model"',
        "no model of stego is in production there; tests/promotion/test_promote.py retires one",
    ),
    "lexiseg card lseg": ("lexiseg sync && lexiseg card lseg", "the tree of the help texts has registered nothing"),
    "python flows/promote.py --method stego": (
        "(python flows/promote.py --method stego || true) | grep -E '^(refused|promoted) version '",
        "the models of the small tree can nothing, so it may be refused; tests/flows/test_promote.py promotes",
    ),
    "prefect deployment run promote/challenger-with-approval --param method=tcl": (
        "",
        "needs a Prefect server, and a human; tests/journeys/test_prefect.py has both",
    ),
    "python benchmarks/promotion_error.py": (
        "python benchmarks/promotion_error.py --pairs 2 --images 2",
        "the small tree has four pictures",
    ),
    # docs/team.md
    **dict.fromkeys(
        (
            "docker compose up --detach --build",
            "docker compose ps",
            "docker compose stop mlflow",
            "docker compose stop mlflow prefect optuna-dashboard",
            "docker compose build",
            "docker compose up --detach",
        ),
        ("", "no Docker in tests; tests/journeys/test_team.py starts and stops the same processes"),
    ),
    **dict.fromkeys(
        (
            f"{_FOR_EACH_DATABASE} pg_dump --username=postgres --format=custom $name > backup/$name.dump; done",
            f"{_FOR_EACH_DATABASE} dropdb --username=postgres --if-exists --force $name; done",
            f"{_FOR_EACH_DATABASE} pg_restore --username=postgres --exit-on-error --dbname=$name"
            " < backup/$name.dump; done",
            "docker compose run --rm databases",
            "docker compose run --rm mlflow mlflow db upgrade postgresql:///mlflow",
            "docker compose run --rm mlflow python -m mlflow.server.auth db upgrade --url postgresql:///mlflow_auth",
            *(
                "docker compose run --rm --user $(id -u) --volume ./backup:/backup"
                f" bucket python /team/bucket.py {what} /backup/objects"
                for what in ("save", "load")
            ),
        ),
        ("", "no Docker in tests; tests/journeys/test_team.py reads these lines and runs them on its own servers"),
    ),
    **dict.fromkeys(
        (
            "python team/users.py add anna",
            "python team/users.py add guest --reader",
            "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
            "export LEXISEG_STORAGE=postgresql://sweeps@127.0.0.1:5432/sweeps",
            "lexiseg sweep tcl --space weights --trials 20 --study wide",
            "dvc push --remote team data/camvid",
        ),
        ("", "needs a team's servers; tests/journeys/test_team.py has them, users, a study and a push"),
    ),
    **dict.fromkeys(
        (
            "read -rs MLFLOW_TRACKING_PASSWORD && export MLFLOW_TRACKING_PASSWORD",
            "read -rs PREFECT_API_AUTH_STRING && export PREFECT_API_AUTH_STRING",
            "read -rs PGPASSWORD && export PGPASSWORD",
            "read -rs AWS_ACCESS_KEY_ID && read -rs AWS_SECRET_ACCESS_KEY"
            " && export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY",
        ),
        ("", "asks for what a person types"),
    ),
    **dict.fromkeys(
        (
            "sudo --preserve-env=MLFLOW_DB_PASSWORD,PREFECT_DB_PASSWORD,SWEEPS_DB_PASSWORD"
            " -u postgres psql < team/databases.sql",
            "mlflow server --app-name=basic-auth --backend-store-uri=postgresql:///mlflow"
            " --artifacts-destination=/srv/lexiseg/artifacts --host=127.0.0.1 --port=5000 --workers=1"
            " --allowed-hosts=localhost:5000,127.0.0.1:5000 --cors-allowed-origins=http://localhost:5000",
            "prefect server start --host=127.0.0.1 --port=4200",
            "optuna studies --storage=postgresql:///sweeps",
            "optuna-dashboard --host=127.0.0.1 --port=8080 postgresql:///sweeps",
        ),
        (
            "",
            "needs PostgreSQL, and serves until it is stopped; tests/test_compose.py sees that these are the commands"
            " of compose.yaml, which tests/journeys/test_team.py starts",
        ),
    ),
    "optuna-dashboard sqlite:///.lexiseg/sweeps.db": (
        "optuna studies --storage sqlite:///.lexiseg/sweeps.db",
        "serves until it is stopped; tests/journeys/test_sweep.py starts it and asks for the studies",
    ),
    "lexiseg sweep tcl --space inference --trials 20": (
        "lexiseg sweep tcl --space inference --trials 3",
        "three trials show what twenty do",
    ),
    "lexiseg sweep tcl --space inference --trials 8 --workers 2 --study two": (
        "lexiseg sweep tcl --space inference --trials 3 --workers 2 --study two",
        "three trials show what eight do",
    ),
    "lexiseg sweep apply tcl-inference": (
        "lexiseg sweep apply tcl-inference || lexiseg sweep show",
        "an example of the help texts: there is no study in their tree; docs/sweeps.md has one",
    ),
    "lexiseg sweep work tcl-inference": (
        "lexiseg sweep work tcl-inference || lexiseg sweep show",
        "there is no study in the tree of the help texts; `lexiseg sweep METHOD` starts it",
    ),
    "lexiseg serve lseg@challenger --port 8080": (
        "",
        "serves until it is stopped; tests/serving/test_server.py starts it and asks",
    ),
    "export PREFECT_API_URL=http://127.0.0.1:4200/api": ("", "no server is there, and flows would wait for it"),
    "lexiseg doctor": ("lexiseg doctor || test $? = 1", "finding fault with this machine is its job"),
    "lexiseg ablate lseg --seeds 3": (
        "lexiseg ablate lseg --seeds 1 --variant 'as set'",
        "three variants and three seeds are nine trainings; one is run",
    ),
    "lexiseg ablate tcl --seeds 3": (
        "lexiseg ablate tcl --seeds 1 --variant '+ area'",
        "seven variants and three seeds are 21 trials; one is run",
    ),
    "lexiseg ablate tcl --table texts --seeds 3": (
        "lexiseg ablate tcl --table texts --seeds 1 --variant nouns",
        "two variants and three seeds are six trainings; one is run",
    ),
    "lexiseg ablate stego --seeds 3": (
        "lexiseg ablate stego --seeds 1 --variant 'k-means, whitened'",
        "eight variants and three seeds are 24 trials; one is run",
    ),
    "lexiseg ablate stego --table probes --seeds 3": (
        "lexiseg ablate stego --table probes --seeds 1 --variant 'STEGO (as set), start 1'",
        "16 variants and three seeds are 48 trials; one is run",
    ),
    "lexiseg ablate stego --table loss --seeds 3": (
        "lexiseg ablate stego --table loss --seeds 1 --variant 'no clamp'",
        "twelve variants and three seeds are 36 trials; one is run",
    ),
    "lexiseg ablate lseg --table blocks --seeds 3": (
        "lexiseg ablate lseg --table blocks --seeds 1 --variant 'bottleneck 2'",
        "seven variants and three seeds are 21 trainings; one is run",
    ),
    "lexiseg ablate lseg --table text-encoder --seeds 3": (
        "lexiseg ablate lseg --table text-encoder --seeds 1 --variant '1 text block'",
        "four variants and three seeds are twelve trainings; one is run",
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks whose commands are run."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if match[1] in LANGUAGES:
            found.append(Block(match[1], match[2], text.count("\n", 0, match.start()) + 2))
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block: whole lines, continued ones joined; in console blocks those after `$ `."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    # A comment begins with # and a space, at the start of the line or after two spaces.
    lines = [re.split(r"(?:^|\s\s)# ", line)[0].strip() for line in lines]
    return [re.sub(r"\s+", " ", line) if '"' not in line else line for line in lines if line]


def script_of(block: Block) -> str:
    """What bash runs for a shell block."""
    return "\n".join(INSTEAD.get(command, (command, ""))[0] for command in commands_of(block))


def run_block(block: Block, tree: Path, page: str) -> None:
    if block.language == "yaml":
        change(tree / "params.yaml", YAML(typ="safe").load(block.text))
        return
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    else:
        command = ["bash", "-euo", "pipefail", "-c", script_of(block)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{page}:{block.line}\n{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture
def stage_set(micro_tree: Path) -> Path:
    """The working tree with what the commands take from outside it: photographs, a data set, weight files."""
    beside, home = micro_tree.parent, micro_tree.parent
    write_street(beside / "CamVid")
    names = enumerate([*THINGS, *STUFF], start=1)
    write_coco(
        beside / "COCO",
        categories=[{"id": id, "name": name, "isthing": int(name in THINGS)} for id, name in names],
        size=5,
    )
    write_captioned(beside / "COCO")
    few = {"encode": {"pretrain": {"steps": 2}}, "tcl": {"train": {"steps": 2, "batch": 2}}}
    change(micro_tree / "profiles/coco_captions.yaml", few)
    shutil.copy(beside / "CamVid/test/test_0.png", micro_tree / "photo.jpg")
    downloads = home / "Downloads"
    downloads.mkdir()
    shutil.copy(micro_tree / "outputs/lseg/register/model.safetensors", downloads / "mobilenetv2.safetensors")
    profile = read_yaml(micro_tree / "profiles/camvid.yaml")["encode"]
    backbone = timm.create_model(profile["backbone"]["name"], pretrained=False, **profile["backbone"]["options"])
    save_file(backbone.state_dict(), downloads / Path(profile["backbone"]["weights"]).name)
    table = downloads / Path(profile["text"]["path"]).name
    words = ["sky", "building", "skyscraper", "traffic light", "road", "pavement", "tree", "street sign", "fence"]
    words += ["car", "person", "bicycle", "grass", "dog"]
    words = list(dict.fromkeys([*words, *THINGS, *STUFF]))
    np.save(table, torch.nn.functional.normalize(torch.randn(len(words), 64), dim=1).numpy())
    table.with_suffix(".names.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    hashes = {"backbone": sha256_of_file(downloads / Path(profile["backbone"]["weights"]).name)}
    hashes["text"] = sha256_of_file(table, table.with_suffix(".names.txt"))
    used = {
        **dict.fromkeys(("camvid", "coco"), ("backbone", "text")),
        **dict.fromkeys(("camvid_stego", "photos"), ("backbone",)),
    }
    for name, parts in used.items():
        change(micro_tree / f"profiles/{name}.yaml", {"encode": {part: {"sha256": hashes[part]} for part in parts}})
    # There are four photographs to learn from.
    change(micro_tree / "profiles/camvid_stego.yaml", {"stego": {"neighbours": {"count": 2}}})
    few = {"neighbours": {"count": 2}, "features": {"crop": 64}, "train": {"steps": 2, "batch": 4}}
    change(micro_tree / "profiles/photos.yaml", {"stego": few})
    write_checkpoint(micro_tree / "demo_e200.ckpt")
    write_stego_checkpoint(micro_tree / "cocostuff27_vit_base_5.ckpt")
    grounder = load_tensors(micro_tree / "outputs/tcl/train/model.safetensors")
    torch.save({"model": officially_named(grounder)}, micro_tree / "tcl.pth")
    for number in range(8):  # of three sizes, from upright to lying
        shape = (96 + 16 * (number % 3), 128 - 16 * (number % 3), 3)
        save(beside / f"photos/images/{number}.png", np.random.default_rng(number).integers(0, 256, shape, np.uint8))
    own = beside / "pictures"
    for split in ("train", "val", "test"):
        for folder, source in (("images", split), ("masks", f"{split}annot")):
            (own / folder / split).mkdir(parents=True)
            for file in sorted((beside / "CamVid" / source).iterdir()):
                shutil.copy(file, own / folder / split)
    (own / "classes.txt").write_text("".join(f"{number} class {number}\n" for number in range(12)), encoding="utf-8")
    return micro_tree


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW_PAGES else [])
        for page in PAGES
        if page not in SERVED_PAGES
    ],
)
def test_the_commands_of_a_page_run(page, stage_set):
    for block in blocks_of((SOURCE / page).read_text(encoding="utf-8")):
        run_block(block, stage_set, page)


def help_examples() -> dict[str, str]:
    """The example in the help of every command."""
    found, waiting = {}, [("lexiseg", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        children = getattr(command, "commands", {})
        waiting += [(f"{name} {child}", group) for child, group in children.items()]
        if not children:
            found[name] = (re.findall(r"Example: (.+)", command.help or "") or [""])[0]
    return found


def test_every_command_has_an_example_of_itself():
    wrong = {name: example for name, example in help_examples().items() if not example.startswith(f"{name} ".rstrip())}
    assert not wrong


@pytest.mark.slow
def test_the_examples_of_the_help_texts_run(stage_set):
    # In an order in which each finds what it needs: params.yaml as committed for all but the profiles.
    examples = sorted(help_examples().values(), key=lambda text: ("profile" in text, "save" not in text, "use" in text))
    for example in examples:
        run_block(Block("sh", example, 0), stage_set, "lexiseg --help")


def test_every_exception_is_needed():
    commands = set(help_examples().values())
    for page in PAGES:
        for block in blocks_of((SOURCE / page).read_text(encoding="utf-8")):
            commands |= set(commands_of(block)) if block.language in ("sh", "console") else set()
    assert set(INSTEAD) <= commands


def test_no_command_hides_in_another_kind_of_block():
    for page in PAGES:
        text = (SOURCE / page).read_text(encoding="utf-8")
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            known = (*LANGUAGES, "text", "mermaid", "json")
            assert language in known, f"{page}: a block marked `{language}`; known are {', '.join(known)}"
            if language not in LANGUAGES:
                assert not re.search(r"^(\$ |lexiseg |dvc |make |git |pip )", body, flags=re.MULTILINE), page


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    text = (SOURCE / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (SOURCE / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_exist(page):
    """`lexiseg …` and `make …` in running text name commands and targets there are."""
    text = (SOURCE / page).read_text(encoding="utf-8")
    names = help_examples()
    targets = re.findall(r"^([a-z][a-z-]*):", (SOURCE / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for words in re.findall(r"`(lexiseg [a-z][^`]*)`", text):
        # `lexiseg sweep METHOD` is short for `lexiseg sweep run METHOD`.
        words = re.sub(r"^lexiseg sweep(?! run| show| apply)", "lexiseg sweep run", words)
        assert any(words == name or words.startswith(f"{name} ") for name in names), f"{page}: {words}"
    for target in re.findall(r"`make ([a-z-]+)[^`]*`", text):
        assert target in targets, f"{page}: make {target}"


def drawn_graph() -> str:
    """dvc.yaml as a Mermaid flowchart. Arrows that follow from others are left out."""
    nodes = read_graph(SOURCE)
    graph = nx.DiGraph()
    for node in nodes.values():
        for dep in node.deps:
            if dep.startswith("data/"):
                graph.add_edge("data.dvc", node.name)
            for other in nodes.values():
                if other is not node and any(dep == out or out.startswith(f"{dep}/") for out in other.outs):
                    graph.add_edge(other.name, node.name)

    def shown(name: str) -> str:
        return f'{re.sub("[^a-z]", "_", name)}["{name}"]'

    edges = sorted(nx.transitive_reduction(graph).edges)
    return "\n".join(["flowchart TD", *(f"  {shown(start)} --> {shown(end)}" for start, end in edges)]) + "\n"


def test_the_picture_of_the_graph_is_the_graph():
    text = (SOURCE / "docs/architecture.md").read_text(encoding="utf-8")
    expected = f"```mermaid\n{drawn_graph()}```"
    assert expected in text, f"put this into docs/architecture.md:\n{expected}"


def test_the_drawing_has_the_stages_that_dvc_sees():
    drawn = set(re.findall(r'\["([^"]+)"\]', drawn_graph()))
    assert drawn == set(re.findall(r'\["([^"]+)"\]', run(SOURCE, *shlex.split("dvc dag --mermaid")).stdout))
