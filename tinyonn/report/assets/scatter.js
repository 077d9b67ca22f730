"use strict";
// Points on a canvas: scatter of A against B, and the volcano. Specific blocks are drawn last, larger and in the accent colour.

class Points {
  constructor(host, data, kind) {
    Object.assign(this, { host, data, kind });
    const volcano = kind === "volcano";
    this.x = volcano ? data.difference : data.a;
    this.y = volcano ? data.statistic : data.b;
    this.titles = volcano
      ? [`difference of mean SPS: ${data.topics[0]} − ${data.topics[1]}`, "standard errors from 0"]
      : [`mean SPS, ${data.topics[0]}`, `mean SPS, ${data.topics[1]}`];
    this.canvas = create("canvas", { role: "img", "aria-label": `${volcano ? "Volcano" : "Scatter"} of ${this.x.length} blocks; the table above lists the first.` });
    host.append(this.canvas);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", hideTip);
    painters.push(() => this.paint());
  }

  range(values, extra = []) {
    const all = [...extra];
    for (const value of values) if (value !== null) all.push(value);
    let low = Infinity, high = -Infinity;
    for (const value of all) { low = Math.min(low, value); high = Math.max(high, value); }
    if (!(high > low)) { low -= 1; high += 1; }
    const pad = (high - low) * 0.04;
    return [low - pad, high + pad];
  }

  paint() {
    const width = this.host.clientWidth, height = Math.min(460, Math.max(300, width * 0.75));
    if (!width) return;
    const context = sizeCanvas(this.canvas, width, height), volcano = this.kind === "volcano";
    const left = 54, bottom = 44, top = 8, right = 10, critical = this.data.critical;
    let xRange = this.range(this.x, [0]), yRange = this.range(this.y, volcano && critical !== null ? [0, critical] : [0]);
    if (!volcano) xRange = yRange = [Math.min(xRange[0], yRange[0]), Math.max(xRange[1], yRange[1])];
    const toX = (value) => left + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (width - left - right);
    const toY = (value) => height - bottom - ((value - yRange[0]) / (yRange[1] - yRange[0])) * (height - top - bottom);
    this.places = this.x.map((value, point) => (value === null || this.y[point] === null ? null : [toX(value), toY(this.y[point])]));
    const soft = cssColour("--soft"), line = cssColour("--line"), text = cssColour("--text");
    context.font = FONT;
    context.lineWidth = 1;
    for (const [range, vertical] of [[xRange, true], [yRange, false]]) {
      for (const tick of niceTicks(...range)) {
        context.strokeStyle = tick === 0 ? soft : line;
        context.beginPath();
        if (vertical) { context.moveTo(toX(tick), top); context.lineTo(toX(tick), height - bottom); }
        else { context.moveTo(left, toY(tick)); context.lineTo(width - right, toY(tick)); }
        context.stroke();
        context.fillStyle = soft;
        context.textAlign = vertical ? "center" : "right";
        context.textBaseline = vertical ? "top" : "middle";
        context.fillText(formatNumber(tick), vertical ? toX(tick) : left - 6, vertical ? height - bottom + 6 : toY(tick));
      }
    }
    context.strokeStyle = cssColour("--mark");
    context.setLineDash([6, 4]);
    context.beginPath();
    if (volcano && critical !== null) { context.moveTo(left, toY(critical)); context.lineTo(width - right, toY(critical)); }
    if (!volcano) { context.moveTo(toX(xRange[0]), toY(xRange[0])); context.lineTo(toX(xRange[1]), toY(xRange[1])); }
    context.stroke();
    context.setLineDash([]);
    let drawn = 0;
    for (const specific of [0, 1]) {
      context.fillStyle = specific ? cssColour("--mark") : soft;
      context.globalAlpha = specific ? 0.8 : 0.35;
      const radius = specific ? 2.6 : 1.8;
      this.places.forEach((place, point) => {
        if (place === null || this.data.specific[point] !== specific) return;
        context.beginPath();
        context.arc(place[0], place[1], radius, 0, 7);
        context.fill();
        drawn++;
      });
    }
    context.globalAlpha = 1;
    context.fillStyle = text;
    context.textAlign = "center";
    context.textBaseline = "bottom";
    context.fillText(clip(context, this.titles[0], width - left), (left + width - right) / 2, height - 6);
    context.translate(12, (height - bottom + top) / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    context.fillText(clip(context, this.titles[1], height), 0, 0);
    this.canvas.dataset.cells = String(drawn);
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, nearest = 144;
    this.places?.forEach((place, point) => {
      if (place === null) return;
      const distance = (place[0] - x) ** 2 + (place[1] - y) ** 2;
      if (distance < nearest) { nearest = distance; best = point; }
    });
    if (best < 0) { hideTip(); return; }
    const data = this.data, verdict = data.specific[best] ? "topic-specific" : "not beyond chance";
    showTip(`${data.names[data.entry[best]]}, block ${data.index[best]}\n${data.topics[0]} ${formatNumber(data.a[best])}, ${data.topics[1]} ${formatNumber(data.b[best])}\n` +
      `difference ${formatNumber(data.difference[best])}, ${formatNumber(data.statistic[best])} standard errors: ${verdict}`, event.pageX, event.pageY);
  }
}

function niceTicks(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick++) ticks.push(Number((tick * step).toPrecision(12)));
  return ticks;
}

const pointsData = readData("points-data");
for (const host of document.querySelectorAll("figure[data-points]")) new Points(host, pointsData, host.dataset.points);
schedulePaint();
