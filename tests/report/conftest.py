"""Scan files made for the report, with every number known, and a headless browser to open the pages in."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tinyonn.heads.plasticity.summary import summarise
from tinyonn.mscan import Integral, LayoutEntry, MscanWriter, SequenceRecord, layout_groups

HOSTILE = "</script><img src=x onerror=alert(1)>"
METADATA = {
    "model": "tiny-model",
    "topic": "python",
    "credit": "full",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "corpus": "python_corpus.jsonl",
}


def make_layout(sizes: dict[str, int]) -> list[LayoutEntry]:
    """Weights by name and output features, 64 features a block."""
    layout, base = [], 0
    for name, features in sizes.items():
        blocks = -(-features // 64)
        layout.append(LayoutEntry(name, features, blocks, base))
        base += blocks
    return layout


def dense_sizes(layers: int = 3) -> dict[str, int]:
    sizes = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, features in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)):
            sizes[f"{prefix}.self_attn.{name}.weight"] = features
        for name, features in (("gate_proj", 300), ("up_proj", 300), ("down_proj", 256)):
            sizes[f"{prefix}.mlp.{name}.weight"] = features
    return sizes | {"lm_head.weight": 500}


def moe_sizes(layers: int = 2, experts: int = 5) -> dict[str, int]:
    sizes = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.self_attn.q_proj.weight": 256,
            f"{prefix}.self_attn.k_proj.weight": 128,
            f"{prefix}.self_attn.v_proj.weight": 128,
        }
        for part, features in (("gate_up_proj", 128), ("down_proj", 256)):
            sizes |= {f"{prefix}.mlp.experts.{part}.{expert}": features for expert in range(experts)}
    return sizes


def plain_sps(activation: np.ndarray, gradient: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """SPS token by token and layer by layer, straight from its definition."""
    out = np.full(activation.shape, np.nan)
    for token in range(len(activation)):
        for first, last in itertools.pairwise(offsets):
            a, g = activation[token, first:last].astype(float), gradient[token, first:last].astype(float)
            known = ~(np.isnan(a) | np.isnan(g))
            if known.any():
                z = [
                    (x[known] - x[known].mean()) / x[known].std() if x[known].std() > 1e-6 * abs(x[known].mean()) else 0 * x[known]
                    for x in (a, g)
                ]
                out[token, np.arange(first, last)[known]] = z[0] - z[1]
    return out


def integral_of(activation: np.ndarray, gradient: np.ndarray, sps: np.ndarray) -> Integral:
    """The sums over tokens of one sequence."""
    known = ~np.isnan(sps)
    count = known.sum(axis=0).astype(np.float64)
    moments = []
    for plane in (activation, gradient):
        values = np.where(known, plane.astype(np.float64), 0.0)
        mean = values.sum(axis=0) / np.maximum(count, 1)
        moments += [mean, np.where(known, (plane - mean) ** 2, 0.0).sum(axis=0)]
    return Integral(np.where(known, sps, 0.0).sum(axis=0), count, *moments)


@dataclass
class Scan:
    """A file and all that was put into it."""

    path: Path
    layout: list[LayoutEntry]
    offsets: np.ndarray
    activation: list[np.ndarray]
    gradient: list[np.ndarray]
    sps: list[np.ndarray]
    loss: list[np.ndarray]
    token_ids: list[np.ndarray]

    @property
    def integral(self) -> np.ndarray:
        return np.nansum(np.concatenate(self.sps), axis=0)

    def mean(self, planes: list[np.ndarray]) -> np.ndarray:
        """Mean per block over the tokens that count."""
        known = ~np.isnan(np.concatenate(self.sps))
        stacked = np.where(known, np.concatenate(planes).astype(np.float64), 0.0)
        with np.errstate(invalid="ignore"):
            return stacked.sum(axis=0) / known.sum(axis=0)


@pytest.fixture
def make_scan(tmp_path: Path) -> Callable[..., Scan]:
    """Writes a scan of random norms. `shift` is added to the activation of each block, in units of its own size."""

    def make(
        name: str = "scan",
        *,
        sizes: dict[str, int] | None = None,
        sequences: int = 4,
        tokens: int = 12,
        seed: int = 0,
        store: str = "records",
        metadata: dict[str, Any] | None = None,
        gradient: bool = True,
        routed: float = 1.0,
        shift: np.ndarray | None = None,
        texts: list[str] | None = None,
        ids: list[str] | None = None,
        block_seed: int = 7,
    ) -> Scan:
        layout = make_layout(sizes or dense_sizes())
        blocks = sum(entry.blocks for entry in layout)
        _, offsets = layout_groups(layout)
        size = np.exp(np.random.default_rng(block_seed).normal(size=(2, blocks)))
        expert = np.concatenate([np.full(entry.blocks, ".experts." in entry.name) for entry in layout])
        rng = np.random.default_rng(seed)
        scan = Scan(tmp_path / f"{name}.mscan", layout, offsets, [], [], [], [], [])
        with MscanWriter(scan.path, metadata or METADATA, layout, codec="f32") as writer:
            for number in range(sequences):
                whole = rng.normal(scale=0.4, size=blocks)  # what a text does to a block, the same for all of its tokens
                noise = rng.normal(scale=0.3, size=(2, tokens, blocks))
                a = (size[0] * np.exp(noise[0] + whole) * (1 if shift is None else np.exp(shift))).astype(np.float32)
                g = (size[1] * np.exp(noise[1]) * (1 if gradient else 0)).astype(np.float32)
                away = expert & (rng.random((tokens, blocks)) >= routed)
                a[away] = g[away] = np.nan
                g[-1] = a[-1] = np.nan  # the last token predicts nothing
                loss = rng.gamma(2.0, 1.2, size=tokens).astype(np.float32)
                loss[-1] = np.nan
                sps = plain_sps(a, g, np.asarray(offsets))
                token_ids = rng.integers(0, 60, size=tokens)
                kept = {"activation": a, "grad_norm": g} if store == "records" else {}
                writer.append(
                    SequenceRecord(
                        ids[number] if ids else f"text-{number}",
                        token_ids,
                        loss,
                        text=texts[number] if texts else "some text",
                        integral=integral_of(a, g, sps),
                        **kept,
                    )
                )
                for kind, value in (("activation", a), ("gradient", g), ("sps", sps), ("loss", loss), ("token_ids", token_ids)):
                    getattr(scan, kind).append(value)
        return scan

    return make


def write_grid(path, columns):
    """A CSV of one line a head from (layers, heads) columns."""
    layers, heads = next(iter(columns.values())).shape
    lines = [",".join(["layer", "head", *columns])]
    for place in np.ndindex(layers, heads):
        lines.append(",".join([*map(str, place), *(f"{values[place]:.9g}" for values in columns.values())]))  # noqa: PERF401
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def hostile():
    """A name that a page must show as text."""
    return HOSTILE


@pytest.fixture
def make_scores(tmp_path):
    """A folder as `tinyonn heads score` writes it; returns it and its columns."""

    def make(layers=4, heads=6, mode="zscore", extra=False, flat=False, ending=None):
        rng = np.random.default_rng(5)
        names = ["out", "ent", "task", *(["peak"] if extra else [])]
        raw = {name: np.full((layers, heads), -2.0) if flat else rng.normal(size=(layers, heads)) - 2 for name in names}
        rank = {name: values.argsort(axis=1).argsort(axis=1) + 1.0 for name, values in raw.items()}
        norm = {
            name: (rank[name] - 1) / (heads - 1)
            if mode == "percentile"
            else (values - values.mean(1, keepdims=True)) / (1 if flat else values.std(1, keepdims=True))
            for name, values in raw.items()
        }
        combined = rank["out"] + 0.5 * rank["ent"] + rank["task"]
        write_grid(tmp_path / "scores_raw.csv", {f"{name}_raw": values for name, values in raw.items()})
        ending = ending or {"zscore": "z", "percentile": "percentile"}[mode]
        write_grid(tmp_path / "scores_norm.csv", {f"{name}_{ending}": values for name, values in norm.items()})
        write_grid(tmp_path / "scores_combined.csv", {"combined": combined})
        order = np.argsort(-combined, axis=None, kind="stable")[:5]
        ranked = [(rank, *divmod(int(flat), heads)) for rank, flat in enumerate(order, start=1)]
        listed = [{"rank": rank, "layer": layer, "head": head, "combined": combined[layer, head]} for rank, layer, head in ranked]
        (tmp_path / "topk_global.json").write_text(json.dumps(listed))
        per_layer = {
            str(layer): [
                {"rank": rank, "head": int(head), "combined": combined[layer, head]}
                for rank, head in enumerate(np.argsort(-combined[layer], kind="stable")[:5], start=1)
            ]
            for layer in range(layers)
        }
        (tmp_path / "topk_per_layer.json").write_text(json.dumps(per_layer))
        summary = {"model": "org/tiny", "data": HOSTILE, "samples": 1024, "tokens": 5000, "layers": layers, "heads": layers * heads}
        (tmp_path / "summary.json").write_text(json.dumps(summary | {"versions": {"torch": "2.13"}}))
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(
                {
                    "model_path": "org/tiny",
                    "norm_mode": mode,
                    "lambda_ent": 0.5,
                    "lambda_task": 1.0,
                    "out_projection": False,
                    "extra_weights": {"peak": 0.25} if extra else {},
                }
            )
        )
        return tmp_path, raw, norm, combined

    return make


@pytest.fixture
def make_run(make_seed, tmp_path):
    """One seed with its report; returns the folder and its columns."""

    def make(seed=0, layers=4, heads=10, **columns):
        folder = tmp_path / "boolq" / f"seed{seed}"
        drawn = make_seed(folder, layers, heads, seed, model=f"/models/{HOSTILE}", **columns)
        summarise(folder)
        return folder, drawn

    return make


class PageParser(HTMLParser):
    """What a test asks of a page: tables, JSON elements, links, and whether every element is closed."""

    VOID = frozenset({"meta", "link", "input", "br", "line", "path", "rect", "circle"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.data: dict[str, Any] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        if tag == "script":
            self._script = found.get("id") if found.get("type") == "application/json" else ""
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.data[self._script] = json.loads(data)
        elif self._script is None and "style" not in self.open:
            self.text += data
            if self.open and self.open[-1] in ("td", "th"):
                self.tables[-1][-1][-1] += data


def read_page(path: Path) -> PageParser:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture
def parse() -> Callable[[Path], PageParser]:
    return read_page


class Browser:
    """A headless Chromium, driven through ChromeDriver's plain HTTP interface."""

    def __init__(self, port: int, chromium: str, profile: str) -> None:
        self._root = f"http://127.0.0.1:{port}"
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        switches += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options = {"binary": chromium, "args": switches}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = f"/session/{self._call('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._root + path, data=data, method=method, headers={"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, *, width: int = 1400, scheme: str = "light") -> None:
        """Loads a page at a width and in a colour scheme, and waits until it has painted twice."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.console()
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})
        self.settle()

    def settle(self) -> None:
        body = {"script": "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(1)));", "args": []}
        self._call("POST", f"{self._session}/execute/async", body)

    def run(self, script: str) -> Any:
        """Value of a script that ends in `return …`."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Keys to the focused element."""
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.devtools("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        self.settle()

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self._call("POST", f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        try:
            port = next(
                (int(found[1]) for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line))), None
            )
            assert port is not None, "chromedriver did not start"
            page = Browser(port, chromium, profile)
            yield page
            page.close()
        finally:
            process.terminate()
            process.wait(timeout=20)
            process.stdout.close()
