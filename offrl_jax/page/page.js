"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const SVG = "http://www.w3.org/2000/svg";

  /** An element with attributes and children; text is never read as markup. */
  function make(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "text", "circle", "title"].includes(name);
    const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // What a reader has set survives a reload while a benchmark runs.
  const memory = {
    read: (key) => { try { return sessionStorage.getItem(location.pathname + key) ?? ""; } catch { return ""; } },
    write: (key, value) => { try { sessionStorage.setItem(location.pathname + key, value); } catch { /* private */ } },
  };

  // ---- sorting -------------------------------------------------------------------
  const byNumber = (a, b) => Number(a) - Number(b);
  const byWord = (a, b) => a.localeCompare(b, "en", { numeric: true });

  // Where a row stood at first: equal ones stay in that order.
  const places = new WeakMap();
  for (const table of $$("table")) for (const body of table.tBodies) [...body.rows].forEach((row, place) => places.set(row, place));

  function sortBy(header, direction) {
    const body = header.closest("table").tBodies[0];
    const column = [...header.parentNode.children].indexOf(header);
    const numbers = header.classList.contains("number");
    const keyed = [...body.rows].map((row) => ({ row, place: places.get(row), key: row.cells[column].dataset.sort ?? "" }));
    keyed.sort((a, b) => {
      // What has no value stands last, whichever way the others go.
      if ((a.key === "") !== (b.key === "")) return a.key === "" ? 1 : -1;
      const order = numbers ? byNumber(a.key, b.key) : byWord(a.key, b.key);
      return (direction === "descending" ? -order : order) || a.place - b.place;
    });
    body.append(...keyed.map((item) => item.row));
    for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  }

  for (const table of $$("section.table table")) {
    const name = `${table.closest("section").id} ${table.className} `;
    const headers = $$("thead th", table).filter((header) => $(".sort", header));
    for (const header of headers) {
      $(".sort", header).addEventListener("click", () => {
        const now = header.getAttribute("aria-sort");
        const rising = ["#", "gap", "s/run", "noise", "P(lead)"].includes($(".sort", header).textContent);
        const first = header.classList.contains("number") && !rising ? "descending" : "ascending";
        const direction = now ? (now === "ascending" ? "descending" : "ascending") : first;
        sortBy(header, direction);
        memory.write(name, `${headers.indexOf(header)} ${direction}`);
      });
    }
    const [place, direction] = memory.read(name).split(" ");
    if (direction && headers[place]) sortBy(headers[place], direction);
  }

  // ---- filters -------------------------------------------------------------------
  const form = $(".filters");
  form.hidden = false;
  // Words, or what is in quotes, or, where there are commas, what lies between them.
  function words(id) {
    const text = (document.getElementById(id)?.value ?? "").toLowerCase();
    const parts = text.includes(",") ? text.split(",") : text.match(/"[^"]*"|[^\s"]+/g) ?? [];
    return parts.map((part) => part.replaceAll('"', "").trim()).filter(Boolean);
  }
  const fits = (name, wanted) => !wanted.length || wanted.some((word) => name.toLowerCase().includes(word));

  function filter() {
    const family = $("#family")?.value ?? "";
    const agents = words("agent"), tasks = words("task");
    let tables = 0, lines = 0;
    for (const section of $$("section.table")) {
      const known = data.sections[section.dataset.section];
      const shown = known.agents.map((name) => fits(name, agents));
      const right = !family || section.dataset.family === family;
      const anyTask = known.tasks.some((name) => fits(name, tasks));
      section.hidden = !(right && shown.some(Boolean) && anyTask);
      if (section.hidden) continue;
      tables += 1;
      for (const element of $$("[data-agent]", section)) element.hidden = !shown[element.dataset.agent];
      // Elements of SVG have no property of that name.
      for (const element of $$("svg [data-agent]", section)) element.toggleAttribute("hidden", !shown[element.dataset.agent]);
      for (const row of $$("tr[data-task]", section)) row.hidden = !fits(known.tasks[row.dataset.task], tasks);
      lines += shown.filter(Boolean).length;
    }
    for (const row of $$(".overview tr[data-of]")) row.hidden = document.getElementById(row.dataset.of).hidden;
    $("#nothing").hidden = tables > 0;
    const active = Boolean(family || agents.length || tasks.length);
    $("#filtered").textContent = active ? `${lines} lines of ${tables} tables shown; numbers stay those over all tasks` : "";
    for (const id of ["family", "agent", "task"]) memory.write(id, document.getElementById(id)?.value ?? "");
  }

  for (const id of ["family", "agent", "task"]) {
    const field = document.getElementById(id);
    if (field) field.value = memory.read(id);
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();

  // ---- one agent lit in the charts -----------------------------------------------
  function light(section, agent) {
    for (const chart of $$(".chart", section)) {
      chart.classList.toggle("lit", agent !== null);
      for (const mark of $$("[data-agent]", chart)) mark.classList.toggle("lit", mark.dataset.agent === agent);
    }
  }
  for (const section of $$("section.table")) {
    const lines = $$(".ranking tbody tr, .legend span, .chart [data-agent]", section);
    for (const line of lines) {
      line.addEventListener("pointerenter", () => light(section, line.dataset.agent));
      line.addEventListener("pointerleave", () => light(section, null));
    }
  }

  // ---- a cell: curves, runs, rows ------------------------------------------------
  const dialog = document.getElementById("detail");
  const number = (value) => value === null || value === undefined ? "-" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toFixed(1);
  const short = (value) => Math.abs(value) >= 1e6 ? `${value / 1e6}M` : Math.abs(value) >= 1e3 ? `${value / 1e3}k` : `${value}`;

  function roundTicks(low, high, count = 5) {
    if (!(high > low)) return [low];
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  /** The lists of a cell, see cells.py, with names. */
  function decode(cell) {
    const own = data.fields.filter((_, i) => cell.shared[i] < 0);
    const shared = data.fields.flatMap((name, i) => cell.shared[i] < 0 ? [] : [[name, data.pool[cell.shared[i]]]]);
    const runs = cell.runs.map(([seed, run, state, value, episodes, points, fields]) => ({
      seed, run: data.pool[run], state, value, episodes,
      curve: cell.steps.map((step, i) => [step, points[2 * i], points[2 * i + 1]]).filter(([, place]) => place !== null),
      row: fields && Object.fromEntries([...shared, ...own.map((name, i) => [name, fields[i]])].sort(([a], [b]) => byWord(a, b))),
    }));
    return { ...cell, runs };
  }

  function curves(cell, unit, updates, steps) {
    const runs = cell.runs.filter((run) => run.curve.length);
    const points = runs.flatMap((run) => run.curve);
    if (!points.length) return null;
    const ends = points.flatMap(([, value, half]) => [value - (half ?? 0), value + (half ?? 0)]);
    const [width, height, left, bottom] = [640, 320, 60, 40];
    const low = Math.min(...ends, ...(unit === "score" ? [0] : [])), high = Math.max(...ends);
    const span = high > low ? high - low : 1;
    const x = (step) => left + (step / updates) * (width - left - 12);
    const y = (value) => height - bottom - ((value - low) / span) * (height - bottom - 12);
    const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${unit} against ${steps}, a line per seed; the numbers are in the table below` });
    const grid = make("g", { class: "grid" });
    for (const tick of roundTicks(low, high)) {
      grid.append(make("line", { x1: left, x2: width - 12, y1: y(tick), y2: y(tick) }), make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of roundTicks(0, updates)) grid.append(make("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, short(tick)));
    grid.append(make("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, steps), make("text", { transform: `translate(12 ${height / 2}) rotate(-90)`, "text-anchor": "middle" }, unit));
    chart.append(grid);
    const path = (list) => `M${list.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join("L")}`;
    runs.forEach((run, i) => {
      const group = make("g", { class: `line c${i % 7} d${Math.floor(i / 7) % 4}`, "data-seed": run.seed }, make("title", {}, `seed ${run.seed}`));
      const banded = run.curve.filter(([, , half]) => half !== null);
      if (banded.length > 1) group.append(make("path", { class: "band", d: `${path([...banded.map(([s, v, h]) => [x(s), y(v + h)]), ...banded.map(([s, v, h]) => [x(s), y(v - h)]).reverse()])}Z` }));
      group.append(make("path", { class: "stroke", d: path(run.curve.map(([s, v]) => [x(s), y(v)])) }));
      for (const [s, v] of run.curve) group.append(make("circle", { cx: x(s).toFixed(1), cy: y(v).toFixed(1), r: 2.5 }));
      chart.append(group);
    });
    return make("figure", {}, chart, make("p", { class: "legend" },
      ...runs.map((run, i) => make("span", {}, make("svg", { class: `swatch c${i % 7} d${Math.floor(i / 7) % 4}`, viewBox: "0 0 24 8" }, make("path", { d: "M0,4H24" })), `seed ${run.seed}`)),
      make("span", {}, "band: 95 % interval of a seed over its evaluation episodes")));
  }

  function table(cell) {
    const head = ["seed", "value", "episodes", "mean return", "deviation", "lowest", "highest", "row", "run", "state"];
    const body = cell.runs.map((run) => {
      const [count, ...rest] = run.episodes ?? [null, null, null, null, null];
      const id = run.row ? run.row.row_id : "-";
      const values = [run.seed, number(run.value), count ?? "-", ...rest.map(number), id, run.run, run.state];
      return make("tr", {}, ...values.map((value, i) => make("td", i < 7 ? { class: "number" } : {}, String(value))));
    });
    return make("div", { class: "scroll", tabindex: 0 }, make("table", { class: "runs" },
      make("caption", {}, make("span", {}, "Every run; value is what counts, deviation is over its episodes")),
      make("thead", {}, make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", class: i < 7 ? "number" : "" }, name)))),
      make("tbody", {}, ...body)));
  }

  function rows(cell) {
    const found = cell.runs.filter((run) => run.row);
    const where = data.episodes ? "" : " Lists of episodes are left out of this page for its size; the files have them.";
    return make("div", {}, make("h3", {}, "Rows"), make("p", {}, `As they are in rows/RUN.jsonl, the last evaluation of every run.${where}`),
      ...found.map((run) => {
        const text = make("pre", {});
        const fold = make("details", {}, make("summary", {}, `seed ${run.seed}: ${run.row.row_id}`), text);
        fold.addEventListener("toggle", () => { text.textContent ||= JSON.stringify(run.row, null, 1); });
        return fold;
      }));
  }

  function open(section, key) {
    const known = data.sections[section], found = known?.cells[key];
    if (!found) return;
    const cell = decode(found);
    const [agent, task] = key.split(".").map(Number);
    const unit = known.units[task];
    $("#detail-title").textContent = `${known.agents[agent]} on ${known.tasks[task]}`;
    const mean = cell.mean ? `Mean over ${cell.runs.filter((run) => run.row).length} runs: ${number(cell.mean[0])}` + (cell.mean[1] === null ? "" : ` [${number(cell.mean[1])}, ${number(cell.mean[2])}]`) : "No run of it counts.";
    const noise = cell.noise === null ? "" : ` Evaluation episodes make ${Math.round(100 * cell.noise)} % of the variance between runs.`;
    $("#detail-body").replaceChildren(make("p", {}, `${mean} (${unit === "score" ? "score, 100 is the reference expert" : "raw return"}).${noise}`), curves(cell, unit, known.updates, known.steps) ?? "", table(cell), rows(cell));
    dialog.showModal();
    dialog.scrollTop = 0;
    const names = [document.querySelector(`[data-section="${section}"]`).id, known.agents[agent], known.tasks[task]];
    history.replaceState(null, "", `#cell/${names.map(encodeURIComponent).join("/")}`);
  }

  /** Opens the cell that the address names. */
  function follow() {
    const [kind, ...names] = location.hash.slice(1).split("/");
    if (kind !== "cell" || names.length !== 3) return;
    const [id, agent, task] = names.map(decodeURIComponent);
    const section = document.getElementById(id)?.dataset.section;
    if (section === undefined) return;
    const known = data.sections[section];
    if (dialog.open) dialog.close();
    open(section, `${known.agents.indexOf(agent)}.${known.tasks.indexOf(task)}`);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".cell");
    if (button) open(button.closest("section").dataset.section, button.dataset.cell);
  });
  // Outside of the box, and not where a selection that began inside of it has ended.
  let pressed = null;
  dialog.addEventListener("pointerdown", (event) => { pressed = event.target; });
  dialog.addEventListener("click", (event) => { if (event.target === dialog && pressed === dialog) dialog.close(); });
  $(".close", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  addEventListener("hashchange", follow);
  follow();

  // ---- print: everything that is folded is unfolded -------------------------------
  addEventListener("beforeprint", () => { for (const fold of $$("main details")) fold.open = true; });

  // ---- live: reload when the rows have changed ------------------------------------
  if (document.body.dataset.live) {
    const status = document.getElementById("live");
    let known = null;
    const ask = async () => {
      try {
        const answer = await (await fetch("version", { cache: "no-store" })).json();
        status.textContent = "Follows the results folder; reloads when rows arrive.";
        // An open cell is being read, a field being written: later.
        const busy = dialog.open || $("input:focus");
        if (known !== null && answer.version !== known && !busy) location.reload();
        known ??= answer.version;
      } catch {
        status.textContent = "The server has stopped; this page stays as it is.";
      }
      setTimeout(ask, 3000);
    };
    ask();
  }
})();
