"""The report: its numbers are those of the files, what runs wrote stays text, and a browser shows it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from epo_jax import report
from epo_jax.analysis import curves
from epo_jax.analysis.page import SCATTERED
from epo_jax.common.errors import UserError
from epo_jax.runs.metrics import evaluation_row, wilson
from tests.browser import Browser, find
from tests.plays import outcomes

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"' & \u2028 🍎 {{ data }}"
STEPS = 20
RECORDED = [curve.key for curve in curves.CURVES if curve.key != curves.RATIO]


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, seed: int, lam: float, success: float, steps: int = STEPS, **without) -> Path:
    """A run of `steps` RL steps with everything that the report shows; `without=("kl", ...)` leaves metrics out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, int(1000 * lam)])
    config = {"seed": seed, "epo": {"lam": lam, "alpha": 5.0}, "algo": {"name": "grpo+epo"}, "env": {"workers": seed}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(steps):
        row = {key: float(rng.random()) for key in RECORDED} | {"step": step, "success": success * step / steps}
        row |= {"corridor_low": 0.1 if step else None, "corridor_high": 0.9 if step else None}
        row |= {f"entropy_turn_{turn}": float(rng.random()) for turn in range(3)}
        rows.append({key: value for key, value in row.items() if key not in without.get("without", ())})
    write(folder / "metrics.jsonl", rows)
    evaluations = []
    for step in (0, steps):
        for split, episodes in (("valid_seen", 10), ("valid_unseen", 20)):
            won = round(success * episodes) if step else 1
            played = outcomes((("look", "pick")[i % 2], i < won) for i in range(episodes))
            evaluations.append(evaluation_row(step, split, played))
    write(folder / "eval.jsonl", evaluations)
    tokens = ["<think>", HOSTILE, "</think>", "<action>", "go to", " fridge 1", "</action>", "<|end|>"]
    turns = [
        {"observation": HOSTILE, "tokens": tokens,
         "entropy": [0.0, 0.5, 0.1, 0.1, 1.5, 0.2, 0.0, 0.0], "action": "go to fridge 1", "valid": True, "reward": 10.0 * won}
        for won in (0, 1)
    ]  # fmt: skip
    episode = {"split": "valid_unseen", "goal": HOSTILE, "score": 100.0, "truncated": False, "end": HOSTILE}
    write(folder / "trajectories.jsonl", [
        {"step": step, "task": f"{kind}-{HOSTILE}", "type": kind, "won": kind == "pick", "turns": turns, **episode}
        for step in (0, steps) for kind in ("look", "pick")
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one arm, the lesser one, and one of another."""
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "a0", 0, 0.1, 0.4), make_run(root / "a1", 1, 0.1, 0.6), make_run(root / "b0", 0, 0.0, 0.9)]


def make(tmp_path, *arguments) -> Path:
    out = tmp_path / "report.html"
    report.main(["report", *map(str, arguments), "--out", str(out)])
    return out


class Page(HTMLParser):
    """The text of the page's data element, and how many elements there are of each kind."""

    def __init__(self, path: Path):
        super().__init__()
        self.data, self.count, self.links, self._inside = "", {}, [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.count[tag] = self.count.get(tag, 0) + 1
        self._inside = attributes.get("id") == "data"
        self.links += [value for name, value in attributes.items() if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, text):
        self.data += text if self._inside else ""


def data_of(path: Path):
    return json.loads(Page(path).data, parse_constant=pytest.fail)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_runs_that_differ_by_the_seed_are_one_arm_and_the_best_comes_first(runs, tmp_path):
    told = data_of(make(tmp_path, *runs))
    assert [(arm["name"], [run["name"] for run in arm["runs"]]) for arm in told["arms"]] == [
        ("lam 0.0", ["b0"]), ("lam 0.1", ["a0", "a1"]),
    ]  # fmt: skip
    assert told["reference"] == "lam 0.1" and told["subject"] == "seeds 0, 1"
    assert told["differing"] == ["epo.lam"] and [arm["settings"]["epo.lam"] for arm in told["arms"]] == [0.0, 0.1]


def test_the_tables_are_printed_with_what_each_run_came_to(runs, tmp_path, capsys):
    arm = data_of(make(tmp_path, *runs))["arms"][1]
    success, entropy, differences = capsys.readouterr().out.split("\n\n")[1::2][:3]
    best, other = success.splitlines()[2:]
    assert best.startswith("| lam 0.0 | 90.0 [69.9, 97.2] (90) | 90.0 [59.6, 98.2] (90) | 90.0 [69.9, 97.2] (90) |")
    interval = f"[{100 * arm['final']['valid_unseen']['low']:.1f}, {100 * arm['final']['valid_unseen']['high']:.1f}]"
    assert other.startswith(f"| lam 0.1 | 50.0 {interval} (40, 60) |")
    entropies = [[row["entropy"] for row in rows(run, "metrics.jsonl")] for run in runs[:2]]
    [step] = [next(k for k, h in enumerate(each) if h > 5 * each[0]) for each in entropies if max(each) > 5 * each[0]]
    assert other.endswith(f" | never, never | never, never | 1 of 2 (step {step}) | 0 of 2 |")
    found = arm["measures"]["change_std"]
    assert found["values"] == pytest.approx([np.diff(each).std() for each in entropies])
    assert f" | {found['mean']:.3g} [{found['low']:.3g}, {found['high']:.3g}] | " in entropy.splitlines()[3]
    # One common seed, 0: 18/20 against 8/20.
    assert differences.splitlines()[2].startswith("| lam 0.0 | +50 (+50) | +50 (+50) | ")


def test_arms_are_compared_with_the_reference(runs, tmp_path):
    told = data_of(make(tmp_path, *runs, "--reference", "lam 0.0"))
    assert told["reference"] == "lam 0.0" and told["arms"][0]["versus"] is None
    assert told["arms"][1]["versus"]["differences"]["valid_unseen"] == {
        "seeds": [0], "values": [-0.5], "mean": -0.5, "low": None, "high": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="--reference=lam 7: no arm has this name; choose one of 'lam 0.1', 'lam 0.0'"):
        make(tmp_path, *runs, "--reference", "lam 7")


def test_success_from_a_step_on(runs, tmp_path):
    told = data_of(make(tmp_path, *runs, "--from_step", "0"))
    assert told["arms"][0]["final"]["valid_unseen"]["mean"] == pytest.approx((0.05 + 0.9) / 2)
    with pytest.raises(UserError, match="--from_step"):
        make(tmp_path, *runs, "--from_step=-1")


def test_arms_can_be_given_by_name(runs, tmp_path):
    told = data_of(make(tmp_path, f"first={runs[0]}", f"other={runs[1]}", f"other={runs[2]}"))
    assert {arm["name"]: [run["name"] for run in arm["runs"]] for arm in told["arms"]} == {"first": ["a0"], "other": ["a1", "b0"]}


def test_the_page_has_the_numbers_of_the_files(runs, tmp_path):
    told = data_of(make(tmp_path, *runs))
    _, arm = told["arms"]
    metrics = [rows(run, "metrics.jsonl") for run in runs[:2]]
    for key in RECORDED:
        values = np.array([[row[key] for row in each] for each in metrics])
        curve = arm["curves"][key]
        assert curve["x"] == list(range(STEPS))
        for name, expected in (("y", values.mean(0)), ("low", values.min(0)), ("high", values.max(0))):
            np.testing.assert_allclose(curve[name], expected, rtol=1e-4)
    assert arm["curves"]["corridor_low"]["x"] == list(range(1, STEPS)) and set(arm["curves"]["corridor_high"]["y"]) == {0.9}
    turns = np.array([[[row[f"entropy_turn_{t}"] for t in range(3)] for row in each] for each in metrics])
    np.testing.assert_allclose(arm["turns"]["entropy"], turns.mean(0), rtol=1e-4)
    assert (arm["turns"]["first"], arm["turns"]["width"], arm["turns"]["turns"]) == (0, 1, [0, 1, 2])

    entropy = np.array([[row["entropy"] for row in each[STEPS // 2 :]] for each in metrics])
    assert arm["measures"]["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert arm["measures"]["entropy_variance"]["mean"] == pytest.approx(entropy.var(axis=1).mean())
    ratio = np.array([[row["entropy"] / each[0]["entropy"] for row in each] for each in metrics])
    np.testing.assert_allclose(arm["curves"]["entropy_ratio"]["y"], ratio.mean(0), rtol=1e-4)
    assert [each["steps"] for each in arm["runs"]] == [STEPS, STEPS] and told["steps"] == STEPS
    final = arm["final"]["valid_unseen"]
    assert (final["mean"], final["counts"], final["step"]) == (pytest.approx(0.5), [[8, 20], [12, 20]], STEPS)
    assert final["types"] == {"look": [10, 20], "pick": [10, 20]}
    assert arm["success"]["valid_unseen"] == {"x": [0, 20], "y": [0.05, 0.5], "low": [0.05, 0.4], "high": [0.05, 0.6]}


def test_a_single_run_carries_its_wilson_interval(runs, tmp_path):
    arm, _ = data_of(make(tmp_path, *runs))["arms"]
    final, curve = arm["final"]["valid_unseen"], arm["success"]["valid_unseen"]
    assert (final["low"], final["high"]) == pytest.approx(wilson(18, 20))
    assert (curve["low"][1], curve["high"][1]) == pytest.approx(wilson(18, 20), abs=1e-4)
    assert "low" not in arm["curves"]["entropy"]


def test_steps_are_counted_without_a_last_evaluation(runs, tmp_path):
    """Rows 0 to 4 are five steps."""
    run = make_run(tmp_path / "killed", 0, 0.1, 0.5)
    write(run / "metrics.jsonl", rows(run, "metrics.jsonl")[:5])
    write(run / "eval.jsonl", rows(run, "eval.jsonl")[:2])
    told = data_of(make(tmp_path, run))
    assert told["steps"] == 5 and told["arms"][0]["runs"][0]["steps"] == 5


def test_long_runs_are_averaged_in_equal_bins(tmp_path):
    steps = 1000
    run = make_run(tmp_path / "long", 0, 0.1, 0.5, steps=steps)
    (arm,) = data_of(make(tmp_path, run))["arms"]
    curve = arm["curves"]["entropy"]
    values = np.array([row["entropy"] for row in rows(run, "metrics.jsonl")])
    assert len(curve["x"]) <= curves.POINTS and len(arm["turns"]["entropy"]) <= curves.COLUMNS
    width = -(-steps // curves.POINTS)
    np.testing.assert_allclose(curve["y"][:5], values[: 5 * width].reshape(5, width).mean(1), rtol=1e-4)
    assert curve["x"][0] == (width - 1) / 2


def test_evaluations_at_further_temperatures_are_columns_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", 0, 0.1, 0.5)
    before = data_of(make(tmp_path, run))
    hot = [row | {"temperature": 1.0, "won": 0, "success": 0.0} for row in rows(run, "eval.jsonl")]
    write(run / "eval.jsonl", sorted([*rows(run, "eval.jsonl"), *hot], key=lambda row: row["step"]))
    told = data_of(make(tmp_path, run))
    titles = ["OOD", "OOD, T = 1", "IID", "IID, T = 1"]
    assert [column["title"] for column in told["columns"]] == titles
    ((arm,), (one,)) = told["arms"], before["arms"]
    for part in ("final", "success"):
        assert {key: arm[part][key] for key in one[part]} == one[part]
        assert set(arm[part]) - set(one[part]) == {"valid_unseen@1", "valid_seen@1"}
    assert arm["final"]["valid_unseen@1"]["mean"] == 0


def test_what_runs_lack_is_said(runs, tmp_path):
    old = make_run(tmp_path / "old", 0, 0.5, 0.5, without=("kl", "entropy_turn_0", "entropy_turn_1", "entropy_turn_2"))
    (old / "trajectories.jsonl").unlink()
    (old / "config.json").unlink()
    write(old / "eval.jsonl", [row for row in rows(old, "eval.jsonl") if row["split"] == "valid_seen"])
    told = data_of(make(tmp_path, *runs, old))
    assert told["arms"][-1]["name"] == "old" and told["arms"][-1]["final"]["valid_unseen"] is None
    for what in ("config", "valid_unseen", "entropy by turn", "episodes", "the metric kl"):
        assert any(sentence.startswith("old: without") and what in sentence for sentence in told["lacking"]), what
    (alone,) = data_of(make(tmp_path, old))["arms"]
    assert alone["turns"] is None and alone["curves"]["kl"] is None


def test_a_torn_line_and_numbers_that_are_not_finite_are_left_out(runs, tmp_path):
    run = make_run(tmp_path / "torn", 0, 0.1, 0.5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "entropy": null, "reward": NaN}\n{"step": 21, "ent')
    (arm,) = data_of(make(tmp_path, run))["arms"]
    assert arm["curves"]["entropy"]["x"] == arm["curves"]["reward"]["x"] == list(range(20))


def test_what_runs_wrote_stays_text(runs, tmp_path):
    page = Page(make(tmp_path, *runs, "--title", HOSTILE))
    told = json.loads(page.data)
    assert page.count["script"] == 2 and "img" not in page.count and page.links == []
    assert told["title"] == HOSTILE
    assert all(e["goal"] == HOSTILE and e["turns"][0]["observation"] == HOSTILE for e in told["episodes"])


def test_episodes_are_chosen_alike_from_all_runs_newest_step_first(runs, tmp_path):
    told = data_of(make(tmp_path, *runs))
    assert (len(told["episodes"]), told["stored"]) == (12, 12)
    size = len(json.dumps(rows(runs[0], "trajectories.jsonl")[0]))
    few = data_of(make(tmp_path, *runs, "--megabytes", 4.5 * size / 1e6))
    assert (len(few["episodes"]), few["stored"]) == (4, 12)
    assert [e["run"] for e in few["episodes"]] == ["a0", "a1", "b0", "a0"]
    assert {e["step"] for e in few["episodes"]} == {STEPS}


def test_a_sweep_is_its_members_with_their_coefficients(tmp_path):
    sweep = tmp_path / "sweep"
    members = []
    keys = "algo.name", "epo.lam", "seed"
    for number, values in enumerate([("ppo", 0.1, 0), ("ppo", 0.1, 1), ("grpo", 0.1, 0), ("ppo", 0.2, 0), ("grpo", 0.2, 0)]):
        make_run(sweep / "members" / f"m{number}", 0, 0.0, 0.1 * number)
        members.append({"name": f"m{number}", "coefficients": dict(zip(keys, values, strict=True))})
    members.append({"name": "not begun", "coefficients": {"algo.name": "ea", "epo.lam": 9.0, "seed": 0}})
    (sweep / "sweep.json").write_text(json.dumps({"members": members}))
    told = data_of(make(tmp_path, sweep))
    assert told["differing"] == ["algo.name", "epo.lam"]
    assert [reason for _, reason in told["left_out"]] == [f"{sweep / 'members' / 'not begun'} has not begun."]
    names = ["grpo, lam 0.2", "ppo, lam 0.2", "grpo, lam 0.1", "ppo, lam 0.1"]
    assert [arm["name"] for arm in told["arms"]] == names
    assert [run["seed"] for run in told["arms"][-1]["runs"]] == [0, 1]


@pytest.mark.parametrize(
    ("name", "fill", "culprit"),
    [
        ("missing", None, "missing is not a folder"),
        ("empty", {}, "empty has no metrics.jsonl"),
        ("sweep", {"sweep.json": "{"}, "sweep.json does not list members"),
        ("sweep", {"sweep.json": '{"members": []}'}, "no run of its members"),
        ("run", {"metrics.jsonl": '{"step": 0}\n', "config.json": "{"}, "config.json cannot be read"),
    ],
)
def test_bad_runs_are_refused_in_one_sentence(tmp_path, name, fill, culprit):
    if fill is not None:
        (tmp_path / name).mkdir()
        for file, text in fill.items():
            (tmp_path / name / file).write_text(text)
    with pytest.raises(UserError, match=culprit) as refusal:
        make(tmp_path, tmp_path / name)
    assert "\n" not in str(refusal.value) and not (tmp_path / "report.html").exists()


def test_what_cannot_be_read_is_left_out_and_listed(runs, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    told = data_of(make(tmp_path, *runs, tmp_path / "unfinished", tmp_path / "notes.txt"))
    assert len(told["arms"]) == 2
    assert [folder for folder, _ in told["left_out"]] == [str(tmp_path / "unfinished"), str(tmp_path / "notes.txt")]
    printed = capsys.readouterr().err
    for sentence in ("unfinished has no metrics.jsonl", "notes.txt is not a folder"):
        assert any(sentence in reason for _, reason in told["left_out"]) and sentence in printed
    with pytest.raises(UserError, match=r"unfinished has no metrics.jsonl .* sweep \(and 1 more folders cannot be read\)\."):
        make(tmp_path, tmp_path / "unfinished", tmp_path / "notes.txt")


@pytest.mark.parametrize(("out", "culprit"), [(".", "is a folder"), ("no/such/report.html", "no folder")])
def test_a_place_that_cannot_be_written_is_refused(runs, tmp_path, out, culprit):
    with pytest.raises(UserError, match=culprit) as refusal:
        report.main(["report", str(runs[0]), "--out", str(tmp_path / out)])
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []


def test_the_command_line_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="--out"):
        report.main(["report", "runs/first"])


# -------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    program = find()
    if program is None:
        pytest.skip("no Chromium is installed (on Debian and Ubuntu: apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()


def choose(browser, filter_name, value):
    browser.run(f"""(() => {{
        const labels = [...document.querySelectorAll("#filters label")];
        const select = labels.find((l) => l.firstChild.textContent === {json.dumps(filter_name)}).querySelector("select");
        select.value = {json.dumps(value)};
        select.dispatchEvent(new Event("change"));
    }})()""")
    return browser.run("document.getElementById('place').textContent")


@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_shows_it_whole_and_asks_for_nothing(browser, runs, tmp_path, width):
    page = make(tmp_path, *runs, "--title", HOSTILE)
    browser.open(page, width)
    assert browser.errors == [] and browser.requests == [page.resolve().as_uri()]
    assert browser.run("performance.getEntriesByName('drawn').length") == 1
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None and browser.run("document.title").startswith("</script>")
    # Two evaluations, all curves, a corridor and a map of turns for each of two arms, differences and scatters; no path without a
    # number.
    count = 2 + len(curves.CURVES) + 2 + 2 + 1 + len(SCATTERED)
    assert browser.run("document.querySelectorAll('figure svg').length") == count
    paths = browser.run("[...document.querySelectorAll('svg path')].map((p) => p.getAttribute('d')).join()")
    assert len(paths) > 1000 and "NaN" not in paths and "undefined" not in paths
    table = browser.run("[...document.querySelectorAll('#table tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))")
    low, high = (100 * bound for bound in wilson(18, 20))
    assert table[0][:4] == ["A ", "lam 0.0", f"90.0 % [{low:.1f}, {high:.1f}]", table[0][3]] and table[1][1] == "lam 0.1"
    assert browser.run("[...document.querySelectorAll('#grid td')].map((c) => c.textContent)") == ["90.0 %", "50.0 %"]


def test_names_of_tasks_and_arms_break_between_words_on_a_phone(browser, tmp_path):
    run = make_run(tmp_path / "a", 0, 0.1, 0.4)
    renamed = {"look": "look_at_obj_in_light", "pick": "pick_clean_then_place_in_recep"}
    changed = [row | {"types": {renamed[kind]: won for kind, won in row["types"].items()}} for row in rows(run, "eval.jsonl")]
    write(run / "eval.jsonl", changed)
    browser.open(make(tmp_path, f"grpo+epo_indicator_with_a_long_name={run}", make_run(tmp_path / "b", 0, 0.2, 0.4)), 390)
    parts = """[...document.querySelectorAll("#types tbody th, .arms td:nth-child(2)")].flatMap((cell) => {
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), found = [];
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const range = document.createRange();
            range.selectNodeContents(node);
            found.push([node.textContent, range.getClientRects().length]);
        }
        return found;
    })"""
    found = browser.run(parts)
    assert ["recep", 1] in found and ["indicator_", 1] in found
    assert [text for text, lines in found if lines != 1] == []


def test_the_page_of_a_single_run_has_no_empty_figure_and_nothing_to_compare(browser, tmp_path):
    run = make_run(tmp_path / "alone", 0, 0.1, 0.4, without=("kl", "entropy_first_turns"))
    browser.open(make(tmp_path, run))
    assert browser.run("document.querySelectorAll('figure:not(:has(svg))').length") == 0
    captions = browser.run("[...document.querySelectorAll('figcaption')].map((each) => each.textContent)")
    assert any("Entropy as" in text for text in captions) and not any("KL to the reference" in text for text in captions)
    assert browser.run("['comparisons', 'coefficients'].map((id) => document.getElementById(id).hidden)") == [True, True]
    assert browser.run("document.querySelectorAll('#table input').length") == 0
    assert browser.run("document.getElementById('facts').textContent").startswith("Method" + "grpo+epo")


def test_axes_of_training_and_evaluation_end_at_the_same_step(browser, runs, tmp_path):
    browser.open(make(tmp_path, runs[0]))
    last = (
        "[...document.querySelectorAll('#success figure')].map((f) => f.querySelector('svg path[stroke-width=\"2\"]').getBBox())"
    )
    evaluated, _, trained = browser.run(f"({last}).map((box) => [box.x, box.x + box.width])")
    assert evaluated[0] == pytest.approx(trained[0], abs=0.2), "both begin at step 0"
    share = (trained[1] - trained[0]) / (evaluated[1] - evaluated[0])
    assert share == pytest.approx((STEPS - 1) / STEPS, abs=0.01), "the last row of training is that of step 19 of 20"


def test_ticks_and_sorting(browser, runs, tmp_path):
    browser.open(make(tmp_path, *runs))
    browser.run("document.querySelector('#table tbody input').click()")
    assert browser.run("document.querySelectorAll('#corridors figure').length") == 1
    assert browser.run("document.querySelectorAll('#success svg path.faint').length") == 3
    browser.run("[...document.querySelectorAll('#table th button')].find((b) => b.textContent === 'runs').click()")
    assert browser.run("document.querySelector('#table tbody td:nth-child(2)').textContent") == "lam 0.1"
    assert browser.errors == []


def test_episodes_can_be_found_and_read(browser, runs, tmp_path):
    browser.open(make(tmp_path, *runs))
    assert browser.run("document.getElementById('place').textContent") == "1 of 12"
    assert choose(browser, "type of task", "pick") == "1 of 6"
    assert choose(browser, "RL step", str(STEPS)) == "1 of 3"
    assert choose(browser, "outcome", "won") == "1 of 3"
    assert choose(browser, "task", f"pick-{HOSTILE}") == "1 of 3"
    browser.run("document.getElementById('next').click()")
    assert browser.run("document.getElementById('place').textContent") == "2 of 3"
    assert browser.run("document.querySelector('.observation').textContent") == HOSTILE
    said = browser.run("[...document.querySelector('.turn').querySelectorAll('.said')].map((s) => s.textContent)")
    assert said == [f"thought<think>{HOSTILE}</think>", "action<action>go to fridge 1</action><|end|>"]
    shades = browser.run("[...document.querySelectorAll('.turn .token')].map((t) => +t.style.getPropertyValue('--h'))")
    assert shades[:8] == pytest.approx([0, 1 / 3, 0.067, 0.067, 1, 0.133, 0, 0], abs=1e-3)
    assert browser.run("document.querySelectorAll('.turn.rewarded').length") == 1
    assert browser.run("window.hacked") is None and browser.errors == []


def test_a_run_without_most_things_opens_too(browser, tmp_path):
    (tmp_path / "bare").mkdir()
    write(tmp_path / "bare" / "metrics.jsonl", [{"step": 0}])
    browser.open(make(tmp_path, tmp_path / "bare"), 360)
    assert browser.errors == [] and browser.run("performance.getEntriesByName('drawn').length") == 1
    assert browser.run("document.getElementById('episode').textContent") == "The runs have stored no episodes."
    assert browser.run("document.querySelectorAll('#lacking li').length") >= 10
