"use strict";
// One state, which runs are shown, for table, curves and panels; sorting, CSV, copying, light and dark.
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Map(); // setting -> values switched off
  const listeners = [];
  const byId = (id) => document.getElementById(id);
  const words = data.runs.map((run) =>
    [run.name, run.label, run.status, `seed ${run.seed}`, ...Object.entries(run.settings).flat()].join(" ").toLowerCase());
  const valueOf = (run, key) =>
    key === "seed" ? String(run.seed) : key === "status" ? run.status : run.settings[key] ?? "–";

  // Chips: a setting with 2 to 12 values.
  const toggles = [...data.keys, "seed", "status"]
    .map((key) => ({ key, values: [...new Set(data.runs.map((run) => valueOf(run, key)))] }))
    .filter(({ values }) => values.length > 1 && values.length <= 12);
  const natural = new Intl.Collator("en", { numeric: true }).compare;

  const query = () => (byId("filter").value.toLowerCase().match(/\S+/g) ?? []);
  const shown = () => {
    const asked = query();
    return data.runs.map((run, place) =>
      asked.every((word) => words[place].includes(word)) &&
      toggles.every(({ key }) => !hidden.get(key)?.has(valueOf(run, key))));
  };

  const drawChips = () => {
    for (const box of document.querySelectorAll("[data-chips]")) {
      box.replaceChildren(...toggles.map(({ key, values }) => {
        const row = document.createElement("div");
        const name = document.createElement("span");
        name.className = "key";
        name.textContent = key;
        row.append(name, ...[...values].sort(natural).map((value) => {
          const chip = document.createElement("button");
          chip.type = "button";
          chip.textContent = value;
          chip.dataset.key = key;
          chip.setAttribute("aria-pressed", "true");
          chip.addEventListener("click", () => {
            const off = hidden.get(key) ?? new Set();
            if (!off.delete(value)) off.add(value);
            hidden.set(key, off);
            changed();
          });
          return chip;
        }));
        return row;
      }));
    }
  };

  const rows = [...document.querySelectorAll("#table tbody tr, #left-out tbody tr")]
    .map((row) => ({ row, runs: row.dataset.runs.trim().split(" ").map(Number) }));

  const changed = () => {
    const now = shown();
    for (const { row, runs } of rows) row.hidden = !runs.some((place) => now[place]);
    for (const chip of document.querySelectorAll("[data-chips] button"))
      chip.setAttribute("aria-pressed", String(!hidden.get(chip.dataset.key)?.has(chip.textContent)));
    const count = now.filter(Boolean).length;
    byId("shown").textContent = count === now.length ? `${count} runs` : `${count} of ${now.length} runs`;
    for (const listener of listeners) listener();
  };

  const bodyShown = () => [...document.querySelectorAll("#table tbody")].find((body) => !body.hidden);

  // Sorting: numbers by value, words naturally, empty cells last.
  const sortBy = (head) => {
    const place = [...head.parentElement.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    for (const body of document.querySelectorAll("#table tbody")) {
      const keyed = [...body.rows].map((row) => [row.cells[place].dataset.value, row]);
      keyed.sort(([a], [b]) => {
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        const both = a !== "" && b !== "" && !Number.isNaN(+a) && !Number.isNaN(+b);
        return (up ? 1 : -1) * (both ? a - b : natural(a, b));
      });
      body.append(...keyed.map(([, row]) => row));
    }
  };

  const csv = () => {
    const heads = [...document.querySelectorAll("#table thead th")];
    const kinds = heads.map((head) => head.dataset.kind === "figure");
    const each = !document.querySelector('#table tbody[data-kind="runs"]').hidden;
    const quote = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const line = (cells) => cells.map((cell) => quote(cell ?? "")).join(",");
    const names = heads.flatMap((head, i) => {
      const name = i === 0 ? (each ? "run" : "setting") : head.dataset.key;
      return kinds[i] ? (each ? [name, `${name}_biased`] : [name, `${name}_spread`, `${name}_biased`]) : [name];
    });
    const lines = [...bodyShown().rows].filter((row) => !row.hidden).map((row) =>
      line([...row.cells].flatMap(({ dataset: d }, i) =>
        !kinds[i] ? [d.value] : each ? [d.value, d.value && (d.biased ?? "0")] : [d.value, d.spread, d.value && (d.biased ?? "0")])));
    return `${line(names)}\n${lines.join("\n")}\n`;
  };

  const download = (text, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const copy = async (button) => {
    const text = button.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page from a file, or a browser that asks first: the selection is copied instead
      const range = document.createRange();
      range.selectNodeContents(button.parentElement.querySelector("pre"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };

  const setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    for (const listener of listeners) listener();
  };
  const wantsDark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = wantsDark.matches ? "dark" : "light";
  wantsDark.addEventListener("change", () => setTheme(wantsDark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () =>
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  for (const head of document.querySelectorAll("#table thead th"))
    head.firstElementChild.addEventListener("click", () => sortBy(head));
  byId("filter").addEventListener("input", changed);
  byId("each").addEventListener("change", (event) => {
    for (const body of document.querySelectorAll("#table tbody")) body.hidden = (body.dataset.kind === "runs") !== event.target.checked;
    byId("table").classList.toggle("each", event.target.checked);
    document.querySelector("#table thead th button").textContent = event.target.checked ? "Run" : "Setting";
  });
  byId("csv").addEventListener("click", () => download(csv(), `${data.study}.csv`));
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
  drawChips();
  changed();
  return { data, shown, valueOf, natural, csv, onChange: (listener) => listeners.push(listener) };
})();
