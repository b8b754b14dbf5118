"use strict";
// Shows the values of a plot at the recorded step that is nearest to the one pointed at, or chosen with the arrow keys. Without this script a plot shows its last values.
const plots = JSON.parse(document.getElementById("data").textContent);

function text(value, unit) {
  if (value === null) return "–";
  if (unit === "%") return `${(100 * value).toFixed(1)} %`;
  if (Math.abs(value) >= 1e12) return value.toExponential(3);
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

// Index of the entry of an ascending list that is nearest to `step`.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

for (const figure of document.querySelectorAll(".plot")) {
  const plot = plots[Number(figure.dataset.plot)];
  const [first, last] = plot.limits;
  const image = figure.querySelector(".image");
  const cursor = figure.querySelector(".cursor");
  const at = figure.querySelector(".at");
  const shown = [...figure.querySelectorAll(".legend b")];
  const lastValues = shown.map((each) => each.textContent);
  const reach = (last - first) / 50;
  let place = null;

  const show = (step) => {
    place = Math.min(Math.max(step, first), last);
    // of each curve the index of its point that is nearest to the place, null where the curve has not begun or has ended
    const points = plot.series.map(({ steps }) =>
      place >= steps[0] - reach && place <= steps[steps.length - 1] + reach ? nearest(steps, place) : null);
    const near = points.flatMap((point, i) => (point === null ? [] : [plot.series[i].steps[point]])).sort((a, b) => a - b);
    const shownStep = near.length ? near[nearest(near, place)] : Math.round(place);
    const share = plot.left + ((plot.right - plot.left) * (shownStep - first)) / (last - first);
    cursor.style.left = `${100 * share}%`;
    cursor.hidden = false;
    const marks = plot.marks.filter((mark) => Math.abs(mark[0] - place) <= reach / 2).map((mark) => `${mark[1]} at ${mark[0].toLocaleString("en-US")}`);
    at.textContent = [`step ${shownStep.toLocaleString("en-US")}`, ...new Set(marks)].join(" · ");
    plot.series.forEach(({ steps, values }, i) => {
      const point = points[i];
      const own = point === null || steps[point] === shownStep ? "" : ` at ${steps[point].toLocaleString("en-US")}`;
      shown[i].textContent = point === null ? "–" : text(values[point], plot.unit) + own;
    });
  };
  const reset = () => {
    place = null;
    cursor.hidden = true;
    at.textContent = "last values";
    shown.forEach((each, i) => { each.textContent = lastValues[i]; });
  };

  image.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    show(first + ((last - first) * (share - plot.left)) / (plot.right - plot.left));
  });
  image.addEventListener("pointerleave", reset);
  image.addEventListener("blur", reset);
  image.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") reset();
    if (direction === undefined) return;
    event.preventDefault();
    show((place === null ? last : place) + (direction * (last - first)) / 100);
  });
}
