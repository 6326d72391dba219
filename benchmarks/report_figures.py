"""Writes selected figures of a report as one PNG, for a document.

    python -m benchmarks.report_figures report.html pilot.png "Success, OOD" "Entropy of sampled tokens"

Arguments are beginnings of the titles of figures; "corridors" is the row of the corridors of all arms, "turns" that of the maps
of entropy by turn. Needs Chromium.
"""

import argparse
import base64
import contextlib
import json
import sys
from pathlib import Path

from tests.browser import Browser, find

# Keeps the legend and the requested figures, and returns their positions.
KEEP = """(titles => {
    const named = (f, title) => f.closest(`#${CSS.escape(title)}`) || f.querySelector('figcaption').textContent.startsWith(title);
    const figures = [...document.querySelectorAll('#curves figure')].filter(f => titles.some(title => named(f, title)));
    const legend = document.getElementById('legend'), grid = document.getElementById('success');
    document.getElementById('curves').replaceChildren(legend, grid);
    grid.replaceChildren(...figures);
    grid.style.gridTemplateColumns = `repeat(${Math.min(3, figures.length)}, 400px)`;
    const [top, bottom] = [legend, grid].map(part => part.getBoundingClientRect());
    const width = Math.max(0, ...figures.map(f => f.getBoundingClientRect().right)) - top.x;
    return {figures: figures.length, x: top.x - 8, y: top.y + scrollY - 8, width: width + 16, height: bottom.bottom - top.y + 16};
})"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("titles", nargs="+", metavar="FIGURE")
    options = parser.parse_args()
    program = find()
    if program is None:
        sys.exit("no Chromium is installed (on Debian and Ubuntu: apt-get install chromium)")
    with contextlib.closing(Browser(program)) as browser:
        browser.open(options.report, width=1280)
        clip = browser.run(f"{KEEP}({json.dumps(options.titles)})")
        if not clip.pop("figures"):
            sys.exit(f"{options.report} has no figure whose title begins with {' or '.join(map(repr, options.titles))}")
        shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1.5})
    options.out.write_bytes(base64.b64decode(shot["data"]))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
