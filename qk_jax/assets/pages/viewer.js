const form = document.querySelector("form");
const cards = [...document.querySelectorAll("article")];
const told = document.getElementById("told");

function filter() {
  const { source, task, words, bad } = form.elements;
  const wanted = words.value.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    const hit =
      (!source.value || card.dataset.source === source.value) &&
      (!task.value || card.dataset.task === task.value) &&
      (!bad.checked || card.hasAttribute("data-bad")) &&
      (!wanted || card.querySelector(".text")?.textContent.toLowerCase().includes(wanted));
    card.hidden = !hit;
    count += hit;
  }
  told.textContent = `${count} of ${cards.length} shown`;
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));

// j and k go from example to example, / to the words; not while something is typed.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || view.open) return;
  if (event.target.closest("input, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    form.elements.words.focus();
    return;
  }
  const by = { j: 1, k: -1 }[event.key];
  if (!by) return;
  const shown = cards.filter((card) => !card.hidden);
  const here = shown.indexOf(document.activeElement.closest("article"));
  const next = here < 0 ? 0 : Math.min(Math.max(here + by, 0), shown.length - 1);
  shown[next]?.focus();
});

filter();
