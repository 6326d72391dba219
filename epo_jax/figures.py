"""Draws the curves of a run, or a comparison of runs, for documents and papers. Needs no browser.

    epo-jax figures runs/first                                               runs/first/figures/*.png, as at the end of the run
    epo-jax figures runs/a runs/b --out pilot.png                            one picture of success, entropy and differences
    epo-jax figures sweeps/pilot --out pilot.svg --panels OOD success entropy corridor
    epo-jax figures epo=runs/a grpo=runs/b --out pilot.pdf --panels final differences scatter:roughness

Runs, sweeps and names are as in epo-jax report. Panels:

"""

import argparse
import sys
from pathlib import Path

from epo_jax.analysis import figures as pictures
from epo_jax.analysis import panels
from epo_jax.analysis.arms import arms_of, reference_arm
from epo_jax.analysis.comparison import Comparison
from epo_jax.analysis.read import read_all
from epo_jax.analysis.subject import subject
from epo_jax.command import ArgumentParser, check_output, number_type, run
from epo_jax.common.errors import UserError
from epo_jax.runs import figures
from epo_jax.settings.setting import COUNT, NOT_NEGATIVE

PANELS = ("OOD", "entropy_ratio", "differences")


def main(argv: list[str]) -> None:
    about = __doc__ + panels.__doc__.partition("shows:\n\n")[2]
    parser = ArgumentParser(prog="epo-jax figures", description=about,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, sweep folder, or NAME=FOLDER")
    parser.add_argument("--out", type=Path, help="the picture of a comparison: .png, .svg or .pdf")
    parser.add_argument(
        "--panels", nargs="+", metavar="PANEL", default=PANELS, help=f"what it shows; {' '.join(PANELS)} if left out"
    )
    parser.add_argument("--title", default="", help="a title before the name of game and model")
    parser.add_argument("--smooth", type=number_type(int, COUNT), default=1,
                        help="curves are means of so many steps, which never look ahead; 1 if left out")  # fmt: skip
    parser.add_argument("--from_step", type=number_type(int, NOT_NEGATIVE),
                        help="final success is the mean of the evaluations after so many RL steps, not the last")  # fmt: skip
    parser.add_argument("--reference", metavar="ARM", help="the arm that the others are compared with; the first if left out")
    options = parser.parse_args(argv[1:])
    if options.out is None:
        if len(options.runs) > 1 or options.panels != PANELS:
            raise UserError("--out is missing; name the picture of the comparison, for example --out=comparison.png.")
        for path in figures.draw(Path(options.runs[0])):
            print(path)
        return
    check_output(options.out, "comparison.png")
    if options.out.suffix not in pictures.FORMATS:
        raise UserError(f"--out={options.out} must end in {', '.join(pictures.FORMATS)}.")
    runs, left_out = read_all(options.runs)
    arms = arms_of(runs)
    compared = Comparison(arms, reference_arm(arms, options.reference), options.from_step, options.smooth)
    about = " · ".join(text for text in (options.title, subject(runs)) if text)
    print(f"wrote {pictures.draw(compared, options.panels, about, options.out)}")
    for _, reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
