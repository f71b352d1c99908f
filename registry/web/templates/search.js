"use strict";
(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const rows = [...document.querySelectorAll("tr[data-search]")];
  const texts = rows.map((row) => row.dataset.search);
  const told = document.getElementById("found");
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      const hit = words.every((word) => texts[index].includes(word));
      row.hidden = !hit;
      count += hit;
    });
    told.textContent = words.length ? `${count} of ${rows.length}` : "";
  };
  box.closest("[hidden]")?.removeAttribute("hidden");
  box.addEventListener("input", filter);
  box.form?.addEventListener("submit", (event) => {
    if (box.form.dataset.whole) event.preventDefault();
  });
  addEventListener("pageshow", filter);
  filter();
})();
