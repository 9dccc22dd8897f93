/* Draws the figures and tables that the JSON of this page describes: see cpsp_dist/report/page.py. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const drawn = new Map(); // element of a figure -> its chart

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  // Theme: the system's, until the button is pressed.

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const setTheme = (name) => {
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "Light theme" : "Dark theme";
    for (const [element, chart] of drawn) {
      chart.setTheme(chartTheme());
      chart.setOption(optionOf(element), true);
    }
  };
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  /* "var(--name)" in an option stands for the theme's colour. */
  const themed = (value) => {
    if (typeof value === "string") {
      const match = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return match ? colour(match[1]) : value;
    }
    if (Array.isArray(value)) return value.length && typeof value[0] === "number" ? value : value.map(themed);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, themed(each)]));
    }
    return value;
  };

  // Figures

  const chartTheme = () => {
    const [text, quiet, line, back] = ["--text", "--quiet", "--line", "--back"].map(colour);
    const axis = {
      axisLine: { lineStyle: { color: quiet } }, axisTick: { lineStyle: { color: quiet } },
      axisLabel: { color: text }, nameTextStyle: { color: text }, splitLine: { lineStyle: { color: line } },
    };
    return {
      color: [0, 1, 2, 3, 4, 5, 6, 7].map((i) => colour(`--c${i}`)),
      backgroundColor: "transparent", textStyle: { color: text, fontFamily: "system-ui, sans-serif" },
      categoryAxis: axis, valueAxis: axis, logAxis: axis, timeAxis: axis,
      parallel: { parallelAxisDefault: axis },
      legend: { textStyle: { color: text }, pageTextStyle: { color: text }, pageIconColor: text, inactiveColor: quiet },
      visualMap: { textStyle: { color: text } },
      dataZoom: { textStyle: { color: text } },
      tooltip: { backgroundColor: back, borderColor: quiet, textStyle: { color: text } },
    };
  };

  const optionOf = (element) => ({ animation: false, ...themed(data.figures[element.dataset.figure].option) });

  function draw(element) {
    if (drawn.has(element) || !element.clientWidth) return;
    const { canvas } = data.figures[element.dataset.figure];
    const chart = echarts.init(element, chartTheme(), { renderer: canvas ? "canvas" : "svg" });
    drawn.set(element, chart);
    chart.on("finished", () => { element.dataset.drawn = "yes"; });
    chart.setOption(optionOf(element));
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "300px" });
  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = drawn.get(target);
      if (chart && target.clientWidth && target.clientWidth !== chart.getWidth()) chart.resize();
    }
  });
  const prepareFigures = (within) => {
    for (const element of within.querySelectorAll(".chart")) {
      seen.observe(element);
      sized.observe(element);
    }
  };
  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);

  // Tables: sort with a column's button, filter by words, pages

  const shown = (value, kind) => {
    if (value === null || value === undefined) return "–";
    if (kind === "percent") return `${(100 * value).toFixed(1)} %`;
    if (kind !== "number" || typeof value !== "number") return String(value);
    return Number.isInteger(value) ? value.toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  };

  /* A video's seconds: [probabilities 0 to 99, truth 0 or 1]; [null, truth] without a prediction. */
  const secondsCell = ([probabilities, truth]) => {
    const spans = (flags) => {
      const found = [];
      flags.forEach((on, i) => { if (on && !flags[i - 1]) found.push([i, i]); if (on) found[found.length - 1][1] = i + 1; });
      return found.map(([a, b]) => `${a}-${b}`).join(", ") || "none";
    };
    const known = probabilities || truth.map((event) => 100 * event);
    const cells = known.map((p, i) => {
      const text = truth[i] ? "event" : "background";
      const cell = make("i", { title: `segment ${i}: ${probabilities ? `${p} %, ` : ""}${text}` });
      cell.className = `${p > 50 ? "e" : ""} ${probabilities && truth[i] ? "t" : ""}`;
      return cell;
    });
    const label = probabilities
      ? `event predicted in segments ${spans(known.map((p) => p > 50))}; true ${spans(truth)}`
      : `event in segments ${spans(truth)}`;
    return make("span", { class: "seconds", role: "img", "aria-label": label }, ...cells);
  };

  const compare = (a, b) => {
    const missing = (a === null || a === undefined) - (b === null || b === undefined);
    if (missing) return missing;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };

  function prepareTable(holder) {
    const { caption, columns, rows, page } = data.tables[holder.dataset.table];
    const state = { column: -1, down: false, words: [], first: 0, order: rows.map((_, i) => i) };
    const body = make("tbody");
    const status = make("span", { role: "status" });
    const head = make("tr");
    columns.forEach((column, number) => {
      const sort = make("button", { type: "button" }, column.name);
      if (column.title) sort.title = column.title;
      const cell = make("th", { scope: "col", class: column.kind === "text" || column.kind === "seconds" ? "text" : "number" });
      cell.append(column.kind === "seconds" ? column.name : sort);
      sort.addEventListener("click", () => {
        state.down = state.column === number ? !state.down : column.kind !== "text";
        state.column = number;
        state.first = 0;
        for (const each of head.children) each.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        update();
      });
      head.append(cell);
    });
    const table = make("table", { "aria-label": caption }, make("thead", {}, head), body);
    const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
    const before = make("button", { type: "button" }, "Previous");
    const after = make("button", { type: "button" }, "Next");
    before.addEventListener("click", () => { state.first -= page; update(); });
    after.addEventListener("click", () => { state.first += page; update(); });
    const tools = make("div", { class: "tools" });
    if (rows.length > 5) {
      const filter = make("input", { type: "search", placeholder: "words", autocomplete: "off" });
      filter.addEventListener("input", () => {
        state.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
        state.first = 0;
        update();
      });
      tools.append(make("label", {}, "Filter ", filter), status);
      if (rows.length > page) tools.append(before, after);
    }
    let texts = null; // made when a word is first asked for
    const textOf = (i) => {
      texts = texts || rows.map((row) => row.filter((_, j) => columns[j].kind !== "seconds").join(" ").toLowerCase());
      return texts[i];
    };

    function update() {
      state.order = rows.map((_, i) => i).filter((i) => state.words.every((word) => textOf(i).includes(word)));
      if (state.column >= 0) {
        const sign = state.down ? -1 : 1;
        const value = (i) => rows[i][state.column];
        state.order.sort((a, b) => (value(a) === null || value(b) === null ? 1 : sign) * compare(value(a), value(b)) || a - b);
      }
      const visible = state.order.slice(state.first, state.first + page);
      body.replaceChildren(...visible.map((i) => make("tr", {}, ...rows[i].map((value, number) => {
        const { kind } = columns[number];
        if (kind === "seconds") return make("td", {}, secondsCell(value));
        return make("td", { class: kind === "text" ? "text" : "number" }, shown(value, kind));
      }))));
      const last = state.first + visible.length;
      status.textContent = visible.length < state.order.length
        ? `rows ${state.first + 1} to ${last} of ${state.order.length.toLocaleString("en-US")}`
        : `${state.order.length.toLocaleString("en-US")} rows`;
      before.disabled = state.first === 0;
      after.disabled = last >= state.order.length;
    }
    update();
    holder.replaceChildren(tools, scroll);
  }

  // One of several groups of figures, by a list to choose from

  function prepareChoice(holder) {
    const select = holder.querySelector("select");
    const groups = [...holder.querySelectorAll("[data-option]")];
    const show = () => {
      groups.forEach((group) => { group.hidden = group.dataset.option !== select.value; });
      groups.filter((group) => !group.hidden).forEach((group) => group.querySelectorAll(".chart").forEach(draw));
    };
    select.addEventListener("change", show);
    show();
  }

  // Tables in a closed <details> are made when it opens.
  for (const holder of document.querySelectorAll("[data-table]")) {
    const folded = holder.closest("details");
    if (!folded) prepareTable(holder);
    else folded.addEventListener("toggle", () => { if (!holder.firstChild) prepareTable(holder); });
  }
  setTheme(dark.matches ? "dark" : "light");
  document.querySelectorAll(".choice").forEach(prepareChoice);
  button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  prepareFigures(document);
  addEventListener("beforeprint", drawAll);
  window.cpspPage = { drawAll, setTheme };
})();
