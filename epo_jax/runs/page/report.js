// The page itself: what is chosen, and what is drawn of it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const OOD = "valid_unseen", IID = "valid_seen";
const MOST_SHOWN = 6;
const chosen = new Set(data.arms.map((_, i) => i).slice(0, MOST_SHOWN));

// -------------------------------------------------------------------- results

const COLUMNS = [
  ["OOD success", (arm) => arm.result[OOD] && arm.result[OOD].mean, (arm) => success(arm.result[OOD])],
  ["IID success", (arm) => arm.result[IID] && arm.result[IID].mean, (arm) => success(arm.result[IID])],
  ["runs", (arm) => arm.runs.length, (arm) => String(arm.runs.length)],
  ["RL steps", (arm) => arm.result.steps[1], (arm) => [...new Set(arm.result.steps)].join(" to ")],
  ["entropy", (arm) => arm.result.entropy, (arm) => format(arm.result.entropy)],
  ["its variance", (arm) => arm.result.entropy_variance, (arm) => format(arm.result.entropy_variance)],
  ["to 70 %", (arm) => arm.result.steps_to_70.reduce((sum, n) => sum + (n === null ? 1e9 : n), 0) / arm.runs.length * -1,
    (arm) => arm.result.steps_to_70.map((n) => (n === null ? "never" : n)).join(", ")],
];
let sortedBy = 0;

function success(result) {
  if (!result) return "–";
  const interval = `[${(100 * result.low).toFixed(1)}, ${(100 * result.high).toFixed(1)}]`;
  return [`${format(result.mean, true)} `, el("span", { class: "soft" }, interval)];
}

function swatch(style) {
  return svg("svg", { viewBox: "0 0 26 10", style: "width: 26px; flex: none" },
    svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: style.colour, "stroke-width": 3, "stroke-dasharray": style.dash }));
}

function drawTable() {
  const value = (i) => { const v = COLUMNS[sortedBy][1](data.arms[i]); return v === null || v === undefined ? -Infinity : v; };
  const order = data.arms.map((_, i) => i).sort((a, b) => (value(a) === value(b) ? a - b : value(b) > value(a) ? 1 : -1));
  const head = COLUMNS.map(([name], i) => el("th", { "aria-sort": i === sortedBy ? "descending" : null },
    el("button", { type: "button", onclick: () => { sortedBy = i; drawTable(); } }, i === sortedBy ? `${name} ▾` : name)));
  const row = (i) => {
    const tick = el("input", { type: "checkbox", checked: chosen.has(i), "aria-label": `draw ${data.arms[i].name}`,
      onchange: (event) => { event.target.checked ? chosen.add(i) : chosen.delete(i); drawTable(); drawCurves(); } });
    const names = data.arms[i].runs.map((run) => (run.seed === null ? run.name : `${run.name}: seed ${run.seed}`)).join("\n");
    const key = shown().includes(i) ? `${styles().get(i).letter} ` : "";
    return el("tr", {}, el("td", {}, key, tick), el("td", { title: names }, data.arms[i].name),
      COLUMNS.map(([, , tell]) => el("td", {}, tell(data.arms[i]))));
  };
  $("table").replaceChildren(el("thead", {}, el("tr", {}, el("th", {}, ""), el("th", {}, "arm"), head)), el("tbody", {}, order.map(row)));
}

function drawTypes() {
  const arms = shown().filter((i) => data.arms[i].result[OOD]);
  const types = [...new Set(arms.flatMap((i) => Object.keys(data.arms[i].result[OOD].types)))].sort();
  if (types.length < 2) return $("types").replaceChildren();
  const rate = (i, type) => { const c = data.arms[i].result[OOD].types[type]; return c ? c[0] / c[1] : null; };
  $("types").replaceChildren(el("h3", {}, "OOD success by task type"), el("div", { class: "scroll" }, cellMap({
    across: "arm", columns: arms.map((i) => styles().get(i).letter), rows: types,
    cells: types.map((type) => arms.map((i) => rate(i, type))), percent: true, down: "task type" })));
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
    else found.push({ x, y, low: low && smooth(low, width), high: high && smooth(high, width), name: arm.name, ...style.get(i), ...more,
      whiskers: more.marks && arm.runs.length === 1 });
  });
  return found;
}

function without(read) {
  const names = shown().filter((i) => !read(data.arms[i])).map((i) => styles().get(i).letter);
  return names.length && data.arms.some(read) ? `Not recorded by ${names.join(", ")}.` : "";
}

function drawCurves() {
  const style = styles(), width = Number($("smooth").value);
  const others = data.arms.length - chosen.size;
  $("legend").replaceChildren(...shown().map((i) => el("li", {}, el("b", {}, style.get(i).letter), swatch(style.get(i)), data.arms[i].name)),
    others > 0 ? el("li", { class: "note" }, `${others} more in grey: tick them in the table`) : "");
  drawTypes();
  const chart = ([key, title, unit]) => {
    const read = (arm) => arm.curves[key];
    return lineChart({ title, unit, percent: key === "success", series: seriesOf(read, width), note: without(read) });
  };
  const evaluated = [[OOD, "Success, OOD"], [IID, "Success, IID"]].map(([split, title]) => {
    const read = (arm) => arm.success[split];
    return lineChart({ title, unit: split, percent: true, series: seriesOf(read, 1, { marks: true }), note: without(read) });
  });
  $("success").replaceChildren(...evaluated, ...data.curves.slice(0, 1).map(chart));
  $("training").replaceChildren(...data.curves.slice(1).map(chart));
  const reach = shown().flatMap((i) => ["entropy", "corridor_high"].flatMap((key) => { const c = data.arms[i].curves[key]; return c ? c.high || c.y : []; }));
  $("corridors").replaceChildren(...shown().map((i) => {
    const arm = data.arms[i], { colour, letter } = style.get(i);
    const only = { ...(arm.curves.entropy || { x: [], y: [] }), name: arm.name, colour, letter: "" };
    const edges = [arm.curves.corridor_low, arm.curves.corridor_high].filter(Boolean).map((curve) => ({ ...curve, low: null, colour: "var(--soft)" }));
    return lineChart({ title: `${letter}  ${arm.name}`, unit: "nats per token", series: [only], edges, reach, note: edges.length ? "" : "No corridor is recorded." });
  }));
  drawTurns();
}

function drawTurns() {
  const arms = shown().filter((i) => data.arms[i].turns);
  if (!arms.length) return $("turns").replaceChildren(el("p", { class: "note" }, "None of the arms shown has recorded it."));
  const all = arms.flatMap((i) => data.arms[i].turns.entropy.flat()).filter((v) => v !== null).sort((a, b) => a - b);
  const low = all[Math.floor(0.01 * all.length)], high = all[Math.ceil(0.99 * (all.length - 1))];
  $("turns").replaceChildren(...arms.map((i) => turnMap({ title: `${styles().get(i).letter}  ${data.arms[i].name}`, ...data.arms[i].turns, low, high })),
    colourBar(low, high, "nats per token"));
}

// -------------------------------------------------------------------- coefficients

const MEASURES = COLUMNS.filter(([name]) => !["runs", "to 70 %"].includes(name));

function options(select, texts, value = 0) {
  select.replaceChildren(...texts.map((text, i) => el("option", { value: i, selected: i === value }, text)));
}

function drawCoefficients() {
  const across = data.differing[$("across").value], down = data.differing[$("down").value - 1];
  const [name, read] = MEASURES[$("measure").value];
  const valuesOf = (key) => [...new Set(data.arms.map((arm) => arm.settings[key]).map((v) => JSON.stringify(v)))]
    .sort((a, b) => (Number(a) - Number(b)) || (a < b ? -1 : 1));
  const columns = valuesOf(across), rows = down ? valuesOf(down) : [name];
  const cells = rows.map((row) => columns.map((column) => {
    const found = data.arms.filter((arm) => JSON.stringify(arm.settings[across]) === column && (!down || JSON.stringify(arm.settings[down]) === row))
      .map(read).filter((v) => v !== null && v !== undefined);
    return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
  }));
  const bare = (text) => text.replace(/^"|"$/g, "");
  $("grid").replaceChildren(cellMap({ across, down, columns: columns.map(bare), rows: rows.map(bare), cells, percent: name.includes("success") }));
}

function startCoefficients() {
  if (!data.differing.length) {
    $("coefficients").hidden = $("to-coefficients").hidden = true;
    return;
  }
  options($("across"), data.differing);
  options($("down"), ["nothing", ...data.differing], Math.min(2, data.differing.length));
  if (data.differing.length === 1) $("down").value = 0;
  options($("measure"), MEASURES.map(([name]) => name));
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
$("about").textContent = `${runs} ${runs === 1 ? "run" : "runs"} in ${data.arms.length} ${data.arms.length === 1 ? "arm" : "arms"}; made ${data.made} by epo_jax.`;
$("lacking").hidden = !data.lacking.length;
$("lacking").querySelector("ul").replaceChildren(...data.lacking.map((sentence) => el("li", {}, sentence)));
$("smooth").addEventListener("change", drawCurves);
drawTable();
drawCurves();
startCoefficients();
startReader();
performance.mark("drawn");
