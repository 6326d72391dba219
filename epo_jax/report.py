"""Makes one page of run folders to share: a single HTML file that needs no network.

    epo-jax report runs/first runs/second --out report.html
    epo-jax report grpo=runs/a grpo=runs/b epo=runs/c --out report.html     arms by name
    epo-jax report runs/sweep --out report.html                             every member of a sweep
    epo-jax report runs/* --out report.html                                 all that can be read

Runs form an arm, a group that is compared with other groups, if their configs differ only in the seed and in settings that change
no result (workers, folders, how often the run saves). A run with a name before it joins the arm of that name. A folder with a
sweep.json ({"members": [{"name": ..., "coefficients": {key: value}}, ...]}) stands for the runs in its members/. Folders that
cannot be read are left out and listed. The command also prints the page's tables in Markdown.
"""

import argparse
import sys
from pathlib import Path

from epo_jax.analysis import page, tables
from epo_jax.analysis.read import read_all
from epo_jax.command import ArgumentParser, check_output, number_type, run, write_output
from epo_jax.settings.setting import NOT_NEGATIVE


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="epo-jax report", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, sweep folder, or NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument("--title", default="Training runs", help="heading of the page")
    parser.add_argument("--from_step", type=number_type(int, NOT_NEGATIVE),
                        help="success is the mean of the evaluations after so many RL steps, not the last")  # fmt: skip
    parser.add_argument("--reference", metavar="ARM", help="the arm that the others are compared with; the first if left out")
    parser.add_argument("--megabytes", type=float, default=4.0, help="most of episodes to read in the page; 4 if left out")
    options = parser.parse_args(argv[1:])
    check_output(options.out, "report.html")
    runs, left_out = read_all(options.runs)
    summary = page.summarize(runs, options.title, options.megabytes, options.from_step, options.reference, left_out)
    text = page.render(summary)
    write_output(options.out, text)
    print(tables.markdown(summary))
    for _, reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"\nwrote {options.out}: {len(runs)} runs, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run(main))
