"use strict";
// One page that shows what the experts learned. The data is the JSON in #content; figures are drawn by Plotly.

const content = JSON.parse(document.getElementById("content").textContent);
const models = content.models;
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"];
const DARK_COLOURS = ["#56B4E9", "#FF9E5E", "#3DD6A3", "#E9A3CB", "#F2C14E"];
const byId = (id) => document.getElementById(id);
const figures = []; // draw functions, called again when colours change

// ---------- colours ----------

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function modelColour(index) {
  return (isDark() ? DARK_COLOURS : COLOURS)[index % COLOURS.length];
}

// Neighbours differ: each step goes round the circle of hues by the golden angle.
function tint(index, lightness) {
  return `hsl(${Math.round(index * 137.508) % 360} ${isDark() ? 55 : 75}% ${lightness}%)`;
}

function heat() {
  return [[0, colour("low")], [0.5, colour("mid")], [1, colour("high")]];
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light colours" : "Dark colours";
  figures.forEach((draw) => draw());
}

// ---------- figures ----------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A figure with its buttons and its table. `build` returns {traces, layout, head, rows, label}.
function figure(place, name, build) {
  const plot = element("div", { class: "plot", role: "img" });
  const tools = element("div", { class: "tools" });
  const details = element("details");
  const table = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${name}, data` });
  details.append(element("summary", {}, "Data as a table"), table);
  for (const format of ["png", "svg"]) {
    const button = element("button", { type: "button", "aria-label": `Save ${name} as ${format.toUpperCase()}` }, format.toUpperCase());
    button.addEventListener("click", () => {
      Plotly.downloadImage(plot, { format, filename: name.replaceAll(" ", "-"), width: 1000, height: Math.max(420, plot.clientHeight), scale: format === "png" ? 2 : 1 });
    });
    tools.append(button);
  }
  const csv = element("button", { type: "button", "aria-label": `Save ${name} as CSV` }, "CSV");
  csv.addEventListener("click", () => saveCsv(name, build()));
  tools.append(csv, details);
  place.replaceChildren(plot, tools);
  const fill = () => {
    if (details.open) {
      const built = build();
      table.replaceChildren(tableOf(built.head, built.rows));
    }
  };
  details.addEventListener("toggle", fill);
  const draw = () => {
    const built = build();
    plot.setAttribute("aria-label", built.label);
    Plotly.react(plot, built.traces, layoutOf(built.layout), { displayModeBar: false, responsive: true });
    fill();
  };
  figures.push(draw);
  draw();
  return { draw, plot };
}

function layoutOf(own) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), fixedrange: true, automargin: true };
  const layout = {
    paper_bgcolor: colour("back"),
    plot_bgcolor: colour("back"),
    font: { color: colour("text"), size: 13, family: "system-ui, 'Segoe UI', Roboto, 'Noto Sans', sans-serif" },
    margin: { l: 60, r: 20, t: 40, b: 50 },
    dragmode: false,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...own,
  };
  layout.xaxis = { ...axis, ...own.xaxis };
  layout.yaxis = { ...axis, ...own.yaxis };
  return layout;
}

function tableOf(head, rows) {
  const top = element("tr");
  head.forEach((cell) => top.append(element("th", { scope: "col" }, String(cell))));
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    row.forEach((cell) => line.append(element("td", {}, cell === null ? "–" : String(cell))));
    body.append(line);
  }
  return element("table", {}, element("thead", {}, top), body);
}

function saveCsv(name, built) {
  const quoted = (cell) => (/[",\n]/.test(String(cell)) ? `"${String(cell).replaceAll('"', '""')}"` : String(cell ?? ""));
  const text = [built.head, ...built.rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${name.replaceAll(" ", "-")}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function isNarrow() {
  return window.innerWidth < 640;
}

// ---------- controls ----------

function options(select, values) {
  select.replaceChildren(...values.map(([value, text]) => element("option", { value }, text)));
}

function onChange(ids, draw) {
  for (const id of ids) byId(id).addEventListener("input", draw);
}

// ---------- numbers ----------

function numberOf(model, name, layer = null) {
  return model.numbers.find((one) => one.name === name && (one.layer ?? null) === layer);
}

function shown(value, unit) {
  const digits = unit === "%" || unit === "experts" ? 1 : 2;
  const rounded = Number((unit === "%" ? 100 * value : value).toFixed(digits));
  return (rounded === 0 ? 0 : rounded).toFixed(digits); // never -0.0
}

function text(number) {
  const unit = number.unit ?? "";
  const space = unit ? ` ${unit}` : "";
  return { value: shown(number.value, unit) + space, range: `${shown(number.low, unit)} to ${shown(number.high, unit)}`, chance: number.chance === undefined ? null : shown(number.chance, unit) + space };
}

const TILES = [
  ["topic cosine", "Two topics’ routing alike", "1 is the same. Low means that topics have experts of their own. All layers together."],
  ["domain beyond token", "Topics, given the word", "What the domain still tells of the expert when the token is known."],
  ["token beyond domain", "Words, given the topic", "What the token still tells of the expert when the domain is known."],
  ["held-out coverage, 1/8 of the experts, own domain", "Picks that an eighth covers", "Of new documents, by the experts of their domain."],
  ["agreement with domain", "Clusters that follow domains", "0 % is chance, 100 % means that each cluster is one domain.", "clusters"],
  ["agreement with part of speech", "Clusters that follow word classes", "The same for parts of speech, where the language was given.", "clusters"],
];

function drawTiles() {
  byId("tiles").replaceChildren();
  for (const [name, title, meaning, from] of TILES) {
    const list = element("dl");
    models.forEach((model, index) => {
      const numbers = from === "clusters" ? model.clusters.numbers : model.numbers;
      const number = numbers.find((one) => one.name === name && one.layer === undefined);
      if (!number) return;
      const told = text(number);
      const term = element("dt", {}, model.name);
      term.style.setProperty("--own", modelColour(index));
      const chance = told.chance === null || name.includes("agreement") || name.includes("beyond") ? "" : `; by chance ${told.chance}`;
      list.append(term, element("dd", {}, element("b", {}, told.value), element("small", {}, `${told.range}${chance}`)));
    });
    if (list.children.length) byId("tiles").append(element("div", { class: "tile" }, element("h3", {}, title), list, element("p", {}, meaning)));
  }
}

function drawNumbers() {
  const layer = byId("numbers-layer").value === "all" ? null : Number(byId("numbers-layer").value);
  const all = models.map((model) => [...model.numbers, ...(layer === null ? model.clusters.numbers.map((one) => ({ ...one, name: `clusters: ${one.name}` })) : [])].filter((one) => (one.layer ?? null) === layer));
  const names = [...new Set(all.flat().map((one) => one.name))];
  const body = element("tbody");
  const keys = Object.keys(content.meanings).sort((a, b) => b.length - a.length);
  const said = new Set();
  for (const name of names) {
    const key = keys.find((one) => name.startsWith(one));
    const first = element("td", {}, name);
    if (key && !said.has(key)) first.append(element("small", {}, content.meanings[key]));
    if (name.endsWith(", information")) first.append(element("small", {}, "the same in bits, with what chance gives"));
    said.add(key);
    const row = element("tr", {}, first);
    for (const numbers of all) {
      const number = numbers.find((one) => one.name === name);
      const told = number && text(number);
      const cell = element("td", {}, told ? told.value : "–");
      if (told) cell.append(element("small", {}, told.range));
      row.append(cell, element("td", {}, told?.chance ?? "–"));
    }
    body.append(row);
  }
  const top = element("tr", {}, element("th", { scope: "col" }, ""));
  models.forEach((model) => top.append(element("th", { scope: "col" }, model.name), element("th", { scope: "col" }, "by chance")));
  byId("numbers-table").replaceChildren(element("table", {}, element("thead", {}, top), body));
}

// ---------- fewer experts ----------

function startRetention() {
  const found = content.retention;
  if (!found || !found.curves.length) {
    byId("figure-retention").replaceChildren(element("p", { class: "empty" }, "The curve was not measured for this page."));
    document.querySelector("#retention .controls").remove();
    return;
  }
  byId("cliff-rise").textContent = found.rise;
  options(byId("retention-domain"), found.domains.map((name) => [name, name]));
  const names = [...new Set(found.curves.map((curve) => curve.model))];
  const methods = [...new Set(found.curves.map((curve) => curve.method))];
  const first = methods.find((method) => method !== "random");
  const pair = first && methods.includes("random") && methods.length > 2 ? [["pair", `${first}, random`]] : [];
  options(byId("retention-method"), [...pair, ["all", "all ways"], ...methods.map((method) => [method, method])]);
  const isChosen = (method) => {
    const chosen = byId("retention-method").value;
    return chosen === "all" || chosen === method || (chosen === "pair" && [first, "random"].includes(method));
  };
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const { draw } = figure(byId("figure-retention"), "retention curve", () => {
    const domain = byId("retention-domain").value;
    const what = byId("retention-shown").value;
    const traces = [];
    const rows = [];
    found.curves.filter((curve) => isChosen(curve.method)).forEach((curve) => {
      const own = modelColour(names.indexOf(curve.model));
      const points = curve.points[domain].filter((point) => point[what] !== null);
      const random = curve.method === "random";
      traces.push({
        x: points.map((point) => point.share), y: points.map((point) => point[what]), name: `${curve.model}, ${curve.method}`, mode: "lines+markers",
        line: { color: own, dash: random ? "dashdot" : dashes[methods.indexOf(curve.method) % 3], width: random ? 1.2 : 2.2 }, opacity: random ? 0.6 : 1,
        error_y: { type: "data", array: points.map((point) => point.error), color: own, thickness: 1, width: 3 },
        customdata: points.map((point) => [point.experts, point.loss]),
        hovertemplate: "%{customdata[0]} experts: loss %{customdata[1]:.3f}, %{y:.3f}<extra>%{fullData.name}</extra>",
      });
      points.forEach((point) => rows.push([curve.model, curve.method, point.share, point.experts, point.loss, point.error, point.rise]));
      if (curve.cliff !== null && !random && domain === found.domains[0] && what === "rise") {
        traces.push({ x: [curve.cliff], y: [found.rise], mode: "markers", showlegend: false, marker: { symbol: "diamond", size: 13, color: own, line: { color: colour("text"), width: 1.5 } },
          hovertemplate: `the cliff of ${curve.model}, ${curve.method}: ${(100 * curve.cliff).toFixed(1)} % of the experts<extra></extra>` });
      }
    });
    const shares = [...new Set(rows.map((row) => row[2]))];
    return {
      traces, head: ["model", "chosen by", "share", "experts", "loss", "error", "rise"], rows,
      label: `Line chart: ${what} against the share of experts kept, ${domain}`,
      layout: {
        height: isNarrow() ? 460 : 480,
        xaxis: { type: "log", autorange: "reversed", title: { text: "experts kept" }, tickvals: shares, ticktext: shares.map((share) => `${+(100 * share).toPrecision(3)} %`) },
        yaxis: { title: { text: what === "rise" ? "rise of the loss (nats per token)" : "loss (nats per token)" } },
        ...(isNarrow() ? { legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0, font: { size: 11 } } } : {}),
      },
    };
  });
  onChange(["retention-domain", "retention-method", "retention-shown"], draw);
}

// ---------- maps and matrices ----------

function sideFigures(id, name, build) {
  const places = models.map(() => element("div", { class: "figure" }));
  byId(id).replaceChildren(...places);
  const drawn = models.map((model, index) => figure(places[index], `${name} ${model.name}`, () => build(model, index)));
  return () => drawn.forEach((one) => one.draw());
}

function startMaps() {
  const most = Math.max(...models.map((model) => model.maps.length)) - 1;
  const slider = byId("maps-layer");
  slider.max = most;
  slider.value = Math.floor(most / 2);
  const draw = sideFigures("figure-maps", "domains by experts", (model) => {
    const map = model.maps[Math.min(Number(slider.value), model.maps.length - 1)];
    byId("maps-layer-name").textContent = map.layer;
    const even = 1 / map.experts.length;
    const times = byId("maps-scale").value === "even";
    const z = map.values.map((row) => row.map((value) => (times ? value / even : value)));
    const top = times ? 8 : 8 * even;
    return {
      traces: [{
        type: "heatmap", z, x: map.experts.map((_, place) => place), y: content.domains, colorscale: heat(), zmin: 0, zmax: top, ygap: 1,
        customdata: map.values.map(() => map.experts), colorbar: { thickness: 10, len: 0.9, outlinewidth: 0, title: { text: times ? "×" : "", side: "top" } },
        hovertemplate: "%{y}, expert %{customdata}: %{z:.3~f}<extra></extra>",
      }],
      head: ["domain", ...map.experts.map((expert) => `expert ${expert}`)], rows: map.values.map((row, place) => [content.domains[place], ...row]),
      label: `Heat map of ${model.name}, layer ${map.layer}: domains by experts`,
      layout: {
        title: { text: `${model.name}, layer ${map.layer}`, x: 0, xref: "paper", font: { size: 15 } }, height: 110 + 22 * content.domains.length,
        xaxis: { title: { text: `${map.experts.length} experts${isNarrow() ? "" : ", by the domain that wants them most"}` }, showticklabels: false, showgrid: false, ticks: "" },
        yaxis: { autorange: "reversed", showgrid: false, ticks: "" }, margin: { l: 80, r: 10, t: 40, b: 40 },
      },
    };
  });
  onChange(["maps-layer", "maps-scale"], draw);
}

function startSimilar() {
  options(byId("similar-by"), Object.keys(models[0].similar).map((name) => [name, name]));
  const draw = sideFigures("figure-similar", "how alike domains are", (model) => {
    const matrix = model.similar[byId("similar-by").value];
    const number = content.domains.length;
    const off = matrix.flatMap((row, i) => row.filter((_, j) => i !== j));
    const mean = off.reduce((sum, value) => sum + value, 0) / Math.max(off.length, 1);
    return {
      traces: [{
        type: "heatmap", z: matrix, x: content.domains, y: content.domains, colorscale: heat(), zmin: 0, zmax: 1, xgap: 1, ygap: 1,
        colorbar: { thickness: 10, len: 0.9, outlinewidth: 0 }, hovertemplate: "%{y} and %{x}: %{z:.2f}<extra></extra>",
      }],
      head: ["", ...content.domains], rows: matrix.map((row, place) => [content.domains[place], ...row]),
      label: `Heat map of ${model.name}: ${byId("similar-by").value}, mean ${mean.toFixed(2)}`,
      layout: {
        title: { text: `${model.name}: mean ${mean.toFixed(2)} off the diagonal`, x: 0, xref: "paper", font: { size: 15 } }, height: 170 + 20 * number,
        xaxis: { tickangle: -60, showgrid: false, ticks: "" }, yaxis: { autorange: "reversed", showgrid: false, ticks: "" }, margin: { l: 80, r: 10, t: 40, b: 80 },
      },
    };
  });
  onChange(["similar-by"], draw);
}

// ---------- topics or words ----------

const TOLD = [
  ["domain", "domain"], ["token", "token"], ["domain beyond token", "domain,<br>given the token"], ["token beyond domain", "token,<br>given the domain"],
  ["word class by characters", "kind of<br>characters"], ["part of speech", "part of<br>speech"],
];

function layerOptions(select) {
  options(select, [["all", "all, in the mean"], ...models[0].layers.map((layer) => [layer, String(layer)])]);
}

function startWords() {
  layerOptions(byId("words-layer"));
  const { draw } = figure(byId("figure-words"), "topics or words", () => {
    const chosen = byId("words-layer").value;
    const layer = chosen === "all" ? null : Number(chosen);
    const known = TOLD.filter(([name]) => models.some((model) => numberOf(model, name, layer)));
    const rows = [];
    const traces = models.map((model, index) => {
      const numbers = known.map(([name]) => numberOf(model, name, layer) ?? { value: null, low: null, high: null });
      known.forEach(([name], place) => rows.push([model.name, name, numbers[place].value, numbers[place].low, numbers[place].high]));
      return {
        type: "bar", name: model.name, x: known.map(([, label]) => label), y: numbers.map((one) => (one.value === null ? null : 100 * one.value)), marker: { color: modelColour(index) },
        error_y: { type: "data", array: numbers.map((one) => 100 * (one.high - one.value)), color: colour("text"), thickness: 1.2, width: 4 },
        hovertemplate: "%{x}: %{y:.1f} %<extra>%{fullData.name}</extra>",
      };
    });
    return {
      traces, head: ["model", "what is known", "share", "low", "high"], rows, label: "Bars: how much of the choice of experts is known from domain, token and word class",
      layout: { barmode: "group", height: 400, yaxis: { title: { text: "of the choice, %" }, rangemode: "tozero" }, xaxis: { tickangle: isNarrow() ? -45 : 0 } },
    };
  });
  onChange(["words-layer"], draw);
}

// ---------- tokens ----------

// A text whose tokens can be chosen by mouse, touch and arrow keys. `paint(span, place)` colours one.
function tokenText(box, pieces, paint, choose) {
  const spans = pieces.map((piece, place) => {
    const span = element("span", { role: "option", "aria-selected": "false", tabindex: "-1" }, piece === "" ? "·" : piece.replaceAll("\n", "⏎\n"));
    paint(span, place);
    span.addEventListener("click", () => select(place, true));
    span.addEventListener("mouseenter", () => choose(place, false));
    return span;
  });
  box.replaceChildren(...spans);
  let current = 0;
  function select(place, focus) {
    spans[current]?.setAttribute("aria-selected", "false");
    spans[current]?.setAttribute("tabindex", "-1");
    current = Math.max(0, Math.min(place, spans.length - 1));
    spans[current]?.setAttribute("aria-selected", "true");
    spans[current]?.setAttribute("tabindex", "0");
    if (focus) spans[current]?.focus();
    choose(current, true);
  }
  box.onmouseleave = () => choose(current, false);
  box.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? spans.length - 1 : step ? current + step : null;
    if (to === null) return;
    event.preventDefault();
    select(to, true);
  };
  return { select, repaint: () => spans.forEach(paint) };
}

function documentOptions(select, model) {
  const before = select.value;
  const seen = {};
  options(select, model.shown.map((one, place) => {
    seen[one.domain] = (seen[one.domain] ?? 0) + 1;
    return [place, `${one.domain} ${seen[one.domain]}`];
  }));
  if (before !== "" && before < model.shown.length) select.value = before;
}

function quoted(piece) {
  return piece === "" ? "a part of a character" : `“${piece.replaceAll("\n", "⏎")}”`;
}

// ---------- clusters ----------

function startClusters() {
  options(byId("clusters-model"), models.map((model, place) => [place, model.name]));
  const model = () => models[byId("clusters-model").value];
  const chosen = () => Number(byId("clusters-cluster").value);
  const composition = figure(byId("figure-composition"), "domains of the cluster", () => {
    const counts = model().clusters.composition[chosen()];
    const total = counts.reduce((sum, value) => sum + value, 0);
    return {
      traces: [{ type: "bar", orientation: "h", x: counts.map((count) => (100 * count) / total), y: content.domains, marker: { color: content.domains.map((_, place) => tint(place, isDark() ? 60 : 45)) }, hovertemplate: "%{y}: %{x:.1f} %<extra></extra>" }],
      head: ["domain", "tokens"], rows: content.domains.map((domain, place) => [domain, counts[place]]),
      label: `Bars: domains of the tokens of cluster ${chosen() + 1}`,
      layout: { title: { text: `Cluster ${chosen() + 1}: ${total.toLocaleString("en")} tokens`, x: 0, xref: "paper", font: { size: 15 } }, height: 90 + 22 * content.domains.length, showlegend: false,
        xaxis: { title: { text: "of its tokens, %" }, range: [0, 101] }, yaxis: { autorange: "reversed", showgrid: false }, margin: { l: 80, r: 10, t: 40, b: 45 } },
    };
  });
  const plane = figure(byId("figure-plane"), "tokens in two directions", () => {
    const points = model().clusters.plane;
    const domain = byId("clusters-by").value === "domain";
    const group = (name, keep, own, size) => {
      const places = points.x.map((_, place) => place).filter(keep);
      return { type: "scatter", mode: "markers", name, x: places.map((p) => points.x[p]), y: places.map((p) => points.y[p]), marker: { size, color: own, opacity: 0.75 },
        text: places.map((p) => `${quoted(points.piece[p])}, ${content.domains[points.domain[p]]}, cluster ${points.cluster[p] + 1}`), hovertemplate: "%{text}<extra></extra>" };
    };
    const traces = domain
      ? content.domains.map((name, index) => group(name, (p) => points.domain[p] === index, tint(index, isDark() ? 60 : 45), 5))
      : [group("other clusters", (p) => points.cluster[p] !== chosen(), colour("line"), 4), group(`cluster ${chosen() + 1}`, (p) => points.cluster[p] === chosen(), modelColour(0), 7)];
    return {
      traces, head: ["x", "y", "cluster", "domain", "piece"], rows: points.x.map((x, p) => [x, points.y[p], points.cluster[p] + 1, content.domains[points.domain[p]], points.piece[p]]),
      label: `Points: tokens in the two directions in which their routing differs most, coloured by ${domain ? "domain" : "cluster"}`,
      layout: { title: { text: isNarrow() ? "Where routing differs most" : "The two directions in which routing differs most", x: 0, xref: "paper", font: { size: 15 } }, height: 90 + 22 * content.domains.length + (isNarrow() ? 130 : 0), xaxis: { showticklabels: false, zeroline: false }, yaxis: { showticklabels: false, zeroline: false },
        legend: isNarrow() ? { orientation: "h", y: -0.05, yanchor: "top", font: { size: 11 } } : { orientation: "v", font: { size: 11 }, itemsizing: "constant" }, margin: { l: 15, r: 10, t: 40, b: 20 } },
    };
  });
  let reader = null;
  const drawText = () => {
    const one = model().shown[byId("clusters-document").value];
    if (!one) return;
    const only = byId("clusters-by").value === "cluster";
    reader = tokenText(byId("clusters-text"), one.pieces, (span, place) => {
      span.style.background = tint(one.clusters[place], parseFloat(colour("tint")));
      span.className = only && one.clusters[place] !== chosen() ? "dim" : "";
    }, (place) => {
      const cluster = one.clusters[place];
      const counts = model().clusters.composition[cluster];
      const best = counts.map((count, domain) => [count, content.domains[domain]]).sort((a, b) => b[0] - a[0])[0];
      const total = counts.reduce((sum, value) => sum + value, 0);
      const picks = one.picks.map((layer, index) => `layer ${model().layers[index]}: ${layer[place].map((p) => model().maps[index].experts[model().maps[index].places.indexOf(p)]).join(", ")}`);
      byId("clusters-token").textContent = `${quoted(one.pieces[place])}: cluster ${cluster + 1}, of which ${Math.round((100 * best[0]) / total)} % are ${best[1]}. Experts: ${picks.join("; ")}.`;
    });
    reader.select(Math.min(8, one.pieces.length - 1), false);
  };
  const drawCluster = () => {
    const typical = model().clusters.typical[chosen()];
    byId("clusters-typical").replaceChildren(...typical.flatMap(([piece, count]) => [element("span", { class: "chip", title: `${count} times` }, piece === "" ? "(part of a character)" : piece.replaceAll("\n", "⏎")), " "]));
    composition.draw();
    plane.draw();
    drawText();
  };
  const drawModel = () => {
    const before = byId("clusters-cluster").value;
    options(byId("clusters-cluster"), model().clusters.composition.map((counts, cluster) => {
      const total = counts.reduce((sum, value) => sum + value, 0);
      const place = counts.indexOf(Math.max(...counts));
      return [cluster, `${cluster + 1}: ${Math.round((100 * counts[place]) / Math.max(total, 1))} % ${content.domains[place]}`];
    }));
    if (before !== "" && before < model().clusters.composition.length) byId("clusters-cluster").value = before;
    documentOptions(byId("clusters-document"), model());
    const say = ["agreement with domain", "agreement with token", "agreement with part of speech"].map((name) => model().clusters.numbers.find((one) => one.name === name)).filter(Boolean);
    byId("clusters-numbers").textContent = `${model().name}: ${say.map((one) => `${one.name} ${text(one).value} (${text(one).range})`).join(", ")}. 0 % is chance.`;
    drawCluster();
  };
  // The figures were drawn before there was a cluster to show.
  onChange(["clusters-model"], drawModel);
  onChange(["clusters-cluster", "clusters-by"], drawCluster);
  onChange(["clusters-document"], drawText);
  figures.push(() => reader?.repaint());
  return drawModel;
}

// ---------- one document ----------

function startRoute() {
  options(byId("route-model"), models.map((model, place) => [place, model.name]));
  const model = () => models[byId("route-model").value];
  const one = () => model().shown[byId("route-document").value];
  const slider = byId("route-token");
  let reader = null;
  const route = figure(byId("figure-route"), "route of a document", () => {
    const now = one();
    const token = Number(slider.value);
    const widest = Math.max(...model().maps.map((map) => map.places.length));
    const z = model().maps.map((map, layer) => map.places.map((place) => now.mean[layer][place] / 10));
    const x = [], y = [], names = [];
    model().maps.forEach((map, layer) => now.picks[layer][token].forEach((pick, rank) => {
      x.push(map.places.indexOf(pick));
      y.push(layer);
      names.push(`layer ${map.layer}, expert ${map.experts[map.places.indexOf(pick)]}, choice ${rank + 1} of ${quoted(now.pieces[token])}`);
    }));
    const top = Math.max(...z.flat());
    return {
      traces: [
        { type: "heatmap", z, x: [...Array(widest).keys()], y: model().maps.map((_, layer) => layer), colorscale: heat(), zmin: 0, zmax: top, ygap: 2, hovertemplate: "layer %{customdata[0]}, expert %{customdata[1]}: %{z:.1f} %<extra></extra>",
          customdata: model().maps.map((map) => map.experts.map((expert) => [map.layer, expert])), colorbar: { thickness: 10, outlinewidth: 0, title: { text: "%", side: "top" } } },
        { type: "scatter", mode: "markers", x, y, text: names, hovertemplate: "%{text}<extra></extra>", marker: { symbol: "circle-open", size: 14, color: colour("mark"), line: { width: 3 } }, showlegend: false },
      ],
      head: ["layer", "expert", "mean probability, %"], rows: model().maps.flatMap((map, layer) => map.experts.map((expert, place) => [map.layer, expert, z[layer][place]])),
      label: `Heat map: layers by experts for a document of ${now.domain}, with the experts of its token ${token + 1}`,
      layout: { height: 130 + Math.max(34, 300 / model().maps.length) * model().maps.length, showlegend: false, xaxis: { title: { text: "experts, in the order of the maps" }, showticklabels: false, showgrid: false, zeroline: false, range: [-0.5, widest - 0.5] },
        yaxis: { tickvals: model().maps.map((_, layer) => layer), ticktext: model().maps.map((map) => `layer ${map.layer}`), autorange: "reversed", showgrid: false, zeroline: false }, margin: { l: 70, r: 10, t: 15, b: 45 } },
    };
  });
  const show = (place) => {
    slider.value = place;
    byId("route-token-name").textContent = `${place + 1}: ${quoted(one().pieces[place])}`;
    route.draw();
  };
  const drawText = () => {
    slider.max = one().pieces.length - 1;
    reader = tokenText(byId("route-text"), one().pieces, (span, place) => {
      span.style.background = place % 2 ? "transparent" : colour("card");
    }, (place, fixed) => { if (fixed) show(place); });
    reader.select(Math.min(Number(slider.value), one().pieces.length - 1), false);
  };
  const drawModel = () => {
    documentOptions(byId("route-document"), model());
    drawText();
  };
  onChange(["route-model"], drawModel);
  onChange(["route-document"], () => { slider.value = 0; drawText(); });
  slider.addEventListener("input", () => reader.select(Number(slider.value), false));
  figures.push(() => reader?.repaint());
  return drawModel;
}

// ---------- new documents ----------

function startNew() {
  const whose = ["own domain", "all domains", "other domains"];
  const dashes = { "own domain": "solid", "all domains": "dash", "other domains": "dot" };
  figure(byId("figure-coverage"), "held-out coverage", () => {
    const rows = [];
    const traces = models.flatMap((model, index) => whose.map((who) => {
      const numbers = [8, 4, 2].map((part) => numberOf(model, `held-out coverage, 1/${part} of the experts, ${who}`)).filter(Boolean);
      numbers.forEach((one) => rows.push([model.name, who, one.chance, one.value, one.low, one.high]));
      return { x: numbers.map((one) => 100 * one.chance), y: numbers.map((one) => 100 * one.value), name: `${model.name}: ${who}`, mode: "lines+markers", line: { color: modelColour(index), dash: dashes[who], width: who === "own domain" ? 2.4 : 1.4 },
        error_y: { type: "data", array: numbers.map((one) => 100 * (one.high - one.value)), color: modelColour(index), thickness: 1, width: 3 }, hovertemplate: "%{x:.0f} % of the experts cover %{y:.1f} % of the picks<extra>%{fullData.name}</extra>" };
    }));
    traces.push({ x: [0, 50], y: [0, 50], mode: "lines", name: "by chance", line: { color: colour("soft"), width: 1, dash: "longdash" }, hoverinfo: "skip" });
    return { traces, head: ["model", "experts of", "share of experts", "picks covered", "low", "high"], rows, label: "Lines: share of picks of new documents that the experts of a domain cover",
      layout: { height: 460, title: { text: "Picks covered", x: 0, xref: "paper", font: { size: 15 } }, xaxis: { title: { text: "routed experts kept, %" }, rangemode: "tozero" }, yaxis: { title: { text: "of a new document’s picks, %" }, range: [0, 100] }, legend: { orientation: "h", y: isNarrow() ? -0.3 : -0.24, yanchor: "top", font: { size: 11 } } } };
  });
  figure(byId("figure-stability"), "pool stability", () => {
    const rows = [];
    const traces = models.flatMap((model, index) => {
      const numbers = model.numbers.filter((one) => one.layer === undefined && one.name.startsWith("pool stability")).map((one) => ({ ...one, tokens: parseInt(one.name.split(", ")[1], 10) }));
      numbers.forEach((one) => rows.push([model.name, one.tokens, one.value, one.low, one.high, one.chance]));
      const line = (name, values, dash, width, error) => ({ x: numbers.map((one) => one.tokens), y: values, name, mode: "lines+markers", line: { color: modelColour(index), dash, width },
        ...(error ? { error_y: { type: "data", array: error, color: modelColour(index), thickness: 1, width: 3 } } : {}), hovertemplate: "%{x} tokens: %{y:.2f}<extra>%{fullData.name}</extra>" });
      return [line(`${model.name}: the same document`, numbers.map((one) => one.value), "solid", 2.4, numbers.map((one) => one.high - one.value)), line(`${model.name}: another domain’s`, numbers.map((one) => one.chance), "dot", 1.4)];
    });
    return { traces, head: ["model", "first tokens", "overlap", "low", "high", "by chance"], rows, label: "Lines: overlap of the experts of the first tokens of a document with those of its rest",
      layout: { height: 460, title: { text: "Overlap with the rest of the document", x: 0, xref: "paper", font: { size: 15 } }, xaxis: { type: "log", title: { text: "first tokens of a document" }, tickvals: [8, 16, 32, 64, 128, 256, 512, 1024] }, yaxis: { title: { text: "experts in both / in either" }, range: [0, 1] }, legend: { orientation: "h", y: isNarrow() ? -0.3 : -0.24, yanchor: "top", font: { size: 11 } } } };
  });
}

// ---------- the page ----------

function start() {
  document.documentElement.dataset.theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  byId("theme").textContent = isDark() ? "Light colours" : "Dark colours";
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  const names = models.map((model) => `${model.name}: ${model.layers.length} layers of ${model.maps[0]?.experts.length ?? 0} routed experts, ${model.picks[0]} taken by a token`);
  byId("about").textContent = `${content.documents.toLocaleString("en")} documents, ${content.tokens.toLocaleString("en")} tokens, ${content.domains.length} domains. ${names.join(". ")}.`;
  if (!models.length) return;
  layerOptions(byId("numbers-layer"));
  onChange(["numbers-layer"], drawNumbers);
  figures.push(drawTiles);
  drawTiles();
  drawNumbers();
  startRetention();
  startMaps();
  startSimilar();
  startWords();
  for (const id of ["clusters-cluster", "clusters-document", "route-document"]) options(byId(id), [[0, ""]]);
  startClusters()();
  startRoute()();
  startNew();
}

start();
