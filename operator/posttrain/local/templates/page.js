(() => {
  const round = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };
  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= step) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
  };
  const charts = [...document.querySelectorAll(".chart")].map((figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg");
    const cursor = figure.querySelector(".cursor");
    const readout = figure.querySelector(".readout");
    return {
      svg, data,
      stepAt(event) {
        const box = svg.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width * data.width;
        const share = (x - data.left) / (data.right - data.left);
        return data.min + Math.min(Math.max(share, 0), 1) * (data.max - data.min);
      },
      show(step) {
        const found = data.lines.map(([name, points]) => [name, nearest(points, step)]);
        const at = found.reduce((a, b) => Math.abs(a[1][0] - step) <= Math.abs(b[1][0] - step) ? a : b)[1][0];
        const x = data.left + (at - data.min) / (data.max - data.min) * (data.right - data.left);
        cursor.setAttribute("x1", x);
        cursor.setAttribute("x2", x);
        cursor.style.visibility = "visible";
        readout.textContent = `step ${at}  ·  ` + found.map(([name, point]) =>
          (found.length > 1 ? `${name} ` : "") + round(point[1]) + (point[0] === at ? "" : ` (step ${point[0]})`)
        ).join("  ·  ");
      },
      hide() {
        cursor.style.visibility = "hidden";
        readout.textContent = "";
      },
    };
  });
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => {
      const step = chart.stepAt(event);
      for (const other of charts) other.show(step);
    });
    chart.svg.addEventListener("pointerleave", () => { for (const other of charts) other.hide(); });
  }
})();
