"use strict";
// Runs before the first paint, so that the page never flashes in the wrong theme.
(function () {
  const asked = new URLSearchParams(location.search).get("theme");
  let stored = null;
  try { stored = localStorage.getItem("kpt-theme"); } catch (error) { stored = null; }
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const known = [asked, stored, system].find((name) => name === "dark" || name === "light");
  document.documentElement.dataset.theme = known;
})();
