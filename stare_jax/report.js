"use strict";
// Readouts under the pointer, videos tied to their timelines, and the copy button. The page reads well without it.

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function element(parent, tag, className) {
  const node = parent.appendChild(document.createElement(tag));
  node.className = className;
  return node;
}

function format(value, rate) {
  if (value === null || value === undefined) return "–";
  if (rate) return (100 * value).toFixed(1) + " %";
  const size = Math.abs(value);
  if (size >= 1e4) return Math.round(value).toLocaleString("en").replaceAll(",", " ");
  return size && size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function readable(figure) {
  const data = JSON.parse(figure.dataset.chart), area = figure.querySelector(".area");
  const first = data.x[0], span = data.x[data.x.length - 1] - first || 1;
  let rule = null, tip = null;
  const hide = () => { rule?.remove(); tip?.remove(); rule = tip = null; };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const i = nearest(data.x, first + clamp((event.clientX - box.left) / box.width, 0, 1) * span);
    rule ??= element(area, "div", "rule");
    tip ??= element(area, "div", "tip");
    const left = (data.x[i] - first) / span;
    rule.style.left = tip.style.left = 100 * left + "%";
    tip.className = left > 0.5 ? "tip left" : "tip";
    tip.replaceChildren(data.xn + " " + format(data.x[i]));
    data.n.forEach((name, s) => {
      const line = element(tip, "div", "");
      element(line, "i", "").style.background = data.c[s];
      line.append((data.n.length > 1 ? name + " " : "") + format(data.y[s][i], data.rate));
    });
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("pointercancel", hide);
}

function playable(article, visible) {
  const data = JSON.parse(article.dataset.episode), video = article.querySelector("video");
  const line = article.querySelector(".timeline"), cursor = article.querySelector(".cursor");
  const band = article.querySelector(".band"), readout = article.querySelector(".readout");
  const button = article.querySelector(".play");

  const show = (step) => {  // step may be fractional: the cursor glides, the words follow whole steps
    const t = clamp(Math.floor(step + 1e-6), 0, data.steps), on = Math.min(t, data.steps - 1);
    cursor.style.left = band.offsetLeft + band.offsetWidth * clamp(step / data.steps, 0, 1) + "px";
    const phi = data.phi[t] === null ? "" : " · Φ " + data.phi[t].toFixed(2);
    readout.textContent = "step " + t + " of " + data.steps + " · " + data.stages[data.stage[on]] + phi;
    line.setAttribute("aria-valuenow", t);
    line.setAttribute("aria-valuetext", readout.textContent);
  };
  let at = 0;
  const seek = (step) => {
    at = clamp(step, 0, data.steps);
    // The middle of the frame's time: players differ in which side of a boundary they show.
    if (video) video.currentTime = Math.min((Math.floor(at) + 0.5) / data.fps, (data.steps - 0.5) / data.fps);
    show(at);
  };

  let dragging = false;
  const toStep = (event) => {
    const box = band.getBoundingClientRect();
    return clamp((event.clientX - box.left) / box.width, 0, 1) * data.steps;
  };
  line.addEventListener("pointerdown", (event) => {
    dragging = true;
    article.dataset.held = "1";
    video?.pause();
    line.setPointerCapture(event.pointerId);
    seek(toStep(event));
  });
  line.addEventListener("pointermove", (event) => dragging && seek(toStep(event)));
  for (const name of ["pointerup", "pointercancel"]) line.addEventListener(name, () => { dragging = false; });
  line.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: data.steps }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    article.dataset.held = "1";
    video?.pause();
    seek(Math.floor(step));
  });
  addEventListener("resize", () => show(at));
  show(0);
  if (!video) return;

  const base64 = video.src.slice(video.src.indexOf(",") + 1);  // as a blob it can be sought in every browser
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  const follow = () => {
    if (video.paused) return;
    at = video.currentTime * data.fps;
    show(at);
    requestAnimationFrame(follow);
  };
  const label = () => {
    button.textContent = video.paused ? "▶" : "❚❚";
    button.setAttribute("aria-label", video.paused ? "Play" : "Pause");
  };
  video.addEventListener("play", () => { label(); follow(); });
  video.addEventListener("pause", label);
  const toggle = () => {
    article.dataset.held = "1";  // from now on the reader decides, not the scrolling
    if (video.paused) video.play(); else video.pause();
  };
  button.addEventListener("click", toggle);
  video.addEventListener("click", toggle);
  visible?.observe(article);
}

document.querySelectorAll("[data-chart]").forEach(readable);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const visible = still || !("IntersectionObserver" in window) ? null : new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const video = target.querySelector("video");
    if (!isIntersecting) video.pause();
    else if (!target.dataset.held) video.play().catch(() => {});
  }
}, { threshold: 0.6 });
document.querySelectorAll("[data-episode]").forEach((article) => playable(article, visible));
document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
  const text = button.parentElement.querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {  // no clipboard on a page opened from a file in some browsers: select it instead
    getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
}));
