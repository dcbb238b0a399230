"use strict";
// Tables of several rows are sorted by their headings; of a table of several bodies, the bodies are what is sorted.
for (const table of document.querySelectorAll("table")) {
  const bodies = [...table.tBodies];
  const parts = bodies.length > 1 ? bodies : [...bodies[0].rows];
  if (parts.length < 2) continue;
  const text = (part, column) => {
    const cell = (part.rows ? part.rows[0] : part).cells[column];
    const strong = cell.querySelector("b");
    if (strong) return strong.textContent.trim();
    const plain = cell.cloneNode(true);
    plain.querySelectorAll("small").forEach((one) => one.remove());
    return plain.textContent.trim();
  };
  const number = (said) => {
    const found = said.replaceAll("\u2212", "-").replaceAll(",", "").match(/-?\d+(\.\d+)?/);
    return found ? Number(found[0]) : NaN;
  };
  const headings = [...table.tHead.rows[0].cells];
  table.classList.add("sortable");
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    heading.querySelectorAll("br").forEach((one) => one.before(" "));
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const byName = column === 0 || parts.every((part) => isNaN(number(text(part, column))));
      const sign = down ? -1 : 1;
      const order = (a, b) => {
        if (byName) return sign * text(a, column).localeCompare(text(b, column), "en", { numeric: true });
        const [x, y] = [number(text(a, column)), number(text(b, column))];
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
      };
      for (const part of [...parts].sort(order)) part.parentNode.append(part);
    });
  });
}
// An image is enlarged by a click or by Enter; the arrows go on to the next, Escape closes.
const images = [...document.querySelectorAll("figure img")];
if (images.length) {
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", "enlarged image");
  dialog.innerHTML =
    '<img alt=""><p aria-live="polite"></p><div><button type="button">\u2190 previous</button> ' +
    '<button type="button">next \u2192</button> <button type="button">close</button></div>';
  document.body.append(dialog);
  const [large, words] = [dialog.querySelector("img"), dialog.querySelector("p")];
  const [previous, next, close] = dialog.querySelectorAll("button");
  let shown = 0;
  const show = (index) => {
    shown = (index + images.length) % images.length;
    large.src = images[shown].src;
    large.alt = images[shown].alt;
    large.className = images[shown].className;
    words.textContent = images[shown].alt;
  };
  images.forEach((image, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    button.title = "enlarge";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      show(index);
      dialog.showModal();
      close.focus();
    });
  });
  previous.addEventListener("click", () => show(shown - 1));
  next.addEventListener("click", () => show(shown + 1));
  close.addEventListener("click", () => dialog.close());
  large.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(shown - 1);
    if (event.key === "ArrowRight") show(shown + 1);
  });
  dialog.addEventListener("close", () => images[shown].parentNode.focus());
}
// On paper nothing can be opened.
const closed = [...document.querySelectorAll("details:not([open])")];
addEventListener("beforeprint", () => closed.forEach((one) => (one.open = true)));
addEventListener("afterprint", () => closed.forEach((one) => (one.open = false)));
