"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const packed = read("rows-data");
  const rows = packed.rows.map((cells) => {
    const row = { ...packed.constant };
    packed.columns.forEach((name, i) => { if (cells[i] !== null) row[name] = cells[i]; });
    return row;
  });

  const config = {
    background: null, font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    view: { stroke: null },
  };
  const actions = { export: true, source: false, compiled: false, editor: false };

  async function draw(figure) {
    const place = document.getElementById(figure.id);
    // Copies, because a view writes its own marks into the objects it is given.
    const own = rows.filter((row) => (row.probe ?? row.task ?? "other") === figure.probe
      && (figure.reads.length === 0 || figure.reads.includes(row.metric))).map((row) => ({ ...row }));
    try {
      const spec = { ...figure.spec, datasets: { rows: own } };
      await vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", config, actions, downloadFileName: figure.id });
    } catch (error) {
      place.classList.add("failed");
      place.textContent = `This figure could not be drawn: ${error.message}`;
    }
  }

  async function drawAll() {
    for (const figure of read("figures-data")) await draw(figure);
    document.body.dataset.figures = "done";
  }

  const inValueCell = ["stderr", "reason"];
  const last = ["study", "run"];
  const names = ["series", "subject"];
  const varying = packed.columns.filter((name) => !names.includes(name) && !inValueCell.includes(name));
  const columns = [...varying.filter((name) => !last.includes(name)), ...varying.filter((name) => last.includes(name))];
  if (!columns.includes("value")) columns.push("value");
  const state = { sort: null, down: false, shown: 100, words: "", equal: {} };
  const table = document.getElementById("row-table");

  function element(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function digits(number) {
    if (Number.isInteger(number)) return String(number);
    const size = Math.abs(number);
    return size >= 1e-3 && size < 1e6 ? String(Number(number.toPrecision(4))) : number.toExponential(2);
  }

  function cell(row, name) {
    const content = row[name];
    if (name === "value" && content === undefined) return element("td", `missing: ${row.reason}`, "absent");
    if (typeof content !== "number") {
      const node = element("td", content ?? "");
      node.title = content ?? "";
      return node;
    }
    const error = name === "value" && row.stderr !== undefined ? ` ± ${digits(row.stderr)}` : "";
    return element("td", digits(content) + error, "number");
  }

  function compare(a, b) {
    const [x, y] = [a[state.sort], b[state.sort]];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return state.down ? -order : order;
  }

  function chosen() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const equal = Object.entries(state.equal).filter(([, value]) => value !== "");
    const kept = rows.filter((row) => equal.every(([name, value]) => String(row[name] ?? "") === value)
      && (words.length === 0 || words.every((word) => Object.values(row).join(" ").toLowerCase().includes(word))));
    return state.sort === null ? kept : kept.sort(compare);
  }

  function showRows() {
    const kept = chosen();
    const body = table.tBodies[0];
    body.replaceChildren(...kept.slice(0, state.shown).map((row) => {
      const line = element("tr");
      line.append(...columns.map((name) => cell(row, name)));
      return line;
    }));
    for (const head of table.tHead.rows[0].cells) {
      head.setAttribute("aria-sort", head.dataset.name !== state.sort ? "none" : state.down ? "descending" : "ascending");
    }
    const shown = Math.min(state.shown, kept.length);
    document.getElementById("row-count").textContent = `${shown} of ${kept.length} rows shown`;
    document.getElementById("row-more").hidden = shown === kept.length;
  }

  function addHead() {
    const line = element("tr");
    for (const name of columns) {
      const head = element("th");
      head.dataset.name = name;
      const button = element("button", name.replace("_", " "));
      button.type = "button";
      button.addEventListener("click", () => {
        state.down = state.sort === name && !state.down;
        state.sort = name;
        showRows();
      });
      head.append(button);
      line.append(head);
    }
    table.tHead.append(line);
  }

  function addFilters() {
    const place = document.getElementById("row-controls");
    for (const name of ["model", "probe", "metric", "element", "variant"]) {
      const values = [...new Set(rows.map((row) => row[name]).filter((value) => value !== undefined))].sort();
      if (values.length < 2) continue;
      const select = element("select");
      select.setAttribute("aria-label", `Filter by ${name}`);
      select.append(new Option(`every ${name}`, ""), ...values.map((value) => new Option(value, value)));
      select.addEventListener("change", () => { state.equal[name] = select.value; showRows(); });
      place.append(select);
    }
    document.getElementById("row-search").addEventListener("input", (event) => { state.words = event.target.value; showRows(); });
    document.getElementById("row-more").addEventListener("click", () => { state.shown += 500; showRows(); });
  }

  const same = Object.entries(packed.constant).filter(([name]) => !["series", "subject", "value", "stderr", "reason"].includes(name));
  if (same.length) {
    const text = same.map(([name, value]) => `${name.replace("_", " ")} ${value}`).join(", ");
    document.getElementById("row-constants").textContent = `The same in every row: ${text}.`;
  }
  addHead();
  addFilters();
  showRows();
  drawAll();
})();
