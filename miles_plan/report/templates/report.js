// Tooltips that appear at once, a crosshair on curves, and open details when printing. The page is complete without it.
(() => {
  const tip = document.getElementById("tip");

  const place = (event) => {
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
    const below = event.clientY + 18;
    const y = below + box.height > window.innerHeight ? event.clientY - box.height - 12 : below;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, y)}px`;
  };
  const show = (words, event) => {
    tip.textContent = words;
    tip.hidden = false;
    place(event);
  };
  const hide = () => { tip.hidden = true; };

  // A <title> is what shows without a script; with one, its words move to our own tooltip.
  for (const title of document.querySelectorAll("svg title")) {
    const owner = title.parentElement;
    owner.dataset.tip = title.textContent;
    owner.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const owner = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    if (owner) show(owner.dataset.tip, event);
    else if (!(event.target instanceof Element && event.target.closest(".curve-box"))) hide();
  });
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, { passive: true, capture: true });

  const draw = (name, attributes) => {
    const made = document.createElementNS(document.querySelector("svg").namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  for (const box of document.querySelectorAll(".curve-box")) {
    const svg = box.querySelector("svg");
    const points = JSON.parse(box.dataset.curve);
    if (!points.length) continue;
    const rule = draw("line", { y1: 14, y2: 176, class: "crosshair", visibility: "hidden" });
    const dot = draw("circle", { r: 4, class: "dot", visibility: "hidden" });
    svg.append(rule, dot);
    const still = () => {
      rule.setAttribute("visibility", "hidden");
      dot.setAttribute("visibility", "hidden");
      hide();
    };
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const at = (event.clientX - frame.left) * svg.viewBox.baseVal.width / frame.width;
      let nearest = points[0];
      for (const point of points) if (Math.abs(point[0] - at) < Math.abs(nearest[0] - at)) nearest = point;
      for (const key of ["x1", "x2"]) rule.setAttribute(key, nearest[0]);
      dot.setAttribute("cx", nearest[0]);
      dot.setAttribute("cy", nearest[1]);
      rule.setAttribute("visibility", "visible");
      dot.setAttribute("visibility", "visible");
      show(nearest[2], event);
    });
    svg.addEventListener("pointerleave", still);
  }

  // Paper has no folds: open what is folded, and fold it again afterwards.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const each of opened) each.open = false;
  });
})();
