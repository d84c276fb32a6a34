"""README, CONTRIBUTING and docs/: links lead somewhere, commands run, flags exist, nothing is said twice.

A block of commands is run here, in order, on small files, unless it is marked: <!-- not run: the reason -->.
"""

import contextlib
import io
import json
import re
import shlex

import pytest
from conftest import ROOT, run_forked

import generate
import judge
import score
import train
from recipes.study import measure, prepare_alpaca, study

RESULTS = "recipes/study/results/README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / RESULTS]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PROGRAMS = {"train.py": train, "score.py": score, "generate.py": generate, "judge.py": judge}
BLOCK = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def without_blocks(text):
    return BLOCK.sub("", text)


# ---------------------------------------------------------------- links


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", TEXT)
def test_every_link_leads_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(TEXT[name])):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_readme_links_every_page():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in TEXT["README.md"], page.name


# ---------------------------------------------------------------- commands


def commands(block):
    """The lines of a block, those that end in a backslash joined with the next, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def own_command(words):
    """(file of the program, its arguments) of `python …`, `torchrun …`; None for any other command."""
    for at, word in enumerate(words):
        if re.split("/", word)[-1] in ("python", "torchrun"):
            at += 1
            while at < len(words) and words[at].startswith("--"):  # torchrun's
                at += 2
            if at < len(words) and words[at].endswith(".py"):
                return words[at], words[at + 1 :]
    return None


def runnable(name):
    for mark, language, block in BLOCK.findall(TEXT[name]):
        if language == "bash" and not mark.startswith("not run: ") and mark not in ("main", "tests"):
            yield block


@pytest.fixture
def folder(bench, tmp_path):
    """Where the commands run: what the pages speak of, small. DIR is the model."""
    rows = [json.loads(line) for k in (1, 2, 3) for line in (bench / f"s{k}.jsonl").read_text().splitlines()[:8]]
    alpaca = [{"id": r["id"], "instruction": r["data"][0], "input": "", "output": r["data"][1]} for r in rows]
    (tmp_path / "DIR").symlink_to(bench / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stage3").symlink_to(bench / "m")
    for name in ("alpaca.json", "s1.jsonl", "s2.jsonl", "s3.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in alpaca))
    scored = [row | {"score": 1 + k % 9 / 2, "ifd": k / 25} for k, row in enumerate(alpaca)]
    for name in ("scored.jsonl", "ifd.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in scored))
    for name in ("vicuna.jsonl", "koala.json"):
        (tmp_path / name).write_text(
            "".join(json.dumps({"id": r["id"], "prompt": r["instruction"]}) + "\n" for r in alpaca[:3])
        )
    for name in ("base", "stage1", "stage3", "mine"):
        answers = [r | {"dataset": "d", "generator": name, "output": f"{name} {r['id']}"} for r in alpaca[:6]]
        (tmp_path / f"{name}.json").write_text(json.dumps(answers))
    return tmp_path


@pytest.mark.parametrize("name", [name for name in TEXT if list(runnable(name))])
def test_every_command_runs_that_is_not_marked(name, folder, api):
    environments = {"score.py": api(), "judge.py": api(judge=1)}  # one server gives a score, the other two
    for words in (words for block in runnable(name) for words in commands(block)):
        if words[0] == "export":
            continue
        found = own_command(words)
        assert found, f"{name}: mark the block of {' '.join(words)!r} as not run, or let it be run here"
        for made in re.findall(r"--out (\S+\.jsonl?)", " ".join(words)):
            (folder / made).unlink(missing_ok=True)  # a file of the fixture
        done = run_forked(PROGRAMS[found[0]].main, *found[1], cwd=folder, env=environments.get(found[0]))
        assert done.stdout


def test_marks_are_those_that_are_known():
    for name, text in TEXT.items():
        for mark, language, _ in BLOCK.findall(text):
            if language == "bash" and mark:
                assert re.fullmatch(r"not run: .{5,}|main|tests", mark), (name, mark)
                assert (mark in ("main", "tests")) <= (name == "README.md"), name


@pytest.mark.parametrize("results", sorted((ROOT / RESULTS).parent.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_and_the_power_of_a_study_are_computed_from_its_results(results, capsys):
    name = results.relative_to(ROOT)
    assert study.main(["--table", str(results)]) == 0
    shown = capsys.readouterr().out
    (tables,) = re.findall(rf"<!-- tables of {name} -->\n(.*?)<!-- end of tables -->", TEXT[RESULTS], re.DOTALL)
    assert shown.strip() == tables.strip()
    for rows in re.findall(rf"<!-- rows of {name} -->\n(.*?)<!-- end of rows -->", TEXT["docs/study.md"], re.DOTALL):
        assert rows and set(rows.splitlines()) <= set(shown.splitlines())
    printed = rf"`--power {name} ([^`]*)` prints:\n\n<!-- power of {name} -->\n```\n(.*?)```"
    for flags, power in re.findall(printed, TEXT["docs/study.md"], re.DOTALL):
        assert study.main(["--power", str(results), *flags.split()]) == 0
        assert capsys.readouterr().out.strip() == power.strip()


# ---------------------------------------------------------------- flags


def help_of(module, *command):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        module.main([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


@pytest.fixture(scope="module")
def flags():
    found = {"train.py": help_of(train), "generate.py": help_of(generate)}
    for program in (study, measure, prepare_alpaca):
        found[f"{program.__name__.replace('.', '/')}.py"] = help_of(program)
    found |= {f"score.py {c}": help_of(score, c) for c in ("difficulty", "ifd", "stages", "select")}
    return found | {f"judge.py {c}": help_of(judge, c) for c in ("compare", "report", "audit")}


# Of other programs: torchrun, sbatch, llama-server, lm_eval, alpaca_eval, vllm, open-instruct, tests/bench*.py
FOREIGN = """--nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --signals-to-handle --nodes --gpus-per-node --time
    --grammar --model_args --tasks --apply_chat_template --model_outputs --outtype --model_name_or_path
    --tensor-parallel-size --parts --annotations --pairs"""


@pytest.mark.parametrize("name", TEXT)
def test_every_flag_exists(name, flags):
    known = set().union(*flags.values(), FOREIGN.split())
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", TEXT[name]):
        assert flag in known, flag


@pytest.mark.parametrize("name", TEXT)
def test_every_flag_of_a_command_is_one_of_that_program(name, flags):
    shown = [b for _, language, b in BLOCK.findall(TEXT[name]) if language == "bash"]
    shown += re.findall(r"`((?:python|torchrun) [^`]*\.py [^`]*)`", TEXT[name])
    for words in (words for block in shown for words in commands(block)):
        if not (found := own_command(words)):
            continue
        own, _, trains = " ".join(found[1]).partition(" -- ")
        for program, given in ((found[0], own), ("train.py", trains)):
            command = program + (f" {given.split()[0]}" if program in ("score.py", "judge.py") else "")
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", given):
                assert program.startswith("tests/") or flag in flags[command], (flag, words)


# ---------------------------------------------------------------- length and repetition


def test_readme_is_short_and_in_order():
    assert len(TEXT["README.md"].splitlines()) <= 200
    headings = re.findall(r"^## (.*)$", without_blocks(TEXT["README.md"]), re.MULTILINE)
    order = ["Two commands", "The method", "Your own model and data", "The four programs"]
    order += ["What was verified where", "Files", "Where to read next"]
    assert [h for h in headings if h in order] == order


def test_nothing_is_said_twice():
    seen = {}
    for name, text in TEXT.items():
        if name == RESULTS:  # docs/study.md repeats rows of its tables
            continue
        words = re.findall(r"[\w'%.-]+", without_blocks(text).lower())
        for k in range(len(words) - 11):
            run = " ".join(words[k : k + 12])
            assert seen.setdefault(run, name) == name, (seen[run], name, run)
