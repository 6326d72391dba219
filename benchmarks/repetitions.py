"""How often repetitions of one run differ by as much as a published pair of methods.

    python -m benchmarks.repetitions study/seeds --episodes=16 --seeds=2

Published comparisons judge each method by a few seeds and each seed by a few episodes. Here nothing differs but the seed: two
groups are drawn from the runs of one sweep, each run is judged by a few games drawn from its full evaluations, and the
difference between the groups is compared with the published ones. `final` takes the last evaluation, `best` the best of all
(Succ* in arXiv 2509.22576).
"""

import argparse
from pathlib import Path

import numpy as np

from epo_jax.runs.folder import read_config
from epo_jax.runs.metrics import read_rows

# Success on unknown tasks with and without EPO, in percent: table 1 of arXiv 2509.22576, version 2.
PUBLISHED = {
    "PPO on ScienceWorld": (39.1, 96.2),
    "GRPO on ScienceWorld": (80.9, 81.3),
    "PPO on ALFWorld": (70.9, 74.3),
    "GRPO on ALFWorld": (63.5, 75.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of a sweep whose members differ in the seed alone")
    parser.add_argument("--split", default="valid_unseen")
    parser.add_argument("--seeds", type=int, default=2, help="runs of a group")
    parser.add_argument("--episodes", type=int, default=16, help="games by which a run is judged")
    options = parser.parse_args()
    won, games = evaluations(options.sweep, options.split)
    runs, times = won.shape
    print(f"{runs} runs, {times} evaluations of {games} games of {options.split}")
    last = 100 * won[:, -1] / games
    print(f"last evaluation: mean {last.mean():.1f} %, standard deviation over runs {last.std(ddof=1):.1f} points")
    gaps = {name: differences(won, games, options.seeds, options.episodes, name == "best") for name in ("final", "best")}
    print(f"| two groups of {options.seeds} seeds, {options.episodes} episodes each | final | best |\n| --- | --- | --- |")
    for quantile in (0.5, 0.9, 0.95):
        print(
            f"| {quantile:.0%} of the differences are at most, points | " + cells(np.quantile(g, quantile) for g in gaps.values())
        )
    for name, (without, with_epo) in PUBLISHED.items():
        at_least = abs(with_epo - without) - 1e-9
        shares = (100 * np.mean(g >= at_least) for g in gaps.values())
        print(f"| differ by the {at_least:.1f} points of {name} or more, % | " + cells(shares))


def cells(values) -> str:
    return " | ".join(f"{value:.1f}" for value in values) + " |"


def evaluations(sweep: Path, split: str) -> tuple[np.ndarray, int]:
    """Games won by every run at every evaluation, [runs, evaluations], and the games of an evaluation.

    Initial policies and evaluations at another temperature than eval.temperature are left out.
    """
    won, games = [], set()
    for folder in sorted((sweep / "members").iterdir()):
        temperature = read_config(folder).eval.temperature
        rows = [row for row in read_rows(folder / "eval.jsonl") if row["split"] == split and row["step"] > 0]
        rows = [row for row in rows if row.get("temperature", temperature) == temperature]
        won.append([row["won"] for row in rows])
        games |= {row["episodes"] for row in rows}
    (games,) = games
    return np.array(won), games


def differences(won: np.ndarray, games: int, seeds: int, episodes: int, best: bool, draws: int = 200_000) -> np.ndarray:
    """Absolute differences in points between two groups of runs, [draws].

    Groups share no run; the games of an evaluation are drawn without replacement.
    """
    rng = np.random.default_rng(0)
    runs = np.argsort(rng.random((draws, len(won))), axis=1)[:, : 2 * seeds]
    judged = won[runs] if best else won[runs][..., -1:]
    share = rng.hypergeometric(judged, games - judged, episodes).max(-1) / episodes
    return 100 * np.abs(share[:, :seeds].mean(1) - share[:, seeds:].mean(1))


if __name__ == "__main__":
    main()
