"use strict";
const view = document.querySelector("dialog");
document.querySelector("main").addEventListener("click", (event) => {
  const picture = event.target.closest("button")?.querySelector("img");
  if (!picture) return;
  const large = view.querySelector("img");
  large.src = picture.src;
  large.alt = picture.alt;
  large.className = picture.className;
  view.querySelector("span").textContent = picture.alt;
  view.showModal();
});
view.addEventListener("click", (event) => event.target === view && view.close());

