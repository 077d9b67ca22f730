"use strict";
// A heat map on a canvas: rows × columns of colour with labels, a colour bar, a tooltip and a cursor for the arrow keys.

class HeatMap {
  // `data` is {title, rows, columns, short, rowTitle, unit, values, views}; `host` the element it fills.
  constructor(host, data, view, { onSelect = null, maxCell = 26 } = {}) {
    Object.assign(this, { host, data, onSelect, maxCell, cursor: null });
    this.view = data.views[view];
    this.canvas = create("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heat map" });
    this.readout = create("p", { class: "readout", "aria-live": "polite" });
    this.box = create("div", { class: "map-box" }, this.canvas);
    host.append(this.box, this.readout);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => { hideTip(); this.point(null); });
    this.canvas.addEventListener("click", (event) => { const cell = this.cellAt(event); if (cell && this.onSelect) this.onSelect(...cell); });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.point(null));
    painters.push(() => this.paint());
  }

  setView(name) { this.view = this.data.views[name]; this.paint(); }

  // Replaces the values and the scale (the replay's map changes with each token).
  setValues(values, view) { this.data.values = values; this.view = view; this.paint(); }

  layout(context) {
    const { rows, short } = this.data;
    context.font = FONT;
    const widest = (labels) => Math.max(0, ...labels.map((label) => context.measureText(label).width));
    const left = Math.min(150, widest(rows) + 26);
    const available = Math.max(this.host.clientWidth - left - 12, 60);
    const cellWidth = Math.max(6, available / short.length);
    const cellHeight = Math.min(this.maxCell, Math.max(rows.length > 80 ? 5 : 11, 460 / rows.length));
    const label = widest(short);
    const flat = label + 6 <= cellWidth;
    const bottom = flat ? 20 : Math.min(label * 0.72, 110) + 16;
    const width = left + cellWidth * short.length + 12;
    return { left, cellWidth, cellHeight, flat, bottom, top: 4, width, bar: 44, height: 4 + cellHeight * rows.length + bottom + 44 };
  }

  paint() {
    if (!this.host.clientWidth) return;
    const probe = this.canvas.getContext("2d");
    const at = (this.at = this.layout(probe));
    const context = sizeCanvas(this.canvas, at.width, at.height);
    const { rows, short, title, rowTitle } = this.data, values = this.view.values;
    const text = cssColour("--text"), soft = cssColour("--soft"), missing = cssColour("--missing");
    let drawn = 0;
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < short.length; column++) {
        const value = values[row][column];
        const known = value !== null && value !== undefined;
        context.fillStyle = known ? colourOf(value, this.view) : missing;
        const x = at.left + column * at.cellWidth, y = at.top + row * at.cellHeight, gap = at.cellHeight > 8 ? 1 : 0;
        if (known) { context.fillRect(x, y, at.cellWidth - gap, at.cellHeight - gap); drawn++; }
        else context.fillRect(x + at.cellWidth * 0.35, y + at.cellHeight / 2 - 0.5, at.cellWidth * 0.3, 1);  // a dash: no such module
      }
    }
    context.font = FONT;
    context.fillStyle = soft;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(13 / at.cellHeight));
    rows.forEach((label, row) => { if (row % every === 0) context.fillText(clip(context, label, at.left - 22), at.left - 5, at.top + (row + 0.5) * at.cellHeight); });
    context.save();
    context.translate(9, at.top + (rows.length * at.cellHeight) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillStyle = text;
    context.fillText(rowTitle, 0, 0);
    context.restore();
    const under = at.top + rows.length * at.cellHeight + 5;
    const each = at.flat ? 1 : Math.max(1, Math.ceil(13 / at.cellWidth));
    context.fillStyle = soft;
    short.forEach((label, column) => {
      if (column % each) return;
      context.save();
      context.translate(at.left + (column + 0.5) * at.cellWidth, under + (at.flat ? 7 : 2));
      if (at.flat) { context.textAlign = "center"; }
      else { context.rotate(-Math.PI / 4); context.textAlign = "right"; }
      context.fillText(at.flat ? label : clip(context, label, 150), 0, 0);
      context.restore();
    });
    this.paintBar(context, at, text, soft);
    if (this.cursor) {
      const [row, column] = this.cursor;
      context.strokeStyle = text;
      context.lineWidth = 2;
      context.strokeRect(at.left + column * at.cellWidth - 1, at.top + row * at.cellHeight - 1, at.cellWidth + 1, at.cellHeight + 1);
    }
    this.canvas.dataset.cells = String(drawn);
    this.canvas.setAttribute("aria-label", `${title}: ${rows.length} rows, ${short.length} columns. Arrow keys read the cells.`);
  }

  paintBar(context, at, text, soft) {
    const y = at.height - 40, width = Math.min(260, at.width - at.left - 12), x = at.left, view = this.view;
    for (let step = 0; step < width; step++) {
      const [r, g, b] = mix(colourStops(view.kind), step / (width - 1));
      context.fillStyle = `rgb(${r},${g},${b})`;
      context.fillRect(x + step, y, 1.5, 10);
    }
    context.strokeStyle = soft;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, 9);
    context.font = FONT;
    context.fillStyle = text;
    context.textBaseline = "top";
    const less = view.clipped ? "≤ " : "", more = view.clipped && view.kind === "diverging" ? "≥ " : "";
    const middle = view.kind === "diverging" ? "0" : formatNumber(view.log ? Math.sqrt(view.low * view.high) : (view.low + view.high) / 2);
    context.textAlign = "left";
    context.fillText(less + formatNumber(view.low), x, y + 13);
    context.textAlign = "center";
    context.fillText(middle, x + width / 2, y + 13);
    context.textAlign = "right";
    context.fillText(more + formatNumber(view.high), x + width, y + 13);
    context.textAlign = "left";
    context.fillStyle = soft;
    context.fillText(view.unit + (view.log ? ", logarithmic" : ""), x, y + 27);
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), at = this.at;
    if (!at) return null;
    const column = Math.floor((event.clientX - box.left - at.left) / at.cellWidth);
    const row = Math.floor((event.clientY - box.top - at.top) / at.cellHeight);
    return row >= 0 && row < this.data.rows.length && column >= 0 && column < this.data.columns.length ? [row, column] : null;
  }

  describe(row, column) {
    const { rows, columns, rowTitle, unit, values } = this.data;
    const name = /^\d+$/.test(rows[row]) ? `${rowTitle} ${rows[row]}` : rows[row];
    const value = values[row][column];
    if (value === null || value === undefined) return `${name}, ${columns[column]}\nno such module, or not measured`;
    const shown = this.view.values[row][column];
    const extra = shown === value ? "" : `\n${formatNumber(shown)} ${this.view.unit}`;
    return `${name}, ${columns[column]}\n${formatNumber(value)} (${unit})${extra}`;
  }

  point(cell, say = false) {
    const same = JSON.stringify(cell) === JSON.stringify(this.cursor);
    this.cursor = cell;
    if (say && cell) this.readout.textContent = this.describe(...cell).replaceAll("\n", " · ");
    if (!same) this.paint();
  }

  hover(event) {
    const cell = this.cellAt(event);
    this.point(cell);
    if (cell) showTip(this.describe(...cell), event.pageX, event.pageY);
    else hideTip();
  }

  key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter" && this.cursor && this.onSelect) { this.onSelect(...this.cursor); return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key], [row, column] = this.cursor || [-down, -right];
    const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
    this.point([clamp(row + down, this.data.rows.length), clamp(column + right, this.data.columns.length)], true);
  }
}

function clip(context, label, width) {
  if (context.measureText(label).width <= width) return label;
  let cut = label;
  while (cut.length > 1 && context.measureText(`…${cut}`).width > width) cut = cut.slice(1);
  return `…${cut}`;
}

// The values of a map as a table, made when it is first opened.
function attachTable(host, data) {
  const details = create("details", {}, create("summary", {}, "Values as a table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const head = create("tr", {}, create("th", {}, data.rowTitle), ...data.columns.map((name) => create("th", { class: "num" }, name)));
    const body = data.rows.map((name, row) =>
      create("tr", {}, create("th", {}, name), ...data.values[row].map((value) => create("td", { class: "num" }, value === null ? "–" : formatNumber(value)))));
    details.append(create("div", { class: "scroll", tabindex: "0" }, create("table", {}, create("thead", {}, head), create("tbody", {}, ...body))));
  });
  host.append(details);
}

// Every <figure data-map="key"> gets its map; the radio buttons named "normalise" switch those with several views.
const heatMaps = {};
for (const data of hasData("maps-data") ? readData("maps-data") : []) {
  const host = document.querySelector(`figure[data-map="${data.key}"]`);
  const chosen = document.querySelector('input[name="normalise"]:checked');
  heatMaps[data.key] = new HeatMap(host, data, chosen && chosen.value in data.views ? chosen.value : "none");
  attachTable(host, data);
}
for (const input of document.querySelectorAll('input[name="normalise"]')) {
  input.addEventListener("change", () => {
    for (const map of Object.values(heatMaps)) if (input.value in map.data.views) map.setView(input.value);
  });
}
schedulePaint();
