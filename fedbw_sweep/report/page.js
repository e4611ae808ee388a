// The table decides: what is filtered and sorted there is what the charts draw.

const PAGE = 100; // rows the table grows by
const CURVES = 60; // curves drawn at once
let METRICS; // column: [heading, unit, decimals, divisor]
const GLYPHS = { circle: "●", square: "■", "triangle-up": "▲", diamond: "◆", "triangle-down": "▼", cross: "✚" };
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child != null));
  return element;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Turn {column: [values]} into [{column: value}]. */
function rowsOf(columns) {
  const names = Object.keys(columns);
  const length = names.length ? columns[names[0]].length : 0;
  return Array.from({ length }, (_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

/** Fixed decimals, so that a column lines up; significant digits where those would show none. */
function formatted(value, decimals, significant = 3) {
  if (value == null) return "–";
  const small = value !== 0 && Math.abs(value) < 10 ** -decimals;
  const digits = small ? { maximumSignificantDigits: significant } : { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  return value.toLocaleString("en-US", digits);
}

/** The largest unit in which the smallest value but zero still has three digits. */
function byteUnit(values) {
  const smallest = Math.min(...values.filter((value) => value > 0));
  return [["MB", 1e6], ["kB", 1e3], ["B", 1]].find(([, scale]) => smallest >= scale) ?? ["B", 1];
}

function spread(row, name) {
  const [, , decimals, divisor] = METRICS[name];
  const sd = row[`${name}_sd`];
  const mean = formatted(row[name] == null ? null : row[name] / divisor, decimals);
  return sd ? [mean, ` ± ${formatted(sd / divisor, decimals, 1)}`] : [mean, ""];
}

/** Two corners of what the axes must span: one value alone would span, and label, nothing. */
function room(points) {
  const ends = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  let [left, right] = ends(points.map((point) => point.mb));
  let [bottom, top] = ends(points.map((point) => point.loss));
  const middle = Math.sqrt(left * right);
  if (right < 2.5 * left) [left, right] = [middle / 2, middle * 2]; // holds a 1, 2 or 5
  if (bottom === top) [bottom, top] = [0.95 * bottom, 1.05 * top];
  return [{ mb: left, loss: bottom }, { mb: right, loss: top }];
}

const inBytes = (count) => (count == null ? "–" : `${Math.round(count).toLocaleString("en-US")} B`);
const state = (row) => (row.done === row.runs ? "done" : row.failed ? "failed" : "missing");

function stateText(row) {
  if (row.done === row.runs) return row.runs > 1 ? `${row.done} done` : "done";
  const missing = row.runs - row.done - row.failed;
  const parts = [[row.done, "done"], [row.failed, "failed"], [missing, "missing"]];
  return parts.filter(([count]) => count).map(([count, word]) => (row.runs > 1 ? `${count} ${word}` : word)).join(", ");
}

async function main() {
  const data = await unpack($("data").textContent);
  METRICS = data.metrics;
  const specs = JSON.parse($("specs").textContent);
  const rows = rowsOf(data.configurations);
  rows.forEach((row, number) => {
    row.number = number;
    row.runsOf = [];
    row.points = [];
  });
  for (const run of rowsOf(data.runs)) rows[run.configuration].runsOf.push(run);
  for (const point of rowsOf(data.curves)) rows[point.configuration].points.push(point);
  for (const row of rows) {
    const words = data.settings.flatMap((name) => [row[name], `${name}=${row[name]}`]);
    const ids = row.runsOf.flatMap((run) => [run.run_id, `seed=${run.seed}`, run.status]);
    row.text = [...words, ...ids].join(" ").toLowerCase();
    row.state = stateText(row);
  }

  for (const [name, metric] of Object.entries(METRICS)) {
    if (metric[1] === "MB") [metric[1], metric[3]] = byteUnit(rows.map((row) => row[name]));
  }
  const columns = [
    ...data.settings.map((name) => ({ name, heading: name, unit: "" })),
    { name: "state", heading: "runs", unit: "" },
    ...Object.entries(METRICS)
      .filter(([name]) => name !== "whole_model_ratio" || rows.some((row) => row[name] != null && row[name] !== row.uplink_ratio))
      .map(([name, [heading, unit]]) => ({ name, heading, unit, metric: true })),
  ];
  const numeric = (column) => rows.every((row) => row[column.name] == null || typeof row[column.name] === "number");
  for (const column of columns) column.number = numeric(column);

  let order = { name: "loss", sign: 1 };
  let shown = rows;
  let visible = PAGE;
  const opened = new Set();

  // What colours stand for
  const choices = data.settings.filter((name) => new Set(rows.map((row) => row[name])).size > 1);
  $("colour").append(make("option", { value: "label" }, "configuration"), ...choices.map((name) => make("option", { value: name }, name)));
  $("colour").value = rows.length <= 7 || !choices.length ? "label" : choices.includes("compression") ? "compression" : choices[0];
  const series = (row) => ($("colour").value === "label" ? row.label : `${row[$("colour").value] ?? "–"}`);
  const compare = (a, b) => a.localeCompare(b, "en", { numeric: true });
  const seriesNames = () => [...new Set(shown.map(series))].sort(compare);

  // Charts
  const views = {};
  const picked = new Set(); // series chosen in the legend; none is all
  const describe = (row) => ({
    number: row.number,
    label: row.label,
    series: series(row),
    task: row.task,
  });
  function curvePoints(chosen) {
    const field = $("direction").value;
    return chosen.flatMap((row) =>
      row.points.filter((point) => point[field] > 0).map((point) => ({
        ...describe(row),
        round: point.round,
        mb: point[field] / 1e6,
        loss: point.loss,
        low: point.loss - (point.sd ?? 0),
        high: point.loss + (point.sd ?? 0),
        spread: spread({ loss: point.loss, loss_sd: point.sd }, "loss").join(""),
        uplink: inBytes(point.uplink_bytes),
        total: inBytes(point.total_bytes),
      })),
    );
  }
  /** Seeds that all of these rows have, or null if they have no others. */
  function commonSeeds(chosen) {
    const seeds = chosen.map((row) => row.runsOf.filter((run) => run.loss != null).map((run) => run.seed));
    const common = seeds.reduce((left, own) => left.filter((seed) => own.includes(seed)));
    return seeds.every((own) => own.length === common.length) ? null : common;
  }
  /** Final losses; a point is dominated if another of its task is no worse in both and better in one. */
  function frontPoints() {
    const field = $("direction").value;
    const finished = shown.filter((row) => row.loss != null && row[field] > 0);
    const points = [];
    for (const task of new Set(finished.map((row) => row.task))) {
      const own = finished.filter((row) => row.task === task);
      const seeds = commonSeeds(own);
      for (const row of own) {
        const runs = row.runsOf.filter((run) => run.loss != null && seeds?.includes(run.seed));
        const mean = (value) => runs.reduce((sum, run) => sum + value(run), 0) / runs.length;
        const compared = runs.length
          ? { loss: mean((run) => run.loss), uplink_bytes: mean((run) => run.uplink_bytes), total_bytes: mean((run) => run.uplink_bytes + run.downlink_bytes) }
          : row;
        points.push({
          ...describe(row),
          seeds: seeds?.length,
          mb: compared[field] / 1e6,
          loss: compared.loss,
          spread: runs.length ? `${formatted(compared.loss, 3)} over seeds ${seeds.join(", ")}` : spread(row, "loss").join(""),
          uplink: inBytes(compared.uplink_bytes),
          total: inBytes(compared.total_bytes),
        });
      }
    }
    const best = {};
    points.sort((a, b) => a.mb - b.mb || a.loss - b.loss);
    for (const point of points) {
      const front = best[point.task];
      const twin = front && front.mb === point.mb && front.loss === point.loss;
      const compared = point.seeds !== 0;
      point.dominated = compared && Boolean(front) && !twin && front.loss <= point.loss;
      point.front = compared && !point.dominated;
      point.verdict = !compared ? "no seed in common" : point.dominated ? "no: dominated" : "yes";
      if (point.front) best[point.task] = point;
    }
    return points;
  }
  function legend(names) {
    $("legend").replaceChildren(...names.map((name, i) => {
      const [colour, shape] = data.styles[i % data.styles.length];
      const swatch = make("i", { ariaHidden: "true" }, GLYPHS[shape]);
      swatch.style.color = colour;
      const pick = () => {
        if (!picked.delete(name)) picked.add(name);
        draw();
        $("legend").children[i].focus(); // the buttons are new
      };
      return make("button", { type: "button", ariaPressed: picked.has(name), onclick: pick }, swatch, name);
    }));
  }
  async function draw() {
    const withCurve = shown.filter((row) => row.points.length);
    const step = Math.max(1, withCurve.length / CURVES);
    const chosen = Array.from({ length: Math.min(CURVES, withCurve.length) }, (_, i) => withCurve[Math.floor(i * step)]);
    const points = { curves: curvePoints(chosen), front: frontPoints() };
    const front = points.front.filter((point) => point.front).length;
    const seeds = [...new Set(points.front.map((point) => point.seeds))];
    const common = seeds.filter((count) => count > 0);
    const over = (common.length ? ` Over the seeds that all have: n = ${common.join(" or ")}.` : "")
      + (seeds.includes(0) ? " Configurations without a common seed are not compared." : "");
    $("curves-note").textContent = withCurve.length > CURVES
      ? `${CURVES} of ${withCurve.length.toLocaleString("en-US")} configurations, evenly from the table as it is sorted; filter to see others.`
      : `${withCurve.length} configuration${withCurve.length === 1 ? "" : "s"}${withCurve.some((row) => row.done > 1) ? ", mean over seeds" : ""}${chosen.some((row) => row.points.some((point) => point.sd)) ? ", band ± sd" : ""}.`;
    const tasks = new Set(points.front.map((point) => point.task)).size;
    $("front-note").textContent = points.front.length
      ? `${front} of ${points.front.length.toLocaleString("en-US")} on the Pareto front${tasks > 1 ? `s of ${tasks} tasks` : ""}; dominated ones are grey.${over}`
      : "No run with bytes and a loss.";
    const names = seriesNames();
    for (const name of picked) if (!names.includes(name)) picked.delete(name);
    legend(names);
    const signals = { series_names: names, picked: [...picked] };
    for (const [name, values] of Object.entries(points)) {
      $(name).hidden = !values.length; // scales have no sense then
      if (!values.length) continue;
      if (!views[name]) {
        const spec = { ...specs[name], datasets: { points: values, room: room(values) } };
        for (const parameter of spec.params) if (parameter.name in signals) parameter.value = signals[parameter.name];
        const { view } = await vegaEmbed(`#${name}`, spec, { actions: false, renderer: "svg", logLevel: 1 });
        views[name] = view;
      } else {
        for (const [signal, value] of Object.entries(signals)) views[name].signal(signal, value);
        await views[name].data("points", values).data("room", room(values)).runAsync();
      }
    }
  }

  // Table
  const head = make("tr", {}, ...columns.map((column) => {
    const button = make("button", { type: "button", onclick: () => sort(column) }, make("span", {}, column.heading));
    if (column.unit) button.append(make("small", {}, column.unit));
    return make("th", { className: column.number ? "number" : "", scope: "col" }, button);
  }));
  document.querySelector("#main thead").append(head);

  function cell(row, column) {
    if (column.metric) {
      const [mean, sd] = spread(row, column.name);
      const exact = column.name.endsWith("_bytes") ? inBytes(row[column.name]) : "";
      return make("td", { className: "number", title: exact }, mean, make("span", { className: "sd" }, sd));
    }
    const text = column.name === "state" ? make("span", { className: `status ${state(row)}` }, row.state) : `${row[column.name] ?? "–"}`;
    return make("td", { className: column.number ? "number" : "" }, text);
  }

  function commandOf(row, run) {
    const overrides = row.changes.map((place) => data.changes[place][3]).join(" ");
    const command = data.command.replace("SEED", run.seed);
    return overrides ? command.replace("OVERRIDES", () => overrides) : command.replace(" OVERRIDES", "");
  }

  function detail(row) {
    const inner = make("div", { className: "inner" });
    if (row.changes) {
      inner.append(make("h4", {}, row.changes.length ? "Differs from the defaults" : "The defaults"));
      const changed = row.changes.map((place) => data.changes[place]);
      inner.append(make("dl", { className: "settings" }, ...changed.map(([key, old, value]) =>
        make("div", {}, make("dt", {}, key), make("dd", {}, make("s", {}, old), " ", value)))));
    }
    inner.append(make("h4", {}, row.runsOf.length === 1 ? "Run" : "Runs"));
    for (const run of row.runsOf) {
      const facts = [`seed ${run.seed}`, run.run_id, run.status];
      if (run.loss != null) facts.push(`loss ${run.loss}`, `${inBytes(run.uplink_bytes)} up`, `${inBytes(run.downlink_bytes)} down`);
      const line = make("div", {}, facts.join(" · "));
      if (run.status !== "done") line.append(" · ", make("a", { href: "#problems" }, "reason"));
      if (run.environment != null) line.append(" · ", make("a", { href: `#versions-${run.environment + 1}` }, `versions ${run.environment + 1}`));
      line.append(` · from ${run.source}`);
      const command = row.changes ? commandOf(row, run) : "its config.yaml was not among what this report was made from";
      inner.append(make("div", { className: "run" }, line, make("pre", { className: "command" }, command)));
    }
    const td = make("td", { colSpan: columns.length }, inner);
    return make("tr", { className: "detail" }, td);
  }

  function render() {
    head.childNodes.forEach((th, i) => {
      if (columns[i].name === order.name) th.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    });
    const body = document.querySelector("#main tbody");
    body.replaceChildren(...shown.slice(0, visible).flatMap((row) => {
      const tr = make("tr", { className: "row" }, ...columns.map((column) => cell(row, column)));
      const toggle = make("button", { type: "button", className: "toggle", ariaLabel: "details", ariaExpanded: opened.has(row) });
      tr.firstChild.prepend(toggle);
      tr.addEventListener("click", () => {
        if (getSelection().toString()) return; // text is being selected
        if (opened.delete(row)) tr.nextSibling.remove();
        else {
          opened.add(row);
          tr.after(detail(row));
        }
        toggle.ariaExpanded = opened.has(row);
      });
      return opened.has(row) ? [tr, detail(row)] : [tr];
    }));
    if (!shown.length) body.append(make("tr", {}, make("td", { colSpan: columns.length }, "Nothing matches the filter.")));
    $("count").textContent = `${shown.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")}`;
    $("more").hidden = visible >= shown.length;
    $("more").textContent = `Show ${Math.min(PAGE, shown.length - visible)} more`;
  }

  function arrange() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const { name, sign } = order;
    const missing = (value) => value == null;
    shown = rows.filter((row) => words.every((word) => row.text.includes(word))).sort((a, b) => {
      const [x, y] = [a[name], b[name]];
      if (missing(x) || missing(y)) return missing(x) - missing(y); // always last
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : compare(`${x}`, `${y}`));
    });
    render();
    return draw();
  }
  function sort(column) {
    order = { name: column.name, sign: order.name === column.name ? -order.sign : 1 };
    visible = PAGE;
    arrange();
  }

  // Versions
  const counts = {};
  for (const run of rowsOf(data.runs)) counts[run.environment] = (counts[run.environment] ?? 0) + 1;
  data.environments.forEach((environment, number) => {
    const entries = Object.entries(environment).map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, value)));
    $("versions").append(
      make("h3", { id: `versions-${number + 1}` }, `${number + 1}: ${(counts[number] ?? 0).toLocaleString("en-US")} run${counts[number] === 1 ? "" : "s"}`),
      make("dl", { className: "settings" }, ...entries),
    );
  });
  if (!data.environments.length) $("versions").append(make("p", {}, "Not recorded in what this report was made from."));

  let pending;
  $("filter").addEventListener("input", () => {
    clearTimeout(pending);
    visible = PAGE;
    pending = setTimeout(arrange, 120);
  });
  for (const id of ["direction", "colour"]) $(id).addEventListener("change", draw);
  $("more").addEventListener("click", () => {
    visible += PAGE;
    render();
  });
  await arrange();
  document.body.dataset.ready = "true";
}

main();
