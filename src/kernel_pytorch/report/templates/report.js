"use strict";
(function () {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const charts = new Map();
  let color = {};

  function readColors() {
    const style = getComputedStyle(root);
    color = {};
    for (const name of ["card", "ink", "muted", "line", "soft", "chosen", "base", "ok", "wrong", "failed", "slow"]) {
      color[name] = style.getPropertyValue("--" + name).trim();
    }
    color.font = getComputedStyle(document.body).fontFamily;
  }

  // Tooltips are built from text nodes: names in a plan come from users and are never markup.
  function lines(...texts) {
    const box = document.createElement("div");
    box.style.cssText = "max-width:340px;white-space:normal;overflow-wrap:anywhere";
    texts.filter(Boolean).forEach((text, index) => {
      const line = document.createElement("div");
      line.textContent = text;
      if (index === 0) line.style.fontWeight = "650";
      box.append(line);
    });
    return box;
  }

  function round(value) {
    return Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });
  }
  function milliseconds(value) {
    if (value >= 10000) return round(value / 1000) + " s";
    return value < 1 && value > 0 ? round(value * 1000) + " us" : round(value) + " ms";
  }
  function percent(share) {
    if (share > 0 && share < 0.0005) return "< 0.1 %";
    return (share * 100).toFixed(share >= 0.0995 || share === 0 ? 0 : 1) + " %";
  }
  function power(value) {
    return "1e" + Math.round(Math.log10(value));
  }
  function prefixed(value) {
    const steps = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const found = steps.find(([scale]) => value >= scale * 0.999);
    return found ? round(value / found[0]) + " " + found[1] : round(value) + " ";
  }
  function fitted(text, width) {
    const most = Math.max(8, Math.floor(width / 6.9));
    return text.length > most ? text.slice(0, most - 1) + "…" : text;
  }

  function niceTop(value) {
    const unit = 10 ** Math.floor(Math.log10(value));
    return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((f) => f * unit).find((top) => top >= value);
  }

  const narrow = (element) => element.clientWidth < 560;
  const ink = () => ({ color: color.ink, fontFamily: color.font, fontSize: 13 });
  const muted = () => ({ color: color.muted, fontFamily: color.font, fontSize: 13 });

  function axis(extra) {
    return Object.assign({
      splitNumber: 5,
      axisLine: { lineStyle: { color: color.line } }, axisTick: { show: false },
      axisLabel: Object.assign({ hideOverlap: true }, muted()),
      splitLine: { lineStyle: { color: color.line } }, minorSplitLine: { show: false },
      nameTextStyle: muted(), nameLocation: "middle",
    }, extra);
  }
  function frame(extra) {
    return Object.assign({
      animation: false, textStyle: ink(), backgroundColor: "transparent",
      tooltip: {
        backgroundColor: color.card, borderColor: color.line, textStyle: ink(), confine: true, extraCssText: "box-shadow:0 4px 20px #0003",
      },
    }, extra);
  }
  function horizontal(element, names, extra) {
    const longest = Math.max(...names.map((text) => text.length));
    const room = Math.min(longest * 7.4 + 8, 300, Math.max(80, element.clientWidth * 0.36));
    return {
      grid: Object.assign({ left: room + 12, right: 24, top: 8, bottom: 30 }, extra),
      yAxis: axis({
        type: "category", data: names, inverse: true, splitLine: { show: false },
        axisLabel: Object.assign(ink(), { formatter: (text) => fitted(text, room * 2), width: room, overflow: "break", lineHeight: 15, interval: 0 }),
      }),
    };
  }
  const height = (rows, each, rest) => rows * each + rest;

  const symbols = { chosen: "diamond", unmodified: "rect", ok: "circle", wrong: "triangle", failed: "pin", timeout: "pin", oom: "pin", operator: "circle" };
  const hues = () => ({
    chosen: color.chosen, unmodified: color.base, ok: color.ok, wrong: color.wrong, failed: color.failed,
    timeout: color.slow, oom: color.slow, operator: color.muted,
  });

  const build = {
    ladder(element, { rungs }) {
      const names = rungs.map((r) => (r.added ? "+\u00a0" + r.label : r.label));
      const text = (r) => (r.speedup && !narrow(element) ? r.time + "   " + r.speedup : r.time);
      const longest = Math.max(...rungs.map((r) => r.ms));
      const inside = (r) => text(r).length * 7 < (r.ms / longest) * element.clientWidth * (narrow(element) ? 0.36 : 0.55);
      const saved = rungs.map((r, i) => (i ? Math.max(0, rungs[i - 1].ms - r.ms) : 0));
      const last = rungs.length - 1;
      return {
        height: height(rungs.length, 52, 36),
        option: frame(Object.assign(horizontal(element, names, {}), {
          xAxis: axis({ type: "value", splitNumber: 4, axisLabel: Object.assign(muted(), { formatter: milliseconds, hideOverlap: true }) }),
          tooltip: Object.assign(frame().tooltip, {
            trigger: "item",
            formatter: (p) => lines(names[p.dataIndex], rungs[p.dataIndex].time, rungs[p.dataIndex].speedup),
          }),
          series: [
            {
              type: "bar", stack: "time", barWidth: 28,
              data: rungs.map((r, i) => ({
                value: r.ms, itemStyle: { color: i === last ? color.chosen : i ? color.ok : color.base, borderRadius: 4 },
              })),
              label: Object.assign(ink(), {
                show: true, position: "insideLeft", formatter: (p) => (inside(rungs[p.dataIndex]) ? text(rungs[p.dataIndex]) : ""),
                color: color.card, fontWeight: 600, 
              }),
            },
            {
              type: "bar", stack: "time", silent: true, data: saved,
              itemStyle: { color: "transparent", borderColor: color.base, borderType: "dashed", borderWidth: 1, borderRadius: 4 },
              label: Object.assign(muted(), {
                show: true, position: "inside", formatter: (p) => (p.value > longest * 0.16 ? "−" + milliseconds(p.value) : ""),
              }),
            },
            {
              type: "bar", stack: "time", silent: true, data: rungs.map(() => 0),
              label: Object.assign(ink(), {
                show: true, position: "right", formatter: (p) => (inside(rungs[p.dataIndex]) ? "" : text(rungs[p.dataIndex])), fontWeight: 600,
              }),
            },
          ],
        })),
      };
    },

    trials(element, chart) {
      const hue = hues();
      const timed = chart.points.filter((p) => p.ms !== null);
      const untimed = chart.points.filter((p) => p.ms === null);
      const lane = untimed.length ? (narrow(element) ? 64 : 110) : 0;
      const slowest = Math.min(chart.slowest_ms, Math.max(chart.baseline_ms, ...timed.map((p) => Math.min(p.high_ms, p.ms * 1.4))));
      const named = (p) => !narrow(element) && (p.kind === "chosen" || p.kind === "unmodified");
      const item = (p, x, index) => ({
        value: [x, p.error], point: p, symbol: symbols[p.kind],
        symbolSize: p.kind === "chosen" ? 20 : p.kind === "wrong" ? 14 : 13,
        itemStyle: !p.compared
          ? { color: color.card, borderColor: hue[p.kind], borderWidth: 2, opacity: 1 }
          : { color: hue[p.kind], borderColor: color.card, borderWidth: 1, opacity: 1 },
        label: Object.assign(ink(), {
          show: true, position: named(p) || p.ms > slowest ? "left" : index % 2 ? "top" : "right",
          formatter: named(p) ? p.number + " " + p.kind : p.number + (p.ms > slowest ? " →" : ""),
          fontWeight: p.kind === "chosen" ? 700 : 500,
        }),
      });
      const whiskers = timed.filter((p) => p.ms <= slowest).map((p) => ({
        type: "line", silent: true, symbol: "none", z: 1, lineStyle: { color: hue[p.kind], width: 2, opacity: 0.65 },
        data: [p.low_ms, Math.min(p.high_ms, slowest)].map((x) => [x, p.error]),
      }));
      const yRange = { type: "log", min: chart.floor, max: chart.top };
      const left = 62;
      const grids = [{ left, right: 20 + lane + (lane ? 12 : 0), top: 26, bottom: 62 }];
      const xs = [axis({
        type: "value", min: 0, max: niceTop(slowest * 1.04), nameGap: 42,
        name: narrow(element) ? "ms per " + chart.unit + ", and speed-up" : "time per " + chart.unit + " (ms) and speed-up over the unmodified model",
        axisLabel: Object.assign(muted(), {
          hideOverlap: true, lineHeight: 17,
          formatter: (v) => (v > 0 ? round(v) + "\n" + round(chart.baseline_ms / v) + "x" : "0"),
        }),
      })];
      const ys = [axis(Object.assign({}, yRange, {
        splitNumber: 10, name: "error", nameLocation: "end", nameGap: 10, nameTextStyle: Object.assign(muted(), { align: "right", padding: [0, 8, 0, 0] }),
        axisLabel: Object.assign(muted(), { formatter: (v) => (v <= chart.floor * 1.01 ? "none" : power(v)) }),
      }))];
      const limit = (label) => ({
        silent: true, precision: 20, symbol: "none", lineStyle: { color: color.wrong, type: "dashed", width: 2 },
        data: [{ yAxis: chart.budget }], label: Object.assign(ink(), { show: Boolean(label), formatter: label, position: "insideStartTop", color: color.wrong }),
      });
      const format = (p) => (p.data && p.data.point
        ? lines(p.data.point.number + "  " + p.data.point.label, "speed-up " + p.data.point.speedup, "error " + p.data.point.error_text, p.data.point.why) : "");
      const series = [...whiskers, {
        type: "scatter", z: 5, data: timed.map((p, i) => item(p, Math.min(p.ms, slowest), i)), markLine: limit("error budget " + chart.budget_text),
      }, {
        type: "line", silent: true, symbol: "none", data: [],
        markLine: { silent: true, precision: 20, symbol: "none", data: [{ xAxis: chart.baseline_ms }], lineStyle: { color: color.base, type: "dotted", width: 2 }, label: { show: false } },
      }];
      if (lane) {
        grids.push({ right: 20, width: lane, top: 26, bottom: 62 });
        xs.push(axis({ type: "value", gridIndex: 1, min: 0, max: untimed.length + 1, name: "not timed", nameGap: 42, axisLabel: { show: false }, splitLine: { show: false } }));
        ys.push(axis(Object.assign({}, yRange, { gridIndex: 1, axisLabel: { show: false } })));
        series.push({ type: "scatter", xAxisIndex: 1, yAxisIndex: 1, z: 5, data: untimed.map((p, i) => item(p, i + 1, 0)), markLine: limit("") });
      }
      return {
        height: narrow(element) ? 380 : 440,
        option: frame({
          grid: grids, xAxis: xs, yAxis: ys, series,
          tooltip: Object.assign(frame().tooltip, { trigger: "item", formatter: format }),
        }),
      };
    },

    roofline(element, chart) {
      const hue = hues();
      const [x0, x1] = chart.x;
      const tight = narrow(element);
      const tall = tight ? 380 : 440;
      const grid = { left: 84, right: tight ? 16 : 210, top: 16, bottom: 52 };
      const perDecade = (tall - grid.top - grid.bottom) / Math.log10(chart.y[1] / chart.y[0]);
      let lastLabel = Infinity;
      const roofs = [...chart.roofs].reverse().map((roof, index) => {
        // Labels go downwards from the highest roof; one that would touch its neighbour is pushed down.
        const at = -Math.log10(roof.peak) * perDecade;
        const place = Number.isFinite(lastLabel) ? Math.max(at, lastLabel + 17) : at;
        lastLabel = place;
        return {
          type: "line", silent: true, symbol: "none", z: 1,
          lineStyle: { color: color.base, width: 2, type: ["dotted", "dashed", "solid"][index % 3] },
          data: [[x0, x0 * chart.bandwidth], [roof.ridge, roof.peak], [x1, roof.peak]],
          markPoint: {
            silent: true, symbol: "circle", symbolSize: 1, data: [{ coord: [x1, roof.peak] }],
            label: Object.assign(muted(), {
              show: true, position: tight ? "left" : "right", offset: [tight ? 0 : 6, place - at - (tight ? 9 : 0)],
              formatter: roof.dtype + "  " + roof.text,
            }),
          },
        };
      });
      const seen = [];
      const perDecadeX = (element.clientWidth - grid.left - grid.right) / Math.log10(x1 / x0);
      const dots = chart.points.map((p) => {
        const operator = p.kind === "operator";
        const [x, y] = [Math.log10(p.x) * perDecadeX, Math.log10(p.y) * perDecade];
        const crowded = operator && seen.some(([a, c]) => a - x > -8 && a - x < 110 && Math.abs(c - y) < 16);
        seen.push([x, y]);
        return {
          value: [p.x, p.y], point: p, symbol: symbols[p.kind], symbolSize: p.kind === "chosen" ? 20 : operator ? 9 : 15,
          itemStyle: { color: operator ? color.card : hue[p.kind], borderColor: operator ? hue.operator : color.card, borderWidth: operator ? 2 : 1, opacity: 1 },
          label: Object.assign(operator ? muted() : ink(), {
            show: !(operator && tight), position: crowded ? "left" : "right", formatter: p.label, fontWeight: operator ? 400 : 650,
          }),
        };
      });
      return {
        height: tall,
        option: frame({
          grid,
          xAxis: axis({ type: "log", min: x0, max: x1, name: "work per byte moved (FLOP per byte)", nameGap: 30, axisLabel: Object.assign(muted(), { formatter: round, hideOverlap: true }) }),
          yAxis: axis({ type: "log", min: chart.y[0], max: chart.y[1], axisLabel: Object.assign(muted(), { formatter: (v) => prefixed(v) + "FLOP/s" }) }),
          tooltip: Object.assign(frame().tooltip, { trigger: "item", formatter: (p) => (p.data && p.data.point ? lines(p.data.point.label, p.data.point.text) : "") }),
          series: [...roofs, { type: "scatter", z: 5, data: dots }],
        }),
      };
    },

    layers(element, { names, before, after }) {
      const bar = (name, values, hue) => ({
        name, type: "bar", data: values, itemStyle: { color: hue, borderRadius: 3 }, barMaxWidth: 16, barGap: "15%",
        label: Object.assign(ink(), { show: true, position: "right", formatter: (p) => milliseconds(p.value) }),
      });
      const ticks = narrow(element) ? 2 : 4;
      return {
        height: height(names.length, 46, 40),
        option: frame(Object.assign(horizontal(element, names, { right: 70 }), {
          xAxis: axis({ type: "value", splitNumber: ticks, axisLabel: Object.assign(muted(), { formatter: milliseconds, hideOverlap: true }) }),
          tooltip: Object.assign(frame().tooltip, { formatter: (p) => lines(names[p.dataIndex], "unmodified " + milliseconds(before[p.dataIndex]), "chosen " + milliseconds(after[p.dataIndex])) }),
          series: [bar("unmodified", before, color.base), bar("chosen", after, color.chosen)],
        })),
      };
    },

    memory(element, { rows: all, shown }) {
      const rows = all.slice(0, shown);
      const hue = hues();
      return {
        height: height(rows.length, 34, 14),
        option: frame(Object.assign(horizontal(element, rows.map((r) => r.label), { right: 84, bottom: 6 }), {
          xAxis: axis({ type: "value", show: false }),
          tooltip: Object.assign(frame().tooltip, { formatter: (p) => lines(p.name, "peak memory " + rows[p.dataIndex].text) }),
          series: [{
            type: "bar", barMaxWidth: 18,
            data: rows.map((r) => ({ value: r.bytes, itemStyle: { color: hue[r.kind], borderRadius: 3 } })),
            label: Object.assign(ink(), { show: true, position: "right", formatter: (p) => rows[p.dataIndex].text }),
          }],
        })),
      };
    },

    operators(element, { names, shares }) {
      return {
        height: height(names.length, 30, 12),
        option: frame(Object.assign(horizontal(element, names, { right: 60, bottom: 4 }), {
          xAxis: axis({ type: "value", show: false }),
          tooltip: Object.assign(frame().tooltip, { formatter: (p) => lines(p.name, percent(p.value) + " of the time") }),
          series: [{
            type: "bar", data: shares, barMaxWidth: 18, itemStyle: { color: color.base, borderRadius: 3 },
            label: Object.assign(ink(), { show: true, position: "right", formatter: (p) => percent(p.value) }),
          }],
        })),
      };
    },

    ceilings(element, { rows }) {
      const names = rows.map((r) => r.label);
      return {
        height: height(rows.length, 44, 42),
        option: frame(Object.assign(horizontal(element, names, { right: 112 }), {
          xAxis: axis({ type: "value", min: 0, splitNumber: 4, axisLabel: Object.assign(muted(), { formatter: (v) => v + "x", hideOverlap: true }) }),
          tooltip: Object.assign(frame().tooltip, { formatter: (p) => lines(names[p.dataIndex], "at most " + round(rows[p.dataIndex].bound) + "x predicted", rows[p.dataIndex].text) }),
          series: [
            {
              type: "bar", data: rows.map((r) => r.bound), barWidth: 24, z: 1,
              itemStyle: { color: color.soft, borderColor: color.base, borderType: "dashed", borderWidth: 1, borderRadius: 4 },
              label: Object.assign(muted(), { show: true, position: "right", formatter: (p) => (rows[p.dataIndex].measured ? round(rows[p.dataIndex].measured) + "x of " : "") + "≤ " + round(p.value) + "x" }),
              markLine: { silent: true, precision: 20, symbol: "none", data: [{ xAxis: 1 }], lineStyle: { color: color.base, type: "dotted", width: 2 }, label: { show: false } },
            },
            {
              type: "bar", barWidth: 12, barGap: "-75%", z: 3,
              data: rows.map((r) => ({ value: r.measured, itemStyle: { color: r.kept === false ? color.wrong : color.ok, borderRadius: 3 } })),
            },
          ],
        })),
      };
    },

    samples(element, chart) {
      const tight = narrow(element);
      const top = Math.max(...chart.baseline, ...chart.chosen);
      // Two medians that lie close together would write over each other: the lower one goes below its line.
      const close = Math.abs(chart.baseline_median - chart.chosen_median) < top * 0.08;
      const place = (below) => (close && below ? "insideEndBottom" : close || tight ? "insideEndTop" : "end");
      const line = (name, values, median, hue, symbol, below) => ({
        name, type: "line", data: values, symbol, symbolSize: 5, showAllSymbol: values.length < 120,
        lineStyle: { color: hue, width: 1, opacity: 0.55 }, itemStyle: { color: hue },
        markLine: {
          silent: true, precision: 20, symbol: "none", data: [{ yAxis: median }], lineStyle: { color: hue, type: "dashed", width: 1.5 },
          label: Object.assign(ink(), {
            position: place(below), formatter: "median " + milliseconds(median), color: hue, fontWeight: 600,
          }),
        },
      });
      return {
        height: 320,
        option: frame({
          grid: { left: 70, right: tight || close ? 20 : 140, top: 22, bottom: 46 },
          xAxis: axis({ type: "category", data: chart.baseline.map((_, i) => i + 1), name: "pair, in the order in which they were taken", nameGap: 28, splitLine: { show: false } }),
          yAxis: axis({ type: "value", min: 0, max: top * 1.12, axisLabel: Object.assign(muted(), { formatter: milliseconds, showMaxLabel: false }) }),
          tooltip: Object.assign(frame().tooltip, {
            trigger: "axis",
            formatter: (ps) => lines("pair " + ps[0].axisValue, ...ps.map((p) => p.seriesName + " " + milliseconds(p.value))),
          }),
          series: [
            line("unmodified", chart.baseline, chart.baseline_median, color.base, "rect", chart.baseline_median < chart.chosen_median),
            line(chart.chosen_name, chart.chosen, chart.chosen_median, color.chosen, "circle", chart.baseline_median >= chart.chosen_median),
          ],
        }),
      };
    },
  };

  function draw() {
    readColors();
    for (const element of document.querySelectorAll(".chart[data-chart]")) {
      const name = element.dataset.chart;
      const { option, height: pixels } = build[name](element, data[name]);
      element.style.height = pixels + "px";
      let chart = charts.get(element);
      if (!chart) {
        chart = echarts.init(element, null, { renderer: "svg" });
        charts.set(element, chart);
      }
      chart.resize();
      chart.setOption(option, true);
    }
  }

  const toggle = document.getElementById("theme");
  function name() {
    toggle.textContent = root.dataset.theme === "dark" ? "Light theme" : "Dark theme";
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("kpt-theme", root.dataset.theme); } catch (error) { /* a file page may have no storage */ }
    name();
    draw();
  });

  for (const button of document.querySelectorAll("button[data-copy]")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.textContent = "Copied";
      } catch (error) {
        button.textContent = "Select and copy";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  name();
  draw();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      draw();
    }
  });
  root.dataset.drawn = String(charts.size);
})();
