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

  // Tooltips are built from text nodes: names and reasons come from users and are never markup.
  function lines(...texts) {
    const box = document.createElement("div");
    box.style.cssText = "max-width:380px;white-space:normal;overflow-wrap:anywhere";
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
  function percent(value) {
    const text = (Math.abs(value) >= 10 ? value.toFixed(0) : String(Number(value.toFixed(1)))).replace("-", "−");
    return (value > 0 ? "+" : "") + text + " %";
  }

  const muted = () => ({ color: color.muted, fontFamily: color.font, fontSize: 13 });
  const ink = () => ({ color: color.ink, fontFamily: color.font, fontSize: 13 });
  const looks = () => ({
    PASS: { symbol: "circle", symbolSize: 9, fill: color.ok },
    FAIL: { symbol: "triangle", symbolSize: 13, fill: color.wrong },
    WRONG: { symbol: "diamond", symbolSize: 14, fill: color.failed },
    STALE: { symbol: "rect", symbolSize: 10, fill: color.slow },
    INCONCLUSIVE: { symbol: "circle", symbolSize: 9, fill: color.card, border: color.base },
  });

  // Most runs decide the range; one wild interval must not flatten all the others.
  function changeRange(points, allowed) {
    const values = points.map((p) => p.change).filter((v) => v !== null);
    const least = Math.min(0, ...values), most = Math.max(allowed, ...values);
    const room = Math.max((most - least) * 0.25, 1);
    const low = Math.min(least, ...points.map((p) => (p.low === null ? 0 : Math.max(p.low, least - room))));
    const high = Math.max(most, ...points.map((p) => (p.high === null ? 0 : Math.min(p.high, most + room))));
    const pad = (high - low) * 0.08;
    return [low - pad, high + pad];
  }
  function timeRange(points) {
    const values = points.flatMap((p) => [p.head, p.base]).filter((v) => v !== null);
    const least = Math.min(...values), most = Math.max(...values);
    const pad = Math.max((most - least) * 0.12, most * 0.02);
    return [Math.max(0, least - pad), most + pad];
  }
  function steps([low, high], count) {
    const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= raw);
    return { min: Math.floor(low / step) * step, max: Math.ceil(high / step) * step, interval: step };
  }

  function option(element, chart) {
    const { points, shifts } = chart;
    const look = looks();
    const tight = element.clientWidth < 560;
    const many = points.length > 80;
    const grid = { left: 66, right: tight ? 14 : 64 };
    const yTime = steps(timeRange(points), 4);
    const yChange = steps(changeRange(points, chart.allowed), 4);
    const cut = (v) => Math.min(yChange.max, Math.max(yChange.min, v));
    const xs = points.map((_, index) => index);
    const oneDay = points[0].when.slice(0, 10) === points[points.length - 1].when.slice(0, 10);
    const label = (index) => (oneDay && points.length > 1 ? points[index].when.slice(11) : points[index].when.slice(0, 10));
    const hue = (shift) => (shift.slower ? color.wrong : color.ok);
    // Labels of change points that lie close together would write over each other: the second of two stands higher.
    const close = (Math.min(points.length, 80) * 60) / Math.max(1, element.clientWidth - 130);
    function heights(all) {
      let last = -Infinity, raised = false;
      return all.map((s) => {
        raised = s.at - last < close && !raised;
        last = s.at;
        return raised ? 17 : 3;
      });
    }
    const verticals = (metric, all = shifts.filter((s) => s.metric === metric), up = heights(all)) => ({
      silent: true, symbol: "none", animation: false,
      data: all.map((s, i) => ({
        xAxis: s.at, lineStyle: { color: hue(s), type: "dashed", width: 1.5 },
        label: Object.assign(ink(), { show: true, formatter: s.label, position: "end", distance: up[i], color: hue(s), fontWeight: 650, fontSize: 12 }),
      })),
    });
    const axis = (extra) => Object.assign({
      axisLine: { lineStyle: { color: color.line } }, axisTick: { show: false }, axisLabel: Object.assign({ hideOverlap: true }, muted()),
      splitLine: { lineStyle: { color: color.line } }, nameTextStyle: muted(), nameLocation: "middle",
    }, extra);
    const category = (index, labels) => axis({
      type: "category", gridIndex: index, data: xs, boundaryGap: true, splitLine: { show: false },
      axisLine: { onZero: false, lineStyle: { color: color.line } },
      axisLabel: Object.assign(muted(), { show: labels, hideOverlap: true, formatter: (i) => label(Number(i)) }),
    });
    const line = (name, key, hue, extra) => Object.assign({
      name, type: "line", data: points.map((p) => p[key]), connectNulls: false, symbol: "circle", symbolSize: many ? 4 : 6, showAllSymbol: !many || "auto",
      lineStyle: { color: hue, width: 1.5 }, itemStyle: { color: hue },
    }, extra);
    const untimed = points.some((p) => p.change === null);
    const top = 34, upper = tight ? 120 : 150, gap = 64, lower = tight ? 120 : 150, zoom = many ? 44 : 0;
    return {
      height: top + upper + gap + lower + 34 + zoom,
      option: {
        animation: false, textStyle: ink(), backgroundColor: "transparent",
        title: [
          { text: "Time of one call or step", top: 3, left: 0, padding: 0, textStyle: Object.assign(muted(), { fontWeight: 600 }) },
          { text: "Change, head against base" + (untimed && !tight ? " (marks at the bottom: not timed)" : ""), top: top + upper + 20, left: 0, padding: 0, textStyle: Object.assign(muted(), { fontWeight: 600 }) },
        ],
        grid: [Object.assign({ top, height: upper }, grid), Object.assign({ top: top + upper + gap, height: lower }, grid)],
        xAxis: [category(0, false), category(1, true)],
        yAxis: [
          axis(Object.assign({ type: "value", gridIndex: 0, axisLabel: Object.assign(muted(), { formatter: milliseconds, hideOverlap: true }) }, yTime)),
          axis(Object.assign({ type: "value", gridIndex: 1, axisLabel: Object.assign(muted(), { formatter: percent, hideOverlap: true }) }, yChange)),
        ],
        axisPointer: { link: [{ xAxisIndex: "all" }], lineStyle: { color: color.muted }, label: { show: false } },
        dataZoom: many ? [
          { type: "inside", xAxisIndex: [0, 1], startValue: points.length - 80, endValue: points.length - 1, zoomOnMouseWheel: "ctrl" },
          {
            type: "slider", xAxisIndex: [0, 1], height: 20, bottom: 8, left: grid.left, right: grid.right, borderColor: color.line, backgroundColor: color.soft,
            fillerColor: color.base + "33", handleStyle: { color: color.card, borderColor: color.base }, moveHandleSize: 0, textStyle: muted(), labelFormatter: (i) => label(Math.max(0, Math.min(points.length - 1, Math.round(i)))),
            dataBackground: { lineStyle: { color: color.base }, areaStyle: { color: color.base, opacity: 0.2 } },
            selectedDataBackground: { lineStyle: { color: color.chosen }, areaStyle: { color: color.chosen, opacity: 0.2 } },
          },
        ] : [],
        tooltip: {
          trigger: "axis", confine: true, backgroundColor: color.card, borderColor: color.line, textStyle: ink(), extraCssText: "box-shadow:0 4px 20px #0003",
          formatter: (shown) => {
            const p = points[shown[0].dataIndex];
            const here = shifts.filter((s) => s.at === shown[0].dataIndex).map((s) => "change point: " + s.text);
            return lines(
              p.when + "  " + p.verdict,
              p.head === null ? "" : "head " + milliseconds(p.head) + (p.base === null ? "" : ", base " + milliseconds(p.base)),
              "change " + p.change_text, p.reason, ...here,
              p.revision ? "revision " + p.revision : "", chart.software[p.software], "run " + p.id.slice(0, 10),
            );
          },
        },
        series: [
          line("base", "base", color.base, { symbol: many ? "none" : "rect", symbolSize: 5, lineStyle: { color: color.base, width: 1.5, opacity: 0.7 }, z: 2 }),
          line("head", "head", color.chosen, { z: 3, markLine: verticals("ms") }),
          {
            name: "level", type: "line", data: chart.levels, symbol: "none", step: "middle", silent: true, z: 2, connectNulls: false,
            lineStyle: { color: color.ink, width: 2 },
          },
          {
            name: "low", type: "bar", stack: "interval", stackStrategy: "all", xAxisIndex: 1, yAxisIndex: 1, silent: true, barWidth: 3,
            data: points.map((p) => (p.low === null ? null : cut(p.low))), itemStyle: { color: "transparent" },
          },
          {
            name: "interval", type: "bar", stack: "interval", stackStrategy: "all", xAxisIndex: 1, yAxisIndex: 1, silent: true, barWidth: 3,
            data: points.map((p) => (p.low === null ? null : { value: cut(p.high) - cut(p.low), itemStyle: { color: (look[p.verdict].border || look[p.verdict].fill), opacity: 0.45, borderRadius: 1.5 } })),
          },
          {
            name: "change", type: "line", xAxisIndex: 1, yAxisIndex: 1, z: 5, showAllSymbol: true, lineStyle: { width: 0 }, emphasis: { scale: 1.3 },
            data: points.map((p) => ({
              value: p.change === null ? yChange.min : cut(p.change), symbol: look[p.verdict].symbol, symbolSize: look[p.verdict].symbolSize * (many ? 0.8 : 1),
              itemStyle: { color: look[p.verdict].fill, borderColor: look[p.verdict].border || color.card, borderWidth: look[p.verdict].border ? 2 : 1, opacity: 1 },
            })),
            markLine: verticals("change"),
          },
          {
            name: "limits", type: "line", xAxisIndex: 1, yAxisIndex: 1, data: [], silent: true,
            markLine: {
              silent: true, symbol: "none", precision: 6,
              data: [
                { yAxis: 0, lineStyle: { color: color.base, type: "solid", width: 1 }, label: { show: false } },
                {
                  yAxis: chart.allowed, lineStyle: { color: color.wrong, type: "dashed", width: 1.5 },
                  label: Object.assign(ink(), { formatter: (tight ? "allowed " : "allowed\n") + percent(chart.allowed), position: tight ? "insideStartTop" : "end", lineHeight: 15, color: color.wrong, fontSize: 12 }),
                },
              ],
            },
          },
        ],
      },
    };
  }

  function draw() {
    readColors();
    for (const element of document.querySelectorAll(".chart[data-chart]")) {
      const { option: wanted, height } = option(element, data[element.dataset.chart]);
      element.style.height = height + "px";
      let chart = charts.get(element);
      if (!chart) {
        chart = echarts.init(element, null, { renderer: "svg" });
        charts.set(element, chart);
      }
      chart.resize();
      chart.setOption(wanted, true);
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
