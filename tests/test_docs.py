"""What the documentation says is there: links, files, commands, options, fields and messages."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import math
import pathlib
import re
import runpy
import shlex
import sys

import pytest

# A main that another test has imported is run once more, which runpy warns of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
CHECKPOINTS = ("ls", "verify", "inspect", "prune", "average", "copy")
# The command of every verb, and the page that lists its options.
COMMANDS = {
    "qk_jax.train": "docs/train.md",
    "qk_jax.sample": "docs/sample.md",
    "qk_jax.app": "docs/app.md",
    "qk_jax.convert from-pytorch": "docs/convert.md",
    "qk_jax.convert to-pytorch": "docs/convert.md",
    "qk_jax.convert verify": "docs/convert.md",
    "qk_jax.convert bench": "docs/convert.md",
    **{f"qk_jax.checkpoints {verb}": "docs/train.md" for verb in CHECKPOINTS},
    "qk_jax.bench cost": "docs/bench.md",
    "qk_jax.bench shardings": "docs/bench.md",
    "qk_jax.bench peer": "docs/bench.md",
    "qk_jax.bench layouts": "docs/layouts.md",
    "qk_jax.bench precompile": "docs/bench.md",
    "qk_jax.bench checkpoints": "docs/bench.md",
    "qk_jax.data import": "docs/data.md",
    "qk_jax.data index": "docs/data.md",
    "qk_jax.data bench": "docs/data.md",
    "qk_jax.data look": "docs/data.md",
    "qk_jax.data synthesize": "docs/data.md",
    "qk_jax.api.paint": "docs/data.md",
    "qk_jax.api.judge": "docs/data.md",
    "qk_jax.evaluate report": "docs/evaluate.md",
}
# They are run by `data synthesize --command`, with folders that it makes.
SHIPPED = {"qk_jax.api.paint", "qk_jax.api.judge"}
# Every command has them; docs/install.md says what they are for.
COMMON = {"--version", "--print-completion"}
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def slugs(text):
    """Anchors that GitHub gives the headings of a page."""
    found = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", FENCE.sub("", text), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        slug if not n else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)
    }


def broken(page):
    """Links of a page that lead nowhere; those to other sites are not followed."""
    text = FENCE.sub("", text_of(page))
    for target in re.findall(r"!?\[[^]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or anchor and anchor not in slugs(file.read_text(encoding="utf-8")):
            yield target


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    assert not list(broken(page))


def test_a_broken_link_and_a_missing_heading_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](gone.md) [b](#one-two-three) [c](#four) [d](page.md)\n"
    )
    assert list(broken(page)) == ["gone.md", "#four"]


def test_readme_is_short_and_every_page_is_in_the_index():
    assert len(text_of("README.md").splitlines()) <= 150
    index = text_of("docs/index.md")
    assert not [
        page for page in NAMES if page != "docs/index.md" and f"{page.split('/')[-1]})" not in index
    ]


@pytest.mark.parametrize("page", NAMES)
def test_lines_can_be_read_in_a_terminal(page):
    prose = [line for line in text_of(page).splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > 120]


@pytest.mark.parametrize("page", [name for name in NAMES if name != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
    """Paths in the repository; one with a NAME or ... in it is a pattern."""
    spans = " ".join(re.findall(r"`+([^`]+)`+", text_of(page)))
    pattern = r"(?<![\w/.-])(?:qk_jax|configs|launch|tests|docs|\.github)/[\w./-]*\w/?"
    found = {name for name in re.findall(pattern, spans) if not re.search(r"[A-Z]{4}", name)}
    assert not [name for name in sorted(found) if not (ROOT / name).exists()]


def code(page, *languages):
    """The fenced blocks of a page in one of the languages, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.M | re.S)
    return [body.replace("\\\n", " ") for language, body in blocks if language in languages]


@pytest.mark.parametrize("page", NAMES)
def test_python_imports_what_there_is(page):
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("qk_jax"):
                module = importlib.import_module(node.module)
                assert not [name.name for name in node.names if not hasattr(module, name.name)]


@functools.cache
def help_of(command):
    """What a command answers to --help."""
    module, *verb = command.split()
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [module, *verb, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_table_row(command):
    text = text_of(COMMANDS[command])
    section = f"\n## {command.split()[-1]}\n"
    if section in text:  # else the whole page is about the command
        text = text.split(section)[1].split("\n## ")[0]
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `--"))
    assert not set(OPTION.findall(help_of(command))) - COMMON - set(OPTION.findall(rows))


def test_what_all_commands_have_is_documented_once():
    assert set(OPTION.findall(text_of("docs/install.md"))) >= COMMON


def commands(page):
    """(module, module and verb, options) of every command of ours on a page."""
    lines = "\n".join([*code(page, "bash"), *re.findall(r"`(python -m [^`]+)`", text_of(page))])
    for module, rest in re.findall(r"python -m (qk_jax[\w.]+)((?:(?!python -m )[^\n#])*)", lines):
        verb = re.match(r" +([a-z][a-z-]*)", rest)
        options = set(OPTION.findall(re.sub(r"--config\.\S+", "", rest)))
        yield module, f"{module} {verb[1]}" if verb else module, options


def is_main(module):
    spec = importlib.util.find_spec(module)
    is_package = spec and spec.submodule_search_locations
    return bool(importlib.util.find_spec(f"{module}.__main__") if is_package else spec)


@pytest.mark.parametrize("page", NAMES)
def test_commands_and_their_options_exist(page):
    assert not [module for module, _, _ in commands(page) if not is_main(module)]
    for _, command, options in commands(page):
        assert not options or not options - set(OPTION.findall(help_of(command))), command


@functools.cache
def fields():
    """{field: value} of the configs, sections among them."""
    from qk_jax.experiment import config

    found = {}
    for spec in ("stage3.py:tiny", "stage3.py:20b"):
        for name, value in config.fields(config.load(str(ROOT / "configs" / spec))):
            parts = name.split(".")
            found |= {".".join(parts[:end]): None for end in range(1, len(parts))} | {name: value}
    return found


@pytest.mark.parametrize("page", NAMES)
def test_config_fields_exist(page):
    named = set(re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", text_of(page)))
    assert named <= fields().keys()


def test_every_config_field_is_documented():
    """Architectures and cells of the sharding table are documented as sections."""
    named = set(re.findall(r"`([a-z_0-9.]+)`", text_of("docs/train.md")))
    sections = ("model.vlm.", "model.mmdit.", "model.vae.", "sharding.")
    leaves = [
        name for name in fields() if not any(other.startswith(f"{name}.") for other in fields())
    ]
    assert not [x for x in leaves if x not in named and not x.startswith(sections)]


def messages():
    """Every text of the program with … where a value is put in, and the texts of the scripts."""
    for file in [*(ROOT / "qk_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
            if isinstance(node, ast.JoinedStr | ast.Constant) and all(
                isinstance(text, str) for text in texts
            ):
                yield "".join(texts)
    for file in (ROOT / "launch").glob("*.sh"):
        yield re.sub(r"\$\w+", "…", file.read_text(encoding="utf-8"))


def test_messages_that_are_explained_exist():
    known = list(messages())
    for line in text_of("docs/errors.md").splitlines():
        match = re.match(r"\| `([^`]+)`", line)
        if match and match[1] not in ("RESOURCE_EXHAUSTED", "data_wait"):
            parts = [re.escape(part) for part in match[1].split("…")]
            pattern = re.compile("[^\n]*?".join(parts))
            assert any(pattern.search(text) for text in known), match[1]


# ---- commands, run as they stand as far as that goes without weights, devices and network --------


def lines_of_commands():
    """{command: page} of every complete command of ours in the README and the docs."""
    found = {}
    for page in NAMES:
        if page in ("CHANGELOG.md", "CONTRIBUTING.md"):
            continue
        spans = re.findall(r"`(python -m [^`]+ --[^`]+)`", FENCE.sub("", text_of(page)))
        for line in "\n".join([*code(page, "bash"), *spans]).splitlines():
            line = re.sub(r"\[--[^]]*\]", "", line)  # [--config.FIELD=VALUE ...]
            if match := re.match(r"python -m (qk_jax\.\w+ +\S.*)", line.strip()):
                found.setdefault(shlex.join(shlex.split(match[1], comments=True)), page)
    return found


LINES = lines_of_commands()


def test_the_commands_of_the_documentation_are_found():
    assert len(LINES) > 35
    assert {line.split()[0] for line in LINES} == {
        command.split()[0] for command in COMMANDS
    } - SHIPPED
    assert any("stage1:7b" in line and page == "README.md" for line, page in LINES.items())


@pytest.fixture
def files_of_the_docs(tmp_path, monkeypatch):
    """A folder with the files that the commands name, and no network."""
    (blocks,) = [code("docs/sample.md", "json")]
    (tmp_path / "many.jsonl").write_text("".join(blocks), encoding="utf-8")
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "T2I").mkdir()  # a generator that another command of the figures writes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)


@functools.cache
def planned(spec, overrides):
    """The plan of a config, as a run would check it; where a mesh is free, over 64 devices."""
    from qk_jax import sharding
    from qk_jax.experiment import config, origins, stages
    from qk_jax.experiment.plan import Plan
    from qk_jax.training import evals

    found = config.load(spec, dict(overrides))
    origins.places(stages.resolve(found), found)
    sizes = found.mesh.to_dict()
    if -1 in sizes.values():
        devices = (8 if found.size == "tiny" else 64) // math.prod(found.slices.values())
        sizes = sharding.filled(sizes, devices)
    whole = {axis: size * found.slices.get(axis, 1) for axis, size in sizes.items()}
    plan = Plan.build(found, sharding.abstract_mesh(whole))
    evals.check(plan)
    return plan


def run_train(argv):
    from qk_jax import train

    args, overrides = train.arguments(argv)
    assert planned(args.config, tuple(overrides.items())).describe() and args.workdir


def run_sample(argv):
    from qk_jax import sample
    from qk_jax.painting import Settings, orders

    args = sample.parser().parse_args(argv)
    assert orders.orders(args)
    orders.parse_size(args.size)
    Settings(args.steps, args.guidance, args.image_guidance, args.solver)


def run_app(argv):
    from qk_jax.app import __main__ as app

    args = app.parser().parse_args(argv)
    assert all(count > 0 for count in (args.port, args.queue, args.keep, args.batch))


def run_convert(argv):
    from qk_jax import convert
    from qk_jax.base import hub

    args = convert.parser().parse_args(argv)
    if args.verb == "from-pytorch" and args.model.startswith("Qwen/"):
        hub.check(args.model)


def run_bench(argv):
    from qk_jax import sharding
    from qk_jax.bench import __main__ as bench
    from qk_jax.bench import layouts, search, shardings
    from qk_jax.bench.cases import Case, Target
    from qk_jax.bench.schedule import topologies
    from qk_jax.data import settings
    from qk_jax.experiment import config as config_lib

    args, overrides = bench.arguments(argv)
    if not getattr(args, "config", None):
        return
    config = config_lib.load(args.config, overrides)
    if args.verb == "cost":
        planned(args.config, tuple(overrides.items()))
    elif args.verb == "shardings":
        shardings.command(args, overrides)
    elif args.verb == "checkpoints":
        devices = Target.of(topologies.parse(args.slice)).slice_devices
        assert math.prod(sharding.filled(config.mesh, devices).values()) == devices
    elif args.verb == "precompile":
        assert settings.shapes(config)
        if args.slice:
            devices = Target.of(topologies.parse(args.slice)).slice_devices
            assert math.prod(sharding.filled(config.mesh, devices).values()) == devices
    else:
        layouts.check(args)
        shape = layouts.shape(args, config)
        given = Case(args.config, overrides, "", False, "", "", 0.0, *shape, (), 0)
        targets = [Target.of(topologies.parse(name)) for name in args.slice or ["v5e-8"]]
        if args.search:
            assert all(search.meshes(given, target) for target in targets)
        else:
            assert search.cases(args, given, targets)


def run_checkpoints(argv):
    from qk_jax.checkpoints import __main__ as checkpoints

    checkpoints.parser().parse_args(argv)


def run_data(argv):
    from qk_jax.data import __main__ as data
    from qk_jax.data.importers import importing
    from qk_jax.data.synthesis import from_records
    from qk_jax.experiment import config as config_lib

    args, overrides = data.arguments(argv)
    if args.verb in ("import", "index"):
        importing.check(data.job_of(args))
    elif args.verb == "synthesize":
        order = data.order_of(args)
        from_records.check(order)
        for line in order.commands:
            module, *rest = shlex.split(line)[2:]
            assert importlib.import_module(module).parser().parse_args(rest)
    elif args.verb == "look":
        data.check_look(args)
        if ":" in args.what:
            config_lib.load(args.what, overrides)


def run_evaluate(argv):
    from qk_jax import evaluate

    assert evaluate.parser().parse_args(argv).folders


@pytest.mark.parametrize("line", LINES)
def test_commands_run_as_they_stand(line, files_of_the_docs):
    module, *argv = line.split(" ", 1)
    runs = {
        "qk_jax.train": run_train, "qk_jax.sample": run_sample, "qk_jax.convert": run_convert,
        "qk_jax.bench": run_bench, "qk_jax.checkpoints": run_checkpoints,
        "qk_jax.data": run_data, "qk_jax.evaluate": run_evaluate, "qk_jax.app": run_app,
    }  # fmt: skip
    with pytest.raises(SystemExit) if "--help" in line else contextlib.nullcontext():
        runs[module](shlex.split(*argv))
