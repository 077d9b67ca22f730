"use strict";
// The text token by token: coloured by loss or SPS, stepped by slider, arrow keys, mouse or playback.

class Replay {
  constructor(host, data) {
    this.data = data;
    this.part = (name) => host.querySelector(`[data-replay="${name}"]`);
    this.rows = data.rows.length;
    this.cells = data.cells;  // [row, column] of each stored value
    this.timer = 0;
    this.position = 0;
    const listen = (name, event, run) => this.part(name).addEventListener(event, run);
    listen("sequence", "change", () => this.open(Number(this.part("sequence").value)));
    for (const name of ["colour", "layer", "module"]) listen(name, "change", () => this.colour());
    listen("slider", "input", () => this.step(Number(this.part("slider").value)));
    listen("back", "click", () => this.step(this.position - 1));
    listen("next", "click", () => this.step(this.position + 1));
    listen("play", "click", () => this.play());
    const tokens = this.part("tokens");
    tokens.addEventListener("keydown", (event) => this.key(event));
    tokens.addEventListener("click", (event) => this.fromEvent(event, (position) => this.step(position)));
    tokens.addEventListener("mouseover", (event) => this.fromEvent(event, (position) => showTip(this.summary(position), event.pageX, event.pageY)));
    tokens.addEventListener("mouseleave", hideTip);
    const blank = data.rows.map(() => data.columns.map(() => null));
    const view = { values: blank, kind: "diverging", log: false, low: -1, high: 1, clipped: false, unit: "mean SPS of the module's blocks" };
    this.map = new HeatMap(this.part("map"), {
      title: "SPS of the chosen token", rows: data.rows, columns: data.columns, short: data.short, rowTitle: "layer",
      unit: "SPS", values: blank, views: { none: view },
    }, "none", { maxCell: 12, onSelect: (row, column) => this.choose(row, column) });
    painters.push(() => this.colour());
    this.open(0);
  }

  open(index) {
    this.stop();
    this.sequence = this.data.sequences[index];
    const sequence = this.sequence;
    if (sequence.packed && !sequence.values) sequence.values = unpack(sequence.packed, Number(sequence.scale));
    this.width = this.cells.length + this.rows;
    const tokens = this.part("tokens");
    tokens.replaceChildren(...sequence.ids.map((id, position) => tokenElement(sequence, id, position)));
    this.spans = [...tokens.children];
    this.part("stored").hidden = sequence.pieces !== null || sequence.text === null;
    this.part("stored").textContent = sequence.pieces === null && sequence.text !== null ? sequence.text : "";
    this.part("slider").max = String(sequence.ids.length - 1);
    this.part("cut").textContent = sequence.note;
    const colour = this.part("colour");
    for (const option of colour.options) option.disabled = option.value === "sps" && !sequence.values;
    if (colour.selectedOptions[0].disabled) colour.value = "loss";
    else if (sequence.values && sequence.loss.every((loss) => loss === null)) colour.value = "sps";
    this.limit = 1;
    if (sequence.values) {
      const sizes = sequence.values.filter((value) => !Number.isNaN(value)).map(Math.abs).sort();
      this.limit = sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || 1 : 1;
    }
    this.step(0, false);
    this.colour();
  }

  value(position, column) { return this.sequence.values ? this.sequence.values[position * this.width + column] : NaN; }

  // Loss of predicting this very token, from the position before it.
  surprisal(position) { return position > 0 ? this.sequence.loss[position - 1] : null; }

  // What a token is coloured by, and the scale for it.
  shading() {
    if (this.part("colour").value === "loss") {
      return { of: (position) => this.surprisal(position), scale: { kind: "heat", log: false, low: 0, high: this.data.lossHigh }, name: "surprisal, nats" };
    }
    const row = Number(this.part("layer").value), module = this.part("module").value;
    if (module === "spread") {
      const of = (position) => this.value(position, this.cells.length + row);
      return { of, scale: { kind: "heat", log: false, low: 0, high: this.limit }, name: "spread of SPS over the layer's blocks" };
    }
    const column = this.cells.findIndex(([r, c]) => r === row && c === Number(module));
    const of = (position) => (column < 0 ? NaN : this.value(position, column));
    return { of, scale: { kind: "diverging", log: false, low: -this.limit, high: this.limit }, name: "mean SPS of the module's blocks" };
  }

  colour() {
    const { of, scale, name } = this.shading();
    const sps = this.part("colour").value === "sps";
    this.part("layer").disabled = this.part("module").disabled = !sps;
    this.spans.forEach((span, position) => {
      const value = of(position);
      if (value === null || Number.isNaN(value)) { span.style.backgroundColor = ""; span.style.color = ""; return; }
      const colour = mix(colourStops(scale.kind), scaleShare(value, scale));
      span.style.backgroundColor = `rgb(${colour.join(",")})`;
      span.style.color = textOn(colour);
    });
    this.bar(scale, name);
  }

  bar(scale, name) {
    const stops = colourStops(scale.kind);
    this.part("bar").style.background = `linear-gradient(to right, ${stops.join(",")})`;
    this.part("low").textContent = formatNumber(scale.low);
    this.part("high").textContent = `≥ ${formatNumber(scale.high)} (${name})`;
  }

  step(position, scroll = true) {
    const last = this.sequence.ids.length - 1;
    if (last < 0) return;
    this.spans[this.position]?.classList.remove("current");
    this.position = Math.min(Math.max(position, 0), last);
    const span = this.spans[this.position];
    span.classList.add("current");
    if (scroll) {
      // Only the box scrolls, never the page.
      const box = this.part("tokens"), top = span.offsetTop - box.offsetTop;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 40) box.scrollTop = top - box.clientHeight / 2;
    }
    this.part("slider").value = String(this.position);
    this.part("slider").setAttribute("aria-valuetext", this.summary(this.position));
    this.facts();
  }

  pieceName(position) {
    const { pieces, ids } = this.sequence;
    if (position >= ids.length) return "(end)";
    return pieces === null ? `token id ${ids[position]}` : JSON.stringify(pieces[position]);
  }

  summary(position) {
    const { of, name } = this.shading();
    const value = of(position);
    const line = this.part("colour").value === "loss" ? "" : `\n${formatNumber(value)} (${name})`;
    return `${position}: ${this.pieceName(position)}\nsurprisal ${formatNumber(this.surprisal(position))}${line}`;
  }

  facts() {
    const { ids, loss, marked, broken } = this.sequence, position = this.position;
    const none = (place) => (broken && place + 1 < ids.length ? "not finite" : "nothing to predict");
    const nats = (value, place) => (value === null ? none(place) : `${formatNumber(value)} nats`);
    const rows = [
      ["Token", `${this.pieceName(position)} (id ${ids[position]})`],
      ["Position", `${position + 1} of ${ids.length}${marked && marked[position] ? ", marked as answer" : ""}`],
      ["Surprisal of this token", position === 0 ? "the first token is not predicted" : nats(this.surprisal(position), position - 1)],
      ["Loss here", loss[position] === null ? none(position) : `${formatNumber(loss[position])} nats, predicting ${this.pieceName(position + 1)}`],
    ];
    this.part("facts").replaceChildren(...rows.flatMap(([name, value]) => [create("dt", {}, name), create("dd", {}, value)]));
    this.part("map").hidden = !this.sequence.values;
    if (!this.sequence.values) return;
    const values = this.data.rows.map(() => this.data.columns.map(() => null));
    this.cells.forEach(([row, column], place) => { const value = this.value(position, place); if (!Number.isNaN(value)) values[row][column] = value; });
    this.map.setValues(values, { ...this.map.view, values, low: -this.limit, high: this.limit, clipped: true });
  }

  choose(row, column) {
    this.part("colour").value = "sps";
    this.part("layer").value = String(row);
    this.part("module").value = String(column);
    this.colour();
  }

  fromEvent(event, run) {
    const position = event.target.dataset?.position;
    if (position !== undefined) run(Number(position));
  }

  key(event) {
    const moves = { ArrowLeft: this.position - 1, ArrowRight: this.position + 1, Home: 0, End: this.sequence.ids.length - 1 };
    if (event.key === " ") { event.preventDefault(); this.play(); }
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.step(moves[event.key]);
  }

  stop() { clearInterval(this.timer); this.timer = 0; this.part("play").textContent = "Play"; }

  play() {
    if (this.timer) { this.stop(); return; }
    if (this.position === this.sequence.ids.length - 1) this.step(0);
    this.part("play").textContent = "Stop";
    this.timer = setInterval(() => {
      if (this.position === this.sequence.ids.length - 1) this.stop();
      else this.step(this.position + 1);
    }, 250);
  }
}

// Base64 of little-endian int16 to numbers; −32768 is missing.
function unpack(packed, scale) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 2);
  for (let place = 0; place < values.length; place++) {
    const code = view.getInt16(2 * place, true);
    values[place] = code === -32768 ? NaN : code * scale;
  }
  return values;
}

function tokenElement(sequence, id, position) {
  const span = create("span", { "data-position": position });
  if (sequence.marked && sequence.marked[position]) span.classList.add("marked");
  if (sequence.pieces === null) {
    span.classList.add("id");
    span.textContent = String(id);
    return span;
  }
  const piece = sequence.pieces[position];
  // Control characters as signs; a newline also breaks the line; part of a character has no text of its own.
  const shown = piece === "" ? "·" : piece.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (sign) => (sign === "\u007f" ? "␡" : String.fromCharCode(0x2400 + sign.charCodeAt(0))));
  span.textContent = shown.replaceAll("\n", "⏎\n");
  if (piece === "") span.classList.add("sign");
  return span;
}

if (hasData("replay-data")) new Replay(document.getElementById("replay"), readData("replay-data"));
schedulePaint();
