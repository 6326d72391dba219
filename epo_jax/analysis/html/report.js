// The page itself: what is chosen, and what is drawn of it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MOST_SHOWN = 7;
const chosen = new Set(data.arms.map((_, i) => i).slice(0, MOST_SHOWN));
const [MAIN] = data.columns.map((column) => column.key);
const several = data.arms.length > 1;

// Names with underscores and plus signs may break after these, and not inside of a word.
const whole = (text) => text.replace(/ ([=/]|[▾%]$) ?/g, (match) => match.replaceAll(" ", "\u00a0"));
const isShort = (text) => text.length < 24;
const breakable = (text) => text.split(/(?<=[_+])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));

// -------------------------------------------------------------------- results

const mean = (values) => (values.includes(null) || !values.length ? null : values.reduce((a, b) => a + b, 0) / values.length);
const count = (steps) => steps.filter((step) => step !== null).length;

// A number with its interval in brackets.
function estimate(found, percent) {
  if (!found || found.mean === null) return "–";
  if (found.low === null) return format(found.mean, percent);
  const bound = (value) => (percent ? (100 * value).toFixed(1) : format(value));
  return [`${format(found.mean, percent)} `, el("span", { class: "soft interval" }, `[${bound(found.low)}, ${bound(found.high)}]`)];
}

// "12, 30, 2 never".
function stepsList(values) {
  const reached = values.filter((n) => n !== null), never = values.length - reached.length;
  return [...reached, ...(never ? [never === values.length ? "never" : `${never} never`] : [])].join(", ");
}

function collapsed(arm, name) {
  const steps = arm.collapses[name].filter((step) => step !== null);
  const p = arm.versus && several ? ` p = ${format(arm.versus.p[name])}` : "";
  return el("span", { title: steps.length ? `at step ${steps.join(", ")}` : null }, `${steps.length} of ${arm.runs.length}`, el("span", { class: "soft interval" }, p));
}

// A column of a table: heading, what it is sorted by, and the content of a cell.
const measureColumn = ({ key, title, unit }) => ({
  title, percent: unit === "share", value: (arm) => (unit === "steps" ? mean(arm.measures[key].values.map((n) => (n === null ? 1e9 : n))) : arm.measures[key].mean),
  ascending: unit === "steps",
  cell: (arm) => (unit === "steps" ? stepsList(arm.measures[key].values) : estimate(arm.measures[key], unit === "share")),
});
const successColumns = [
  ...data.columns.map(({ key, title }) => ({ title, percent: true, value: (arm) => arm.final[key] && arm.final[key].mean, cell: (arm) => estimate(arm.final[key], true) })),
  ...data.columns.map(({ key, title }) => {
    const best = (arm) => arm.final[key] && arm.final[key].best;
    return { title: `best ${title}`, percent: true, value: (arm) => best(arm) && best(arm).mean, cell: (arm) => estimate(best(arm), true) };
  }),
  ...data.measures.filter((m) => ["share", "steps"].includes(m.unit)).map(measureColumn),
  { title: "runs", value: (arm) => arm.runs.length, cell: (arm) => String(arm.runs.length) },
  { title: "RL steps", value: (arm) => Math.max(...arm.runs.map((run) => run.steps)), cell: (arm) => {
    const steps = arm.runs.map((run) => run.steps), low = Math.min(...steps), high = Math.max(...steps);
    return low === high ? String(low) : `${low} to ${high}`;
  } },
];
const entropyColumns = [
  ...["entropy", "success"].map((name) => ({ title: `collapses of ${name}`, value: (arm) => count(arm.collapses[name]), cell: (arm) => collapsed(arm, name) })),
  ...data.measures.filter((m) => !["share", "steps"].includes(m.unit) && data.arms.some((arm) => arm.measures[m.key].mean !== null)).map(measureColumn),
];

function swatch(style) {
  return svg("svg", { viewBox: "0 0 26 10", style: "width: 26px; flex: none" },
    svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: style.colour, "stroke-width": 3, "stroke-dasharray": style.dash }));
}

let sortedBy = successColumns[0];

function drawTables() {
  const value = (i) => { const v = sortedBy.value(data.arms[i]); return v === null || v === undefined ? -Infinity : sortedBy.ascending ? -v : v; };
  const order = data.arms.map((_, i) => i).sort((a, b) => (value(a) === value(b) ? a - b : value(b) > value(a) ? 1 : -1));
  for (const [id, columns, ticked] of [["table", successColumns, true], ["entropies", entropyColumns, false]]) {
    const head = columns.map((column) => el("th", { "aria-sort": column === sortedBy ? "descending" : null },
      el("button", { type: "button", onclick: () => { sortedBy = column; drawTables(); } }, whole(column === sortedBy ? `${column.title} ▾` : column.title))));
    const row = (i) => {
      const tick = el("input", { type: "checkbox", checked: chosen.has(i), "aria-label": `draw ${data.arms[i].name}`,
        onchange: (event) => { event.target.checked ? chosen.add(i) : chosen.delete(i); drawAll(); } });
      const names = data.arms[i].runs.map((run) => (run.seed === null ? run.name : `${run.name}: seed ${run.seed}`)).join("\n");
      const key = several && shown().includes(i) ? `${styles().get(i).letter} ` : "";
      return el("tr", {}, el("td", {}, key, ticked && several ? tick : null), el("td", { title: names, class: isShort(data.arms[i].name) ? "short" : null }, isShort(data.arms[i].name) ? data.arms[i].name : breakable(data.arms[i].name)),
        columns.map((column) => el("td", {}, column.cell(data.arms[i]))));
    };
    $(id).replaceChildren(el("thead", {}, el("tr", {}, el("th", {}, ""), el("th", {}, several ? "arm" : "run"), head)), el("tbody", {}, order.map(row)));
  }
}

function drawTypes() {
  const arms = MAIN ? shown().filter((i) => data.arms[i].final[MAIN]) : [];
  const typesOf = (i) => data.arms[i].final[MAIN].types;
  const types = [...new Set(arms.flatMap((i) => Object.keys(typesOf(i))))].sort();
  if (types.length < 2) return $("types").replaceChildren();
  const rate = (i, type) => { const c = typesOf(i)[type]; return c ? c[0] / c[1] : null; };
  $("types").replaceChildren(el("h3", {}, `Success by task type, ${data.columns[0].title}`), el("div", { class: "scroll" }, cellMap({
    across: several ? "arm" : "", columns: arms.map((i) => (several ? styles().get(i).letter : "success")), rows: types.map(breakable),
    cells: types.map((type) => arms.map((i) => rate(i, type))), percent: true, down: "task type" })));
}

// -------------------------------------------------------------------- comparisons

const differenceTitle = (key) => {
  const best = key.startsWith("best "), bare = key.replace(/^best /, "");
  const found = data.columns.find((column) => column.key === bare) || data.measures.find((measure) => measure.key === bare);
  return `${best ? "best " : ""}${found.title}`;
};
const isShare = (key) => !data.measures.some((measure) => measure.key === key && measure.unit !== "share");

function drawDifferences() {
  const key = data.differences[$("difference").value], style = styles();
  const rows = shown().filter((i) => data.arms[i].versus && data.arms[i].versus.differences[key]).map((i) => {
    const { values, ...found } = data.arms[i].versus.differences[key];
    return { ...found, dots: values, name: data.arms[i].name, ...style.get(i) };
  });
  $("differences").replaceChildren(differencePlot({ title: `${differenceTitle(key)}: difference from ${data.reference}`, percent: isShare(key), rows }));
}

function drawScatters() {
  const arms = data.arms.flatMap((arm, i) => arm.runs.map(() => i)), style = styles();
  const title = (key) => data.measures.find((measure) => measure.key === key).title;
  const text = (r) => `${r.mean.toFixed(2)} [${r.low.toFixed(2)}, ${r.high.toFixed(2)}]`;
  const told = ({ r, within, runs }) => (r ? `${runs} runs: r = ${text(r)}${within ? `; within arms ${text(within)}` : ""}.` : `${runs} runs, too few or too alike for a correlation.`);
  $("scatters").replaceChildren(...data.scatters.filter((found) => found.runs > 1).map(({ key, x, y, ...found }) => scatterPlot({
    title: `Final success against ${title(key)}`, across: title(key), note: told(found),
    points: x.map((value, n) => ({ x: value, y: y[n], name: data.arms[arms[n]].name, ...(style.get(arms[n]) || { colour: "var(--soft)" }) }))
      .filter((point) => point.x !== null && point.y !== null) })));
}

function startComparisons() {
  const runs = data.arms.reduce((sum, arm) => sum + arm.runs.length, 0);
  const keys = data.differences.map((key, i) => i).filter((i) => data.arms.some((arm) => arm.versus && arm.versus.differences[data.differences[i]]));
  $("paired").hidden = !keys.length;
  $("difference").replaceChildren(...keys.map((i) => el("option", { value: i }, differenceTitle(data.differences[i]))));
  $("difference").addEventListener("change", drawDifferences);
  $("comparisons").hidden = $("to-comparisons").hidden = runs < 2 || (!keys.length && data.scatters.every((found) => found.runs < 2));
}

function drawComparisons() {
  if ($("comparisons").hidden) return;
  if (!$("paired").hidden) drawDifferences();
  drawScatters();
}

// -------------------------------------------------------------------- curves

const shown = () => [...chosen].sort((a, b) => a - b);
const styles = () => new Map(shown().map((i, n) => [i, styleOf(n)]));

// Mean of the last `width` points, of fewer at the start.
function smooth(values, width) {
  return values.map((value, i) => {
    const part = values.slice(Math.max(0, i + 1 - width), i + 1).filter((v) => v !== null);
    return value === null ? null : part.reduce((a, b) => a + b, 0) / part.length;
  });
}

function seriesOf(read, width, more = {}) {
  const style = styles();
  const found = [];
  data.arms.forEach((arm, i) => {
    const curve = read(arm);
    if (!curve) return;
    const { x, low, high } = curve, y = smooth(curve.y, width);
    if (!style.has(i)) found.push({ x, y, faint: true });
    else found.push({ x, y, low: low && smooth(low, width), high: high && smooth(high, width), name: arm.name, ...style.get(i), ...(several ? {} : { letter: "" }), ...more,
      whiskers: more.marks && arm.runs.length === 1 });
  });
  return found;
}

function without(read) {
  const names = shown().filter((i) => !read(data.arms[i])).map((i) => styles().get(i).letter);
  return names.length && data.arms.some(read) ? `Not recorded by ${names.join(", ")}.` : "";
}

function drawAll() {
  drawTables();
  drawTypes();
  drawCurves();
  drawComparisons();
}

const reach = [0, data.steps];

function drawCurves() {
  const style = styles(), width = Number($("smooth").value);
  const others = data.arms.length - chosen.size;
  $("legend").replaceChildren(...(several ? shown().map((i) => el("li", {}, el("b", {}, style.get(i).letter), swatch(style.get(i)), breakable(data.arms[i].name))) : []),
    others > 0 ? el("li", { class: "note" }, `${others} more in grey: tick them in the table`) : "");
  const chart = ([key, title, unit]) => {
    const read = (arm) => arm.curves[key];
    return lineChart({ title, unit, across: reach, percent: key === "success", series: seriesOf(read, width), note: without(read) });
  };
  const evaluated = data.columns.map(({ key, title }) => {
    const read = (arm) => arm.success[key];
    return lineChart({ title: `Success, ${title}`, unit: "share won", across: reach, percent: true, series: seriesOf(read, 1, { marks: true }), note: without(read) });
  });
  const ofSuccess = data.curves.filter(([key]) => key === "success");
  $("success").replaceChildren(...evaluated, ...ofSuccess.map(chart));
  $("training").replaceChildren(...data.curves.filter((curve) => !ofSuccess.includes(curve)).map(chart));
  const found = shown().filter((i) => data.arms[i].curves.corridor_high);
  const values = found.flatMap((i) => ["entropy", "corridor_high"].flatMap((key) => { const c = data.arms[i].curves[key]; return c ? c.high || c.y : []; }));
  $("in-corridor").hidden = !found.length;
  $("corridors").replaceChildren(...found.map((i) => {
    const arm = data.arms[i], { colour, letter } = style.get(i);
    const only = { ...(arm.curves.entropy || { x: [], y: [] }), name: arm.name, colour, letter: "" };
    const edges = [arm.curves.corridor_low, arm.curves.corridor_high].map((curve) => ({ ...curve, low: null, colour: "var(--soft)" }));
    return lineChart({ title: armTitle(letter, arm), unit: "nats per token", across: reach, series: [only], edges, reach: values });
  }));
  drawTurns();
}

const armTitle = (letter, arm) => (several ? `${letter}  ${arm.name}` : arm.name);

function drawTurns() {
  const arms = shown().filter((i) => data.arms[i].turns);
  $("by-turn").hidden = !arms.length;
  if (!arms.length) return $("turns").replaceChildren();
  const all = arms.flatMap((i) => data.arms[i].turns.entropy.flat()).filter((v) => v !== null).sort((a, b) => a - b);
  const low = all[Math.floor(0.01 * all.length)], high = all[Math.ceil(0.99 * (all.length - 1))];
  $("turns").replaceChildren(...arms.map((i) => turnMap({ title: armTitle(styles().get(i).letter, data.arms[i]), across: reach, ...data.arms[i].turns, low, high })),
    colourBar(low, high, "nats per token"));
}

// -------------------------------------------------------------------- coefficients

const MAPPED = [...successColumns, ...entropyColumns].filter((column) => column.title !== "runs" && !column.ascending);

function options(select, texts, value = 0) {
  select.replaceChildren(...texts.map((text, i) => el("option", { value: i, selected: i === value }, text)));
}

function drawCoefficients() {
  const across = data.differing[$("across").value], down = data.differing[$("down").value - 1];
  const { title: name, value: read, percent } = MAPPED[$("measure").value];
  const valuesOf = (key) => [...new Set(data.arms.map((arm) => arm.settings[key]).map((v) => JSON.stringify(v)))]
    .sort((a, b) => (Number(a) - Number(b)) || (a < b ? -1 : 1));
  const columns = valuesOf(across), rows = down ? valuesOf(down) : [name];
  const cells = rows.map((row) => columns.map((column) => {
    const found = data.arms.filter((arm) => JSON.stringify(arm.settings[across]) === column && (!down || JSON.stringify(arm.settings[down]) === row))
      .map(read).filter((v) => v !== null && v !== undefined);
    return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
  }));
  const bare = (text) => text.replace(/^"|"$/g, "");
  $("grid").replaceChildren(cellMap({ across, down, columns: columns.map(bare), rows: rows.map((name) => breakable(bare(name))), cells, percent }));
}

function startCoefficients() {
  if (!data.differing.length) {
    $("coefficients").hidden = $("to-coefficients").hidden = true;
    return;
  }
  options($("across"), data.differing);
  options($("down"), ["nothing", ...data.differing], Math.min(2, data.differing.length));
  if (data.differing.length === 1) $("down").value = 0;
  options($("measure"), MAPPED.map((column) => column.title));
  for (const id of ["across", "down", "measure"]) $(id).addEventListener("change", drawCoefficients);
  drawCoefficients();
}

// -------------------------------------------------------------------- episodes

const FILTERS = [
  ["arm", (e) => data.arms[e.arm].name], ["run", (e) => e.run], ["split", (e) => e.split], ["type of task", (e) => e.type],
  ["task", (e) => e.task], ["RL step", (e) => String(e.step)], ["outcome", (e) => (e.won ? "won" : "not won")],
];
const wanted = FILTERS.map(() => "");
let matching = [], current = 0;

function passes(episode, except) {
  return FILTERS.every(([, read], i) => i === except || !wanted[i] || read(episode) === wanted[i]);
}

// Each filter offers what the others leave.
function drawFilters() {
  $("filters").replaceChildren(...FILTERS.map(([name, read], i) => {
    const values = [...new Set(data.episodes.filter((e) => passes(e, i)).map(read))].sort((a, b) => (Number(a) - Number(b)) || (a < b ? -1 : 1));
    const select = el("select", { onchange: (event) => { wanted[i] = event.target.value; current = 0; drawFilters(); } },
      el("option", { value: "" }, `all (${values.length})`), values.map((v) => el("option", { value: v, selected: v === wanted[i] }, v)));
    return el("label", {}, name, select);
  }));
  matching = data.episodes.filter((e) => passes(e));
  drawEpisode();
}

const highest = (() => {
  const all = data.episodes.flatMap((e) => e.turns.flatMap((turn) => turn.entropy)).sort((a, b) => a - b);
  return all[Math.floor(0.98 * (all.length - 1))] || 1;
})();

// The answer in parts: <think>...</think>, <action>...</action>, and what is outside of them. Tokens go where they begin;
// blanks, and a last token alone (the end of the turn), stay with what came before them.
function parts(tokens) {
  const text = tokens.join(""), kinds = Array(text.length + 1).fill("answer");
  for (const [pattern, kind] of [[/<think>[^]*?<\/think>/gi, "thought"], [/<action>[^]*?<\/action>/gi, "action"]]) {
    for (const match of text.matchAll(pattern)) kinds.fill(kind, match.index, match.index + match[0].length);
  }
  const found = [];
  let at = 0;
  tokens.forEach((token, i) => {
    const last = found.at(-1), kind = kinds[at];
    at += token.length;
    if (last && (kind === last.kind || !token.trim() || (kind === "answer" && i === tokens.length - 1))) last.tokens.push(i);
    else found.push({ kind, tokens: [i] });
  });
  return found;
}

function drawTurn(turn, number) {
  const words = parts(turn.tokens).map(({ kind, tokens }) => el("div", { class: `said ${kind}` },
    el("span", { class: "label" }, kind),
    tokens.map((i) => {
      const h = turn.entropy[i];
      return el("span", { class: "token", title: `${h} nats`, "data-h": h.toFixed(2), style: `--h: ${Math.min(1, h / highest).toFixed(3)}` }, turn.tokens[i]);
    })));
  const mean = turn.entropy.reduce((a, b) => a + b, 0) / (turn.entropy.length || 1);
  const told = [`turn ${number + 1}`, `reward ${format(turn.reward)}`, `mean entropy ${format(mean)} nats`];
  const said = turn.tokens.join("").toLowerCase().replace(/\s+/g, " ");
  const read = !turn.action ? "no action in it" : !turn.valid ? `not a valid answer; taken as: ${turn.action}` : said.includes(turn.action) ? null : `taken as: ${turn.action}`;
  return el("div", { class: turn.reward > 0 ? "turn rewarded" : "turn" },
    el("h4", {}, told.join(" · ")), el("div", { class: "observation" }, turn.observation), words, read && el("h4", {}, read));
}

function drawEpisode() {
  const episode = matching[current];
  $("place").textContent = matching.length ? `${current + 1} of ${matching.length}` : "no episode";
  $("previous").disabled = current === 0;
  $("next").disabled = current + 1 >= matching.length;
  if (!episode) return $("episode").replaceChildren(el("p", { class: "note" }, data.stored ? "No episode passes the filters." : "The runs have stored no episodes."));
  const outcome = episode.won ? "won" : episode.truncated ? "not won, ended by a limit" : "not won";
  const total = episode.turns.reduce((sum, turn) => sum + turn.reward, 0);
  const told = [episode.run, `${episode.split}, step ${episode.step}`, episode.type, outcome, `return ${format(total)}`, `score ${format(episode.score)}`, `${episode.turns.length} turns`];
  $("episode").replaceChildren(el("p", { class: "note" }, told.join(" · ")), el("p", { class: "note" }, episode.task), el("p", { class: "goal" }, episode.goal || ""),
    ...episode.turns.map(drawTurn), el("div", { class: "turn" }, el("h4", {}, "at the end"), el("div", { class: "observation" }, episode.end)));
}

function startReader() {
  const move = (by) => () => { current += by; drawEpisode(); };
  $("previous").addEventListener("click", move(-1));
  $("next").addEventListener("click", move(1));
  $("numbers").addEventListener("change", (event) => $("episode").classList.toggle("numbers", event.target.checked));
  $("scale").replaceChildren(el("p", { class: "note" }, "entropy of each token: 0", el("span", { class: "ramp" }), `${format(highest)} nats and more. `,
    data.episodes.length < data.stored ? `The page holds ${data.episodes.length} of the ${data.stored} stored episodes (--megabytes).` : ""));
  drawFilters();
}

// --------------------------------------------------------------------

document.title = $("title").textContent = data.title;
const runs = data.arms.reduce((sum, arm) => sum + arm.runs.length, 0);
$("subject").textContent = data.subject;
$("about").textContent = `${runs} ${runs === 1 ? "run" : "runs"}${several ? ` in ${data.arms.length} arms` : ""}; made ${data.made} by epo_jax.`;
$("facts").replaceChildren(...data.facts.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
$("last").textContent = data.from_step === null ? "that of each run's last evaluation" : `the mean of a run's evaluations after step ${data.from_step}`;
$("compared").textContent = several ? `p: Fisher's exact test against ${data.reference}, two-sided.` : "";
$("choose").hidden = !several;
$("out").hidden = !data.left_out.length;
$("out").querySelector("ul").replaceChildren(...data.left_out.map(([, reason]) => el("li", {}, reason)));
$("lacking").hidden = !data.lacking.length;
$("lacking").querySelector("ul").replaceChildren(...data.lacking.map((sentence) => el("li", {}, sentence)));
$("smooth").addEventListener("change", drawCurves);
startComparisons();
drawAll();
startCoefficients();
startReader();
performance.mark("drawn");
