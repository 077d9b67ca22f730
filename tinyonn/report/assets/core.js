"use strict";
// What all parts share: data, colours, number format, the tooltip, redrawing.

const readData = (id) => JSON.parse(document.getElementById(id).textContent);
const hasData = (id) => document.getElementById(id) !== null;
const palette = readData("palette-data");
const darkQuery = window.matchMedia("(prefers-color-scheme: dark)");

// Painters run when the page has a width, when that width changes, and when the colour scheme does.
const painters = [];
function paintAll() { for (const paint of painters) paint(); }
let pending = 0;
function schedulePaint() {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(paintAll);
}
darkQuery.addEventListener("change", schedulePaint);
window.addEventListener("resize", schedulePaint);

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function create(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);  // strings become text nodes, never markup
  return element;
}

function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not measured";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function mix(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const part = (at) => parseInt(stops[low].slice(at, at + 2), 16) * (low + 1 - place) + parseInt(stops[low + 1].slice(at, at + 2), 16) * (place - low);
  return [Math.round(part(1)), Math.round(part(3)), Math.round(part(5))];
}

function colourStops(kind) {
  if (kind === "sequential") return palette.sequential;
  return palette[kind + (darkQuery.matches ? "Dark" : "Light")];
}

// Place of a value on a scale, 0 … 1.
function scaleShare(value, scale) {
  if (!(scale.high > scale.low)) return 0.5;
  if (scale.log) return value <= 0 ? 0 : Math.log(value / scale.low) / Math.log(scale.high / scale.low);
  return (value - scale.low) / (scale.high - scale.low);
}

function colourOf(value, scale) {
  const [r, g, b] = mix(colourStops(scale.kind), scaleShare(value, scale));
  return `rgb(${r},${g},${b})`;
}

// Black or white, whichever reads better on a colour (WCAG relative luminance).
function textOn([r, g, b]) {
  const linear = (x) => ((x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  return luminance > 0.179 ? "#000" : "#fff";
}

const tip = create("div", { id: "tip", role: "presentation" });
document.body.append(tip);
function showTip(text, pageX, pageY) {
  tip.textContent = text;
  const width = tip.offsetWidth, right = window.scrollX + document.documentElement.clientWidth;
  tip.style.left = `${Math.max(window.scrollX + 4, Math.min(pageX + 14, right - width - 6))}px`;
  tip.style.top = `${pageY + 16}px`;
  tip.style.visibility = "visible";
}
function hideTip() { tip.style.visibility = "hidden"; }

// A canvas of width × height CSS pixels, sharp on dense screens.
function sizeCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const FONT = '11px system-ui, "Segoe UI", Roboto, Arial, sans-serif';
