// The threshold slider and the gallery's filters; without this script the page shows the same as tables.
"use strict";
(() => {
  const data = document.getElementById("sweep-data");
  const slider = document.getElementById("threshold");
  if (data && slider) {
    const sweep = JSON.parse(data.textContent);
    const mark = document.getElementById("threshold-mark");
    const show = () => {
      const place = Number(slider.value);
      const threshold = sweep.thresholds[place];
      document.getElementById("threshold-value").textContent = threshold.toFixed(2);
      slider.setAttribute("aria-valuetext", `threshold ${threshold.toFixed(2)}`);
      for (const row of document.querySelectorAll("#sweep-now tbody tr")) {
        const point = sweep.points[row.dataset.source][place];
        const cells = row.querySelectorAll("td");
        cells[0].textContent = point.kept.toLocaleString("en");
        cells[1].textContent = point.texts ? `${((100 * point.kept) / point.texts).toFixed(1)} %` : "–";
        cells[2].textContent = point.noise
          ? `${point.noise[0].toFixed(3)} (${point.noise[1].toFixed(3)} to ${point.noise[2].toFixed(3)})`
          : "–";
      }
      const x = sweep.left + (sweep.right - sweep.left) * threshold;
      mark.setAttribute("x1", x);
      mark.setAttribute("x2", x);
    };
    slider.addEventListener("input", show);
    show();
  }
  const form = document.getElementById("gallery-filter");
  if (form) {
    form.hidden = false;
    const narrow = () => {
      const wanted = Object.fromEntries(new FormData(form));
      let shown = 0;
      for (const group of document.querySelectorAll("[data-group]")) {
        let here = 0;
        for (const card of group.querySelectorAll("li[data-source]")) {
          const itm = card.dataset.itm === "" ? null : Number(card.dataset.itm);
          const fits =
            (!wanted.source || card.dataset.source === wanted.source) &&
            (!wanted.fate || card.dataset.fate === wanted.fate) &&
            (itm === null || (itm >= Number(wanted.low || 0) && itm <= Number(wanted.high || 1)));
          card.hidden = !fits;
          here += fits;
        }
        group.hidden = here === 0 || (wanted.group && wanted.group !== group.dataset.group);
        shown += group.hidden ? 0 : here;
      }
      document.getElementById("gallery-count").textContent = `${shown} pictures`;
    };
    form.addEventListener("input", narrow);
    form.addEventListener("submit", (event) => event.preventDefault());
    narrow();
  }
})();
